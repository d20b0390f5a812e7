// The caller's workspace, handed out piece by piece; without memory it only counts.
#pragma once
#include <cstdint>

namespace moe::cuda {

class Scratch {
 public:
  explicit Scratch(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  // The next `count` elements, 256-byte aligned; null while counting.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * int64_t(sizeof(T))));
  }
  void* take_bytes(int64_t bytes) {
    void* out = memory_ ? memory_ + used_ : nullptr;
    used_ += (bytes + 255) / 256 * 256;
    return out;
  }
  int64_t bytes() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace moe::cuda
