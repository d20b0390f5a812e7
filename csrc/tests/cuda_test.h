// What the tests of csrc/cuda share: counts of what passed, random inputs, poisoned buffers, a measure of closeness.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../core/shapes.h"

using namespace moe;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Ints = std::vector<int32_t>;

namespace {

int passed = 0, failed = 0;
std::mt19937 rng(7);

void expect(bool ok, const std::string& what) {
  (ok ? passed : failed)++;
  if (!ok) std::printf("FAILED %s\n", what.c_str());
}

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
const char* name_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? " fp32" : dtype == Dtype::kBFloat16 ? " bf16" : " fp16";
}
double unit_roundoff(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 0 : dtype == Dtype::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
}

template <class... Numbers>
std::string label(const char* what, Dtype dtype, Numbers... numbers) {
  std::string text = what;
  ((text += " " + std::to_string(numbers)), ...);
  return text + name_of(dtype);
}

// A buffer sized to the byte, so that the address sanitizer sees any overrun, and full of NaN until it is written.
struct Buffer {
  Dtype dtype;
  std::vector<char> bytes;
  Buffer(Dtype d, size_t count) : dtype(d), bytes(count * size_t(dtype_bytes(d)), char(0xFF)) {}
  Buffer(Dtype d, const Floats& values) : Buffer(d, values.size()) {
    with_dtype(d, [&](auto element) {
      for (size_t i = 0; i < values.size(); ++i) assign(reinterpret_cast<decltype(element)*>(data())[i], values[i]);
    });
  }
  Floats floats() const {
    Floats out(bytes.size() / size_t(dtype_bytes(dtype)));
    with_dtype(dtype, [&](auto element) {
      const auto* elements = reinterpret_cast<const decltype(element)*>(bytes.data());
      for (size_t i = 0; i < out.size(); ++i) out[i] = to_float(elements[i]);
    });
    return out;
  }
  char* data() { return bytes.data(); }
};

Floats poisoned(int64_t count) { return Floats(size_t(count), NAN); }

// Random values that the dtype represents, so that the oracle sees what the kernel sees.
Floats random_values(int64_t count, float scale, Dtype dtype) {
  std::normal_distribution<float> normal;
  Floats out(size_t(count), 0.f);
  for (float& v : out) v = normal(rng) * scale;
  return Buffer(dtype, out).floats();
}

double relative_error(const Floats& got, const Doubles& want) {
  double error = 0, norm = 0;
  if (got.size() != want.size()) return NAN;
  for (size_t i = 0; i < want.size(); ++i) error += (got[i] - want[i]) * (got[i] - want[i]), norm += want[i] * want[i];
  return norm == 0 ? std::sqrt(error) : std::sqrt(error / norm);
}

// Close as a whole: within a few fp32 roundings and one of the output's dtype; many elements lose less than half of it
// on average. NaN is never close.
void expect_close(const Floats& got, const Doubles& want, Dtype dtype, const std::string& what, double fp32 = 2e-6) {
  const double error = relative_error(got, want), share = want.size() < 256 ? 1 : 0.5;
  expect(error <= fp32 + share * unit_roundoff(dtype), what + ": error " + std::to_string(error));
}

struct Plan {
  Ints counts, offsets, row_token, row_pick, token_row_offsets, token_rows;
  Floats row_weight;
  Plan(int64_t T, int64_t E, int64_t R)
      : counts(E, -7),
        offsets(E + 1, -7),
        row_token(R, -7),
        row_pick(R, -7),
        token_row_offsets(T + 1, -7),
        token_rows(R, -7),
        row_weight(poisoned(R)) {}
  PlanOut out() {
    return {row_weight.data(),        counts.data(),    offsets.data(), row_token.data(), row_pick.data(),
            token_row_offsets.data(), token_rows.data()};
  }
  void take_tokens_rows(const std::vector<Ints>& rows_of) {
    token_row_offsets[0] = 0;
    for (size_t t = 0; t < rows_of.size(); ++t) {
      token_row_offsets[t + 1] = token_row_offsets[t] + int32_t(rows_of[t].size());
      std::copy(rows_of[t].begin(), rows_of[t].end(), token_rows.begin() + token_row_offsets[t]);
    }
  }
  bool operator==(const Plan& o) const {
    return counts == o.counts && offsets == o.offsets && row_token == o.row_token && row_pick == o.row_pick &&
           token_row_offsets == o.token_row_offsets && token_rows == o.token_rows && row_weight == o.row_weight;
  }
};

}  // namespace
