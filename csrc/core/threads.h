// Parallel loops over independent tasks. Each task writes its own outputs in its own fixed order,
// so results do not depend on the number of threads or on who takes which task.
#pragma once
#include <cstdint>
#include <functional>

namespace moe {

// Run body(task, thread) for every task in [0, tasks) on at most `threads` threads, thread in [0, threads).
// OpenMP (the pool torch already owns); std::thread in sanitizer builds, which libgomp would blind.
void parallel_tasks(int threads, int64_t tasks, const std::function<void(int64_t task, int thread)>& body);

// Run body(begin, end) over [0, count) cut into at most `threads` contiguous ranges of at least `grain`.
void parallel_ranges(int threads, int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace moe
