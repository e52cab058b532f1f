// What the forward and the backward pass share: scratch memory, rows of keys, and the padded part of a window.
#pragma once

#include <initializer_list>
#include <limits>

#include "micro.h"

namespace nat_dense {
namespace {

constexpr double kLog2E = 1.4426950408889634;  // logits are kept times log2(e): their exponential is 2^x
constexpr double kLn2 = 0.6931471805599453;
constexpr int64_t kSlack = 32;  // elements that a Window may read past the end of a packed row

// Hands out scratch memory. Over address 0 it only counts what is needed.
class Arena {
 public:
  explicit Arena(void* memory) : base_(reinterpret_cast<uintptr_t>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t base_;
  int64_t used_ = 0;
};

// The last few rows of a row group, packed: a row stays in the slot of its place.
template <class T>
struct Ring {
  T* data;
  int64_t slots, row;

  Ring(Arena& arena, int64_t slots, int64_t row)
      : data(arena.take<T>(slots * row + kSlack)), slots(slots), row(row) {}
  T* at(int64_t place) const { return data + place % slots * row; }
};

// The first token of one place of an item's row group.
template <class S>
S* row_of(const Group& rows, const Item& item, const Map& map, int64_t place) {
  S* head = static_cast<S*>(map.data) + item.batch * map.batch + item.head * map.head;
  return head + rows.token(place) * map.row;
}

// The log-sum-exp of the first token of one place; those of other columns are call.heads further each. Null where nobody
// wants them.
template <class T>
T* lse_of(const Call& call, const Group& rows, const Item& item, int64_t place) {
  if (!call.lse) return nullptr;
  const int64_t row = item.batch * call.rows.length + rows.token(place);
  return static_cast<T*>(call.lse) + row * call.columns.length * call.heads + item.head;
}

// The tokens of one place of an item's row group, in these columns; `cold`: in memory, for all that is known.
template <class S>
Tokens<S> tokens_of(const Call& call, const Group& rows, const Item& item, const Map& map, int64_t place,
                    const int64_t* columns, int64_t count, bool cold) {
  S* next = place + 1 < rows.real ? row_of<S>(rows, item, map, place + 1) : nullptr;
  const int64_t bytes = call.dim * static_cast<int64_t>(sizeof(S));
  const int64_t ahead = cold && call.fetch ? max_of(4096 / bytes, 1) : 0;  // 4 KiB
  return {row_of<S>(rows, item, map, place), next, map.column, columns, count, call.dim, call.columns.dilation, ahead};
}

// Consecutive query rows of one row group, and the key rows that their windows cover.
class RowBlock {
 public:
  static constexpr int kMostRows = 4;
  static constexpr int kMostPlaces = int{kLargestKernel} + kMostRows - 1;

  RowBlock(const Group& rows, int64_t begin, int64_t end, int most)
      : begin(begin), count(static_cast<int>(min_of(most, end - begin))), kernel_(rows.kernel) {
    for (int r = 0; r < count; ++r) {
      start_[r] = rows.start(begin + r);
      limit_[r] = rows.limit(begin + r);
    }
    low = start_[0];
    high = start_[count - 1] + limit_[count - 1];
    for (int64_t place = low; place < high; ++place) {
      int first = 0, last = count;
      while (start_[first] + kernel_ <= place) ++first;
      while (start_[last - 1] > place) --last;
      first_[place - low] = first, last_[place - low] = last;
    }
  }

  const int64_t begin;
  const int count;
  int64_t low, high;  // key places

  int64_t start(int r) const { return start_[r]; }
  int64_t limit(int r) const { return limit_[r]; }
  // Bias row of the first window row of query row r.
  int64_t bias(int r) const { return start_[r] - (begin + r) + kernel_ - 1; }
  // Query rows [first, last) have key row `place` in their windows.
  int first(int64_t place) const { return first_[place - low]; }
  int last(int64_t place) const { return last_[place - low]; }

