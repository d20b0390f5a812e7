#include "gating.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "../core/threads.h"
#include "../core/workspace.h"
#include "kernels.h"

namespace moe {
namespace {

constexpr int64_t kTokenGrain = 32;

// The K largest in descending order, the lower index first among equals.
void top_k(const float* probs, int64_t E, int64_t K, float* weights, int32_t* ids) {
  for (int64_t e = 0; e < E; ++e) {
    int64_t place = std::min(e, K);
    for (; place > 0 && probs[e] > weights[place - 1]; --place)
      if (place < K) weights[place] = weights[place - 1], ids[place] = ids[place - 1];
    if (place < K) weights[place] = probs[e], ids[place] = int32_t(e);
  }
}

}  // namespace

int64_t gating_fwd(const GatingSizes& s, const void* x, const float* weight, float* probs, float* topk_weights,
                   int32_t* topk_ids) {
  std::atomic<int64_t> bad{s.T};
  parallel_ranges(s.threads, s.T, kTokenGrain, [&](int64_t begin, int64_t end) {
    kernels().logits[int(s.dtype)](x, weight, probs, s.H, s.E, begin, end);
    for (int64_t t = begin; t < end; ++t) {
      if (!kernels().softmax(probs + t * s.E, s.E)) {
        int64_t seen = bad;
        while (t < seen && !bad.compare_exchange_weak(seen, t)) {}
        return;
      }
      top_k(probs + t * s.E, s.E, s.K, topk_weights + t * s.K, topk_ids + t * s.K);
    }
  });
  return bad < s.T ? bad.load() : -1;
}

void gating_bwd(const GatingSizes& s, const float* dtopk_weights, const DProbs& dprobs, const void* x,
                const float* weight, const int32_t* topk_ids, const float* probs, void* dx, float* dweight) {
  constexpr int64_t kColumns = 64;
  Workspace memory(Workspace::padded(s.T * s.E * 4));
  float* dlogits = memory.take<float>(s.T * s.E);
  parallel_ranges(s.threads, s.T, kTokenGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* g = dlogits + t * s.E;
      const float* p = probs + t * s.E;
      if (dprobs.rows)
        std::copy_n(dprobs.rows + t * dprobs.stride, s.E, g);
      else
        std::fill_n(g, s.E, 0.f);
      for (int64_t k = 0; k < s.K; ++k) g[topk_ids[t * s.K + k]] += dtopk_weights[t * s.K + k];
      double mean = 0;
      for (int64_t e = 0; e < s.E; ++e) mean += double(p[e]) * g[e];
      for (int64_t e = 0; e < s.E; ++e) g[e] = float(p[e] * (g[e] - mean));
    }
    kernels().logits_dx[int(s.dtype)](dlogits, weight, dx, s.H, s.E, begin, end);
  });
  parallel_tasks(s.threads, (s.H + kColumns - 1) / kColumns, [&](int64_t i, int) {
    kernels().logits_dweight[int(s.dtype)](dlogits, x, dweight, s.T, s.H, s.E, i * kColumns,
                                           std::min(s.H, (i + 1) * kColumns));
  });
}

}  // namespace moe
