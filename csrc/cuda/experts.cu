#include "experts.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "engines.h"
#include "scratch.h"
#include "sums.h"
#include "waves.h"

namespace moe::cuda {
namespace {

constexpr int kMostParts = 4, kMostSharedParts = 8;  // of the rows of a weight gradient

// One call: what all of its launches share.
struct Call {
  const MoeSizes& s;
  PlanView plan;
  cudaStream_t stream;
  Device device = current_device();
  Engine engine = engine_for(device, s.dtype, s.tf32);

  int64_t shared_tokens() const { return s.Is ? s.T : 0; }
  Groups groups() const { return {int(s.E), int(shared_tokens()), plan.expert_offsets}; }
  // The tiling whose busiest block ends first, of equals the widest. A tile costs its columns and 32 more: on an H100
  // rows times weights reach 691 of 795 TFLOP/s at 192. Where sums are short all are narrow: those store while they
  // multiply.
  // areas_of(tiling): what there is to do, in the order in which blocks take tiles.
  template <class AreasOf>
  Tiling tiling(int64_t depth, const AreasOf& areas_of) const {
    if (engine == Engine::kSimt) return simt::kTiling;
    if (engine == Engine::kSm80) return sm80::kTiling;
    Tiling best = sm90::kPingPong;
    double least = std::numeric_limits<double>::infinity();
    for (const Tiling& t : {sm90::kPingPong, sm90::kMiddle, sm90::kWide}) {
      if (const int asked = asked_columns(); asked ? asked != t.n : depth < 1024 && t.n > sm90::kPingPong.n) continue;
      const double time = busiest(areas_of(t), t.n, device.processors) * (t.n + 32);
      if (time <= least) best = t, least = time;
    }
    return best;
  }
  // Of a product of rows with weights: so many columns, sums over depth elements; the shared expert's come last.
  Tiling rows_tiling(int64_t depth, int64_t shared_depth, int64_t columns, int64_t shared_columns) const {
    return tiling(depth, [&](const Tiling& t) -> Areas {
      return {{{s.R / t.m + std::min(s.E, s.R) / 2, columns, double(depth)},
               {ceil_div(shared_tokens(), t.m), shared_columns, double(shared_depth)}}};
    });
  }
  Tiling up_tiling() const { return rows_tiling(s.H, s.H, s.halves() * s.I, s.halves() * s.Is); }
  Tiling dact_tiling() const { return engine == Engine::kSm90 ? sm90::kPingPong : rows_tiling(s.H, s.H, s.I, s.Is); }

