// Tests of gating, with and without LayerNorm and modulation in front, against double-precision loops.
#pragma once
#include "../cuda/gating.h"
#include "cuda_test.h"

namespace {

struct Gating {
  GatingSizes s;
  Floats x, weight, probs, topk;
  Ints ids;
  std::string name;

  Gating(int64_t T, int64_t H, int64_t E, int64_t K, Dtype dtype, float scale)
      : s{T, H, E, K, dtype, 1},
        x(random_values(T * H, 1, dtype)),
        weight(random_values(E * H, scale, Dtype::kFloat32)),
        probs(poisoned(T * E)),
        topk(poisoned(T * K)),
        ids(size_t(T * K), -7),
        name(label("gating", dtype, T, H, E, K)) {}

  void run() {
    Buffer stored(s.dtype, x);
    cuda::gating_fwd(s, stored.data(), weight.data(), probs.data(), topk.data(), ids.data(), nullptr);
  }

  double logit(int64_t t, int64_t e) const {
    double sum = 0;
    for (int64_t h = 0; h < s.H; ++h) sum += double(x[t * s.H + h]) * weight[e * s.H + h];
    return sum;
  }

  void check_probs() const {
    Doubles want(probs.size());
    double widest = 1;
    for (int64_t t = 0; t < s.T; ++t) {
      double most = -INFINITY, total = 0;
      for (int64_t e = 0; e < s.E; ++e) most = std::max(most, want[t * s.E + e] = logit(t, e));
      widest = std::max(widest, std::abs(most));
      for (int64_t e = 0; e < s.E; ++e) total += want[t * s.E + e] = std::exp(want[t * s.E + e] - most);
      for (int64_t e = 0; e < s.E; ++e) want[t * s.E + e] /= total;
    }
    expect_close(probs, want, Dtype::kFloat32, name + " probs", 5e-7 * widest);
  }

  // The picks are exactly those of the probabilities that were written: descending, the lower expert on a tie.
  void check_picks() const {
    bool good = true;
    for (int64_t t = 0; t < s.T; ++t) {
      const float* p = &probs[t * s.E];
      Ints order(s.E);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [p](int a, int b) { return p[a] > p[b]; });
      for (int64_t k = 0; k < s.K; ++k) good &= ids[t * s.K + k] == order[k] && topk[t * s.K + k] == p[order[k]];
    }
    expect(good, name + " picks");
  }

  // The router's gradient in double, from the probabilities that the kernel is given.
  Doubles dlogits(const Floats& dtopk, const Floats& dprobs) const {
    Doubles out(probs.size());
    for (int64_t t = 0; t < s.T; ++t) {
      double mean = 0;
      double* d = &out[t * s.E];
      for (int64_t e = 0; e < s.E && !dprobs.empty(); ++e)
        d[e] = dprobs[int64_t(dprobs.size()) == s.E ? e : t * s.E + e];
      for (int64_t k = 0; k < s.K && !dtopk.empty(); ++k) d[ids[t * s.K + k]] += dtopk[t * s.K + k];
      for (int64_t e = 0; e < s.E; ++e) mean += d[e] * probs[t * s.E + e];
      for (int64_t e = 0; e < s.E; ++e) d[e] = probs[t * s.E + e] * (d[e] - mean);
    }
    return out;
  }

  // dlogits weight
  Doubles weighed(const Doubles& d) const {
    Doubles out(size_t(s.T * s.H));
    for (int64_t t = 0; t < s.T; ++t)
      for (int64_t e = 0; e < s.E; ++e)
        for (int64_t h = 0; h < s.H; ++h) out[t * s.H + h] += d[t * s.E + e] * weight[e * s.H + h];
    return out;
  }

  // dlogits^T tokens
  Doubles outer(const Doubles& d, const Floats& tokens) const {
    Doubles out(size_t(s.E * s.H));
    for (int64_t t = 0; t < s.T; ++t)
      for (int64_t e = 0; e < s.E; ++e)
        for (int64_t h = 0; h < s.H; ++h) out[e * s.H + h] += d[t * s.E + e] * tokens[t * s.H + h];
    return out;
  }

