// How much of a product is in flight: sizes computed from this machine's caches.
#pragma once
#include <cstdint>

namespace moe {

// Bytes: of a core's data caches, and of the last one, which cores share.
struct Caches {
  int64_t l1, l2, l3;
};

// What this machine says (sysconf, /sys); MOE_KERNELS_CACHES="32,512,32768", in KiB, overrides it.
Caches caches();

struct Blocking {
  int64_t panel_bytes;  // packed panels of one task, which stay in L2
  int64_t wave_bytes;   // activations in flight, which stay in L3
};

// panel_bytes = 3/8 of L2, from 64 to 768 KiB: the rows, their results and the weights fetched ahead take the rest.
// wave_bytes = L3 / 2, from 4 to 16 MiB. Bounded, since virtual machines may report what is not there, or not theirs.
Blocking blocking_for(const Caches& caches);

// blocking_for(caches()), computed once.
const Blocking& blocking();

}  // namespace moe
