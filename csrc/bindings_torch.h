// Tensors of torch as arguments of bindings, read through the table of C functions that DLPack has for that
// (torch.Tensor.__dlpack_c_exchange_api__): some 0.1 us each where a view made in Python takes 3, and no header of
// torch. The structures are those of DLPack 1, https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/tensor.h"

namespace moe::dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeAPI {
  Version version;
  void* older;
  void* allocate;
  void* from_object_managed;
  void* to_object;
  int (*from_object)(void* object, DLTensor* out);  // what it fills in stays the object's
  void* current_stream;
};

struct Torch {
  pybind11::object tensor_type;
  const ExchangeAPI* api;
};

// torch's table, read once.
inline const Torch& torch() {
  namespace py = pybind11;
  static const Torch* const found = [] {
    const py::object type = py::module_::import("torch").attr("Tensor");
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    const void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!pointer) throw py::error_already_set();
    const auto* api = static_cast<const ExchangeAPI*>(pointer);
    MOE_CHECK(api->version.major == 1 && api->from_object, "torch: DLPack ", api->version.major, ", expected 1");
    return new Torch{type, api};  // never freed: the interpreter may be gone before static objects are
  }();
  return *found;
}

inline Dtype dtype_of(const DataType& dtype, pybind11::handle object) {
  constexpr uint8_t kInt = 0, kFloat = 2, kBFloat = 4, kBool = 6;
  if (dtype.lanes == 1) {
    if (dtype.code == kFloat && dtype.bits == 32) return Dtype::kFloat32;
    if (dtype.code == kBFloat && dtype.bits == 16) return Dtype::kBFloat16;
    if (dtype.code == kFloat && dtype.bits == 16) return Dtype::kFloat16;
    if (dtype.code == kInt && dtype.bits == 32) return Dtype::kInt32;
    if (dtype.code == kBool && dtype.bits == 8) return Dtype::kBool;
  }
  throw pybind11::type_error("tensor: got " + std::string(pybind11::str(object.attr("dtype"))) +
                             ", expected one of torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool");
}

// How far memory may be read from a tensor's first element on: its own elements where they are contiguous, else what is
// left of its storage, in which slices may overlap.
inline int64_t readable_bytes(const Tensor& t, pybind11::handle object) {
  int64_t count = 1;
  bool contiguous = true;
  for (size_t d = t.sizes.size(); d-- > 0; count *= t.sizes[d]) contiguous &= t.sizes[d] == 1 || t.strides[d] == count;
  const int64_t size = dtype_bytes(t.dtype);
  if (contiguous || count == 0) return count * size;
  const auto storage = object.attr("untyped_storage")().attr("nbytes")().cast<int64_t>();
  return storage - object.attr("storage_offset")().cast<int64_t>() * size;
}

inline bool is_tensor(pybind11::handle object) {
  const auto* type = reinterpret_cast<PyTypeObject*>(torch().tensor_type.ptr());
  return object && PyType_IsSubtype(Py_TYPE(object.ptr()), const_cast<PyTypeObject*>(type));
}

inline DLTensor read(pybind11::handle object) {
  DLTensor seen{};
  if (torch().api->from_object(object.ptr(), &seen) != 0) throw pybind11::error_already_set();
  return seen;
}

inline void* address_of(const DLTensor& seen) { return static_cast<char*>(seen.data) + seen.byte_offset; }

inline Tensor tensor_of(pybind11::handle object) {
  const DLTensor seen = read(object);
  Tensor t{address_of(seen),
           dtype_of(seen.dtype, object),
           {seen.shape, seen.shape + seen.ndim},
           {seen.strides, seen.strides + seen.ndim},
           0};
  t.nbytes = readable_bytes(t, object);
  return t;
}

}  // namespace moe::dlpack

namespace pybind11::detail {

// The argument's tensor lives for as long as the call, so what is launched in it finds its memory.
template <>
struct type_caster<moe::Tensor> {
  PYBIND11_TYPE_CASTER(moe::Tensor, const_name("torch.Tensor"));
  bool load(handle object, bool) {
    if (!moe::dlpack::is_tensor(object)) return false;
    value = moe::dlpack::tensor_of(object);
    return true;
  }
};

}  // namespace pybind11::detail
