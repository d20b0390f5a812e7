#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#ifdef MOE_STD_THREADS
#include <thread>
#include <vector>
#endif

namespace moe {
namespace {

// libgomp's pool does not survive fork(): a child would wait forever for threads that are not there.
std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

class FirstError {
 public:
  void capture() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace

void parallel_tasks(int threads, int64_t tasks, const std::function<void(int64_t, int)>& body) {
  const int team = forked ? 1 : int(std::min<int64_t>(std::max(threads, 1), tasks));
  if (team <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  FirstError error;
  const auto work = [&](int thread) {
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task, thread);
    } catch (...) {
      error.capture();
    }
  };
#ifdef MOE_STD_THREADS
  std::vector<std::thread> helpers;
  for (int thread = 1; thread < team; ++thread) helpers.emplace_back(work, thread);
  work(0);
  for (auto& helper : helpers) helper.join();
#else
  // Static schedule: iteration i runs on thread i, and a team smaller than asked for still runs every i.
#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int thread = 0; thread < team; ++thread) work(thread);
#endif
  error.rethrow();
}

void parallel_ranges(int threads, int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t pieces = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, std::max(threads, 1));
  parallel_tasks(threads, count > 0 ? pieces : 0,
                 [&](int64_t piece, int) { body(count * piece / pieces, count * (piece + 1) / pieces); });
}

}  // namespace moe
