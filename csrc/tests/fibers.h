// CUDA C++ on a CPU, for tests: one fiber per CUDA thread, blocks one after another. Covers what the kernels of
// csrc/cuda use: shared memory, barriers, shuffles, votes, matches. Not covered: memory-model races, atomics between
// blocks, speed.
// MOE_FIBER_ORDER: in which order the threads of a block run. forward, reverse: a warp as far as it gets, the first or
// the last one first; shuffled: all threads in turn, each to its next barrier. none: no kernel does anything, for
// bench/gpu/issuing.py.
#pragma once
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define MOE_FIBER_ASAN 1
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace moe::fibers {

constexpr size_t kStack = 128 * 1024;
constexpr int kLanes = 32;

// A stack that can be left and come back to. On x86-64 by hand: swapcontext makes two system calls a switch.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};
extern "C" void moe_fiber_switch(Context* from, const Context* to);
asm(R"(
.text
.weak moe_fiber_switch
.type moe_fiber_switch, @function
moe_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size moe_fiber_switch, .-moe_fiber_switch
)");
inline void start_at(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + kStack) / 16 * 16);
  std::fill(top - 8, top, nullptr);  // six registers, the entry, and what it would return to
  top[-2] = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - 8;
}
#else
using Context = ucontext_t;
inline void moe_fiber_switch(Context* from, const Context* to) { swapcontext(from, to); }
inline void start_at(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack = {stack, 0, kStack};
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// A barrier of `expected` threads that is used again and again.
struct Meeting {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  bool done = false;
  bool waited = false;  // for the kernel before
  void* fake_stack = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  Context scheduler;
  void* scheduler_fake = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  const std::function<void()>* body = nullptr;
  std::string failure;
  int current = 0;
  bool progress = false;
  dim3 grid, index;
  Meeting everyone;
  std::vector<Meeting> warps;
  std::vector<std::array<uint64_t, kLanes>> slots;  // what the lanes of a warp show each other
  std::vector<Meeting> named = std::vector<Meeting>(16);
  std::vector<char> dynamic;
  std::vector<std::shared_ptr<void>> owned;  // what objects in shared memory point to: nobody destroys those
};

inline Block*& block() {
  static Block* current = nullptr;
  return current;
}
struct Index {
  unsigned x, y = 0, z = 0;
};
inline Index thread_index() { return {unsigned(block()->current)}; }

inline void to_scheduler([[maybe_unused]] bool last) {
  Block& b = *block();
  Fiber& mine = b.fibers[b.current];
#ifdef MOE_FIBER_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &mine.fake_stack, b.scheduler_stack, b.scheduler_size);
#endif
  moe_fiber_switch(&mine.context, &b.scheduler);
#ifdef MOE_FIBER_ASAN
  __sanitizer_finish_switch_fiber(mine.fake_stack, nullptr, nullptr);
#endif
}

inline void run_fiber() {
  Block& b = *block();
#ifdef MOE_FIBER_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_size);
#endif
  try {
    (*b.body)();
  } catch (const std::exception& error) {
    b.failure = error.what();
  }
  b.fibers[b.current].done = true;
  b.progress = true;
  to_scheduler(true);
}

// Let the others run until `ready`.
template <class Ready>
void wait_until(const Ready& ready) {
  while (!ready()) to_scheduler(false);
  block()->progress = true;
}

inline void arrive(Meeting& meeting) {
  block()->progress = true;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
}

inline void meet(Meeting& meeting) {
  const uint64_t mine = meeting.generation;
  arrive(meeting);
  wait_until([&] { return meeting.generation != mine; });
}

struct Order {
  std::vector<int> threads;
  int together;
};

inline Order order_of(int threads) {
  Order order{std::vector<int>(threads), kLanes};
  for (int i = 0; i < threads; ++i) order.threads[i] = i;
  const char* wanted = std::getenv("MOE_FIBER_ORDER");
  const std::string name = wanted ? wanted : "forward";
  if (name == "reverse")
    std::reverse(order.threads.begin(), order.threads.end());
  else if (name == "shuffled")
    std::shuffle(order.threads.begin(), order.threads.end(), std::mt19937(threads)), order.together = threads;
  else if (name != "forward")
    throw std::runtime_error("MOE_FIBER_ORDER: '" + name + "', expected forward, reverse or shuffled");
  return order;
}

inline void resume(Block& b, int thread) {
  b.current = thread;
  Fiber& fiber = b.fibers[thread];
#ifdef MOE_FIBER_ASAN
  __sanitizer_start_switch_fiber(&b.scheduler_fake, fiber.stack, kStack);
#endif
  moe_fiber_switch(&b.scheduler, &fiber.context);
#ifdef MOE_FIBER_ASAN
  __sanitizer_finish_switch_fiber(b.scheduler_fake, nullptr, nullptr);
#endif
}

inline char* aligned_1024(std::vector<char>& bytes) {
  return bytes.data() + (1024 - reinterpret_cast<uintptr_t>(bytes.data()) % 1024) % 1024;
}

// Fill the dynamic shared memory with NaN; what lies behind it is not the kernel's.
inline void poison_shared(Block& b, size_t shared) {
  if (b.dynamic.empty()) b.dynamic.resize(shared + 1024);
  std::memset(aligned_1024(b.dynamic), 0xFF, shared);
#ifdef MOE_FIBER_ASAN
  ASAN_POISON_MEMORY_REGION(aligned_1024(b.dynamic) + shared,
                            size_t(b.dynamic.data() + b.dynamic.size() - aligned_1024(b.dynamic)) - shared);
#endif
}

inline char* stack_of(int thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (int(stacks.size()) <= thread) stacks.emplace_back(new char[kStack]);
  return stacks[thread].get();
}

// Resume the `together` threads from `first` on, in turn, until none gets any further.
inline bool run_some(Block& b, const Order& order, int first, bool& alive) {
  bool moved = false;
  do {
    b.progress = false;
    for (int i = first; i < first + order.together; ++i)
      if (!b.fibers[order.threads[i]].done) resume(b, order.threads[i]);
    moved |= b.progress;
  } while (b.progress && b.failure.empty());
  for (int i = first; i < first + order.together; ++i) alive |= !b.fibers[order.threads[i]].done;
  return moved;
}

inline void run_to_the_end(Block& b, const Order& order) {
  for (bool alive = true; alive;) {
    bool moved = alive = false;
    for (int first = 0; first < int(order.threads.size()); first += order.together)
      moved |= run_some(b, order, first, alive);
    if (!b.failure.empty()) throw std::runtime_error(b.failure);
    if (alive && !moved)
      throw std::runtime_error("deadlock: threads of a block wait at barriers that the others never reach");
  }
}

inline void run_block(Block& b, int threads, size_t shared) {
  b.everyone = {threads, 0, 0};
  b.warps.assign(threads / kLanes, {kLanes, 0, 0});
  b.named.assign(16, {});
  poison_shared(b, shared);
  for (Fiber& fiber : b.fibers) {
    fiber.done = fiber.waited = false;
#ifdef MOE_FIBER_ASAN
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStack);  // frames that were left for good
#endif
    start_at(fiber.context, fiber.stack, run_fiber);
  }
  run_to_the_end(b, order_of(threads));
}

