// The table of kernels: every product in every dtype that an engine multiplies. No other kernel is compiled.
#pragma once
#include "device.h"
#include "experts.h"
#include "products.h"

#define MOE_PRODUCTS(MACRO, T)                 \
  MACRO(Up<T MOE_COMMA false>)                 \
  MACRO(Up<T MOE_COMMA true>)                  \
  MACRO(RowsTimes<T MOE_COMMA Summed::kInner>) \
  MACRO(RowsTimes<T MOE_COMMA Summed::kOuter>) \
  MACRO(Dact<T MOE_COMMA false>)               \
  MACRO(Dact<T MOE_COMMA true>)                \
  MACRO(Dweight<T MOE_COMMA Gathered::kA>)     \
  MACRO(Dweight<T MOE_COMMA Gathered::kB>)
#define MOE_COMMA ,

namespace moe::cuda {

// Block of the result that a thread block works on. `n` counts columns of both halves where a product has two.
struct Tiling {
  int m, n;
  int part;  // columns that are summed up row by row before they reach memory
};

struct Launch {
  Device device;
  Tiling tiling;
  int tiles;  // at most so many, whatever the routing
  int64_t rows;  // routed ones
  cudaStream_t stream;
};

namespace simt {  // fp32 in IEEE arithmetic; bf16 and fp16 on GPUs before sm_80
constexpr Tiling kTiling{128, 64, 64};
template <class Product>
void run(const Product&, const Launch&);
}  // namespace simt

namespace sm80 {  // mma.sync: bf16, fp16, and fp32 as TF32
constexpr Tiling kTiling{128, 128, 64};
template <class Product>
void run(const Product&, const Launch&);
}  // namespace sm80

namespace sm90 {  // wgmma and TMA: bf16 and fp16
constexpr Tiling kPingPong{128, 128, 128}, kMiddle{128, 192, 192}, kWide{128, 256, 256};
template <class Product>
void run(const Product&, const Launch&);
}  // namespace sm90

}  // namespace moe::cuda