  template <class Product>
  void run(const Product& product, const Tiling& tiling, int64_t tiles) const {
    const Launch on{device, tiling, int(std::min<int64_t>(tiles, INT32_MAX)), s.R, stream};
    if constexpr (sizeof(typename Product::T) == 2)
      if (engine == Engine::kSm90) return sm90::run(product, on);
    if (engine == Engine::kSm80) return sm80::run(product, on);
    simt::run(product, on);
  }
  // Set the tiles of a product of rows with weights, and launch it.
  template <class Product>
  void run_rows(Product product, const Tiling& tiling) const {
    const int columns = tiling.n / Product::kHalves;
    product.tiles = {groups(), int(ceil_div(product.N, columns)), int(ceil_div(product.Ns, columns))};
    const int64_t routed = (s.R / tiling.m + std::min(s.E, s.R)) * product.tiles.num_n;
    run(product, tiling, routed + ceil_div(shared_tokens(), tiling.m) * product.tiles.shared_num_n);
  }
};

template <class T>
struct Pair {  // of the routed experts and of the shared one
  T* routed;
  T* shared;
};

template <class T>
Pair<T> take(Scratch& scratch, const MoeSizes& s, int64_t routed, int64_t shared) {
  return {scratch.take<T>(s.R * routed), scratch.take<T>(s.Is ? s.T * shared : 0)};
}

template <class T>
void set_operands(RowsTimesWeights<T>& p, Pair<const T> rows, const int32_t* row_token, const Weights& from,
                  int64_t matrices, int64_t K, int64_t Ks, int64_t N, int64_t Ns) {
  p.rows = rows.routed, p.shared_rows = rows.shared, p.row_token = row_token;
  p.from = from, p.matrices = int(matrices);
  p.K = int(K), p.Ks = int(Ks), p.N = int(N), p.Ns = int(Ns);
}

template <class T, bool GELU>
void up(const Call& call, const ExpertWeights& w, const T* x, Pair<T> act, Pair<T> gate_up) {
  const MoeSizes& s = call.s;
  Up<T, GELU> p{};
  set_operands<T>(p, {x, x}, call.plan.row_token, w.gate_up_proj, s.halves(), s.H, s.H, s.I, s.Is);
  p.act = act.routed, p.shared_act = act.shared, p.gate_up = gate_up.routed, p.shared_gate_up = gate_up.shared;
  call.run_rows(p, call.up_tiling());
}

template <class T>
void up(const Call& call, const ExpertWeights& w, const T* x, Pair<T> act, Pair<T> gate_up) {
  call.s.activation == Activation::kGELU ? up<T, true>(call, w, x, act, gate_up)
                                         : up<T, false>(call, w, x, act, gate_up);
}

template <class T, Summed WEIGHTS>
void rows_times(const Call& call, Pair<T> rows, const Weights& from, int64_t matrices, int64_t K, int64_t Ks,
                Pair<T> out) {
  RowsTimes<T, WEIGHTS> p{};
  set_operands<T>(p, {rows.routed, rows.shared}, nullptr, from, matrices, K, Ks, call.s.H, call.s.H);
  p.out = out.routed, p.shared_out = out.shared;
  p.split = matrices == 2 ? p.K / 2 : -1, p.shared_split = matrices == 2 ? p.Ks / 2 : -1;
  call.run_rows(p, call.rows_tiling(K, Ks, call.s.H, call.s.H));
}

// What the backward pass keeps between its launches.
template <class T>
struct Backward {
  Pair<T> gate_up, dgate_up, act, dx;
  float* parts;
  int64_t num_parts;
  float* partials[2][2];  // of down_proj's gradient and gate_up_proj's; routed and shared
};

// How a weight gradient, (E, M, N) and (Ms, Ns), is cut: its tiles, and parts of the rows, enough to fill the device.
struct Cut {
  Tiling tiling;
  int split, shared_split;
};
Cut cut_of(const Call& call, const Tiling& tiling, int64_t M, int64_t N) {
  const MoeSizes& s = call.s;
  const int64_t area = s.E * ceil_div(M, tiling.m) * ceil_div(N, tiling.n);
  const int split = int(std::clamp<int64_t>(call.device.processors / std::max<int64_t>(area, 1), 1, kMostParts));
  const int64_t longer = s.T * s.E / std::max<int64_t>(s.R, 1);  // the shared expert has more rows than a routed one
  return {tiling, split, split * int(std::clamp<int64_t>(longer, 1, kMostSharedParts))};
}
Cut cut_of(const Call& call, int64_t M, int64_t Ms, int64_t N, int64_t Ns) {
  const MoeSizes& s = call.s;
  const int64_t rows = s.R / std::max<int64_t>(s.E, 1);
  const Tiling tiling = call.tiling(rows, [&](const Tiling& t) -> Areas {
    const Cut cut = cut_of(call, t, M, N);
    return {{{ceil_div(Ms, t.m) * cut.shared_split, Ns, double(s.T) / cut.shared_split},
             {s.E * ceil_div(M, t.m) * cut.split, N, double(rows) / cut.split}}};
  });
  return cut_of(call, tiling, M, N);
}

template <class T, bool GELU>
void dact(const Call& call, const ExpertWeights& w, const T* dout, bool combined, const Backward<T>& b) {
  const MoeSizes& s = call.s;
  Dact<T, GELU> p{};
  set_operands<T>(p, {dout, dout}, combined ? call.plan.row_token : nullptr, w.down_proj, 1, s.H, s.H, s.I, s.Is);
  p.row_weight = combined ? call.plan.row_weight : nullptr;
  p.gate_up = b.gate_up.routed, p.shared_gate_up = b.gate_up.shared;
  p.dgate_up = b.dgate_up.routed, p.shared_dgate_up = b.dgate_up.shared;
  p.act = b.act.routed, p.shared_act = b.act.shared;
  p.parts = b.parts, p.num_parts = int(b.num_parts), p.part_columns = call.dact_tiling().part;
  call.run_rows(p, call.dact_tiling());
}

// out (E, M, N) and shared_out (Ms, Ns) = sums of left^T right over the rows, once `sums` have been done.
template <class T, Gathered GATHERED>
void dweight(const Call& call, Pair<const T> left, Pair<const T> right, bool gather, int64_t M, int64_t Ms, int64_t N,
             int64_t Ns, void* out, void* shared_out, float* const (&partials)[2], std::vector<SumJob>& sums) {
  const MoeSizes& s = call.s;
  const auto [tiling, split, shared_split] = cut_of(call, M, Ms, N, Ns);
  const bool shared = s.Is > 0;
  Dweight<T, GATHERED> p{};
  p.tiles = {call.groups(),
             int(ceil_div(M, tiling.m)),
             int(ceil_div(N, tiling.n)),
             split,
             shared ? int(ceil_div(Ms, tiling.m)) : 0,
             shared ? int(ceil_div(Ns, tiling.n)) : 0,
             shared_split};
  p.left = left.routed, p.shared_left = left.shared, p.right = right.routed, p.shared_right = right.shared;
  p.row_token = gather ? call.plan.row_token : nullptr;
  p.out = static_cast<T*>(out), p.shared_out = static_cast<T*>(shared_out);
  p.partials = split > 1 ? partials[0] : nullptr, p.shared_partials = shared_split > 1 ? partials[1] : nullptr;
  p.M = int(M), p.Ms = int(Ms), p.N = int(N), p.Ns = int(Ns);
  const int64_t tiles = s.E * p.tiles.num_m * p.tiles.num_n * split;
  call.run(p, tiling, tiles + int64_t(p.tiles.shared_num_m) * p.tiles.shared_num_n * shared_split);
  if (split > 1) sums.push_back({partials[0], split, s.E * M * N, out, s.dtype});
  if (shared && shared_split > 1) sums.push_back({partials[1], shared_split, Ms * Ns, shared_out, s.dtype});
}

int64_t partial_count(int split, int64_t count) { return split > 1 ? split * count : 0; }

// Lay the buffers of a backward pass out; gate_up is only taken where it has to be computed again.
template <class T>
Backward<T> take_backward(Scratch& scratch, const Call& call, bool recompute) {
  const MoeSizes& s = call.s;
  const int64_t u = s.halves();
  Backward<T> b{};
  if (recompute) b.gate_up = take<T>(scratch, s, u * s.I, u * s.Is);
  b.dgate_up = take<T>(scratch, s, u * s.I, u * s.Is);
  b.act = take<T>(scratch, s, s.I, s.Is);
  b.dx = take<T>(scratch, s, s.H, s.H);
  const Tiling wide = call.dact_tiling();
  b.num_parts = ceil_div(s.I, wide.n) * (wide.n / wide.part);
  b.parts = scratch.take<float>(s.R * b.num_parts);
  const Cut down = cut_of(call, s.H, s.H, s.I, s.Is), gate_up = cut_of(call, u * s.I, u * s.Is, s.H, s.H);
  b.partials[0][0] = scratch.take<float>(partial_count(down.split, s.E * s.H * s.I));
  b.partials[0][1] = scratch.take<float>(partial_count(down.shared_split, s.H * s.Is));
  b.partials[1][0] = scratch.take<float>(partial_count(gate_up.split, s.E * u * s.I * s.H));
  b.partials[1][1] = scratch.take<float>(partial_count(gate_up.shared_split, u * s.Is * s.H));
  return b;
}

// All gradients. dout has a row per token, or, not combined, one per routed row.
template <class T>
void backward(const Call& call, const ExpertWeights& w, const T* x, const T* dout, bool combined, Backward<T>& b,
              void* dx, float* drow_weight, const int32_t* row_pick, const ExpertGrads& grads) {
  const MoeSizes& s = call.s;
  const int64_t u = s.halves();
  s.activation == Activation::kGELU ? dact<T, true>(call, w, dout, combined, b)
                                    : dact<T, false>(call, w, dout, combined, b);
  std::vector<SumJob> sums;
  dweight<T, Gathered::kA>(call, {dout, dout}, {b.act.routed, b.act.shared}, combined, s.H, s.H, s.I, s.Is,
                           grads.ddown_proj, grads.dshared_down_proj, b.partials[0], sums);
  dweight<T, Gathered::kB>(call, {b.dgate_up.routed, b.dgate_up.shared}, {x, x}, true, u * s.I, u * s.Is, s.H, s.H,
                           grads.dgate_up_proj, grads.dshared_gate_up_proj, b.partials[1], sums);
  ordered_sums(sums.data(), int(sums.size()), call.stream);
  rows_times<T, Summed::kOuter>(call, b.dgate_up, w.gate_up_proj, u, u * s.I, u * s.Is, b.dx);
  CombineArgs sum{};
  sum.T = s.T, sum.H = s.H, sum.dtype = s.dtype, sum.rows = b.dx.routed, sum.out = dx;
  sum.token_row_offsets = call.plan.token_row_offsets, sum.token_rows = call.plan.token_rows;
  sum.shared = s.Is ? b.dx.shared : nullptr;
  if (combined)
    sum.parts = b.parts, sum.num_parts = b.num_parts, sum.drow_weight = drow_weight, sum.row_pick = row_pick;
  combine_fwd(sum, call.stream);
}

template <class T>
Pair<T> pair(const void* routed, const void* shared) {
  return {static_cast<T*>(const_cast<void*>(routed)), static_cast<T*>(const_cast<void*>(shared))};
}

}  // namespace

int64_t experts_fwd_workspace_bytes(const MoeSizes& s) { return s.R * s.I * dtype_bytes(s.dtype); }

void experts_fwd(const MoeSizes& s, const PlanView& plan, const ExpertWeights& w, const void* x, void* y_rows,
                 void* gate_up, void* workspace, cudaStream_t stream) {
  const Call call{s, plan, stream};
  with_dtype(s.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Pair<T> act{static_cast<T*>(workspace), nullptr};
    up<T>(call, w, static_cast<const T*>(x), act, pair<T>(gate_up, nullptr));
    rows_times<T, Summed::kInner>(call, act, w.down_proj, 1, s.I, 0, pair<T>(y_rows, nullptr));
  });
}

