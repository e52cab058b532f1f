// The backward pass of one item: a run of rows of one row group of one head, all segments of columns.
//
// The item owns its rows: it alone writes their gradients. The gradient of a key needs every query that sees it, so
// the queries of neighbouring runs that see the item's keys are computed here once more.
#pragma once

#include "window.h"

namespace nat_dense {
namespace {

template <class V, class S>
class Backward {
  using T = typename V::scalar;

 public:
  Backward(const Call& call, const Item& item, const Partial& partial, Arena& arena)
      : call_(call),
        item_(item),
        group_(call.rows, item.group),
        partial_(partial),
        window_(call.rows.kernel * call.columns.kernel),
        slots_(call.rows.kernel + V::kRows - 1),
        key_step_(call.key_stride),
        query_step_(call.query_stride),
        channels_(round_up(call.dim, V::kLanes)),
        bias_(call, item.head),
        next_{{call, group_, item, arena, {&call.key, &call.value}},
              {call, group_, item, arena, {&call.query, &call.grad_out}}},
        keys_(arena, slots_, call.dim * key_step_),
        values_(arena, slots_, call.dim * key_step_),
        key_tokens_(arena, slots_, channels_ * key_step_),
        grad_keys_(arena, slots_, channels_ * key_step_),
        grad_values_(arena, slots_, channels_ * key_step_),
        query_tokens_(arena, V::kRows, channels_ * query_step_),
        grad_out_tokens_(arena, V::kRows, channels_ * query_step_),
        weight_(arena, V::kRows, window_ * query_step_),
        grad_logit_(arena, V::kRows, window_ * query_step_),
        query_(arena.take<T>(V::kRows * call.dim * V::kLanes)),
        grad_out_(arena.take<T>(V::kRows * call.dim * V::kLanes)),
        padded_(arena.take<T>(V::kRows * V::kLanes)),
        pad_sums_(arena.take<T>(2 * call.dim * V::kLanes)),
        bias_sums_(arena.take<T>(most_tiles(call) * bias_rows() * call.columns.kernel * V::kLanes)) {}

  static int64_t scratch(const Call& call) {
    Arena arena(nullptr);
    Backward measure(call, Item{}, Partial{}, arena);
    return arena.used();
  }

  static void run(const Call& call, const Item& item, const Partial& partial, void* memory) {
    Arena arena(memory);
    Backward pass(call, item, partial, arena);
    pass.next_.start();
    for (int64_t i = 0; i < call.segment_count; ++i) {
      const Segment& segment = call.segments[i];
      const int64_t* begun = i ? (&segment)[-1].key_column + (&segment)[-1].key_count : segment.key_column;
      pass.run(segment, begun - segment.key_column);
    }
    V::fence();
  }

 private:
  static int64_t most_tiles(const Call& call) {
    int64_t most = 0;
    for (int64_t i = 0; i < call.segment_count; ++i) most = max_of(most, call.segments[i].tile_count);
    return call.needs_grad_bias ? most : 0;
  }
  int64_t bias_rows() const { return 2 * call_.rows.kernel - 1; }
  bool owns(int64_t place) const { return item_.begin <= place && place < item_.end; }

  // The first `begun` keys were those of the last segment as well.
  void run(const Segment& segment, int64_t begun) {
    clear(bias_sums_, segment.tile_count * (call_.needs_grad_bias ? bias_rows() * call_.columns.kernel * V::kLanes : 0));
    if (call_.pad_key) clear(pad_sums_, 2 * call_.dim * V::kLanes);
    // Query rows that see a row of this item, or are one.
    int64_t begin = item_.begin, end = item_.end;
    while (begin > 0 && group_.start(begin - 1) + group_.kernel > item_.begin) --begin;
    while (end < group_.real && group_.start(end) < item_.end) ++end;
    int64_t finished = group_.start(begin), packed = finished;
    bool cold = true;
    for (int64_t i = begin; i < end; i += V::kRows) {
      const RowBlock block(group_, i, end, V::kRows);
      for (; finished < block.low; ++finished) flush(segment, finished, begun);
      for (; packed < block.high; ++packed) {
        const auto key = keys<const S>(call_.key, packed, segment, cold);
        pack<V>(key, 0, key.count, keys_.at(packed), key_step_);
        copy<V>(key, 0, key.count, key_tokens_.at(packed), channels_);
        pack<V>(keys<const S>(call_.value, packed, segment, cold), 0, key.count, values_.at(packed), key_step_);
        clear(grad_keys_.at(packed), segment.key_count * channels_);
        clear(grad_values_.at(packed), segment.key_count * channels_);
      }
      for (int r = 0; r < block.count; ++r) {
        const int64_t count = segment.query_count;
        copy<V>(queries<const S>(call_.query, i + r, segment, cold), 0, count, query_tokens_.at(r), channels_);
        copy<V>(queries<const S>(call_.grad_out, i + r, segment, cold), 0, count, grad_out_tokens_.at(r), channels_);
      }
      next_.keys.look(block.high, block.high + V::kRows);
      next_.queries.look(i + block.count, end);
      const Rows rows{{block, keys_}, {block, values_}, {block, key_tokens_}};
      for (int64_t t = 0; t < segment.tile_count; ++t) differentiate(block, rows, segment, t);
      cold = next_.too_many(2 * (block.high - block.low), call_.dim);
      for (int64_t key = 0; key < segment.key_count; key += kKeysAtOnce) {
        for (int r = 0; r < block.count; ++r) scatter_row(block, segment, r, key);
      }
    }
    for (; finished < packed; ++finished) flush(segment, finished, begun);
    add_partials(segment);
  }

