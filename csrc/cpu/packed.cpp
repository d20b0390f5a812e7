#include <cstring>
#include <tuple>

#include "../core/error.h"
#include "experts_tasks.h"

namespace moe {
namespace {

std::vector<Group> unrouted_groups(const Engine& engine, const MoeSizes& s, const ExpertTable& w) {
  const std::vector<int32_t> offsets(size_t(s.E + 1), 0);
  return engine.groups({nullptr, offsets.data(), nullptr, nullptr, nullptr}, w, nullptr, nullptr, {}, false);
}

// The upper half of the value in the middle of each matrix: rewriting a weight as a whole changes it.
std::vector<uint16_t> samples(const ExpertTable& w) {
  std::vector<uint16_t> out;
  for (const Matrices* kind : {&w.gate, &w.up, &w.down, &w.shared_gate, &w.shared_up, &w.shared_down}) {
    if (kind->rows * kind->columns == 0) continue;
    const int64_t bytes = dtype_bytes(kind->dtype), o = kind->rows / 2, i = kind->columns / 2;
    const int64_t middle = kind->transposed ? i * kind->ld + o : o * kind->ld + i;
    for (const void* matrix : kind->data) {
      out.emplace_back();
      std::memcpy(&out.back(), static_cast<const char*>(matrix) + (middle + 1) * bytes - 2, 2);
    }
  }
  return out;
}

int64_t all_packed_bytes(const MoeSizes& s) {
  const Engine engine(s);
  int64_t bytes = 0;
  for (const Group& g : unrouted_groups(engine, s, {})) bytes += engine.packed_bytes(g);
  return bytes;
}

}  // namespace

PackedWeights::PackedWeights(const MoeSizes& s, const ExpertTable& w) : sizes_(s), memory_(all_packed_bytes(s)) {
  const Engine engine(sizes_);
  const std::vector<Group> all = unrouted_groups(engine, sizes_, w);
  expert_bytes_ = engine.packed_bytes(all[0]);
  for (size_t e = 0; e < all.size(); ++e) engine.pack(all[e], memory_.data() + int64_t(e) * expert_bytes_);
  samples_ = samples(w);
}

void PackedWeights::check(const MoeSizes& s, const ExpertTable& w) const {
  const auto shape = [](const MoeSizes& m) { return std::make_tuple(m.H, m.E, m.I, m.Is, m.dtype, m.activation); };
  MOE_CHECK(shape(s) == shape(sizes_), "packed weights: made for other sizes, dtype or activation than this call's");
  MOE_CHECK(samples(w) == samples_, "packed weights: the weights have changed since they were packed");
}

}  // namespace moe
