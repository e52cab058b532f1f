// The forward pass of one item: a run of query rows of one head, in one segment of columns.
#pragma once

#include "window.h"

namespace nat_dense {
namespace {

template <class V, class S>
class Forward {
  using T = typename V::scalar;

 public:
  Forward(const Call& call, const Item& item, const Item* next, Arena& arena)
      : call_(call),
        item_(item),
        next_(next),
        segment_(call.segments[item.segment]),
        window_(call.rows.kernel * call.columns.kernel),
        key_step_(call.key_stride),
        query_step_(call.query_stride),
        bias_(call, item.head),
        keys_(arena, call.rows.kernel + V::kRows - 1, call.dim * key_step_),
        values_(arena, call.rows.kernel + V::kRows - 1, call.dim * key_step_),
        query_(arena, V::kRows, call.dim * query_step_),
        weight_(arena.take<T>(V::kRows * window_ * V::kLanes)),
        out_(arena.take<T>(V::kRows * call.dim * V::kLanes)) {}

  static int64_t scratch(const Call& call) {
    Arena arena(nullptr);
    Forward measure(call, Item{}, nullptr, arena);
    return arena.used();
  }

  static void run(const Call& call, const Item& item, const Item* next, void* memory) {
    Arena arena(memory);
    Forward(call, item, next, arena).run();
  }

 private:
  void run() {
    int64_t packed = 0;
    for (int64_t i = item_.begin; i < item_.end; i += V::kRows) {
      const RowBlock block(call_.rows, item_.group, i, item_.end, V::kRows);
      for (packed = max_of(packed, block.low); packed < block.high; ++packed) {
        pack_row(call_.key, packed, segment_.key_column, segment_.key_count, T(1), keys_.at(packed), key_step_);
        pack_row(call_.value, packed, segment_.key_column, segment_.key_count, T(1), values_.at(packed), key_step_);
      }
      for (int r = 0; r < block.count; ++r) {
        const T factor = T(call_.scale * kLog2E);
        pack_row(call_.query, i + r, segment_.query_column, segment_.query_count, factor, query_.at(r), query_step_);
      }
      look_ahead(block);
      for (int64_t t = 0; t < segment_.tile_count; ++t) attend(block, segment_.tiles[t]);
    }
  }

  // The tokens that the next block packs: here, or at the start of the next item.
  void look_ahead(const RowBlock& block) {
    ahead_.start(segment_.tile_count * 2 * (block.high - block.low));
    const int64_t begin = block.begin + block.count;
    if (begin < item_.end) {
      look_ahead(item_, RowBlock(call_.rows, item_.group, begin, item_.end, V::kRows), block.high);
    } else if (next_) {
      look_ahead(*next_, RowBlock(call_.rows, next_->group, next_->begin, next_->end, V::kRows), 0);
    }
  }

  void look_ahead(const Item& item, const RowBlock& block, int64_t packed) {
    const Segment& segment = call_.segments[item.segment];
    const auto add = [&](const Map& map, int64_t place, const int64_t* columns, int64_t count) {
      ahead_.add(map, sizeof(S), item.batch, token_of(call_.rows, item.group, place), item.head, columns, count);
    };
    for (int64_t place = max_of(packed, block.low); place < block.high; ++place) {
      add(call_.key, place, segment.key_column, segment.key_count);
      add(call_.value, place, segment.key_column, segment.key_count);
    }
    for (int r = 0; r < block.count; ++r) {
      add(call_.query, block.begin + r, segment.query_column, segment.query_count);
    }
  }

  void pack_row(const Map& map, int64_t place, const int64_t* columns, int64_t count, T factor, T* out, int64_t step) {
    const S* row = row_of<const S>(map, item_.batch, token_of(call_.rows, item_.group, place), item_.head);
    pack<V>(row, map.column, columns, count, call_.dim, factor, out, step);
  }

  void attend(const RowBlock& block, const Tile& tile) {
    const int64_t dim = call_.dim, lanes = V::kLanes, kernel_columns = call_.columns.kernel;
    const int64_t* columns = segment_.query_column + tile.first;
    score<V>(block, tile, query_.data + tile.first, query_.row, query_step_, keys_, key_step_, dim, &bias_, weight_,
             window_ * lanes, lanes, kernel_columns, ahead_, dim * sizeof(S));
    V sums[V::kRows], lse[V::kRows];
    for (int r = 0; r < block.count; ++r) softmax(block, tile, r, &sums[r], &lse[r]);
    gather<V>(block, tile, weight_, window_ * lanes, lanes, values_, key_step_, dim, out_, dim * lanes, kernel_columns, ahead_, dim * sizeof(S));
    for (int r = 0; r < block.count; ++r) {
      unpack<V, false>(out_ + r * dim * lanes, lanes, reciprocal(sums[r]), dim, out_row(block, r), call_.out.column,
                       columns, tile.lanes);
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
      const V logit = dot_with_one<V>(query_.at(r) + tile.first, query_step_, key, dim);
      pads.fill(weight, lanes, logit, bias_.row(block.bias(r)), bias_.stride);
    }
    V most = V::load(weight), total = V::zero();
    for (int64_t i = 0; i < window_; i += call_.columns.kernel) {  // a chain per window row, not one through all
      V row_most = V::load(weight + i * lanes);
      for (int64_t j = i + 1; j < i + call_.columns.kernel; ++j) row_most = max(row_most, V::load(weight + j * lanes));
      most = max(most, row_most);
    }
    for (int64_t i = 0; i < window_; i += call_.columns.kernel) {  // a sum per window row: fewer roundings in a chain
      V row_total = V::zero();
      for (int64_t j = i; j < i + call_.columns.kernel; ++j) {
        const V p = exp2(V::load(weight + j * lanes) - most);
        p.store(weight + j * lanes);
        row_total = row_total + p;
      }
      total = total + row_total;
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

  S* out_row(const RowBlock& block, int r) const {
    return row_of<S>(call_.out, item_.batch, token_row(block, r), item_.head);
  }
  int64_t token_row(const RowBlock& block, int r) const { return token_of(call_.rows, item_.group, block.begin + r); }

  const Call& call_;
  const Item& item_;
  const Item* const next_;
  const Segment& segment_;
  Ahead ahead_;
  const int64_t window_, key_step_, query_step_;
  const Bias<V> bias_;
  const Ring<T> keys_, values_;  // by place, [dim][key positions]
  const Ring<T> query_;          // by query row of the block, [dim][query positions], scaled
  T* const weight_;  // [rows][window][lanes]: logits, then weights
  T* const out_;     // [rows][dim][lanes]
};

}  // namespace
}  // namespace nat_dense
