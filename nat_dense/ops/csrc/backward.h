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
  Backward(const Call& call, const Item& item, const Item* next, const Partial& partial, Arena& arena)
      : call_(call),
        item_(item),
        next_(next),
        partial_(partial),
        window_(call.rows.kernel * call.columns.kernel),
        slots_(call.rows.kernel + V::kRows - 1),
        key_step_(call.key_stride),
        query_step_(call.query_stride),
        bias_(call, item.head),
        keys_(arena, slots_, call.dim * key_step_),
        values_(arena, slots_, call.dim * key_step_),
        grad_keys_(arena, slots_, call.dim * key_step_),
        grad_values_(arena, slots_, call.dim * key_step_),
        query_(arena, V::kRows, call.dim * query_step_),
        grad_out_(arena, V::kRows, call.dim * query_step_),
        weight_(arena, V::kRows, window_ * query_step_),
        grad_logit_(arena, V::kRows, window_ * query_step_),
        grad_query_(arena.take<T>(V::kRows * call.dim * V::kLanes)),
        gathered_weight_(arena.take<T>(V::kRows * most_viewers(call) * V::kLanes)),
        gathered_grad_(arena.take<T>(V::kRows * most_viewers(call) * V::kLanes)),
        pad_sums_(arena.take<T>(2 * call.dim * V::kLanes)),
        bias_sums_(arena.take<T>(most_tiles(call) * bias_rows() * call.columns.kernel * V::kLanes)) {}

  static int64_t scratch(const Call& call) {
    Arena arena(nullptr);
    Backward measure(call, Item{}, nullptr, Partial{}, arena);
    return arena.used();
  }

  static void run(const Call& call, const Item& item, const Item* next, const Partial& partial, void* memory) {
    Arena arena(memory);
    Backward pass(call, item, next, partial, arena);
    for (int64_t i = 0; i < call.segment_count; ++i) pass.run(call.segments[i]);
  }

 private:
  static int64_t most_viewers(const Call& call) {
    int64_t most = 1;
    for (int64_t i = 0; i < call.segment_count; ++i) {
      for (int64_t t = 0; t < call.segments[i].key_tile_count; ++t) {
        most = max_of(most, call.segments[i].key_tiles[t].columns);
      }
    }
    return most;
  }
  static int64_t most_tiles(const Call& call) {
    int64_t most = 0;
    for (int64_t i = 0; i < call.segment_count; ++i) most = max_of(most, call.segments[i].tile_count);
    return call.needs_grad_bias ? most : 0;
  }
  int64_t bias_rows() const { return 2 * call_.rows.kernel - 1; }
  bool owns(int64_t place) const { return item_.begin <= place && place < item_.end; }

  void run(const Segment& segment) {
    const Axis& rows = call_.rows;
    const int64_t group = item_.group;
    clear(bias_sums_, segment.tile_count * (call_.needs_grad_bias ? bias_rows() * call_.columns.kernel * V::kLanes : 0));
    if (call_.pad_key) clear(pad_sums_, 2 * call_.dim * V::kLanes);
    int64_t begin, end;
    query_rows(item_, &begin, &end);
    int64_t finished = window_start(rows, group, begin), packed = finished;
    for (int64_t i = begin; i < end; i += V::kRows) {
      const RowBlock block(rows, group, i, end, V::kRows);
      for (; finished < block.low; ++finished) flush(segment, finished);
      for (; packed < block.high; ++packed) {
        pack_row<S>(call_.key, packed, segment.key_column, segment.key_count, T(1), keys_.at(packed), key_step_);
        pack_row<S>(call_.value, packed, segment.key_column, segment.key_count, T(1), values_.at(packed), key_step_);
        clear(grad_keys_.at(packed), call_.dim * key_step_);
        clear(grad_values_.at(packed), call_.dim * key_step_);
      }
      for (int r = 0; r < block.count; ++r) {
        const T factor = T(call_.scale * kLog2E);
        pack_row<S>(call_.query, i + r, segment.query_column, segment.query_count, factor, query_.at(r), query_step_);
        pack_row<S>(call_.grad_out, i + r, segment.query_column, segment.query_count, T(1), grad_out_.at(r), query_step_);
      }
      look_ahead(segment, block, end);
      for (int64_t t = 0; t < segment.tile_count; ++t) differentiate(block, segment, t);
      for (int64_t t = 0; t < segment.key_tile_count; ++t) {
        for (int r = 0; r < block.count; ++r) scatter(block, segment, segment.key_tiles[t], r);
      }
    }
    for (; finished < packed; ++finished) flush(segment, finished);
    add_partials(segment);
  }

  // Query rows that see a row of this item, or are one.
  void query_rows(const Item& item, int64_t* begin, int64_t* end) const {
    const Axis& rows = call_.rows;
    *begin = item.begin, *end = item.end;
    while (*begin > 0 && window_start(rows, item.group, *begin - 1) + rows.kernel > item.begin) --*begin;
    while (*end < real_members(rows, item.group) && window_start(rows, item.group, *end) < item.end) ++*end;
  }

  // The tokens that the next block packs and the gradients that it finishes: in this segment, the next, or the next
  // item's first.
  void look_ahead(const Segment& segment, const RowBlock& block, int64_t end) {
    ahead_.start(segment.tile_count * 3 * (block.high - block.low));
    const Segment* last = call_.segments + call_.segment_count - 1;
    const int64_t following = block.begin + block.count;
    if (following < end) {
      const RowBlock next(call_.rows, item_.group, following, end, V::kRows);
      look_ahead(item_, segment, next, block.high);
      for (int64_t place = max_of(block.low, item_.begin); place < min_of(next.low, item_.end); ++place) {
        add_ahead(call_.grad_key, sizeof(T), item_, place, segment.key_column, segment.key_count);
        add_ahead(call_.grad_value, sizeof(T), item_, place, segment.key_column, segment.key_count);
      }
    } else if (&segment < last || next_) {
      const Item& item = &segment < last ? item_ : *next_;
      int64_t next_begin, next_end;
      query_rows(item, &next_begin, &next_end);
      look_ahead(item, &segment < last ? *(&segment + 1) : call_.segments[0],
                 RowBlock(call_.rows, item.group, next_begin, next_end, V::kRows), 0);
    }
  }

  void look_ahead(const Item& item, const Segment& segment, const RowBlock& block, int64_t packed) {
    for (int64_t place = max_of(packed, block.low); place < block.high; ++place) {
      add_ahead(call_.key, sizeof(S), item, place, segment.key_column, segment.key_count);
      add_ahead(call_.value, sizeof(S), item, place, segment.key_column, segment.key_count);
    }
    for (int r = 0; r < block.count; ++r) {
      add_ahead(call_.query, sizeof(S), item, block.begin + r, segment.query_column, segment.query_count);
      add_ahead(call_.grad_out, sizeof(S), item, block.begin + r, segment.query_column, segment.query_count);
    }
  }

  void add_ahead(const Map& map, int64_t size, const Item& item, int64_t place, const int64_t* columns, int64_t count) {
    ahead_.add(map, size, item.batch, token_of(call_.rows, item.group, place), item.head, columns, count);
  }

  static void clear(T* p, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = T(0);
  }

  template <class From>
  void pack_row(const Map& map, int64_t place, const int64_t* columns, int64_t count, T factor, T* out, int64_t step) {
    const From* row = row_of<const From>(map, item_.batch, token_of(call_.rows, item_.group, place), item_.head);
    pack<V>(row, map.column, columns, count, call_.dim, factor, out, step);
  }

  // Weights and logit gradients of a tile, kept for `scatter`; and the gradient of its queries.
  void differentiate(const RowBlock& block, const Segment& segment, int64_t t) {
    const Tile& tile = segment.tiles[t];
    const int64_t dim = call_.dim, kernel_columns = call_.columns.kernel;
    T* weight = weight_.data + tile.first;
    T* grad = grad_logit_.data + tile.first;
    const T* query = query_.data + tile.first;
    const T* grad_out = grad_out_.data + tile.first;
    score<V>(block, tile, query, query_.row, query_step_, keys_, key_step_, dim, &bias_, weight, weight_.row, query_step_, kernel_columns, ahead_, dim * sizeof(S));
    score<V>(block, tile, grad_out, grad_out_.row, query_step_, values_, key_step_, dim, nullptr, grad, grad_logit_.row, query_step_, kernel_columns, ahead_, dim * sizeof(S));
    for (int r = 0; r < block.count; ++r) softmax_gradient(block, segment, t, r);
    gather<V>(block, tile, grad, grad_logit_.row, query_step_, keys_, key_step_, dim, grad_query_, dim * V::kLanes, kernel_columns, ahead_, dim * sizeof(S));
    for (int r = 0; r < block.count; ++r) {
      if (!owns(block.begin + r)) continue;
      unpack<V, false>(grad_query_ + r * dim * V::kLanes, V::kLanes, V::broadcast(T(call_.scale)), dim, query_row(block, r),
                       call_.grad_query.column, segment.query_column + tile.first, tile.lanes);
    }
  }

  S* query_row(const RowBlock& block, int r) const {
    return row_of<S>(call_.grad_query, item_.batch, token_of(call_.rows, item_.group, block.begin + r), item_.head);
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
    delta = delta * reciprocal(total);  // 1 but for the rounding of lse, which would not cancel below
    for (int64_t i = 0; i < window_; ++i) {
      (V::load(weight + i * step) * (V::load(grad + i * step) - delta)).store(grad + i * step);
    }
    if (call_.needs_grad_bias && owned) {
      T* sums = bias_sums_ + (t * bias_rows() + block.bias(r)) * call_.columns.kernel * V::kLanes;
      for (int64_t i = 0; i < window_; ++i) {
        (V::load(sums + i * V::kLanes) + V::load(grad + i * step)).store(sums + i * V::kLanes);
      }
    }
    T* grad_query = grad_query_ + r * call_.dim * V::kLanes;
    if (call_.pad_key) {
      take_pads(pads, r, weight, grad, grad_query, owned);
    } else {
      clear(grad_query, call_.dim * V::kLanes);
    }
  }

  void fill_pads(const RowBlock& block, const PadWindow<V>& pads, int r, T* weight, T* grad) {
    const int64_t dim = call_.dim;
    const T* key = static_cast<const T*>(call_.pad_key) + item_.head * dim;
    const T* value = static_cast<const T*>(call_.pad_value) + item_.head * dim;
    const V logit = dot_with_one<V>(query_.at(r) + pads.tile.first, query_step_, key, dim);
    pads.fill(weight, query_step_, logit, bias_.row(block.bias(r)), bias_.stride);
    // Only differences of these products matter. Relative to the padded keys' own, which may carry nearly all of the
    // weight, the others lose no digits.
    const V padded = dot_with_one<V>(grad_out_.at(r) + pads.tile.first, query_step_, value, dim);
    for (int64_t i = 0; i < window_; ++i) (V::load(grad + i * query_step_) - padded).store(grad + i * query_step_);
    pads.fill(grad, query_step_, V::zero());
  }

  // Moves what the padded keys get into their sums, and what they give into the query's gradient.
  void take_pads(const PadWindow<V>& pads, int r, T* weight, T* grad, T* grad_query, bool owned) {
    const int64_t dim = call_.dim, first = pads.tile.first;
    const T* key = static_cast<const T*>(call_.pad_key) + item_.head * dim;
    T lanes[2][V::kLanes];
    const V grad_logit = pads.take(grad, query_step_);
    grad_logit.store(lanes[0]);
    pads.take(weight, query_step_).store(lanes[1]);
    for (int i = pads.tile.lanes; i < V::kLanes; ++i) lanes[0][i] = lanes[1][i] = T(0);
    for (int64_t d = 0; d < dim; ++d) (grad_logit * V::broadcast(key[d])).store(grad_query + d * V::kLanes);
    if (!owned) return;
    for (int64_t d = 0; d < dim; ++d) {
      for (int i = 0; i < pads.tile.lanes; ++i) {
        pad_sums_[d * V::kLanes + i] += lanes[0][i] * query_.at(r)[d * query_step_ + first + i];
        pad_sums_[(dim + d) * V::kLanes + i] += lanes[1][i] * grad_out_.at(r)[d * query_step_ + first + i];
      }
    }
  }

  V load_lse(const RowBlock& block, const Segment& segment, const Tile& tile, int r) {
    const int64_t token_row = item_.batch * call_.rows.length + token_of(call_.rows, item_.group, block.begin + r);
    const T* row = static_cast<const T*>(call_.lse) + token_row * call_.columns.length * call_.heads + item_.head;
    T lanes[V::kLanes];
    for (int i = 0; i < V::kLanes; ++i) {
      lanes[i] = row[segment.query_column[tile.first + min_of(i, tile.lanes - 1)] * call_.heads] * T(kLog2E);
    }
    return V::load(lanes);
  }

  // What query row r gives to the gradients of the keys and values of a key tile, in the rows that it sees.
  void scatter(const RowBlock& block, const Segment& segment, const KeyTile& tile, int r) {
    const int64_t kernel_columns = call_.columns.kernel, low = block.start(r);
    const int64_t begin = max_of(low, item_.begin), end = min_of(low + block.limit(r), item_.end);
    for (int64_t place = begin; place < end; place += V::kRows) {
      const int count = static_cast<int>(min_of(V::kRows, end - place));
      Mix<V> values, keys;
      for (int i = 0; i < count; ++i) {
        const int64_t window_row = (place + i - low) * kernel_columns * query_step_;
        const T* weight = weight_.at(r) + window_row;
        const T* grad = grad_logit_.at(r) + window_row;
        if (tile.straight) {
          const int64_t offset = (kernel_columns - 1) * query_step_ + tile.query;
          values.weight[i] = weight + offset;
          keys.weight[i] = grad + offset;
        } else {
          values.weight[i] = gather_weights(tile, weight, gathered_weight_ + i * tile.columns * V::kLanes);
          keys.weight[i] = gather_weights(tile, grad, gathered_grad_ + i * tile.columns * V::kLanes);
        }
        values.out[i] = grad_values_.at(place + i) + tile.first;
        keys.out[i] = grad_keys_.at(place + i) + tile.first;
      }
      add(tile, grad_out_.at(r), count, &values);
      add(tile, query_.at(r), count, &keys);
    }
  }

  void add(const KeyTile& tile, const T* row, int count, Mix<V>* a) {
    a->weight_step = tile.straight ? 1 - query_step_ : V::kLanes;
    a->y = row + tile.query;
    a->y_step = query_step_;
    a->out_step = key_step_;
    a->dim = call_.dim;
    a->index = tile.straight ? nullptr : tile.index;
    mix(*a, count, tile.columns);
  }

  static const T* gather_weights(const KeyTile& tile, const T* weight, T* out) {
    for (int i = 0; i < tile.columns * V::kLanes; i += V::kLanes) V::gather(weight, tile.weight + i).store(out + i);
    return out;
  }

  // Adds a finished row of key and value gradients to the caller's.
  void flush(const Segment& segment, int64_t place) {
    if (!owns(place)) return;
    const int64_t token_row = token_of(call_.rows, item_.group, place);
    T* key_row = row_of<T>(call_.grad_key, item_.batch, token_row, item_.head);
    T* value_row = row_of<T>(call_.grad_value, item_.batch, token_row, item_.head);
    for (int64_t p = 0; p < segment.key_count; p += V::kLanes) {
      const int64_t count = min_of(V::kLanes, segment.key_count - p);
      const int64_t* columns = segment.key_column + p;
      // The packed query carries log2(e), which its product with a gradient must lose.
      unpack<V, true>(grad_keys_.at(place) + p, key_step_, V::broadcast(T(kLn2)), call_.dim, key_row, call_.grad_key.column, columns, count);
      unpack<V, true>(grad_values_.at(place) + p, key_step_, V::broadcast(T(1)), call_.dim, value_row, call_.grad_value.column, columns, count);
    }
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
            out[tile.straight ? tile.bias + b : tile.bias_index[b * V::kLanes + i]] += sums[i];
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

  const Call& call_;
  const Item& item_;
  const Item* const next_;
  const Partial& partial_;
  Ahead ahead_;
  const int64_t window_, slots_, key_step_, query_step_;
  const Bias<V> bias_;
  const Ring<T> keys_, values_, grad_keys_, grad_values_;  // by place, [dim][key positions]
  const Ring<T> query_, grad_out_;                         // by query row of the block, [dim][query positions]
  const Ring<T> weight_, grad_logit_;                      // by query row of the block, [window][query positions]
  T* const grad_query_;       // [rows][dim][lanes]
  T* const gathered_weight_;  // [rows][columns][lanes]
  T* const gathered_grad_;
  T* const pad_sums_;         // [key, value][dim][lanes]
  T* const bias_sums_;        // [tiles][bias rows][window columns][lanes]
};

}  // namespace
}  // namespace nat_dense
