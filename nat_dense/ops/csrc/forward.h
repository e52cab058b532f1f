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
        group_(call.rows, item.group),
        segment_(call.segments[item.segment]),
        stream_(streams<V, S>(call)),
        window_(call.rows.kernel * call.columns.kernel),
        key_step_(call.key_stride),
        channels_(round_up(call.dim, V::kLanes)),
        bias_(call, item.head),
        next_{{call, group_, item, arena, {&call.key, &call.value}}, {call, group_, item, arena, {&call.query}}},
        keys_(arena, forward_slots(call, V::kRows), call.dim * key_step_),
        values_(arena, forward_slots(call, V::kRows), channels_ * key_step_),
        query_(arena.take<T>(V::kRows * call.dim * V::kLanes)),
        weight_(arena.take<T>(V::kRows * window_ * V::kLanes)),
        largest_(arena.take<T>(V::kRows * V::kLanes)),
        factor_(arena.take<T>(V::kRows * V::kLanes)),
        padded_(arena.take<T>(V::kRows * V::kLanes)) {}

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
    next_.start();
    int64_t packed = group_.start(item_.begin);
    bool cold = true;
    for (int64_t i = item_.begin; i < item_.end; i += V::kRows) {
      const RowBlock block(group_, i, item_.end, V::kRows);
      for (; packed < block.high; ++packed) KeyRow(*this, packed, cold).pack_tokens(0, segment_.key_count);
      const Rows rows(*this, block, cold);
      // Where rows are packed ahead, those that the next block sees besides: a share with each tile, see README.md.
      const int64_t last = min_of(i + (call_.fetch ? 2 : 1) * V::kRows, item_.end) - 1;
      const int64_t end = group_.start(last) + group_.limit(last);
      next_.keys.look(packed, end);
      next_.queries.look(i, item_.end);
      cold = next_.too_many(block.high - block.low, call_.dim);
      KeyRow coming[V::kRows];
      const int count = static_cast<int>(end - packed);
      for (int k = 0; k < count; ++k) {
        coming[k] = KeyRow(*this, packed + k, cold);
        if (k + 1 < count) coming[k].keys.next = coming[k].values.next = nullptr;  // it is packed at the same time
      }
      packed = end;
      for (int64_t t = 0, key = 0; t < segment_.tile_count; ++t) {
        const bool last_tile = t + 1 == segment_.tile_count;
        if (last_tile) next_.queries.look(i + block.count, item_.end);
        const Tile& tile = segment_.tiles[t];
        attend(block, rows, tile, segment_.query_column[last_tile ? 0 : tile.first + tile.lanes]);
        if (count == 0) continue;
        const int64_t key_end = key_part(t + 1);
        for (int k = 0; k < count; ++k) coming[k].pack_tokens(key, key_end);
        key = key_end;
      }
    }
    if (stream_) V::fence();
  }

  // Keys that are packed before tile t: whole vectors, a share for every tile.
  int64_t key_part(int64_t t) const {
    const int64_t vectors = ceil_div(segment_.key_count, V::kLanes);
    return min_of(vectors * t / segment_.tile_count * V::kLanes, segment_.key_count);
  }

  // A row of keys and values on its way to the rings.
  struct KeyRow {
    Tokens<const S> keys, values;
    T *packed_keys, *packed_values;
    int64_t key_step, value_step;

    KeyRow() = default;
    KeyRow(const Forward& pass, int64_t place, bool cold)
        : keys(pass.keys(pass.call_.key, place, cold)),
          values(pass.keys(pass.call_.value, place, cold)),
          packed_keys(pass.keys_.at(place)),
          packed_values(pass.values_.at(place)),
          key_step(pass.key_step_),
          value_step(pass.channels_) {}

    void pack_tokens(int64_t begin, int64_t end) const {
      pack<V>(keys, begin, end, packed_keys, key_step);
      copy<V>(values, begin, end, packed_values, value_step);
    }
  };

  // What the tiles of a block share.
  struct Rows {
    const RowsOf<T> keys, values;
    Tokens<const S> query[V::kRows];
    S* out[V::kRows];
    T* lse[V::kRows];  // of column 0

    Rows(const Forward& pass, const RowBlock& block, bool cold) : keys(block, pass.keys_), values(block, pass.values_) {
      for (int r = 0; r < block.count; ++r) {
        query[r] = pass.queries(pass.call_.query, block.begin + r, cold);
        out[r] = row_of<S>(pass.group_, pass.item_, pass.call_.out, block.begin + r);
        lse[r] = lse_of<T>(pass.call_, pass.group_, pass.item_, block.begin + r);
      }
    }
  };

  Tokens<const S> keys(const Map& map, int64_t place, bool cold) const {
    return tokens_of<const S>(call_, group_, item_, map, place, segment_.key_column, segment_.key_count, cold);
  }
  Tokens<const S> queries(const Map& map, int64_t place, bool cold) const {
    return tokens_of<const S>(call_, group_, item_, map, place, segment_.query_column, segment_.query_count, cold);
  }

  // The queries of a tile; those from `next_column` on come next.
  void attend(const RowBlock& block, const Rows& rows, const Tile& tile, int64_t next_column) {
    const int64_t dim = call_.dim, lanes = V::kLanes, kernel_columns = call_.columns.kernel;
    int64_t column[V::kLanes];
    for (int i = 0; i < tile.lanes; ++i) column[i] = segment_.query_column[tile.first + i] * call_.out.column;
    for (int r = 0; r < block.count; ++r) {
      pack<V>(rows.query[r], tile.first, T(call_.scale * kLog2E), query_ + r * dim * lanes, lanes);
      // Results are asked for ahead too: stores wait for lines that aren't there.
      for (int i = 0; i < tile.lanes && call_.fetch; ++i) {
        if (call_.lse) prefetch(rows.lse[r] + segment_.query_column[tile.first + i] * call_.heads);
        if (!stream_) Tokens<S>::fetch(rows.out[r] + column[i], dim);
      }
    }
    const int64_t key_column = segment_.query_column[tile.first];
    T* const largest = call_.pad_key ? nullptr : largest_;  // with padded keys it is found when theirs are there
    score<V>(block, tile, query_, dim * lanes, lanes, rows.keys, key_step_, dim, &bias_, weight_, window_ * lanes,
             lanes, kernel_columns, largest, [&](int64_t i) { return next_.at(i, key_column, next_column); });
    for (int r = 0; r < block.count; ++r) {
      const LogSum sum = softmax(block, tile, r);
      if (call_.lse) store_lse(rows.lse[r], tile, sum);
    }
    const T* pad_value = call_.pad_key ? static_cast<const T*>(call_.pad_value) + item_.head * dim : nullptr;
    const Gather<V> gather(call_, block, tile, weight_, window_ * lanes, lanes, rows.values, channels_);
    gather.run(
        [&](int r, int lane, int64_t d) NAT_DENSE_INLINE_LAMBDA {
          return pad_value ? V::broadcast(padded_[r * lanes + lane]) * V::load_part(pad_value + d, dim - d) : V::zero();
        },
        [&](int r, int lane, int64_t d, V sum) NAT_DENSE_INLINE_LAMBDA {
          write(sum * V::broadcast(factor_[r * lanes + lane]), rows.out[r] + column[lane] + d, dim - d, stream_);
        });
  }

  // Of powers of two: total * 2^most.
  struct LogSum {
    V most, total;
  };

  // Turns the logits of query row r into weights that are to be divided by their sum.
  LogSum softmax(const RowBlock& block, const Tile& tile, int r) {
    const int64_t dim = call_.dim, lanes = V::kLanes;
    T* weight = weight_ + r * window_ * lanes;
    const PadWindow<V> pads{tile, call_.rows.kernel, call_.columns.kernel, block.limit(r)};
    if (call_.pad_key) {
      const T* key = static_cast<const T*>(call_.pad_key) + item_.head * dim;
      const V logit = dot_with_one<V>(query_ + r * dim * lanes, lanes, key, dim);
      pads.fill(weight, lanes, logit, bias_.row(block.bias(r)), bias_.stride);
    }
    const auto larger = [](V a, V b) NAT_DENSE_INLINE_LAMBDA { return max(a, b); };
    const auto both = [](V a, V b) NAT_DENSE_INLINE_LAMBDA { return a + b; };
    const auto stored = [&](int64_t i) NAT_DENSE_INLINE_LAMBDA { return V::load(weight + i * lanes); };
    const V most = call_.pad_key ? reduce(V::load(weight), stored, larger) : V::load(largest_ + r * lanes);
    const auto take = [&](int64_t i) NAT_DENSE_INLINE_LAMBDA {
      const V p = exp2(stored(i) - most);
      p.store(weight + i * lanes);
      return p;
    };
    const V total = reduce(V::zero(), take, both);
    if (call_.pad_key) pads.take(weight, lanes).store(padded_ + r * lanes);
    (V::broadcast(T(1)) / total).store(factor_ + r * lanes);
    return {most, total};
  }

  // All values of the window together, in four chains: they wait less and round less than one.
  template <class Value, class Both>
  NAT_DENSE_INLINE V reduce(V start, Value&& value, Both&& both) const {
    V a = start, b = start, c = start, d = start;
    int64_t i = 0;
    for (; i + 4 <= window_; i += 4) {
      a = both(a, value(i));
      b = both(b, value(i + 1));
      c = both(c, value(i + 2));
      d = both(d, value(i + 3));
    }
    for (; i < window_; ++i) a = both(a, value(i));
    return both(both(a, b), both(c, d));
  }

  void store_lse(T* out, const Tile& tile, const LogSum& sum) const {
    T lanes[V::kLanes];
    ((sum.most + log2(sum.total)) * V::broadcast(T(kLn2))).store(lanes);
    for (int i = 0; i < tile.lanes; ++i) out[segment_.query_column[tile.first + i] * call_.heads] = lanes[i];
  }

  const Call& call_;
  const Item& item_;
  const Group group_;
  const Segment& segment_;
  const bool stream_;
  const int64_t window_, key_step_, channels_;
  const Bias<V> bias_;
  NextTokens<V, S> next_;
  const Ring<T> keys_;    // by place, [dim][key positions]
  const Ring<T> values_;  // by place, [key positions][channels]
  T* const query_;        // [rows][dim][lanes], scaled
  T* const weight_;       // [rows][window][lanes]: logits, then weights
  T* const largest_;      // [rows][lanes]: of the logits, without padded keys
  T* const factor_;       // [rows][lanes]: one over the sum of the weights
  T* const padded_;       // [rows][lanes]: the padded keys' part of the sum
};

}  // namespace
}  // namespace nat_dense
