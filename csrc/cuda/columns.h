// How the vectors of a row are cut among the threads of blocks: each thread keeps its columns for all its tokens.
#pragma once
#include "device.h"

namespace moe::cuda {

struct Columns {
  int threads;      // of a block, whole warps
  unsigned blocks;  // that share a row
};

// The fewest blocks of at most `most` threads, equally wide.
inline Columns cut_columns(int64_t vectors, int most) {
  const int64_t blocks = ceil_div(vectors, most);
  return {int(ceil_div(ceil_div(vectors, blocks > 0 ? blocks : 1), kWarp)) * kWarp, unsigned(blocks)};
}

}  // namespace moe::cuda
