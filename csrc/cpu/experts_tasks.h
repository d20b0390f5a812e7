// The engine of the experts room: groups, their workspace wave by wave, and the task lists of their kernels.
#pragma once
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "../core/threads.h"
#include "../core/workspace.h"
#include "experts.h"

namespace moe {

constexpr int64_t kSlackBytes = 256;               // kernels read whole vectors past the last element
constexpr int64_t kBiasColumns = 512;               // of a bias's gradient that one task sums
constexpr int64_t kTasksPerThread = 16;             // the last one to finish costs at most 1/16

inline Compute compute_of(Dtype dtype) {
  if (dtype == Dtype::kFloat32) return Compute::kFloat32;
  if (dtype == Dtype::kFloat16) return Compute::kFloat16Widened;
  return kernels().has_bf16_pairs ? Compute::kBFloat16Pairs : Compute::kBFloat16Widened;
}

inline void* at(void* base, int64_t elements, Dtype dtype) {
  return base ? static_cast<char*>(base) + elements * dtype_bytes(dtype) : nullptr;
}

inline float* part(float* base, int64_t elements) { return base ? base + elements : nullptr; }

// The engine: builds groups, gives them workspace wave by wave, and runs their column blocks on all threads.
class Engine {
 public:
  explicit Engine(const MoeSizes& sizes)
      : sizes_(sizes),
        table_(kernels()),
        compute_(compute_of(sizes.dtype)),
        elem_(compute_ == Compute::kBFloat16Pairs ? Dtype::kBFloat16 : Dtype::kFloat32),
        panel_(2 * table_.vector_floats) {}

  // All experts in order, the shared expert last; pointers into caller memory are set, workspace is not.
  std::vector<Group> groups(const PlanView& plan, const ExpertTable& w, void* gate_up, void* shared_gate_up,
                            const ExpertTable& grads, bool weighted, const PackedWeights* packed = nullptr) const {
    std::vector<Group> all;
    for (int64_t e = 0; e < sizes_.E; ++e) {
      Group g = make_group(plan.expert_offsets[e + 1] - plan.expert_offsets[e], sizes_.I);
      g.row_token = plan.row_token + plan.expert_offsets[e];
      g.row_weight = weighted ? plan.row_weight + plan.expert_offsets[e] : nullptr;
      g.gate_proj = w.gate[e], g.up_proj = w.up[e], g.down_proj = w.down[e];
      g.dgate_proj = grads.gate[e], g.dup_proj = grads.up[e], g.ddown_proj = grads.down[e];
      const int64_t U = sizes_.halves() * sizes_.I, H = sizes_.H;
      g.variant = w.variant;
      g.gate_up_bias = part(w.biases.gate_up, e * U), g.down_bias = part(w.biases.down, e * H);
      g.dgate_up_bias = part(grads.biases.gate_up, e * U), g.ddown_bias = part(grads.biases.down, e * H);
      if (packed) set_packed(g, packed->expert(e));
      g.gate_up = at(gate_up, plan.expert_offsets[e] * sizes_.halves() * sizes_.I, sizes_.dtype);
      all.push_back(g);
    }
    if (sizes_.Is > 0) {
      Group g = make_group(sizes_.T, sizes_.Is);
      g.gate_proj = w.shared_gate[0], g.up_proj = w.shared_up[0], g.down_proj = w.shared_down[0];
      g.dgate_proj = grads.shared_gate[0], g.dup_proj = grads.shared_up[0], g.ddown_proj = grads.shared_down[0];
      g.variant = w.variant;
      g.gate_up_bias = w.biases.shared_gate_up, g.down_bias = w.biases.shared_down;
      g.dgate_up_bias = grads.biases.shared_gate_up, g.ddown_bias = grads.biases.shared_down;
      if (packed) set_packed(g, packed->expert(sizes_.E));
      g.gate_up = shared_gate_up;
      all.push_back(g);
    }
    return all;
  }

