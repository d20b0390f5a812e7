// What the tests of csrc/cpu share: buffers of NaN, layouts of weights in memory, plans, the experts in double.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../core/error.h"
#include "../core/workspace.h"
#include "../cpu/blocking.h"
#include "../cpu/combine.h"
#include "../cpu/dispatch.h"
#include "../cpu/experts.h"
#include "../cpu/gating.h"
#include "../cpu/kernels.h"
#include "../cpu/levels.h"
#include "../cpu/peak.h"
#include "../cpu/selection.h"

using namespace moe;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Ints = std::vector<int32_t>;

namespace {

int passed = 0, failed = 0;

void expect(bool ok, const std::string& what) {
  (ok ? passed : failed)++;
  if (!ok) std::printf("FAILED %s\n", what.c_str());
}

double relative_error(const Floats& got, const Doubles& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return norm == 0 ? std::sqrt(error) : std::sqrt(error / norm);
}

// Values every dtype represents exactly, so that the oracle sees the same inputs.
Floats random_values(size_t count, float scale, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  Floats out(count);
  for (float& v : out) {
    v = normal(rng) * scale;
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    bits &= 0xFFFF0000u;
    std::memcpy(&v, &bits, 4);
  }
  return out;
}

// A buffer in storage dtype, sized to the byte so that the address sanitizer sees any overrun.
struct Buffer {
  Dtype dtype;
  std::vector<char> bytes;
  Buffer(Dtype d, size_t count) : dtype(d), bytes(count * size_t(dtype_bytes(d)), char(0xFF)) {}  // 0xFF..: NaN
  Buffer(Dtype d, const Floats& values) : Buffer(d, values.size()) {
    round_rows(values.data(), bytes.data(), int64_t(values.size()), d, 1);
  }
  Floats floats() const {
    Floats out(bytes.size() / size_t(dtype_bytes(dtype)));
    with_dtype(dtype, [&](auto element) {
      for (size_t i = 0; i < out.size(); ++i)
        out[i] = to_float(reinterpret_cast<const decltype(element)*>(bytes.data())[i]);
    });
    return out;
  }
  void* data() { return bytes.data(); }
};

// Where the matrices of experts lie, and how each is stored.
struct Layout {
  std::string name;
  bool scattered;  // each in memory of its own, made in shuffled order, rows padded; else (E, 2I, H), or (E, H, 2I)
  bool up_first;  // [up; gate]
  bool gate_transposed, transposed;  // the latter: up and down
};
const Layout kLayouts[] = {{"stacked", false, false, false, false},
                           {"stacked, [up; gate]", false, true, false, false},
                           {"stacked, transposed", false, false, true, true},
                           {"stacked, transposed, [up; gate]", false, true, true, true},
                           {"scattered", true, false, false, false},
                           {"scattered, transposed", true, true, true, true},
                           {"scattered, gate transposed", true, false, true, false}};

using Kind = Matrices ExpertTable::*;
const std::array<Kind, 6> kKinds{&ExpertTable::gate,        &ExpertTable::up,        &ExpertTable::down,
                                 &ExpertTable::shared_gate, &ExpertTable::shared_up, &ExpertTable::shared_down};

// The matrices of one layer in memory as a layout has it; NaN until set, and NaN between their rows.
class Placed {
 public:
  Placed(const MoeSizes& s, const Layout& layout) : s_(s), layout_(layout), rng_(11) {
    place(s.E, s.I, table.gate, table.up, table.down);
    if (s.Is > 0) place(1, s.Is, table.shared_gate, table.shared_up, table.shared_down);
  }
  // From and to (n, rows, columns) in sequence.
  void set(const Matrices& to, const float* values) {
    each(to, [&](auto& element) { assign(element, *values++); });
  }
  Floats values(const Matrices& from) const {
    Floats out;
    each(from, [&](auto& element) { out.push_back(to_float(element)); });
    return out;
  }
  // gate_up_proj (n, halves * I, H), from gate (empty: gelu) and up.
  void set_gate_up(const Matrices& gate, const Matrices& up, const Floats& values) {
    const size_t one = size_t(up.rows * up.columns), n = up.data.size(), halves = gate.present() ? 2 : 1;
    for (const Matrices* half : {&gate, &up}) {
      if (!half->present()) continue;
      Floats own(n * one);
      for (size_t e = 0; e < n; ++e)
        std::copy_n(&values[(halves * e + (half == &up ? halves - 1 : 0)) * one], one, &own[e * one]);
      set(*half, own.data());
    }
  }
  Floats gate_up(const Matrices& gate, const Matrices& up) const {
    const Floats first = values(gate), second = values(up);
    const size_t one = size_t(up.rows * up.columns);
    Floats out;
    for (size_t e = 0; e < up.data.size(); ++e) {
      if (gate.present()) out.insert(out.end(), &first[e * one], &first[e * one] + one);
      out.insert(out.end(), &second[e * one], &second[e * one] + one);
    }
    return out;
  }
  // Only the matrices of `written` have been written: all else is as it was made. Overwrites them.
  bool nothing_else_written(const ExpertTable& written) {
    for (const Kind kind : kKinds)
      each(written.*kind, [](auto& element) { std::memset(&element, 0xFF, sizeof(element)); });
    return std::all_of(memory_.begin(), memory_.end(), [](const Buffer& b) {
      return std::all_of(b.bytes.begin(), b.bytes.end(), [](char c) { return c == char(0xFF); });
    });
  }
  ExpertTable table;