  static void clear(T* p, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = T(0);
  }

  template <class Stored>
  Tokens<Stored> keys(const Map& map, int64_t place, const Segment& segment, bool cold) const {
    return tokens_of<Stored>(call_, group_, item_, map, place, segment.key_column, segment.key_count, cold);
  }
  template <class Stored>
  Tokens<Stored> queries(const Map& map, int64_t place, const Segment& segment, bool cold) const {
    return tokens_of<Stored>(call_, group_, item_, map, place, segment.query_column, segment.query_count, cold);
  }

  struct Rows {
    RowsOf<T> keys, values, key_tokens;
  };

  // Weights and logit gradients of a tile, kept for `scatter`; and the gradient of its queries.
  void differentiate(const RowBlock& block, const Rows& rows, const Segment& segment, int64_t t) {
    const Tile& tile = segment.tiles[t];
    const int64_t dim = call_.dim, kernel_columns = call_.columns.kernel;
    T* weight = weight_.data + tile.first;
    T* grad = grad_logit_.data + tile.first;
    for (int r = 0; r < block.count; ++r) {
      const int64_t first = tile.first * channels_;
      pack_tile(query_tokens_.at(r) + first, tile, T(call_.scale * kLog2E), query_ + r * dim * V::kLanes);
      pack_tile(grad_out_tokens_.at(r) + first, tile, T(1), grad_out_ + r * dim * V::kLanes);
    }
    for (int r = 0; r < block.count && call_.fetch; ++r) {
      const T* lse = lse_of<const T>(call_, group_, item_, block.begin + r);
      for (int i = 0; i < tile.lanes; ++i) prefetch(lse + segment.query_column[tile.first + i] * call_.heads);
    }
    const int64_t column = segment.query_column[tile.first];
    score<V>(block, tile, query_, dim * V::kLanes, V::kLanes, rows.keys, key_step_, dim, &bias_, weight, weight_.row,
             query_step_, kernel_columns, nullptr, [&](int64_t i) { return next_.at(i, column, column); });
    score<V>(block, tile, grad_out_, dim * V::kLanes, V::kLanes, rows.values, key_step_, dim, nullptr, grad,
             grad_logit_.row, query_step_, kernel_columns, nullptr,
             [&](int64_t i) { return next_.at(block.high - block.low + i, column, column); });
    for (int r = 0; r < block.count; ++r) softmax_gradient(block, segment, t, r);
    const bool stream = streams<V, S>(call_);
    S* out[V::kRows][V::kLanes] = {};
    for (int r = 0; r < block.count; ++r) {
      const auto row = queries<S>(call_.grad_query, block.begin + r, segment, true);
      for (int i = 0; i < tile.lanes && owns(block.begin + r); ++i) {
        out[r][i] = row.at(tile.first + i);
        if (call_.fetch && !stream) row.fetch(out[r][i], dim);
      }
    }
    const T* pad_key = call_.pad_key ? static_cast<const T*>(call_.pad_key) + item_.head * dim : nullptr;
    const V scale = V::broadcast(T(call_.scale));
    const Gather<V> gather(call_, block, tile, grad, grad_logit_.row, query_step_, rows.key_tokens, channels_);
    gather.run(
        [&](int r, int lane, int64_t d) NAT_DENSE_INLINE_LAMBDA {
          return pad_key ? V::broadcast(padded_[r * V::kLanes + lane]) * V::load_part(pad_key + d, dim - d) : V::zero();
        },
        [&](int r, int lane, int64_t d, V sum) NAT_DENSE_INLINE_LAMBDA {
          if (out[r][lane]) write(sum * scale, out[r][lane] + d, dim - d, stream);
        });
  }