 private:
  const int64_t kernel_;
  int64_t start_[kMostRows], limit_[kMostRows];
  int first_[kMostPlaces], last_[kMostPlaces];
};

// The rows of a ring that a block of query rows sees, found once: finding one divides.
template <class T>
struct RowsOf {
  const T* row[RowBlock::kMostPlaces];

  RowsOf(const RowBlock& block, const Ring<T>& ring) {
    for (int64_t place = block.low; place < block.high; ++place) row[place - block.low] = ring.at(place);
  }
};

// Rows of tokens that will be needed, on their way to the caches while products are computed: a row with each key row of
// a product, and of it as many tokens as a tile has columns.
template <class V, class S>
class NextRows {
 public:
  NextRows(const Call& call, const Group& rows, const Item& item, Arena& arena, std::initializer_list<const Map*> maps)
      : call_(call), group_(rows), item_(item) {
    for (const Map* map : maps) sources_[count_++] = {map, arena.take<int64_t>(call.dim)};
  }

  // Fills the tables: when there is memory for them.
  void start() {
    if (!call_.fetch) return;
    constexpr int64_t kStored = sizeof(S);
    const int64_t lines = tile_lines();
    for (int64_t d = 0; d < call_.dim; ++d) {
      const int64_t line = lines < call_.dim ? d * lines / call_.dim : d;
      for (int i = 0; i < count_; ++i) {
        // Where a tile goes over the end of a dilation group or of the map, others are asked for, or none: no harm but
        // to the time.
        const int64_t token = line % V::kLanes * sources_[i].map->column * call_.columns.dilation;
        sources_[i].offset[d] = token * kStored + line / V::kLanes * kLine;
      }
    }
  }

  // The places [begin, end) are looked for: V::kRows at most, and none past the last.
  void look(int64_t begin, int64_t end) {
    rows_ = 0;
    end = min_of(min_of(end, begin + V::kRows), group_.real);
    for (int i = 0; call_.fetch && i < count_; ++i) {
      const Source& source = sources_[i];
      for (int64_t place = begin; place < end; ++place) {
        const auto row = reinterpret_cast<uintptr_t>(row_of<const S>(group_, item_, *source.map, place));
        row_[rows_++] = {row, source.map->column * static_cast<int64_t>(sizeof(S)), source.offset};
      }
    }
  }
  int64_t rows() const { return rows_; }

  // The part of the i-th row from this column on; none of one past the last.
  Lines at(int64_t i, int64_t column) const {
    if (i >= rows_) return {0, nullptr};
    return {row_[i].first + column * row_[i].column, row_[i].offset};
  }

  // Lines of a row that a tile takes. Products ask for `dim` at most.
  int64_t tile_lines() const { return V::kLanes * ceil_div(call_.dim * static_cast<int64_t>(sizeof(S)), kLine); }

 private:
  struct Source {
    const Map* map;
    int64_t* offset;  // [dim]
  };
  struct Row {
    uintptr_t first;
    int64_t column;  // bytes
    const int64_t* offset;
  };

  const Call& call_;
  const Group& group_;
  const Item& item_;
  Source sources_[2];
  int count_ = 0;
  Row row_[2 * V::kRows];
  int64_t rows_ = 0;
};

// Of keys first, then of queries.
template <class V, class S>
struct NextTokens {
  NextRows<V, S> keys, queries;

  void start() {
    keys.start();
    queries.start();
  }
  // What to ask for with the i-th key row.
  Lines at(int64_t i, int64_t key_column, int64_t query_column) const {
    return i < keys.rows() ? keys.at(i, key_column) : queries.at(i - keys.rows(), query_column);
  }
  // Whether products with this many key rows leave something out: rows, or lines of narrow tokens.
  bool too_many(int64_t key_rows, int64_t dim) const {
    return keys.rows() + queries.rows() > key_rows || keys.tile_lines() > dim;
  }
};

// The values of one query row of a tile: [window row][window column][lanes], `step` apart. Real keys come first on
// both axes; what follows them is padded.
template <class V>
struct PadWindow {
  using T = typename V::scalar;
  const Tile& tile;
  int64_t kernel_rows, kernel_columns, real_rows;