 private:
  template <class Visit>
  static void each(const Matrices& m, const Visit& visit) {
    with_dtype(m.dtype, [&](auto element) {
      for (void* matrix : m.data)
        for (int64_t o = 0; o < m.rows; ++o)
          for (int64_t i = 0; i < m.columns; ++i)
            visit(static_cast<decltype(element)*>(matrix)[m.transposed ? i * m.ld + o : o * m.ld + i]);
    });
  }
  static Matrices empty(int64_t n, int64_t rows, int64_t columns, bool transposed, Dtype dtype) {
    return {std::vector<void*>(size_t(n)), rows, columns, transposed ? rows : columns, transposed, dtype};
  }
  void* allocate(int64_t elements) {
    memory_.emplace_back(s_.dtype, size_t(elements));
    return memory_.back().data();
  }
  void place(int64_t n, int64_t I, Matrices& gate, Matrices& up, Matrices& down) {
    if (s_.halves() == 2) gate = empty(n, I, s_.H, layout_.gate_transposed, s_.dtype);
    up = empty(n, I, s_.H, layout_.transposed, s_.dtype);
    down = empty(n, s_.H, I, layout_.transposed, s_.dtype);
    if (layout_.scattered) return scatter({&gate, &up, &down});
    stack({&down});
    if (s_.halves() == 1)
      stack({&up});
    else if (layout_.up_first)
      stack({&up, &gate});
    else
      stack({&gate, &up});
  }
  // One allocation of (n, sum of rows, columns), or transposed.
  void stack(const std::vector<Matrices*>& parts) {
    const int64_t n = int64_t(parts[0]->data.size()), one = parts[0]->rows * parts[0]->columns,
                  halves = int64_t(parts.size());
    char* base = static_cast<char*>(allocate(n * halves * one));
    for (int64_t half = 0; half < halves; ++half) {
      Matrices& m = *parts[size_t(half)];
      if (m.transposed) m.ld *= halves;
      for (int64_t e = 0; e < n; ++e)
        m.data[size_t(e)] = base + (e * halves * one + half * (m.transposed ? m.rows : one)) * dtype_bytes(m.dtype);
    }
  }
  void scatter(const std::vector<Matrices*>& kinds) {
    std::vector<std::pair<Matrices*, size_t>> all;
    int64_t padding = 1;
    for (Matrices* m : kinds) {
      m->ld += padding++;
      for (size_t e = 0; e < m->data.size(); ++e) all.emplace_back(m, e);
    }
    std::shuffle(all.begin(), all.end(), rng_);
    for (const auto& [m, e] : all) {
      const int64_t outer = m->transposed ? m->columns : m->rows, inner = m->transposed ? m->rows : m->columns;
      m->data[e] = allocate((outer - 1) * m->ld + inner);
    }
  }

  const MoeSizes s_;
  const Layout layout_;
  std::mt19937 rng_;
  std::vector<Buffer> memory_;
};

struct Plan {
  Ints counts, offsets, row_token, row_pick, token_row_offsets, token_rows;
  Floats row_weight;
  Plan(int64_t T, int64_t E, int64_t R)
      : counts(E), offsets(E + 1), row_token(R), row_pick(R), token_row_offsets(T + 1), token_rows(R), row_weight(R) {}
  PlanOut out() {
    return {row_weight.data(),        counts.data(),    offsets.data(), row_token.data(), row_pick.data(),
            token_row_offsets.data(), token_rows.data()};
  }
  PlanView view() const {
    return {row_weight.data(), offsets.data(), row_token.data(), token_row_offsets.data(), token_rows.data()};
  }
};

double activate(Activation kind, double gate, double up, double* dgate, double* dup) {
  if (kind == Activation::kGELU) {
    const double cdf = 0.5 * std::erfc(-gate / std::sqrt(2.0));
    *dgate = cdf + gate * std::exp(-0.5 * gate * gate) / std::sqrt(2 * M_PI);
    *dup = 0;
    return gate * cdf;
  }
  const double s = 1 / (1 + std::exp(-gate));
  *dgate = up * s * (1 + gate * (1 - s));
  *dup = gate * s;
  return gate * s * up;
}

// One row through one expert in double: y, and given dy the contributions to dx, the weights and <dy, y>.
struct Oracle {
  const MoeSizes& s;
  double row(const float* x, const float* up_w, const float* down_w, int64_t I, double weight, double* out,
             const float* dout, double* dx, double* dup_w, double* ddown_w) const {
    const int64_t halves = s.halves();
    Doubles pre(size_t(halves * I)), act(I), dpre(size_t(halves * I)), dgate(I), dup(I);
    for (int64_t u = 0; u < halves * I; ++u)
      for (int64_t h = 0; h < s.H; ++h) pre[u] += double(x[h]) * up_w[u * s.H + h];
    for (int64_t i = 0; i < I; ++i)
      act[i] = activate(s.activation, pre[i], halves == 2 ? pre[I + i] : 0, &dgate[i], &dup[i]);
    double product = 0;
    for (int64_t h = 0; h < s.H; ++h) {
      double y = 0;
      for (int64_t i = 0; i < I; ++i) y += act[i] * down_w[h * I + i];
      out[h] += weight * y;
      product += y * dout[h];
    }
    for (int64_t i = 0; i < I; ++i) {
      double dact = 0;
      for (int64_t h = 0; h < s.H; ++h) {
        dact += double(dout[h]) * down_w[h * I + i];
        ddown_w[h * I + i] += weight * act[i] * dout[h];
      }
      dpre[i] = weight * dact * dgate[i];
      if (halves == 2) dpre[I + i] = weight * dact * dup[i];
    }
    for (int64_t u = 0; u < halves * I; ++u)
      for (int64_t h = 0; h < s.H; ++h) {
        dx[h] += dpre[u] * up_w[u * s.H + h];
        dup_w[u * s.H + h] += dpre[u] * x[h];
      }
    return product;
  }
};

}  // namespace
