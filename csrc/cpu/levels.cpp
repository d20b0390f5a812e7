// Which ISA level runs: the best this CPU has, or the one MOE_KERNELS_ISA names.
#include "levels.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "../core/error.h"
#include "kernels.h"

namespace moe {

Kernels table_portable();
Kernels table_avx2();
Kernels table_avx512();
Kernels table_avx512bf16();

namespace {

struct Level {
  const char* name;
  bool runs;
  Kernels (*table)();
};

std::vector<Level> all_levels() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return {{"avx512bf16", avx512 && __builtin_cpu_supports("avx512bf16"), table_avx512bf16},
          {"avx512", avx512, table_avx512},
          {"avx2", avx2, table_avx2},
          {"portable", true, table_portable}};
}

Kernels choose() {
  const char* forced = std::getenv("MOE_KERNELS_ISA");
  for (const Level& level : all_levels()) {
    if (forced && std::string(forced) != level.name) continue;
    MOE_CHECK(!forced || level.runs, "MOE_KERNELS_ISA=", forced, ": this CPU does not run it");
    if (level.runs) return level.table();
  }
  fail(__FILE__, "level", "MOE_KERNELS_ISA=", forced, ", expected avx512bf16, avx512, avx2 or portable");
}

}  // namespace

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : all_levels())
    if (level.runs) names.emplace_back(level.name);
  return names;
}

const Kernels& kernels() {
  static const Kernels table = choose();
  return table;
}

int64_t scratch_bytes(int64_t H, int64_t I) {
  constexpr int64_t kMaxPanel = 32, kMaxRows = 16, kMaxTilesPacked = 4, kSlack = 4096;
  const int64_t panel_bytes = blocking().panel_bytes;
  const int64_t whole_k_panel = (H > I ? H : I) * kMaxPanel * 4 * kPassPanels;
  const int64_t forward = (panel_bytes > whole_k_panel ? panel_bytes : whole_k_panel) + kSlack;
  const int64_t sums = (kGradFeatures + kMaxRows) * (panel_bytes / kChunkItems + kMaxPanel * 4);
  const int64_t grads = sums + panel_bytes + kMaxTilesPacked * (kMaxRows * kChunkItems + kMaxPanel) * 4 + kSlack;
  return forward > grads ? forward : grads;
}

}  // namespace moe