int64_t experts_bwd_workspace_bytes(const MoeSizes& s) { return moe_mlp_bwd_workspace_bytes(s, false); }

void experts_bwd(const MoeSizes& s, const PlanView& plan, const ExpertWeights& w, const void* x, const void* dy_rows,
                 const void* gate_up, void* dx, const ExpertGrads& grads, void* workspace, cudaStream_t stream) {
  const Call call{s, plan, stream};
  with_dtype(s.dtype, [&](auto tag) {
    using T = decltype(tag);
    Scratch scratch(workspace);
    Backward<T> b = take_backward<T>(scratch, call, false);
    b.gate_up = pair<T>(gate_up, nullptr);
    backward<T>(call, w, static_cast<const T*>(x), static_cast<const T*>(dy_rows), false, b, dx, nullptr, nullptr,
                grads);
  });
}

namespace {

template <class T>
struct Forward {
  Pair<T> act, y;
};
template <class T>
Forward<T> take_forward(Scratch& scratch, const MoeSizes& s) {
  const Pair<T> act = take<T>(scratch, s, s.I, s.Is);
  return {act, take<T>(scratch, s, s.H, s.H)};
}

}  // namespace

int64_t moe_mlp_fwd_workspace_bytes(const MoeSizes& s) {
  Scratch scratch;
  with_dtype(s.dtype, [&](auto tag) { take_forward<decltype(tag)>(scratch, s); });
  return scratch.bytes();
}

