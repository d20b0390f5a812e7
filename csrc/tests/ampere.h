// What csrc/cuda/ampere.h wraps, on fibers, after the PTX manual. Copies land at once (MOE_FIBER_ORDER=forward) or when
// they are waited for.
#pragma once
#include <deque>

#include "../cuda/device.h"

namespace moe::cuda {

inline bool late() {
  const char* order = std::getenv("MOE_FIBER_ORDER");
  return order && std::string(order) != "forward";
}

struct Chunk {
  char* into;
  const char* from;
  bool live;
  void copy() const { live ? std::memcpy(into, from, 16) : std::memset(into, 0, 16); }
};
struct Chunks {
  std::vector<Chunk> open;
  std::deque<std::vector<Chunk>> groups;
};
inline Chunks& chunks() {  // of the current fiber, under way
  static Chunks all[1024];
  return all[fibers::block()->current];
}
inline void load_chunk(void* shared, const void* global, bool live) {
  chunks().open.push_back({static_cast<char*>(shared), static_cast<const char*>(global), live});
}
inline void commit_chunks() {
  Chunks& mine = chunks();
  if (!late())
    for (const Chunk& chunk : mine.open) chunk.copy();
  mine.groups.push_back(late() ? std::move(mine.open) : std::vector<Chunk>{});
  mine.open.clear();
}
template <int LEFT>
void wait_chunks() {
  for (auto& groups = chunks().groups; groups.size() > LEFT; groups.pop_front())
    for (const Chunk& chunk : groups.front()) chunk.copy();
}

// What the lanes of a warp show each other: pointers, or the fragments of a product.
struct Fragments {
  const char* row;
  unsigned a[4], b[2];
};
template <class Read>
void show(const Fragments& mine, const Read& read) {
  static Fragments all[32][fibers::kLanes];
  fibers::Block& block = *fibers::block();
  Fragments(&seen)[fibers::kLanes] = all[block.current / fibers::kLanes];
  seen[fibers::lane()] = mine;
  __syncwarp();
  read(seen);
  __syncwarp();
}

inline void load_matrices(unsigned (&to)[4], const void* row) {
  show({static_cast<const char*>(row), {}, {}}, [&](const Fragments* lanes) {
    const int lane = fibers::lane();
    for (int i = 0; i < 4; ++i) std::memcpy(&to[i], lanes[8 * i + lane / 4].row + lane % 4 * 4, 4);
  });
}
inline void load_transposed(unsigned (&to)[4], const void* row) {
  show({static_cast<const char*>(row), {}, {}}, [&](const Fragments* lanes) {
    const int lane = fibers::lane();
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half)
        std::memcpy(reinterpret_cast<char*>(&to[i]) + 2 * half, lanes[8 * i + lane % 4 * 2 + half].row + lane / 4 * 2,
                    2);
  });
}

// Element k of a row of a fragment, of which the quad lanes[0..3] hold the words `low` (first 16 bytes) and `high`.
template <class T>
float element(const unsigned (&low)[4], const unsigned (&high)[4], int k) {
  constexpr int kPerWord = 4 / int(sizeof(T));
  T values[8 * kPerWord];
  std::memcpy(values, low, 16);
  std::memcpy(values + 4 * kPerWord, high, 16);
  return wide(values[k]);
}
template <class T>
void multiply(float* sums, const unsigned (&a)[4], const unsigned* b) {
  show({nullptr, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, [&](const Fragments* lanes) {
    const int lane = fibers::lane();
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4, col = lane % 4 * 2 + i % 2, h = i / 2;
      unsigned a_low[4], a_high[4], b_low[4], b_high[4];
      for (int q = 0; q < 4; ++q) {
        a_low[q] = lanes[4 * row + q].a[h], a_high[q] = lanes[4 * row + q].a[2 + h];
        b_low[q] = lanes[4 * col + q].b[0], b_high[q] = lanes[4 * col + q].b[1];
      }
      for (int k = 0; k < 32 / int(sizeof(T)); ++k)
        sums[i] += element<T>(a_low, a_high, k) * element<T>(b_low, b_high, k);
    }
  });
}

inline unsigned round_tf32(unsigned bits) { return (bits + 0x1000u) & 0xFFFFE000u; }

}  // namespace moe::cuda