  template <class Whole, class Lane>
  void each(T* values, int64_t step, Whole&& whole, Lane&& lane) const {
    for (int64_t a = 0; a < kernel_rows; ++a) {
      T* row = values + a * kernel_columns * step;
      const int padded_from = a < real_rows ? tile.columns : 0;
      if (tile.ragged && padded_from > 0) {
        for (int i = 0; i < V::kLanes; ++i) {
          if (tile.limit[i] < padded_from) lane(row + (padded_from - 1) * step, a, padded_from - 1, i);
        }
      }
      for (int b = padded_from; b < kernel_columns; ++b) whole(row + b * step, a, b);
    }
  }

  // Sets the padded values to `value` plus their bias.
  void fill(T* values, int64_t step, V value, const T* bias, int64_t bias_stride) const {
    T lanes[V::kLanes];
    value.store(lanes);
    each(
        values, step,
        [&](T* p, int64_t a, int b) { (value + bias_of<V>(tile, bias + a * bias_stride, b)).store(p); },
        [&](T* p, int64_t a, int b, int i) {
          p[i] = lanes[i] + bias[a * bias_stride + tile.bias_index[b * V::kLanes + i]];
        });
  }

  // Sets the padded values to `value`.
  void fill(T* values, int64_t step, V value) const {
    T lanes[V::kLanes];
    value.store(lanes);
    each(
        values, step, [&](T* p, int64_t, int) { value.store(p); },
        [&](T* p, int64_t, int, int i) { p[i] = lanes[i]; });
  }

  // The sum of the padded values; those between real ones become zero.
  V take(T* values, int64_t step) const {
    V sum = V::zero();
    T lanes[V::kLanes] = {};
    each(
        values, step, [&](T* p, int64_t, int) { sum = sum + V::load(p); },
        [&](T* p, int64_t, int, int i) {
          lanes[i] += p[i];
          p[i] = 0;
        });
    return sum + V::load(lanes);
  }
};

// Sum over channels of x[d][lanes] * y[d].
template <class V>
V dot_with_one(const typename V::scalar* x, int64_t x_step, const typename V::scalar* y, int64_t dim) {
  V sum = V::zero();
  for (int64_t d = 0; d < dim; ++d) sum = fma(V::load(x + d * x_step), V::broadcast(y[d]), sum);
  return sum;
}

template <class V>
struct Bias {
  const typename V::scalar* head;
  int64_t stride;

  Bias(const Call& call, int64_t index)
      : head(static_cast<const typename V::scalar*>(call.bias) +
             index * (2 * call.rows.kernel - 1) * call.bias_stride),
        stride(call.bias_stride) {}
  const typename V::scalar* row(int64_t place) const { return head + place * stride; }
};

// Scores of a block of query rows against the key rows that they see: out + r * out_row is [window][step]. `largest`
// ([rows][lanes], may be null) becomes the largest of each query. `later(i)` are the lines to ask for with the i-th key
// row.
template <class V, class Later>
void score(const RowBlock& block, const Tile& tile, const typename V::scalar* x, int64_t x_row, int64_t x_step,
           const RowsOf<typename V::scalar>& keys, int64_t key_step, int64_t dim, const Bias<V>* bias,
           typename V::scalar* out, int64_t out_row, int64_t out_step, int64_t kernel_columns,
           typename V::scalar* largest, Later&& later) {
  static_assert(V::kRows <= RowBlock::kMostRows);
  Dot<V> a;
  a.x_step = x_step;
  a.y_step = key_step;
  a.out_step = out_step;
  a.dim = dim;
  a.tile = &tile;
  for (int r = 0; largest && r < block.count; ++r) {
    V::broadcast(-std::numeric_limits<typename V::scalar>::infinity()).store(largest + r * V::kLanes);
  }
  for (int64_t place = block.low; place < block.high; ++place) {
    const int first = block.first(place), last = block.last(place);
    for (int r = first; r < last; ++r) {
      const int64_t window_row = place - block.start(r);
      a.x[r - first] = x + r * x_row;
      a.bias[r - first] = bias ? bias->row(block.bias(r) + window_row) : nullptr;
      a.out[r - first] = out + r * out_row + window_row * kernel_columns * out_step;
      a.largest[r - first] = largest ? largest + r * V::kLanes : nullptr;
    }
    a.y = keys.row[place - block.low] + tile.key;
    a.later = later(place - block.low);
    dot(a, last - first);
  }
}

// The sums of values weighted by the windows of a block of query rows.
template <class V>
class Gather {
  using T = typename V::scalar;