void moe_mlp_fwd(const MoeSizes& s, const PlanView& plan, const ExpertWeights& w, const void* x, void* out,
                 void* gate_up, void* shared_gate_up, const Residual* residual, void* workspace, cudaStream_t stream) {
  const Call call{s, plan, stream};
  with_dtype(s.dtype, [&](auto tag) {
    using T = decltype(tag);
    Scratch scratch(workspace);
    const Forward<T> f = take_forward<T>(scratch, s);
    up<T>(call, w, static_cast<const T*>(x), f.act, pair<T>(gate_up, shared_gate_up));
    rows_times<T, Summed::kInner>(call, f.act, w.down_proj, 1, s.I, s.Is, f.y);
    CombineArgs sum{};
    sum.T = s.T, sum.H = s.H, sum.dtype = s.dtype, sum.rows = f.y.routed, sum.row_weight = plan.row_weight;
    sum.token_row_offsets = plan.token_row_offsets, sum.token_rows = plan.token_rows;
    sum.shared = s.Is ? f.y.shared : nullptr, sum.out = out;
    if (residual)
      sum.residual = residual->residual, sum.gate = residual->gate, sum.residual_dtype = residual->dtype,
      sum.gate_dtype = residual->gate_dtype, sum.B = residual->B, sum.y = residual->y;
    combine_fwd(sum, stream);
  });
}

int64_t moe_mlp_bwd_workspace_bytes(const MoeSizes& s, bool recompute) {
  const Call call{s, {}, nullptr};
  Scratch scratch;
  with_dtype(s.dtype, [&](auto tag) { take_backward<decltype(tag)>(scratch, call, recompute); });
  return scratch.bytes();
}

void moe_mlp_bwd(const MoeSizes& s, const PlanView& plan, const ExpertWeights& w, const void* x, const void* dout,
                 const void* gate_up, const void* shared_gate_up, void* dx, float* drow_weight, const int32_t* row_pick,
                 const ExpertGrads& grads, void* workspace, cudaStream_t stream) {
  const Call call{s, plan, stream};
  with_dtype(s.dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool recompute = !gate_up && !shared_gate_up && s.T > 0;
    Scratch scratch(workspace);
    Backward<T> b = take_backward<T>(scratch, call, recompute);
    if (recompute)
      up<T>(call, w, static_cast<const T*>(x), b.act, b.gate_up);
    else
      b.gate_up = pair<T>(gate_up, shared_gate_up);
    backward<T>(call, w, static_cast<const T*>(x), static_cast<const T*>(dout), true, b, dx, drow_weight, row_pick,
                grads);
  });
}

}  // namespace moe::cuda
