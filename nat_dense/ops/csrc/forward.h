// The forward pass of one item: a run of query rows of one head, in one segment of columns.
#pragma once

#include "window.h"

namespace nat_dense {
namespace {

template <class V, class S>
class Forward {
  using T = typename V::scalar;

 public:
  Forward(const Call& call, const Item& item, Arena& arena)
      : call_(call),
        item_(item),
        segment_(call.segments[item.segment]),
        window_(call.rows.kernel * call.columns.kernel),
        step_(call.key_stride),
        bias_(call, item.head),
        keys_(arena, call.rows.kernel + V::kRows - 1, call.dim * step_),
        values_(arena, call.rows.kernel + V::kRows - 1, call.dim * step_),
        query_(arena.take<T>(V::kRows * call.dim * V::kLanes)),
        weight_(arena.take<T>(V::kRows * window_ * V::kLanes)),
        out_(arena.take<T>(V::kRows * call.dim * V::kLanes)) {}

  static int64_t scratch(const Call& call) {
    Arena arena(nullptr);
    Forward measure(call, Item{}, arena);
    return arena.used();
  }

  static void run(const Call& call, const Item& item, void* memory) {
    Arena arena(memory);
    Forward(call, item, arena).run();
  }

 private:
  void run() {
    int64_t packed = 0;
    for (int64_t i = item_.begin; i < item_.end; i += V::kRows) {
      const RowBlock block(call_.rows, item_.group, i, item_.end, V::kRows);
      for (packed = max_of(packed, block.low); packed < block.high; ++packed) {
        pack_row(call_.key, packed, keys_.at(packed));
        pack_row(call_.value, packed, values_.at(packed));
      }
      for (int64_t t = 0; t < segment_.tile_count; ++t) attend(block, segment_.tiles[t]);
    }
  }

  void pack_row(const Map& map, int64_t place, T* out) {
    const S* row = row_of<const S>(map, item_.batch, token_of(call_.rows, item_.group, place), item_.head);
    pack<V>(row, map.column, segment_.key_column, segment_.key_count, call_.dim, T(1), out, step_);
  }

  void attend(const RowBlock& block, const Tile& tile) {
    const int64_t dim = call_.dim, lanes = V::kLanes, kernel_columns = call_.columns.kernel;
    const int64_t* columns = segment_.query_column + tile.first;
    for (int r = 0; r < block.count; ++r) {
      const S* row = row_of<const S>(call_.query, item_.batch, token_row(block, r), item_.head);
      pack<V>(row, call_.query.column, columns, tile.lanes, dim, T(call_.scale * kLog2E), query_ + r * dim * lanes, lanes);
    }
    score<V>(block, tile, query_, dim * lanes, lanes, keys_, step_, dim, &bias_, weight_, window_ * lanes, lanes, kernel_columns);
    V sums[V::kRows], lse[V::kRows];
    for (int r = 0; r < block.count; ++r) softmax(block, tile, r, &sums[r], &lse[r]);
    gather<V>(block, tile, weight_, window_ * lanes, lanes, values_, step_, dim, out_, dim * lanes, kernel_columns);
    for (int r = 0; r < block.count; ++r) {
      S* row = row_of<S>(call_.out, item_.batch, token_row(block, r), item_.head);
      const V normalise = reciprocal(sums[r]);
      unpack<V, false>(out_ + r * dim * lanes, lanes, normalise, dim, row, call_.out.column, columns, tile.lanes);
      store_lse(token_row(block, r), columns, tile.lanes, lse[r]);
    }
  }

  // Turns the logits of query row r into unnormalised weights, and sets its output to what the padded keys give.
  void softmax(const RowBlock& block, const Tile& tile, int r, V* sum, V* lse) {
    const int64_t dim = call_.dim, lanes = V::kLanes;
    T* weight = weight_ + r * window_ * lanes;
    T* out = out_ + r * dim * lanes;
    const PadWindow<V> pads{tile, call_.rows.kernel, call_.columns.kernel, block.limit(r)};
    if (call_.pad_key) {
      const T* key = static_cast<const T*>(call_.pad_key) + item_.head * dim;
      const V logit = dot_with_one<V>(query_ + r * dim * lanes, lanes, key, dim);
      pads.fill(weight, lanes, logit, bias_.row(block.bias(r)), bias_.stride);
    }
    V most = V::load(weight);
    for (int64_t i = 1; i < window_; ++i) most = max(most, V::load(weight + i * lanes));
    V total = V::zero();
    for (int64_t i = 0; i < window_; ++i) {
      const V p = exp2(V::load(weight + i * lanes) - most);
      p.store(weight + i * lanes);
      total = total + p;
    }
    *sum = total;
    *lse = (most + log2(total)) * V::broadcast(T(kLn2));
    if (call_.pad_key) {
      const T* value = static_cast<const T*>(call_.pad_value) + item_.head * dim;
      const V padded = pads.take(weight, lanes);
      for (int64_t d = 0; d < dim; ++d) (padded * V::broadcast(value[d])).store(out + d * lanes);
    } else {
      for (int64_t d = 0; d < dim; ++d) V::zero().store(out + d * lanes);
    }
  }

  void store_lse(int64_t token_row, const int64_t* columns, int count, V lse) {
    T lanes[V::kLanes];
    lse.store(lanes);
    T* row = static_cast<T*>(call_.lse) + (item_.batch * call_.rows.length + token_row) * call_.columns.length * call_.heads;
    for (int i = 0; i < count; ++i) row[columns[i] * call_.heads + item_.head] = lanes[i];
  }

  int64_t token_row(const RowBlock& block, int r) const { return token_of(call_.rows, item_.group, block.begin + r); }

  const Call& call_;
  const Item& item_;
  const Segment& segment_;
  const int64_t window_, step_;
  const Bias<V> bias_;
  const Ring<T> keys_, values_;
  T* const query_;   // [rows][dim][lanes], scaled
  T* const weight_;  // [rows][window][lanes]: logits, then weights
  T* const out_;     // [rows][dim][lanes]
};

}  // namespace
}  // namespace nat_dense