 public:
  // `weight`: query row r's are at weight + r * weight_row, [window][weight_step]. `values`: [key position][step], `step`
  // channels in whole vectors.
  Gather(const Call& call, const RowBlock& block, const Tile& tile, const T* weight, int64_t weight_row,
         int64_t weight_step, const RowsOf<T>& values, int64_t step)
      : block_(block),
        tile_(tile),
        weight_(weight),
        weight_row_(weight_row),
        weight_step_(weight_step),
        window_row_(call.columns.kernel * weight_step),
        step_(step),
        values_(values) {}

  // For every query: sum = start(r, lane, d), plus its window's values; then finish(r, lane, d, sum). The sum is of a
  // vector of channels from d on.
  template <class Start, class Finish>
  void run(Start&& start, Finish&& finish) const {
    for (int lane = 0; lane < tile_.lanes;) {
      const bool pair = lane + 1 < tile_.lanes && key(lane + 1) == key(lane) + 1 && limit(lane + 1) == limit(lane);
      if (pair) {
        channels<2>(lane, start, finish);
      } else {
        channels<1>(lane, start, finish);
      }
      lane += pair ? 2 : 1;
    }
  }

 private:
  int64_t key(int lane) const { return tile_.key + (tile_.straight ? lane : tile_.index[lane]); }
  int limit(int lane) const { return tile_.ragged ? tile_.limit[lane] : tile_.columns; }

  template <int Q, class Start, class Finish>
  NAT_DENSE_INLINE void channels(int lane, Start& start, Finish& finish) const {
    int64_t d = 0;
    for (; d + V::kVectors * V::kLanes <= step_; d += V::kVectors * V::kLanes) {
      sums<Q, V::kVectors>(lane, d, start, finish);
    }
    for (; d < step_; d += V::kLanes) sums<Q, 1>(lane, d, start, finish);
  }

  template <int Q, int D, class Start, class Finish>
  NAT_DENSE_INLINE void sums(int lane, int64_t channel, Start& start, Finish& finish) const {
    V sum[V::kRows][Q][D];
    const T* weight[V::kRows];
#pragma GCC unroll 8
    for (int r = 0; r < V::kRows; ++r) {
      weight[r] = weight_ + r * weight_row_ + lane;
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) sum[r][q][d] = start(r, lane + q, channel + d * V::kLanes);
      }
    }
    const int64_t offset = key(lane) * step_ + channel, places = block_.high - block_.low;
    const int columns = limit(lane);
    for (int64_t i = 0; i < places; ++i) {
      add_rows<V, 0, V::kRows>(block_.first(block_.low + i), block_.last(block_.low + i), weight, weight_step_,
                               window_row_, values_.row[i] + offset, step_, columns, sum);
    }
#pragma GCC unroll 8
    for (int r = 0; r < V::kRows; ++r) {
      if (r >= block_.count) break;
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) finish(r, lane + q, channel + d * V::kLanes, sum[r][q][d]);
      }
    }
  }

  const RowBlock& block_;
  const Tile& tile_;
  const T* const weight_;
  const int64_t weight_row_, weight_step_, window_row_, step_;
  const RowsOf<T>& values_;
};

}  // namespace
}  // namespace nat_dense
