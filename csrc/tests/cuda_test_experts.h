// The experts with weights wherever they lie: the bits that the same weights give stacked, with every engine.
#pragma once
#include "../cuda/dispatch.h"
#include "../cuda/experts.h"
#include "cuda_test.h"

namespace {

// Matrices in shuffled order at multiples of `step` elements of one buffer, NaN between them.
struct Scattered {
  Ints numbers;
  int64_t step, count = 0;
  Buffer memory;
  Scattered(const Buffer& stacked, int64_t matrices, int64_t step_)
      : numbers(size_t(matrices)), step(step_), memory(stacked.dtype, 0) {
    if (matrices == 0) return;
    const size_t bytes = stacked.bytes.size() / size_t(matrices), unit = size_t(step * dtype_bytes(stacked.dtype));
    Ints order(numbers.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    for (const int32_t i : order) {
      numbers[i] = int32_t(count);
      count += int64_t((bytes + unit - 1) / unit + 1 + rng() % 3);
    }
    count = numbers[order.back()] + 1;
    memory.bytes.assign(size_t(count - 1) * unit + bytes, char(0xFF));
    for (size_t i = 0; i < numbers.size(); ++i)
      std::memcpy(memory.data() + size_t(numbers[i]) * unit, stacked.bytes.data() + i * bytes, bytes);
  }
  Slices slices() { return {count ? memory.data() : nullptr, step, count}; }
};

// Weights of one kind, stacked and scattered.
struct KindOfWeights {
  Buffer routed, shared;
  Slices stacked, shared_stacked;
  Scattered anywhere, shared_anywhere;
  Ints index;
  KindOfWeights(const MoeSizes& s, int64_t halves)
      : routed(s.dtype, random_values(s.E * halves * s.I * s.H, 0.2f, s.dtype)),
        shared(s.dtype, random_values(halves * s.Is * s.H, 0.2f, s.dtype)),
        stacked{routed.data(), halves * s.I * s.H, s.E},
        shared_stacked{s.Is ? shared.data() : nullptr, halves * s.Is * s.H, 1},
        anywhere(routed, s.E * halves, 24),
        shared_anywhere(shared, s.Is ? halves : 0, 8),
        index(anywhere.numbers) {
    index.insert(index.end(), shared_anywhere.numbers.begin(), shared_anywhere.numbers.end());
  }
  Weights weights(bool indexed) {
    if (!indexed) return {stacked, shared_stacked, nullptr};
    return {anywhere.slices(), shared_anywhere.slices(), index.data()};
  }
};

struct Layer {
  MoeSizes s;
  Buffer x, dout;
  KindOfWeights gate_up, down;
  Plan plan;
  Layer(const MoeSizes& sizes, int64_t K)
      : s(sizes),
        x(s.dtype, random_values(s.T * s.H, 1, s.dtype)),
        dout(s.dtype, random_values(s.T * s.H, 1, s.dtype)),
        gate_up(s, s.halves()),
        down(s, 1),
        plan(s.T, s.E, s.R) {
    Ints ids(size_t(s.R)), workspace(size_t(cuda::dispatch_workspace_bytes(s.T, K, s.E) / 4));
    for (int64_t i = 0; i < s.R; ++i) ids[i] = int32_t((i / K * 7 + i % K * 3) % s.E);
    const Floats weights = random_values(s.R, 1, Dtype::kFloat32);
    cuda::dispatch_fwd(s.T, K, s.E, ids.data(), weights.data(), plan.out(), workspace.data(), nullptr);
  }

  // All that forward and backward write.
  std::vector<Buffer> run(bool gate_up_indexed, bool down_indexed) {
    const int64_t u = s.halves();
    std::vector<Buffer> out;
    for (const int64_t count : {s.T * s.H, s.R * u * s.I, s.T * u * s.Is, s.T * s.H, s.E * u * s.I * s.H,
                                s.E * s.H * s.I, u * s.Is * s.H, s.H * s.Is})
      out.emplace_back(s.dtype, size_t(count));
    out.emplace_back(Dtype::kFloat32, size_t(s.R));
    const auto of = [&](int i) -> char* { return out[i].bytes.empty() ? nullptr : out[i].data(); };
    const ExpertWeights w{gate_up.weights(gate_up_indexed), down.weights(down_indexed)};
    const PlanView view{plan.row_weight.data(), plan.offsets.data(), plan.row_token.data(),
                        plan.token_row_offsets.data(), plan.token_rows.data()};
    const int64_t bytes = std::max(cuda::moe_mlp_fwd_workspace_bytes(s), cuda::moe_mlp_bwd_workspace_bytes(s, false));
    Buffer workspace(Dtype::kFloat32, size_t(bytes / 4));
    cuda::moe_mlp_fwd(s, view, w, x.data(), of(0), of(1), of(2), nullptr, workspace.data(), nullptr);
    cuda::moe_mlp_bwd(s, view, w, x.data(), dout.data(), of(1), of(2), of(3), reinterpret_cast<float*>(of(8)), nullptr,
                      {of(4), of(5), of(6), of(7)}, workspace.data(), nullptr);
    return out;
  }
};

void test_weights_anywhere(const char* engine, MoeSizes s, int64_t K) {
  setenv("MOE_FIBER_ENGINE", engine, 1);
  s.R = s.T * K;
  Layer layer(s, K);
  const std::vector<Buffer> want = layer.run(false, false);
  for (const auto& [gate_up, down] : std::vector<std::array<bool, 2>>{{true, true}, {true, false}, {false, true}}) {
    const std::vector<Buffer> got = layer.run(gate_up, down);
    const std::string name =
        label("weights anywhere", s.dtype, s.T, s.H, s.E, K, s.I, s.Is, int(s.activation), gate_up, down) + " " +
        engine;
    for (size_t i = 0; i < want.size(); ++i) {
      const Floats values = got[i].floats();
      const bool finite = std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
      expect(finite && got[i].bytes == want[i].bytes, name + " result " + std::to_string(i));
    }
  }
  unsetenv("MOE_FIBER_ENGINE");
}

void test_weights_anywhere() {
  constexpr auto kSwiGLU = Activation::kSwiGLU, kGELU = Activation::kGELU;
  constexpr auto kF32 = Dtype::kFloat32, kBf16 = Dtype::kBFloat16, kFp16 = Dtype::kFloat16;
  for (const char* engine : {"simt", "sm80", "sm90", "sm90_middle", "sm90_wide"}) {
    test_weights_anywhere(engine, {9, 40, 3, 0, 64, 128, kBf16, kSwiGLU, 1}, 2);
    test_weights_anywhere(engine, {9, 40, 3, 0, 128, 64, kFp16, kGELU, 1}, 2);
    test_weights_anywhere(engine, {9, 136, 2, 0, 192, 0, kBf16, kSwiGLU, 1}, 1);  // several tiles and boxes
  }
  for (const Activation activation : {kSwiGLU, kGELU}) {
    test_weights_anywhere("simt", {20, 40, 3, 0, 64, 128, kF32, activation, 1}, 2);
    test_weights_anywhere("sm80", {20, 40, 3, 0, 64, 128, kF32, activation, 1, true}, 2);
  }
  test_weights_anywhere("simt", {140, 24, 1, 0, 64, 64, kF32, kSwiGLU, 1}, 1);  // more rows than a tile
}

}  // namespace
