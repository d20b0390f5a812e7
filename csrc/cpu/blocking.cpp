#include "blocking.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

#include "../core/error.h"

namespace moe {
namespace {

constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB;

int64_t reported(int name, int64_t otherwise) {
  const long bytes = sysconf(name);
  return bytes > 0 ? bytes : otherwise;
}

// The part that the first core shares: on AMD's processors sysconf sums all parts of the socket, 384 MiB of 32 each.
int64_t last_level() {
  std::ifstream size("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t kib = 0;
  char unit = 0;
  return size >> kib >> unit && kib > 0 && unit == 'K' ? kib * kKiB : reported(_SC_LEVEL3_CACHE_SIZE, 16 * kMiB);
}

}  // namespace

Caches caches() {
  if (const char* given = std::getenv("MOE_KERNELS_CACHES")) {
    std::istringstream in(given);
    Caches c{};
    char comma[2] = {}, rest = 0;
    in >> c.l1 >> comma[0] >> c.l2 >> comma[1] >> c.l3;
    MOE_CHECK(in && comma[0] == ',' && comma[1] == ',' && !(in >> rest) && c.l1 > 0 && c.l2 > 0 && c.l3 > 0,
              "MOE_KERNELS_CACHES=", given, ", expected the KiB of L1, L2 and L3, as in 32,512,32768");
    return {c.l1 * kKiB, c.l2 * kKiB, c.l3 * kKiB};
  }
  return {reported(_SC_LEVEL1_DCACHE_SIZE, 32 * kKiB), reported(_SC_LEVEL2_CACHE_SIZE, 512 * kKiB), last_level()};
}

Blocking blocking_for(const Caches& caches) {
  return {std::clamp(caches.l2 * 3 / 8, 64 * kKiB, 768 * kKiB), std::clamp(caches.l3 / 2, 4 * kMiB, 16 * kMiB)};
}

const Blocking& blocking() {
  static const Blocking sizes = blocking_for(caches());
  return sizes;
}

}  // namespace moe
