// Scratch memory that survives between calls: fresh pages cost more than the kernels that fill them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace moe {

// A leased block of scratch memory, 64-byte aligned; returned to the pool when the lease ends. Thread safe.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Take the next `count` elements of T, 64-byte aligned; throws when the block is exhausted.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * int64_t(sizeof(T))));
  }
  static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  void* take_bytes(int64_t bytes);
  char* data_;
  int64_t capacity_;
  int64_t used_ = 0;
};

// Ask for huge pages under a large fresh buffer: a 4 KiB page fault costs more than the stores that fill the page.
void advise_huge_pages(void* data, int64_t bytes);

int64_t workspace_bytes();    // held by the pool, leased or not
void release_workspace();     // give unleased blocks back to the system

}  // namespace moe
