#include "workspace.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>

#include "error.h"

namespace moe {
namespace {

constexpr int64_t kHugePage = int64_t(1) << 21;

struct Pool {
  std::mutex mutex;
  std::multimap<int64_t, char*> kept;  // capacity -> block
  int64_t kept_bytes = 0, used_bytes = 0, most_used_bytes = 0;

  // The smallest kept block that holds `capacity` and is at most `largest`; null when there is none.
  char* reuse(int64_t& capacity, int64_t largest) {
    const auto found = kept.lower_bound(capacity);
    if (found == kept.end() || found->first > largest) return nullptr;
    char* data = found->second;
    capacity = found->first;
    kept.erase(found);
    kept_bytes -= capacity;
    return data;
  }
  void drop_smallest() {
    kept_bytes -= kept.begin()->first;
    std::free(kept.begin()->second);
    kept.erase(kept.begin());
  }
};

Pool& pool() {
  static Pool* instance = new Pool;  // never destroyed: tensors that own blocks may outlive static destructors
  return *instance;
}

char* allocate(int64_t capacity) {
  void* data = nullptr;
  MOE_CHECK(posix_memalign(&data, size_t(kHugePage), size_t(capacity)) == 0, "workspace: out of memory for ", capacity,
            " bytes");
  madvise(data, size_t(capacity), MADV_HUGEPAGE);
  return static_cast<char*>(data);
}

}  // namespace

Block::Block(int64_t bytes, bool brief)
    : bytes_(bytes), capacity_((std::max<int64_t>(bytes, 1) + kHugePage - 1) / kHugePage * kHugePage) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  data_ = p.reuse(capacity_, brief ? INT64_MAX : 2 * capacity_);
  if (!data_) data_ = allocate(capacity_);
  p.used_bytes += capacity_;
  p.most_used_bytes = std::max(p.most_used_bytes, p.used_bytes);
}

Block::~Block() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  p.used_bytes -= capacity_;
  p.kept_bytes += capacity_;
  p.kept.emplace(capacity_, data_);
  while (p.kept_bytes + p.used_bytes > p.most_used_bytes && !p.kept.empty()) p.drop_smallest();
}

void* Workspace::take_bytes(int64_t bytes) {
  MOE_CHECK(used_ + padded(bytes) <= padded(block_.bytes()), "workspace: asked for ", bytes, " bytes, ",
            block_.bytes() - used_, " left");
  void* out = block_.data() + used_;
  used_ += padded(bytes);
  return out;
}

int64_t workspace_bytes() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  return p.kept_bytes;
}

void release_workspace() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  while (!p.kept.empty()) p.drop_smallest();
  p.most_used_bytes = p.used_bytes;
}

}  // namespace moe
