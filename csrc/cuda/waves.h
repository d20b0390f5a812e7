// How evenly the tiles of a product fall on persistent blocks, which the width of a tile decides.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

#include "device.h"

namespace moe::cuda {

// Tiles of a product: so many of 128 rows in m, over so many columns, at a cost each.
struct Area {
  int64_t m_tiles, columns;
  double cost;
};
using Areas = std::array<Area, 2>;

// What the busiest of so many blocks does that take tiles of so many columns in turn. Blocks do alike up to where the
// first tiles end, and up to where all end.
inline double busiest(const Areas& areas, int columns, int blocks) {
  const int64_t first = areas[0].m_tiles * ceil_div(areas[0].columns, columns);
  const int64_t all = first + areas[1].m_tiles * ceil_div(areas[1].columns, columns);
  double most = 0;
  for (const int64_t block : {int64_t(0), first % blocks, all % blocks}) {
    const int64_t firsts = ceil_div(std::max<int64_t>(first - block, 0), blocks);
    const int64_t mine = ceil_div(std::max<int64_t>(all - block, 0), blocks);
    most = std::max(most, firsts * areas[0].cost + (mine - firsts) * areas[1].cost);
  }
  return most;
}

}  // namespace moe::cuda