inline int64_t& launches() {  // since the program began
  static int64_t count = 0;
  return count;
}

inline void launch(dim3 grid, int threads, size_t shared, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  ++launches();
  if (threads <= 0 || threads > 1024 || threads % kLanes)
    throw std::runtime_error("launch: " + std::to_string(threads) + " threads, expected whole warps, at most 1024");
  if (const char* wanted = std::getenv("MOE_FIBER_ORDER"); wanted && std::string(wanted) == "none") return;
  Block b;
  b.fibers.resize(threads);
  for (int thread = 0; thread < threads; ++thread) b.fibers[thread].stack = stack_of(thread);
  b.slots.resize(threads / kLanes);
  b.body = &body, b.grid = grid;
  block() = &b;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        b.index = dim3(x, y, z);
        run_block(b, threads, shared);
      }
  block() = nullptr;
}

inline char* dynamic_shared() { return aligned_1024(block()->dynamic); }

// Every lane shows its value; read(slots) takes what this lane wants to see.
template <class T, class Read>
auto exchange(T value, const Read& read) {
  static_assert(sizeof(T) <= 8);
  Block& b = *block();
  const int warp = b.current / kLanes, lane = b.current % kLanes;
  std::memcpy(&b.slots[warp][lane], &value, sizeof(T));
  meet(b.warps[warp]);
  const auto result = read([&](int from) {
    T seen;
    std::memcpy(&seen, &b.slots[warp][from & (kLanes - 1)], sizeof(T));
    return seen;
  });
  meet(b.warps[warp]);
  return result;
}

// csrc/cuda/device.h says who has to.
inline void wait_for_predecessor() { block()->fibers[block()->current].waited = true; }
inline void expect_waited() {
  if (!block()->fibers[block()->current].waited)
    throw std::runtime_error("thread " + std::to_string(block()->current) + " ends without wait_for_predecessor");
}

inline int lane() { return block()->current % kLanes; }
inline void expect_all_lanes(unsigned mask) {
  if (mask != 0xFFFFFFFFu) throw std::runtime_error("a warp operation of some lanes only");
}

}  // namespace moe::fibers

#define threadIdx (::moe::fibers::thread_index())
#define blockIdx (::moe::fibers::block()->index)
#define gridDim (::moe::fibers::block()->grid)
#define blockDim (dim3(unsigned(::moe::fibers::block()->fibers.size())))
#define MOE_DYNAMIC_SHARED(name) char* name = ::moe::fibers::dynamic_shared()

inline void __syncthreads() { moe::fibers::meet(moe::fibers::block()->everyone); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  moe::fibers::expect_all_lanes(mask);
  moe::fibers::meet(moe::fibers::block()->warps[moe::fibers::block()->current / moe::fibers::kLanes]);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  moe::fibers::expect_all_lanes(mask);
  return moe::fibers::exchange(value, [&](const auto& of) { return of(from); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, moe::fibers::lane() ^ distance);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = moe::fibers::lane();
  return __shfl_sync(mask, value, lane < distance ? lane : lane - distance);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int lane = moe::fibers::lane();
  return __shfl_sync(mask, value, lane + distance >= moe::fibers::kLanes ? lane : lane + distance);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  moe::fibers::expect_all_lanes(mask);
  return moe::fibers::exchange(predicate, [](const auto& of) {
    unsigned bits = 0;
    for (int lane = 0; lane < moe::fibers::kLanes; ++lane) bits |= unsigned(of(lane) != 0) << lane;
    return bits;
  });
}
inline unsigned __match_any_sync(unsigned mask, int value) {
  moe::fibers::expect_all_lanes(mask);
  return moe::fibers::exchange(value, [value](const auto& of) {
    unsigned bits = 0;
    for (int lane = 0; lane < moe::fibers::kLanes; ++lane) bits |= unsigned(of(lane) == value) << lane;
    return bits;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
// The approximations: what they are asked for, 0 where the GPU's divisor is too large for its reciprocal.
inline float __fdividef(float a, float b) {
  return std::fabs(b) > 0x1p126f && std::fabs(b) <= 0x1.fffffep127f ? a * 0.0f : a * (1.0f / b);
}
using std::max;
using std::min;
