// A view of caller-owned memory that knows how far it may be read.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "dtype.h"
#include "error.h"

namespace moe {

struct Tensor {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // in elements
  int64_t nbytes = 0;            // readable bytes from data on

  // Check dtype and sizes (-1 = any), row-major contiguity, and that the buffer holds every element.
  void expect(const char* name, Dtype want, const std::vector<int64_t>& want_sizes) const {
    MOE_CHECK(dtype == want, name, ": dtype tag ", int(dtype), ", expected ", int(want));
    MOE_CHECK(sizes.size() == want_sizes.size() && strides.size() == sizes.size(), name, ": ", sizes.size(),
              " dimensions, expected ", want_sizes.size());
    int64_t total = 1, expected_stride = 1;
    for (size_t d = 0; d < sizes.size(); ++d) {
      MOE_CHECK(sizes[d] >= 0 && (want_sizes[d] < 0 || sizes[d] == want_sizes[d]), name, ": size ", sizes[d],
                " in dimension ", d, ", expected ", want_sizes[d]);
      total *= sizes[d];
    }
    for (size_t d = sizes.size(); d-- > 0; expected_stride *= sizes[d])
      MOE_CHECK(total == 0 || sizes[d] == 1 || strides[d] == expected_stride, name, ": stride ", strides[d],
                " in dimension ", d, ", expected ", expected_stride, " (contiguous)");
    MOE_CHECK(total * dtype_bytes(dtype) <= nbytes, name, ": buffer of ", nbytes, " bytes, expected at least ",
              total * dtype_bytes(dtype));
    MOE_CHECK(total == 0 || data != nullptr, name, ": null pointer");
  }

  bool present() const { return !sizes.empty(); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace moe