  void pack_tile(const T* first, const Tile& tile, T factor, T* out) const {
    if (tile.lanes == V::kLanes) return pack_even<V>(first, channels_, call_.dim, factor, out, V::kLanes);
    const auto token = [&](int i) { return first + min_of(i, tile.lanes - 1) * channels_; };
    pack_any<V>(token, call_.dim, factor, out, V::kLanes);
  }

  void softmax_gradient(const RowBlock& block, const Segment& segment, int64_t t, int r) {
    const Tile& tile = segment.tiles[t];
    const int64_t step = query_step_;
    T* weight = weight_.at(r) + tile.first;
    T* grad = grad_logit_.at(r) + tile.first;
    const bool owned = owns(block.begin + r);
    const PadWindow<V> pads{tile, call_.rows.kernel, call_.columns.kernel, block.limit(r)};
    if (call_.pad_key) fill_pads(block, pads, r, weight, grad);
    const V lse = load_lse(block, segment, tile, r);
    V total = V::zero(), delta = V::zero();
    for (int64_t i = 0; i < window_; i += call_.columns.kernel) {  // a sum per window row: fewer roundings in a chain
      V row_total = V::zero(), row_delta = V::zero();
      for (int64_t j = i; j < i + call_.columns.kernel; ++j) {
        const V p = exp2(V::load(weight + j * step) - lse);
        p.store(weight + j * step);
        row_total = row_total + p;
        row_delta = fma(p, V::load(grad + j * step), row_delta);
      }
      total = total + row_total;
      delta = delta + row_delta;
    }
    delta = delta / total;  // 1 but for the rounding of lse, which would not cancel below
    for (int64_t i = 0; i < window_; ++i) {
      (V::load(weight + i * step) * (V::load(grad + i * step) - delta)).store(grad + i * step);
    }
    if (call_.needs_grad_bias && owned) {
      T* sums = bias_sums_ + (t * bias_rows() + block.bias(r)) * call_.columns.kernel * V::kLanes;
      for (int64_t i = 0; i < window_; ++i) {
        (V::load(sums + i * V::kLanes) + V::load(grad + i * step)).store(sums + i * V::kLanes);
      }
    }
    if (call_.pad_key) take_pads(pads, r, weight, grad, owned);
  }

  void fill_pads(const RowBlock& block, const PadWindow<V>& pads, int r, T* weight, T* grad) {
    const int64_t dim = call_.dim;
    const T* key = static_cast<const T*>(call_.pad_key) + item_.head * dim;
    const T* value = static_cast<const T*>(call_.pad_value) + item_.head * dim;
    const V logit = dot_with_one<V>(query_ + r * dim * V::kLanes, V::kLanes, key, dim);
    pads.fill(weight, query_step_, logit, bias_.row(block.bias(r)), bias_.stride);
    // Only differences of these products matter. Relative to the padded keys' own, which may carry nearly all of the
    // weight, the others lose no digits.
    const V padded = dot_with_one<V>(grad_out_ + r * dim * V::kLanes, V::kLanes, value, dim);
    for (int64_t i = 0; i < window_; ++i) (V::load(grad + i * query_step_) - padded).store(grad + i * query_step_);
    pads.fill(grad, query_step_, V::zero());
  }

  // Moves what the padded keys get into their sums, and keeps what they give to the query's gradient.
  void take_pads(const PadWindow<V>& pads, int r, T* weight, T* grad, bool owned) {
    const int64_t dim = call_.dim;
    T lanes[2][V::kLanes];
    const V grad_logit = pads.take(grad, query_step_);
    grad_logit.store(padded_ + r * V::kLanes);
    grad_logit.store(lanes[0]);
    pads.take(weight, query_step_).store(lanes[1]);
    for (int i = pads.tile.lanes; i < V::kLanes; ++i) lanes[0][i] = lanes[1][i] = T(0);
    if (!owned) return;
    for (int64_t d = 0; d < dim; ++d) {
      for (int i = 0; i < pads.tile.lanes; ++i) {
        pad_sums_[d * V::kLanes + i] += lanes[0][i] * query_[(r * dim + d) * V::kLanes + i];
        pad_sums_[(dim + d) * V::kLanes + i] += lanes[1][i] * grad_out_[(r * dim + d) * V::kLanes + i];
      }
    }
  }

  V load_lse(const RowBlock& block, const Segment& segment, const Tile& tile, int r) {
    const T* row = lse_of<const T>(call_, group_, item_, block.begin + r);
    T lanes[V::kLanes];
    for (int i = 0; i < V::kLanes; ++i) {
      lanes[i] = row[segment.query_column[tile.first + min_of(i, tile.lanes - 1)] * call_.heads] * T(kLog2E);
    }
    return V::load(lanes);
  }

