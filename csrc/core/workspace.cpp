#include "workspace.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#include "error.h"

namespace moe {
namespace {

constexpr int64_t kHugePage = int64_t(1) << 21;

struct Block {
  char* data;
  int64_t capacity;
};

std::mutex pool_mutex;
std::vector<Block> pool;
int64_t pool_bytes = 0;

Block allocate(int64_t bytes) {
  const int64_t capacity = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* data = nullptr;
  MOE_CHECK(posix_memalign(&data, size_t(kHugePage), size_t(capacity)) == 0, "workspace: out of memory for ", bytes,
            " bytes");
  madvise(data, size_t(capacity), MADV_HUGEPAGE);
  pool_bytes += capacity;
  return {static_cast<char*>(data), capacity};
}

}  // namespace

Workspace::Workspace(int64_t bytes) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  Block block{nullptr, 0};
  if (!pool.empty()) {
    block = pool.back();
    pool.pop_back();
  }
  if (block.capacity < bytes) {
    std::free(block.data);
    pool_bytes -= block.capacity;
    block = allocate(bytes);
  }
  data_ = block.data;
  capacity_ = block.capacity;
}

Workspace::~Workspace() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  pool.push_back({data_, capacity_});
}

void* Workspace::take_bytes(int64_t bytes) {
  MOE_CHECK(used_ + padded(bytes) <= capacity_, "workspace: asked for ", bytes, " bytes, ", capacity_ - used_, " left");
  void* out = data_ + used_;
  used_ += padded(bytes);
  return out;
}

void advise_huge_pages(void* data, int64_t bytes) {
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kHugePage * kHugePage;
  if (data && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

int64_t workspace_bytes() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  return pool_bytes;
}

void release_workspace() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  for (const Block& block : pool) {
    std::free(block.data);
    pool_bytes -= block.capacity;
  }
  pool.clear();
}

}  // namespace moe
