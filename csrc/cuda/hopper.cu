#include "hopper.h"

namespace moe::cuda::hopper {
#ifndef MOE_FIBERS
namespace {

// The driver's function, found through the runtime: the extension does not link against the driver.
auto encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    MOE_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    MOE_CHECK(result == cudaDriverEntryPointSuccess && function, "driver: no cuTensorMapEncodeTiled, expected CUDA 12");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

}  // namespace

TensorMap tensor_map(Dtype dtype, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[4],
                     const int (&box)[4]) {
  const auto type = dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint64_t extent[4], bytes[3];
  cuuint32_t boxes[4], steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) extent[i] = cuuint64_t(sizes[i]), boxes[i] = cuuint32_t(box[i]);
  for (int i = 0; i < 3; ++i) bytes[i] = cuuint64_t(strides[i + 1] * dtype_bytes(dtype));
  TensorMap map;
  const CUresult code =
      encoder()(&map, type, 4, const_cast<void*>(data), extent, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  MOE_CHECK(code == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int(code), " for a tensor of ", sizes[3], " x ",
            sizes[2], " x ", sizes[1], " x ", sizes[0]);
  return map;
}
#endif
}  // namespace moe::cuda::hopper
