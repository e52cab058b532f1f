// How the columns of a map are laid out in lanes: built once per call, read by every item.
#pragma once

#include <memory>
#include <vector>

#include "problem.h"

namespace nat_dense {

class Plan {
 public:
  // At most `width` query positions make a segment; `lanes` and `slots` are those of the kernels. The backward pass
  // alone asks for viewers.
  Plan(const Axis& columns, int64_t lanes, int64_t slots, int64_t width, bool viewers);

  // Sets the call's segments, which live as long as the plan.
  void describe(Call* call) const;

 private:
  // A column of the map at its position as a query: sorted by dilation group, then by place.
  struct Query {
    int64_t column;
    int64_t first;  // position of the first key of its window
    int64_t limit;  // real keys of its window
    int64_t bias;   // bias column of its first key, but for the shift of a copy: see `bias()`
  };
  // The same as a key. At the ends of an axis without dilation stand copies of the columns one window further in: where
  // a window has shifted, it is still the keys around its query, in another order.
  struct Key {
    int64_t column;
    int64_t shift;  // positions from a copy to the key itself, else 0
  };

  void sort_columns(const Axis& columns);
  int64_t bias(const Query& query, int64_t window_column) const;
  void add_segment(int64_t begin, int64_t end, bool viewers);
  void add_tiles(int64_t begin, int64_t end, int64_t key_begin, Segment* segment);
  void add_viewers(int64_t begin, int64_t end, int64_t key_begin, Segment* segment);
  template <class T>
  T* keep(std::vector<T> table);

  const int64_t kernel_, lanes_, slots_;
  int64_t query_stride_ = 0, key_stride_ = 0;
  std::vector<Query> queries_;
  std::vector<Key> keys_;
  std::vector<int64_t> query_column_, key_column_;
  std::vector<Segment> segments_;
  std::vector<std::shared_ptr<void>> tables_;
};

}  // namespace nat_dense