  // Forward: y of every group. Groups larger than a wave are cut by rows.
  void forward(const std::vector<Group>& all, const void* x) {
    std::vector<Group> pieces;
    for (const Group& g : all) {
      const int64_t cuts = std::max<int64_t>(1, ceil_div(forward_bytes(g), blocking().wave_bytes));
      for (int64_t c = 0; c < cuts && g.rows > 0; ++c)
        pieces.push_back(slice(g, g.rows * c / cuts, g.rows * (c + 1) / cuts));
    }
    prepare(pieces, &Engine::forward_bytes);
    waves(pieces, &Engine::forward_bytes, [&](std::vector<Group>& wave) {
      char* free = wave_memory_;
      for (Group& g : wave) {
        g.x = carve(free, g.rows * g.ld_h);
        g.act = carve(free, g.rows * g.ld_i);
      }
      gather(wave, x, &Group::x);
      columns(wave, table_.up[int(compute_)], sizes_.halves() == 2 ? panel_ / 2 : panel_, &Group::I);
      columns(wave, table_.down[int(compute_)], panel_, &Group::H);
    });
  }

  // Backward: weight gradients, y = gradient of the gathered x, and the experts' drow_weight (null: not wanted).
  // Groups stay whole, since their weight gradients contract over all their rows.
  // dout is (T, H), or (R, H) in row order when by_row.
  void backward(std::vector<Group> all, const void* x, const void* dout, bool by_row, const PlanView& plan,
                float* drow_weight) {
    prepare(all, &Engine::backward_bytes);
    waves(all, &Engine::backward_bytes, [&](std::vector<Group>& wave) {
      char* free = wave_memory_;
      for (Group& g : wave) {
        g.x = carve(free, g.rows * g.ld_h);
        g.dout = carve(free, g.rows * g.ld_h);
        g.act = carve(free, g.rows * g.ld_i);
        g.dgate_up = carve(free, g.rows * g.ld_i * g.halves());
        if (drow_weight && g.row_token)
          g.drow_weight_parts = static_cast<float*>(carve_bytes(free, g.rows * ceil_div(g.I, panel_) * 4));
      }
      gather(wave, x, &Group::x);
      compute_gate_up(wave, free);
      if (by_row)
        gather(in_row_order(wave, plan), dout, &Group::dout);
      else
        gather(wave, dout, &Group::dout);
      columns(wave, table_.dact[int(compute_)], panel_, &Group::I);
      for (const Group& g : wave)
        if (g.drow_weight_parts) sum_parts(g, drow_weight + (g.row_token - plan.row_token));
      gradients(wave);
    });
  }

  // (R, H) rows of the experts, then (T, H) of the shared expert; fp32; valid until the engine dies.
  const float* y() const { return y_; }

  // The weights of a group in panels, gate_proj and up_proj before down_proj, and the bytes that takes.
  int64_t panels(const Group& g, int64_t Group::* width) const {
    return ceil_div(g.*width, width == &Group::I && sizes_.halves() == 2 ? panel_ / 2 : panel_);
  }
  int64_t packed_gate_up_bytes(const Group& g) const { return panels(g, &Group::I) * panel_bytes(g.H); }
  int64_t packed_bytes(const Group& g) const {
    return packed_gate_up_bytes(g) + panels(g, &Group::H) * panel_bytes(g.I);
  }
  void pack(const Group& g, char* out) const {
    parallel_ranges(sizes_.threads, panels(g, &Group::I), 1, [&](int64_t begin, int64_t end) {
      table_.pack_gate_up_proj[int(compute_)](g, begin, end, out + begin * panel_bytes(g.H));
    });
    out += packed_gate_up_bytes(g);
    parallel_ranges(sizes_.threads, panels(g, &Group::H), 1, [&](int64_t begin, int64_t end) {
      table_.pack_down_proj[int(compute_)](g, begin, end, out + begin * panel_bytes(g.I));
    });
  }

