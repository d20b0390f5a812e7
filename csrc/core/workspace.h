// Memory that survives between calls: fresh pages cost more than the kernels that fill them (10 % of a backward).
#pragma once
#include <cstddef>
#include <cstdint>

namespace moe {

// A block of memory out of one pool, on huge pages, 64-byte aligned; goes back to the pool when it dies. Thread safe.
// The pool keeps no more than was in use at once at the worst moment: it does not raise the process's peak.
// A brief block, gone when the call ends, may be a kept one of any size; others waste at most half of theirs.
class Block {
 public:
  explicit Block(int64_t bytes, bool brief = false);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_;
  int64_t bytes_, capacity_;
};

// Scratch memory of one call: a block, handed out piece by piece.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : block_(bytes, true) {}

  // Take the next `count` elements of T, 64-byte aligned; throws when the block is exhausted.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * int64_t(sizeof(T))));
  }
  static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  void* take_bytes(int64_t bytes);
  Block block_;
  int64_t used_ = 0;
};

int64_t workspace_bytes();  // kept by the pool for later calls
void release_workspace();   // give them back to the system

}  // namespace moe
