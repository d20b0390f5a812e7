// What csrc/cuda/hopper.h wraps, on fibers: barriers with transactions, TMA boxes, wgmma with its descriptors, after
// the PTX manual. Copies and products happen at once (MOE_FIBER_ORDER=forward) or as late as the barriers allow: a
// missing wait shows in one of the two.
#pragma once
#include <deque>

#include "../cuda/products.h"
#include "ampere.h"

namespace moe::cuda::hopper {

struct TensorMap {
  Dtype dtype;
  const char* data;
  int64_t sizes[4], strides[4];
  int box[4];
};

inline TensorMap tensor_map(Dtype dtype, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[4],
                            const int (&box)[4]) {
  TensorMap map{dtype, static_cast<const char*>(data), {}, {}, {}};
  for (int i = 0; i < 4; ++i) map.sizes[i] = sizes[i], map.strides[i] = strides[i], map.box[i] = box[i];
  MOE_CHECK(box[0] * 2 == 128, "box: ", box[0], " elements a line, expected 64");
  for (int i = 0; i < 4; ++i) MOE_CHECK(box[i] <= 256 && sizes[i] > 0, "box or size out of range in dimension ", i);
  for (int i = 1; i < 4; ++i) MOE_CHECK(strides[i] % 8 == 0, "stride: ", strides[i], ", expected a multiple of 8");
  return map;
}

struct Barrier {
  int expected, pending;
  int64_t bytes;
  uint64_t phase;
  std::deque<std::function<void()>>* landing;  // copies on their way; the block owns them
};

inline void init(Barrier& b, int arrivals) {
  const auto landing = std::make_shared<std::deque<std::function<void()>>>();
  fibers::block()->owned.push_back(landing);
  b = {arrivals, arrivals, 0, 0, landing.get()};
}
inline void make_barriers_visible() {}
inline void end_phase(Barrier& b) {
  fibers::block()->progress = true;
  if (b.pending < 0) throw std::runtime_error("barrier: more arrivals than it expects");
  if (b.pending == 0 && b.bytes == 0) b.pending = b.expected, ++b.phase;
}
inline void arrive(Barrier& b) {
  --b.pending;
  end_phase(b);
}
inline void arrive_announcing(Barrier& b, int bytes) {
  b.bytes += bytes;
  arrive(b);
}
inline void land(Barrier& b, std::function<void()> copy) {
  if (late())
    b.landing->push_back(std::move(copy));
  else
    copy();
}
inline void wait(Barrier& b, int parity) {
  fibers::wait_until([&] {
    while (!b.landing->empty()) {
      const auto copy = b.landing->front();
      b.landing->pop_front();
      copy();
    }
    return int(b.phase & 1) != parity;
  });
}

inline void load_box(const TensorMap& map, Barrier& b, void* shared, int c0, int c1, int c2, int c3) {
  if (reinterpret_cast<uintptr_t>(shared) % 1024) throw std::runtime_error("load_box: not at a multiple of 1024 bytes");
  land(b, [&b, map, shared, c0, c1, c2, c3] {
    int line = 0;
    for (int i3 = 0; i3 < map.box[3]; ++i3)
      for (int i2 = 0; i2 < map.box[2]; ++i2)
        for (int i1 = 0; i1 < map.box[1]; ++i1, ++line)
          for (int i0 = 0; i0 < map.box[0]; ++i0) {
            const int64_t at[] = {c0 + i0, c1 + i1, c2 + i2, c3 + i3};
            int64_t offset = 0;
            bool live = true;
            for (int d = 0; d < 4; ++d)
              live = live && at[d] >= 0 && at[d] < map.sizes[d], offset += at[d] * map.strides[d];
            char* into = static_cast<char*>(shared) + line * 128 + ((i0 * 2) ^ (line % 8 * 16));
            live ? std::memcpy(into, map.data + offset * 2, 2) : std::memset(into, 0, 2);
          }
    b.bytes -= int64_t(line) * 128;
    end_phase(b);
  });
}

inline void arrive_after_chunks(Barrier& b) {
  land(b, [&b, mine = std::move(chunks().open)] {
    for (const Chunk& c : mine) c.copy();
    arrive(b);
  });
  chunks().open.clear();
}
inline void make_visible() {}

inline fibers::Meeting& named(int id, int threads) {
  fibers::Meeting& meeting = fibers::block()->named.at(id);
  if (meeting.expected && meeting.expected != threads) throw std::runtime_error("a named barrier of two sizes");
  meeting.expected = threads;
  return meeting;
}
inline void sync_threads(int id, int threads) { fibers::meet(named(id, threads)); }
inline void arrive_threads(int id, int threads) { fibers::arrive(named(id, threads)); }
template <int REGISTERS>
void release_registers() {}
template <int REGISTERS>
void acquire_registers() {}

inline uint64_t shared_address(const void* shared) {
  return uint64_t(static_cast<const char*>(shared) - fibers::dynamic_shared());
}

// Element (mn, k) of an operand that a descriptor describes, 128B swizzle, 16-bit elements.
template <class T, Summed LIES>
float element(uint64_t descriptor, int mn, int k) {
  const uint64_t start = (descriptor & 0x3FFF) << 4, lead = (descriptor >> 16 & 0x3FFF) << 4;
  const uint64_t stride = (descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1) throw std::runtime_error("descriptor: not of the 128B swizzle");
  const uint64_t plain = LIES == Summed::kInner ? start + mn / 8 * stride + mn % 8 * 128 + k * 2
                                                : start + mn / 64 * lead + k / 8 * stride + k % 8 * 128 + mn % 64 * 2;
  T value;
  std::memcpy(&value, fibers::dynamic_shared() + (plain ^ (plain >> 7 & 7) << 4), sizeof(T));
  return wide(value);
}

struct Products {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> batches;
};
inline Products& products() {  // of the current fiber
  static Products all[1024];
  return all[fibers::block()->current];
}
template <class T, int N, Summed A, Summed B>
void multiply(float (&sums)[N / 2], uint64_t a, uint64_t b) {
  const int thread = fibers::block()->current % 128;
  products().open.push_back([&sums, a, b, thread] {
    const int warp = thread / 32, lane = thread % 32;
    float rows[2][16];  // value 4 j + 2 h + i: row lane / 4 + 8 h of the warp's 16, column 8 j + 2 (lane % 4) + i
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 16; ++k) rows[h][k] = element<T, A>(a, 16 * warp + lane / 4 + 8 * h, k);
    for (int j = 0; j < N / 8; ++j)
      for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 16; ++k) {
          const float value = element<T, B>(b, 8 * j + 2 * (lane % 4) + i, k);
          for (int h = 0; h < 2; ++h) sums[4 * j + 2 * h + i] += rows[h][k] * value;
        }
  });
}
template <int COUNT>
void keep_order(float (&)[COUNT]) {}
inline void start() {}
inline void commit() {
  Products& mine = products();
  mine.batches.push_back(std::move(mine.open));
  mine.open.clear();
  if (late()) return;
  for (const auto& product : mine.batches.back()) product();
  mine.batches.back().clear();
}
template <int LEFT>
void wait_products() {
  Products& mine = products();
  for (; mine.batches.size() > LEFT; mine.batches.pop_front())
    for (const auto& product : mine.batches.front()) product();
  __syncwarp();  // the instruction is one of whole warps
}

}  // namespace moe::cuda::hopper