 private:
  int64_t items(int64_t k) const { return compute_ == Compute::kBFloat16Pairs ? ceil_div(k, 2) : k; }
  int64_t panel_bytes(int64_t k) const { return items(k) * panel_ * 4; }
  void set_packed(Group& g, const char* packed) const {
    g.packed_gate_up_proj = packed;
    g.packed_down_proj = packed + packed_gate_up_bytes(g);
  }

  Group make_group(int64_t rows, int64_t I) const {
    Group g;
    g.rows = rows, g.H = sizes_.H, g.I = I, g.activation = sizes_.activation;
    g.ld_h = leading(sizes_.H), g.ld_i = leading(I);
    return g;
  }

  // Whole panels, and an odd number of cache lines so that the rows of a tile fall into different L1 sets.
  int64_t leading(int64_t width) const {
    const int64_t line = 64 / dtype_bytes(elem_);
    const int64_t lines = ceil_div(ceil_div(width, panel_) * panel_, line);
    return (lines | 1) * line;
  }

  int64_t forward_bytes(const Group& g) const {
    return g.rows * (g.ld_h + g.ld_i) * dtype_bytes(elem_) + 2 * (kSlackBytes + 64);
  }
  int64_t backward_bytes(const Group& g) const {
    const int64_t again = g.gate_up ? 0 : g.halves() * g.I * dtype_bytes(sizes_.dtype);
    return g.rows *
               ((2 * g.ld_h + (1 + g.halves()) * g.ld_i) * dtype_bytes(elem_) + ceil_div(g.I, panel_) * 4 + again) +
           6 * (kSlackBytes + 64);
  }
  int64_t scratch_stride() const { return Workspace::padded(scratch_bytes(sizes_.H, std::max(sizes_.I, sizes_.Is))); }

  static void* carve_bytes(char*& free, int64_t bytes) {
    void* out = free;
    free += Workspace::padded(bytes + kSlackBytes);
    return out;
  }
  void* carve(char*& free, int64_t elements) const { return carve_bytes(free, elements * dtype_bytes(elem_)); }

  Group slice(Group g, int64_t begin, int64_t end) const {
    g.rows = end - begin;
    if (g.row_token) g.row_token += begin;
    if (!g.row_token) g.token_begin += begin;
    g.gate_up = at(g.gate_up, begin * g.halves() * g.I, sizes_.dtype);
    return g;
  }

  // The same groups reading row r of a (R, H) source instead of token row_token[r].
  static std::vector<Group> in_row_order(std::vector<Group> wave, const PlanView& plan) {
    for (Group& g : wave) {
      g.token_begin = g.row_token - plan.row_token;
      g.row_token = nullptr;
    }
    return wave;
  }

  using Bytes = int64_t (Engine::*)(const Group&) const;

  // Lease memory for y, the threads' scratch and the largest wave, and give every group its rows of y, in order.
  void prepare(std::vector<Group>& all, Bytes bytes) {
    int64_t rows = 0, largest = 0;
    for (const Group& g : all) rows += g.rows;
    waves(all, bytes, [&](const std::vector<Group>& wave) { largest = std::max(largest, total(wave, bytes)); });
    const int64_t y_bytes = rows * sizes_.H * 4, scratch = scratch_stride() * sizes_.threads;
    memory_ = std::make_unique<Workspace>(largest + y_bytes + scratch + 4096);
    y_ = memory_->take<float>(y_bytes / 4);
    scratch_ = memory_->take<char>(scratch);
    wave_memory_ = memory_->take<char>(largest);
    float* next = y_;
    for (Group& g : all) g.y = next, next += g.rows * g.H;
  }

  int64_t total(const std::vector<Group>& wave, Bytes bytes) const {
    int64_t sum = 0;
    for (const Group& g : wave) sum += (this->*bytes)(g);
    return sum;
  }