  // What query row r gives to the gradients of a run of keys and values, in the rows that it sees.
  void scatter_row(const RowBlock& block, const Segment& segment, int r, int64_t key) {
    const int64_t low = block.start(r), begin = max_of(low, item_.begin), end = min_of(low + block.limit(r), item_.end);
    const int64_t window_row = call_.columns.kernel * query_step_;
    Scatter<V> values, keys;
    values.viewers = keys.viewers = segment.viewers + key;
    values.keys = keys.keys = min_of(kKeysAtOnce, segment.key_count - key);
    values.weight_row = keys.weight_row = window_row;
    values.step = keys.step = channels_;
    values.y = grad_out_tokens_.at(r);
    keys.y = query_tokens_.at(r);
    for (int64_t place = begin; place < end;) {
      const int count = static_cast<int>(ceil_div(end - place, ceil_div(end - place, V::kKeyRows)));
      values.weight = weight_.at(r) + (place - low) * window_row;
      keys.weight = grad_logit_.at(r) + (place - low) * window_row;
      for (int i = 0; i < count; ++i, ++place) {
        values.out[i] = grad_values_.at(place) + key * channels_;
        keys.out[i] = grad_keys_.at(place) + key * channels_;
      }
      scatter(values, count);
      scatter(keys, count);
    }
  }

  // Gives a finished row of key and value gradients to the caller.
  void flush(const Segment& segment, int64_t place, int64_t begun) {
    if (!owns(place)) return;
    const T scale = T(call_.scale);
    const bool stream = streams<V, T>(call_);
    const int64_t skipped = segment.real_begin * channels_;
    const auto real_keys = [&](const Map& map) {
      return tokens_of<T>(call_, group_, item_, map, place, segment.key_column + segment.real_begin,
                          segment.real_end - segment.real_begin, true);
    };
    begun -= segment.real_begin;
    put<V>(grad_keys_.at(place) + skipped, channels_, scale, real_keys(call_.grad_key), begun, stream);
    put<V>(grad_values_.at(place) + skipped, channels_, T(1), real_keys(call_.grad_value), begun, stream);
  }

  void add_partials(const Segment& segment) {
    const int64_t kernel_columns = call_.columns.kernel, width = 2 * kernel_columns - 1;
    for (int64_t t = 0; call_.needs_grad_bias && t < segment.tile_count; ++t) {
      const Tile& tile = segment.tiles[t];
      for (int64_t a = 0; a < bias_rows(); ++a) {
        double* out = partial_.bias + (item_.head * bias_rows() + a) * width;
        for (int64_t b = 0; b < kernel_columns; ++b) {
          const T* sums = bias_sums_ + ((t * bias_rows() + a) * kernel_columns + b) * V::kLanes;
          for (int i = 0; i < tile.lanes; ++i) {
            out[tile.uniform ? tile.bias + b : tile.bias_index[b * V::kLanes + i]] += sums[i];
          }
        }
      }
    }
    for (int64_t d = 0; call_.pad_key && d < call_.dim; ++d) {
      for (int i = 0; i < V::kLanes; ++i) {
        partial_.pad_key[item_.head * call_.dim + d] += pad_sums_[d * V::kLanes + i] * kLn2;
        partial_.pad_value[item_.head * call_.dim + d] += pad_sums_[(call_.dim + d) * V::kLanes + i];
      }
    }
  }

  static constexpr int64_t kKeysAtOnce = 16;  // their gradients stay in the first-level cache from row to row

  const Call& call_;
  const Item& item_;
  const Group group_;
  const Partial& partial_;
  const int64_t window_, slots_, key_step_, query_step_, channels_;
  const Bias<V> bias_;
  NextTokens<V, S> next_;
  const Ring<T> keys_, values_;                            // by place, [dim][key positions]
  const Ring<T> key_tokens_, grad_keys_, grad_values_;     // by place, [key positions][channels]
  const Ring<T> query_tokens_, grad_out_tokens_;           // by query row of the block, [query positions][channels]
  const Ring<T> weight_, grad_logit_;                      // by query row of the block, [window][query positions]
  T* const query_;      // [rows][dim][lanes] of a tile, scaled
  T* const grad_out_;   // [rows][dim][lanes]
  T* const padded_;     // [rows][lanes]: the gradient of the padded keys' logits
  T* const pad_sums_;   // [key, value][dim][lanes]
  T* const bias_sums_;  // [tiles][bias rows][window columns][lanes]
};

}  // namespace
}  // namespace nat_dense
