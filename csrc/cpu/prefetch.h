// Memory traffic hidden under the multiplications: the micro-kernel prefetches one line per k step along "streams".
#pragma once
#include "simd.h"

namespace moe {
namespace MOE_LEVEL {
namespace {

constexpr int64_t kLine = 64;
constexpr int kStreamLines = 16;  // prefetches of one stream

struct Stream {
  const char* at;
  int64_t step;  // bytes
};

// The streams of one micro-kernel call. More than it has steps for are forgotten: prefetches are only hints.
class Streams {
 public:
  // Every line of `rows` <= kStreamLines rows of `bytes` bytes, `stride` bytes apart.
  void rows(const void* first, int64_t stride, int64_t bytes) {
    const char* line = static_cast<const char*>(first);
    const int64_t lines = (bytes + kLine - 1) / kLine;
    for (int64_t l = 0; l < lines; ++l) add({line + l * kLine, stride});
  }
  void add(Stream stream) {
    if (count_ < kMost) list_[count_++] = stream;
  }
  int count() const { return count_; }
  const Stream* list() const { return list_; }

 private:
  static constexpr int kMost = 64;
  Stream list_[kMost];
  int count_ = 0;
};

// A block of memory that later calls read, brought into L2 evenly by the calls before: packing straight from memory
// costs a quarter of the time at 64 rows per expert.
class Ahead {
 public:
  Ahead() = default;
  explicit Ahead(int64_t calls) : calls_(calls) {}
  // `rows` rows of `bytes` bytes, `stride` bytes apart.
  void block(const void* first, int64_t stride, int64_t rows, int64_t bytes) {
    const int64_t lines = (bytes + kLine - 1) / kLine;
    if (rows > 0 && lines > 0)
      add({static_cast<const char*>(first), lines, stride, lines * ((rows + kStreamLines - 1) / kStreamLines)});
  }
  void contiguous(const void* first, int64_t bytes) {
    if (bytes > 0)
      add({static_cast<const char*>(first), 0, kLine, (bytes + kStreamLines * kLine - 1) / (kStreamLines * kLine)});
  }
  // Add this call's share to its streams.
  void share(Streams& streams) {
    const int64_t until = total_ * ++call_ / calls_;
    for (; next_ < until; ++next_, ++within_) {
      if (within_ == pieces_[piece_].streams) ++piece_, within_ = 0;
      streams.add(pieces_[piece_].stream(within_));
    }
  }

 private:
  static constexpr int kMost = 8;  // pieces; more are forgotten
  struct Piece {
    const char* first;
    int64_t lines, stride, streams;
    Stream stream(int64_t i) const {
      if (lines == 0) return {first + i * kStreamLines * kLine, kLine};
      return {first + i / lines * kStreamLines * stride + i % lines * kLine, stride};
    }
  };
  void add(Piece piece) {
    if (count_ < kMost) pieces_[count_++] = piece, total_ += piece.streams;
  }

  Piece pieces_[kMost];
  int count_ = 0, piece_ = 0;
  int64_t calls_ = 1, call_ = 0, next_ = 0, within_ = 0, total_ = 0;
};

}  // namespace
}  // namespace MOE_LEVEL
}  // namespace moe