  // Consecutive groups that fit into blocking().wave_bytes together (one at least), those with most rows first.
  template <class Visit>
  void waves(const std::vector<Group>& all, Bytes bytes, const Visit& visit) const {
    std::vector<Group> wave;
    for (size_t i = 0; i < all.size(); ++i) {
      wave.push_back(all[i]);
      if (i + 1 < all.size() && total(wave, bytes) + (this->*bytes)(all[i + 1]) <= blocking().wave_bytes) continue;
      std::stable_sort(wave.begin(), wave.end(), [](const Group& a, const Group& b) { return a.rows > b.rows; });
      visit(wave);
      wave.clear();
    }
  }

  void gather(const std::vector<Group>& wave, const void* source, void* Group::* target) const {
    constexpr int64_t kRows = 64;
    std::vector<std::pair<const Group*, int64_t>> tasks;
    for (const Group& g : wave)
      for (int64_t row = 0; row < g.rows; row += kRows) tasks.emplace_back(&g, row);
    parallel_tasks(sizes_.threads, int64_t(tasks.size()), [&](int64_t i, int) {
      const Group& g = *tasks[i].first;
      table_.gather[int(compute_)](g, source, g.*target, tasks[i].second, std::min(g.rows, tasks[i].second + kRows));
    });
  }

  // How many of `tasks` tasks each group of a wave gets, by its work.
  class Shares {
   public:
    Shares(const std::vector<Group>& wave, int64_t tasks) {
      for (const Group& g : wave) work_ += double(g.rows) * double(g.I);
      per_work_ = work_ > 0 ? double(tasks) / work_ : 0;
    }
    // For one of `products` products of equal work.
    int64_t tasks(const Group& g, int products = 1) const {
      return int64_t(double(g.rows) * double(g.I) * per_work_ / products + 0.5);
    }

   private:
    double work_ = 0, per_work_;
  };

  // One kernel over the column panels of every group, cut into tasks of about equal work whatever the routing.
  void columns(const std::vector<Group>& wave, void (*kernel)(const Group&, int64_t, int64_t, void*), int64_t panel,
               int64_t Group::* width) const {
    struct Task {
      const Group* group;
      int64_t begin, end;
    };
    std::vector<Task> tasks;
    const Shares shares(wave, kTasksPerThread * sizes_.threads);
    for (const Group& g : wave) {
      if (g.rows == 0) continue;
      const int64_t panels = ceil_div(g.*width, panel);  // of `panel` columns
      const int64_t cuts = std::clamp<int64_t>(shares.tasks(g), 1, panels);
      for (int64_t c = 0; c < cuts; ++c) tasks.push_back({&g, panels * c / cuts, panels * (c + 1) / cuts});
    }
    parallel_tasks(sizes_.threads, int64_t(tasks.size()), [&](int64_t i, int thread) {
      kernel(*tasks[i].group, tasks[i].begin, tasks[i].end, scratch_ + thread * scratch_stride());
    });
  }

  // gate_up of the groups whose forward did not keep it; `act` is overwritten later.
  void compute_gate_up(std::vector<Group>& wave, char*& free) const {
    std::vector<Group> anew;
    for (Group& g : wave) {
      if (g.gate_up) continue;
      g.gate_up = carve_bytes(free, g.rows * g.halves() * g.I * dtype_bytes(sizes_.dtype));
      anew.push_back(g);
    }
    if (!anew.empty()) columns(anew, table_.up[int(compute_)], sizes_.halves() == 2 ? panel_ / 2 : panel_, &Group::I);
  }

  void sum_parts(const Group& g, float* drow_weight) const {
    const int64_t parts = ceil_div(g.I, panel_);
    for (int64_t row = 0; row < g.rows; ++row) {
      float total = 0;
      for (int64_t p = 0; p < parts; ++p) total += g.drow_weight_parts[row * parts + p];
      drow_weight[row] = total;
    }
  }

