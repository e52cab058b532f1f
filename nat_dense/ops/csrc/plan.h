// How the columns of a map are laid out in lanes: built once per call, read by every item.
#pragma once

#include <memory>
#include <vector>

#include "problem.h"

namespace nat_dense {

class Plan {
 public:
  // At most `width` query positions make a segment; `lanes` and `slots` are those of the kernels.
  Plan(const Axis& columns, int64_t lanes, int64_t slots, int64_t width);

  // Sets the call's segments, which live as long as the plan.
  void describe(Call* call) const;

 private:
  // A column of the map at its position: sorted by dilation group, then by place.
  struct Position {
    int64_t column;
    int64_t first;  // position of the first key of its window
    int64_t limit;  // real keys of its window
    int64_t bias;   // bias column of its first key
  };

  void sort_columns(const Axis& columns);
  void add_segment(int64_t begin, int64_t end);
  void add_tiles(int64_t begin, int64_t end, int64_t key_begin, Segment* segment);
  void add_viewers(int64_t begin, int64_t end, int64_t key_begin, Segment* segment);
  template <class T>
  T* keep(std::vector<T> table);

  const int64_t kernel_, lanes_, slots_;
  int64_t query_stride_ = 0, key_stride_ = 0;
  std::vector<Position> positions_;
  std::vector<int64_t> column_;
  std::vector<Segment> segments_;
  std::vector<std::shared_ptr<void>> tables_;
};

}  // namespace nat_dense
