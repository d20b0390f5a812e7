#include "peak.h"

#include <time.h>

#include <numeric>
#include <vector>

#include "../core/threads.h"
#include "kernels.h"

namespace moe {
namespace {

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

}  // namespace

double peak_gflops(Dtype dtype, int threads, double seconds) {
  std::vector<double> rates(size_t(threads), 0.0);
  const auto loop = kernels().peak[int(dtype)];
  parallel_tasks(threads, threads, [&](int64_t task, int) {
    double flops = 0, elapsed = 0;
    for (const double start = thread_seconds(); elapsed < seconds; elapsed = thread_seconds() - start)
      flops += loop(100000);
    rates[size_t(task)] = 1e-9 * flops / elapsed;
  });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

}  // namespace moe