  // The gradients of weights and biases that are wanted and y of every group: independent of each other, one task list.
  void gradients(const std::vector<Group>& wave) const {
    // dgate_proj or dup_proj; dx, whose block has panels alone; ddown_proj; of a bias, whose block has features alone
    enum class Kind { kGateUp, kDx, kDown, kGateUpBias, kDownBias };
    struct Task {
      const Group* group;
      Kind kind;
      GradBlock block;
    };
    std::vector<Task> tasks;
    const Shares shares(wave, kTasksPerThread * sizes_.threads);
    const auto add_blocks = [&](const Group& g, Kind kind, int64_t half, const Matrix& to, int64_t out, int64_t in) {
      if (!to.data) return;
      const int64_t features = to.transposed ? in : out, width = to.transposed ? out : in;
      const int64_t panels = ceil_div(width, panel_);
      const int64_t cuts_p = ceil_div(panels, panels_in_l2(std::clamp<int64_t>(items(g.rows), 1, kChunkItems), panel_));
      const int64_t least = items(g.rows) > kChunkItems ? ceil_div(features, kGradFeatures) : 1;
      const int64_t cuts_f = std::clamp<int64_t>(shares.tasks(g, 6) / cuts_p, least, features);  // six such products
      for (int64_t f = 0; f < cuts_f; ++f)
        for (int64_t p = 0; p < cuts_p; ++p)
          tasks.push_back({&g, kind,
                           GradBlock{half, features * f / cuts_f, features * (f + 1) / cuts_f, panels * p / cuts_p,
                                     panels * (p + 1) / cuts_p}});
    };
    const auto add_bias = [&](const Group& g, Kind kind, int64_t half, const float* to, int64_t width) {
      for (int64_t c = 0; to && c < width; c += kBiasColumns)
        tasks.push_back({&g, kind, GradBlock{half, c, std::min(width, c + kBiasColumns), 0, 0}});
    };
    for (const Group& g : wave) {
      for (int64_t half = 0; half < g.halves(); ++half)
        add_blocks(g, Kind::kGateUp, half, g.dhalf_proj(half), g.I, g.H);
      const int64_t panels = ceil_div(g.H, panel_), width = panels_in_l2(kChunkItems, panel_);
      for (int64_t p = 0; g.rows > 0 && p < panels; p += width)
        tasks.push_back({&g, Kind::kDx, GradBlock{0, 0, 0, p, std::min(panels, p + width)}});
      add_blocks(g, Kind::kDown, 0, g.ddown_proj, g.H, g.I);
      for (int64_t half = 0; half < g.halves(); ++half) add_bias(g, Kind::kGateUpBias, half, g.dgate_up_bias, g.I);
      add_bias(g, Kind::kDownBias, 0, g.ddown_bias, g.H);
    }
    parallel_tasks(sizes_.threads, int64_t(tasks.size()), [&](int64_t i, int thread) {
      const Task& task = tasks[i];
      void* own = scratch_ + thread * scratch_stride();
      switch (task.kind) {
        case Kind::kGateUp:
          return table_.dgate_up_proj[int(compute_)](*task.group, task.block, own);
        case Kind::kDx:
          return table_.dx[int(compute_)](*task.group, task.block.panel_begin, task.block.panel_end, own);
        case Kind::kDown:
          return table_.ddown_proj[int(compute_)](*task.group, task.block, own);
        case Kind::kGateUpBias:
        case Kind::kDownBias:
          return bias_gradient(*task.group, task.kind == Kind::kDownBias, task.block);
      }
    });
  }

  void bias_gradient(const Group& g, bool down, const GradBlock& block) const {
    const int64_t begin = block.feature_begin, end = block.feature_end;
    const auto sums = table_.column_sums[int(compute_)];
    if (down) return sums(g.dout, g.ld_h, g.rows, g.row_weight, begin, end, g.ddown_bias);
    sums(at(g.dgate_up, block.half * g.ld_i, elem_), g.halves() * g.ld_i, g.rows, nullptr, begin, end,
         g.dgate_up_bias + block.half * g.I);
  }

  const MoeSizes& sizes_;
  const Kernels& table_;
  const Compute compute_;
  const Dtype elem_;
  const int64_t panel_;
  std::unique_ptr<Workspace> memory_;
  float* y_ = nullptr;
  char* scratch_ = nullptr;
  char* wave_memory_ = nullptr;
};

}  // namespace moe