  void check_backward(bool with_topk, bool with_probs, bool one_row) const {
    const Floats dtopk = with_topk ? random_values(s.T * s.K, 1, Dtype::kFloat32) : Floats();
    const Floats dprobs = with_probs ? random_values((one_row ? 1 : s.T) * s.E, 1, Dtype::kFloat32) : Floats();
    Buffer stored(s.dtype, x), dx(s.dtype, x.size());
    Buffer workspace(Dtype::kFloat32, cuda::gating_bwd_workspace_bytes(s) / 4);
    Floats dweight = poisoned(s.E * s.H);
    const cuda::RouterUpstream upstream{with_topk ? dtopk.data() : nullptr,
                                        with_probs ? DProbs{dprobs.data(), one_row ? 0 : s.E} : DProbs{}};
    cuda::gating_bwd(s, upstream, stored.data(), weight.data(), ids.data(), probs.data(),
                     {dx.data(), false, dweight.data(), Dtype::kFloat32}, workspace.data(), nullptr);
    const Doubles d = dlogits(dtopk, dprobs);
    expect_close(dx.floats(), weighed(d), s.dtype, name + " dx");
    expect_close(dweight, outer(d, x), Dtype::kFloat32, name + " dweight");
  }
};

// What token choice asks of the backward: the auxiliary loss's gradient from the experts' counts, dx added to what is
// there, dweight in the dtype of x. The bits of doing it one after the other.
void test_gating_onto(const Gating& g) {
  const GatingSizes& s = g.s;
  const Floats dtopk = random_values(s.T * s.K, 1, Dtype::kFloat32), before = random_values(s.T * s.H, 1, s.dtype);
  Ints counts(size_t(s.E));
  std::iota(counts.begin(), counts.end(), 0);
  const float scale = 0.37f;
  Floats row(counts.size());
  std::transform(counts.begin(), counts.end(), row.begin(), [&](int32_t count) { return scale * float(count); });
  Buffer stored(s.dtype, g.x), dx(s.dtype, g.x.size()), onto(s.dtype, before), rounded(s.dtype, g.weight.size());
  Buffer workspace(Dtype::kFloat32, cuda::gating_bwd_workspace_bytes(s) / 4);
  Floats dweight = poisoned(s.E * s.H);
  const auto run = [&](const cuda::RouterUpstream& upstream, const cuda::RouterGrads& grads) {
    cuda::gating_bwd(s, upstream, stored.data(), g.weight.data(), g.ids.data(), g.probs.data(), grads, workspace.data(),
                     nullptr);
  };
  run({dtopk.data(), {row.data(), 0}}, {dx.data(), false, dweight.data(), Dtype::kFloat32});
  run({dtopk.data(), {}, counts.data(), scale}, {onto.data(), true, rounded.data(), s.dtype});
  Floats sum = dx.floats();
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += before[i];
  expect(onto.bytes == Buffer(s.dtype, sum).bytes, g.name + " dx added to what is there");
  expect(rounded.bytes == Buffer(s.dtype, dweight).bytes, g.name + " dweight in another dtype");
}

void test_gating(int64_t T, int64_t H, int64_t E, int64_t K, Dtype dtype, float scale) {
  Gating g(T, H, E, K, dtype, scale);
  g.run();
  g.check_probs();
  g.check_picks();
  g.check_backward(K > 0, K == 0 || T % 2 == 0, T % 4 == 0);
  test_gating_onto(g);
}

void test_ties(Dtype dtype) {
  Gating g(40, 24, 9, 9, dtype, 0.3f);
  for (int64_t h = 0; h < 24; ++h) {
    g.weight[3 * 24 + h] = g.weight[8 * 24 + h] = g.weight[1 * 24 + h];  // exact
    g.weight[5 * 24 + h] = std::nextafter(g.weight[2 * 24 + h], 1.f);    // near
  }
  g.run();
  g.check_picks();
  bool equal = true;
  for (int64_t t = 0; t < 40; ++t)
    equal &= g.probs[t * 9 + 1] == g.probs[t * 9 + 3] && g.probs[t * 9 + 1] == g.probs[t * 9 + 8];
  expect(equal, g.name + " equal weights, equal probabilities");
  Gating far(2, 8, 4, 3, dtype, 0);
  far.weight[1 * 8] = 300, far.x[0] = 1, far.x[8] = -1;  // all but one underflow; all but one are equal
  far.run();
  far.check_picks();
}

void test_not_finite(int64_t T, int64_t E, Dtype dtype) {
  Gating g(T, 16, E, std::min<int64_t>(E, 3), dtype, 0.3f);
  const float bad[] = {NAN, INFINITY, -INFINITY};
  for (int i = 0; i < 3; ++i) g.x[(2 * i + 1) * 16 + i] = bad[i];
  g.run();
  bool nan = true, finite = true, valid = true;
  for (int64_t t = 0; t < T; ++t) {
    const bool spoilt = t < 6 && t % 2 == 1;
    for (int64_t e = 0; e < E; ++e) (spoilt ? nan : finite) &= std::isnan(g.probs[t * E + e]) == spoilt;
    for (int64_t k = 0; k < g.s.K; ++k) {
      valid &= g.ids[t * g.s.K + k] >= 0 && g.ids[t * g.s.K + k] < E;
      for (int64_t j = 0; j < k; ++j) valid &= g.ids[t * g.s.K + k] != g.ids[t * g.s.K + j];
      (spoilt ? nan : finite) &= std::isnan(g.topk[t * g.s.K + k]) == spoilt;
    }
  }
  expect(nan && finite && valid, g.name + " logits that are not finite");
}

