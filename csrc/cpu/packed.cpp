#include <cstring>
#include <tuple>

#include "../core/error.h"
#include "engine.h"

namespace moe {
namespace {

std::vector<Group> unrouted_groups(const Engine& engine, const MoeSizes& s, const ExpertWeights& w) {
  const std::vector<int32_t> offsets(size_t(s.E + 1), 0);
  return engine.groups({offsets.data(), nullptr, nullptr, nullptr, nullptr}, w, nullptr, nullptr, {}, false);
}

// The upper half of the value in the middle of each expert matrix: whoever rewrites a weight as a whole changes it.
std::vector<uint16_t> samples(const MoeSizes& s, const ExpertWeights& w) {
  const int64_t bytes = dtype_bytes(s.dtype);
  std::vector<uint16_t> out;
  const auto sample = [&](const void* weights, int64_t matrices, int64_t elements) {
    const char* middle = static_cast<const char*>(weights) + (elements / 2) * bytes + bytes - 2;
    for (int64_t m = 0; weights && m < matrices; ++m, middle += elements * bytes) {
      out.emplace_back();
      std::memcpy(&out.back(), middle, 2);
    }
  };
  sample(w.gate_up_proj, s.E * s.halves(), s.I * s.H);
  sample(w.down_proj, s.E, s.H * s.I);
  sample(w.shared_gate_up_proj, s.halves(), s.Is * s.H);
  sample(w.shared_down_proj, 1, s.H * s.Is);
  return out;
}

int64_t all_packed_bytes(const MoeSizes& s) {
  const Engine engine(s);
  int64_t bytes = 0;
  for (const Group& g : unrouted_groups(engine, s, {})) bytes += engine.packed_bytes(g);
  return bytes;
}

}  // namespace

PackedWeights::PackedWeights(const MoeSizes& s, const ExpertWeights& w) : sizes_(s), memory_(all_packed_bytes(s)) {
  const Engine engine(sizes_);
  const std::vector<Group> all = unrouted_groups(engine, sizes_, w);
  expert_bytes_ = engine.packed_bytes(all[0]);
  for (size_t e = 0; e < all.size(); ++e) engine.pack(all[e], memory_.data() + int64_t(e) * expert_bytes_);
  samples_ = samples(sizes_, w);
}

void PackedWeights::check(const MoeSizes& s, const ExpertWeights& w) const {
  const auto shape = [](const MoeSizes& m) { return std::make_tuple(m.H, m.E, m.I, m.Is, m.dtype, m.activation); };
  MOE_CHECK(shape(s) == shape(sizes_), "packed weights: made for other sizes, dtype or activation than this call's");
  MOE_CHECK(samples(s, w) == samples_, "packed weights: the weights have changed since they were packed");
}

}  // namespace moe
