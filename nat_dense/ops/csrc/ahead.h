// Fetches the tokens of the next block of rows while the present one is computed.
#pragma once

#include "problem.h"
#include "vec_generic.h"

namespace nat_dense {
namespace {

// Tokens of one head lie hundreds of bytes apart, further than hardware prefetchers follow: without this the packing
// of rows waits for memory as long as all arithmetic takes. Asking for all of them at once would wait as well, for
// free miss registers, so a few are asked for at every step.
class Ahead {
 public:
  // Forgets the last block. The coming one makes `steps` calls of `step`.
  void start(int64_t steps) {
    count_ = row_ = 0;
    position_ = tokens_ = at_once_ = 0;
    steps_ = max_of(steps, 1);
  }

  // The tokens of a map row and head in these columns, `size` bytes per element.
  void add(const Map& map, int64_t size, int64_t batch, int64_t token_row, int64_t head, const int64_t* columns,
           int64_t count) {
    if (count_ == kMostRows) return;
    const int64_t offset = batch * map.batch + token_row * map.row + head * map.head;
    rows_[count_++] = {static_cast<const char*>(map.data) + offset * size, map.column * size, columns, count};
    tokens_ += count;
    at_once_ = ceil_div(tokens_, steps_);
  }

  NAT_DENSE_INLINE void step(int64_t token_bytes) {
#if defined(__GNUC__)
    int64_t left = at_once_;
    while (left > 0 && row_ < count_) {
      const Row& row = rows_[row_];
      const int64_t end = min_of(position_ + left, row.count);
      for (int64_t i = position_; i < end; ++i) {
        const char* token = row.data + row.columns[i] * row.stride;
        for (int64_t b = 0; b < token_bytes; b += 64) __builtin_prefetch(token + b, 0, 3);
      }
      left -= end - position_;
      position_ = end;
      if (end == row.count) ++row_, position_ = 0;
    }
#endif
  }

 private:
  static constexpr int kMostRows = 48;
  struct Row {
    const char* data;
    int64_t stride;
    const int64_t* columns;
    int64_t count;
  };
  Row rows_[kMostRows];
  int count_ = 0, row_ = 0;
  int64_t position_ = 0, tokens_ = 0, steps_ = 1, at_once_ = 0;
};

}  // namespace
}  // namespace nat_dense