// LayerNorm and modulation around it.
void test_adaln(int64_t B, int64_t L, int64_t H, int64_t E, int64_t K, Dtype x_dtype, Dtype dtype, float scale,
                bool upstream) {
  Gating g(B * L, H, E, K, dtype, 1 / std::sqrt(float(H)));
  const int64_t T = B * L;
  g.name = label("adaln", x_dtype, B, L, H, E, K) + name_of(dtype);
  const Floats x = random_values(T * H, scale, x_dtype), shift = random_values(B * H, 0.5f, x_dtype);
  const Floats factor = random_values(B * H, 0.5f, x_dtype);
  const Floats dtokens = random_values(T * H, 1, dtype), dtopk = random_values(T * K, 1, Dtype::kFloat32);
  Buffer bx(x_dtype, x), bshift(x_dtype, shift), bscale(x_dtype, factor);
  Buffer tokens(dtype, T * H), bdtokens(dtype, dtokens);
  Floats moments = poisoned(2 * T);
  const cuda::Modulation m{B, x_dtype, x_dtype, x_dtype, 1e-6f, bx.data(), bshift.data(), bscale.data()};
  cuda::modulated_gating_fwd(g.s, m, g.weight.data(), tokens.data(), g.probs.data(), g.topk.data(), g.ids.data(),
                             moments.data(), nullptr);
  g.x = tokens.floats();
  g.check_probs();
  g.check_picks();

  Doubles normal(size_t(T * H)), want(normal), reciprocal(T);
  for (int64_t t = 0; t < T; ++t) {
    double mean = 0, square = 0;
    for (int64_t h = 0; h < H; ++h) mean += x[t * H + h] / double(H);
    for (int64_t h = 0; h < H; ++h) square += (x[t * H + h] - mean) * (x[t * H + h] - mean) / double(H);
    reciprocal[t] = 1 / std::sqrt(square + double(m.eps));
    for (int64_t h = 0; h < H; ++h) {
      normal[t * H + h] = (x[t * H + h] - mean) * reciprocal[t];
      want[t * H + h] = normal[t * H + h] * (1 + double(factor[t / L * H + h])) + shift[t / L * H + h];
    }
  }
  expect_close(g.x, want, dtype, g.name + " tokens");

  Buffer dx(x_dtype, T * H), dshift(x_dtype, B * H), dscale(x_dtype, B * H);
  Buffer workspace(Dtype::kFloat32, cuda::modulated_gating_bwd_workspace_bytes(g.s, m) / 4);
  Floats dweight = poisoned(E * H);
  cuda::modulated_gating_bwd(g.s, m, upstream ? bdtokens.data() : nullptr, dtopk.data(), {}, g.weight.data(),
                             g.ids.data(), g.probs.data(), moments.data(), dx.data(), dshift.data(), dscale.data(),
                             dweight.data(), workspace.data(), nullptr);
  const Doubles dlogits = g.dlogits(dtopk, {});
  Doubles gradient = g.weighed(dlogits), want_dx(gradient.size()), want_dshift(size_t(B * H)), want_dscale(want_dshift);
  for (int64_t t = 0; t < T; ++t) {
    double plain = 0, along = 0;
    for (int64_t h = 0; h < H; ++h) {
      const int64_t i = t * H + h, b = t / L * H + h;
      if (upstream) gradient[i] += dtokens[i];
      want_dshift[b] += gradient[i], want_dscale[b] += gradient[i] * normal[i];
      plain += gradient[i] * (1 + double(factor[b])) / double(H);
      along += gradient[i] * (1 + double(factor[b])) * normal[i] / double(H);
    }
    for (int64_t h = 0; h < H; ++h)
      want_dx[t * H + h] = reciprocal[t] * (gradient[t * H + h] * (1 + double(factor[t / L * H + h])) - plain -
                                            normal[t * H + h] * along);
  }
  expect_close(dx.floats(), want_dx, x_dtype, g.name + " dx", 4e-6);
  expect_close(dshift.floats(), want_dshift, x_dtype, g.name + " dshift", 4e-6);
  expect_close(dscale.floats(), want_dscale, x_dtype, g.name + " dscale", 4e-6);
  expect_close(dweight, g.outer(dlogits, g.x), Dtype::kFloat32, g.name + " dweight", 4e-6);
}

}  // namespace
