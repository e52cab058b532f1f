// The two loops that all the arithmetic is in, and the transposition of tokens into lanes and back.
//
// Packed buffers are [dim][position]: a vector holds one channel of consecutive positions. See README.md.
#pragma once

#include "problem.h"
#include "vec_generic.h"

namespace nat_dense {
namespace {

// For up to V::kRows query rows that share a key row, out[row][column] = bias + sum over channels of
// x[row] * (key of that window column).
template <class V>
struct Dot {
  using T = typename V::scalar;
  const T* x[V::kRows];     // [dim][lanes], the query rows
  int64_t x_step;
  const T* y;               // [dim][...], the key row, at the tile's first key
  int64_t y_step;
  const T* bias[V::kRows];  // bias rows; null for none
  T* out[V::kRows];         // [columns][lanes]
  int64_t out_step;
  int64_t dim;
  const Tile* tile;
};

// For up to V::kRows output rows, out[row][channel] += sum over window columns of weight[row][column] * (y of that
// column).
template <class V>
struct Mix {
  using T = typename V::scalar;
  const T* weight[V::kRows];  // [columns][lanes]
  int64_t weight_step;        // may be negative
  const T* y;                 // [dim][...]
  int64_t y_step;
  T* out[V::kRows];           // [dim][lanes]
  int64_t out_step;
  int64_t dim;
  const int32_t* index;       // [columns][lanes] slots of y; null where column c of lane l is y[c + l]
};

// Bias of window column `column`, lane by lane.
template <class V>
NAT_DENSE_INLINE V bias_of(const Tile& tile, const typename V::scalar* row, int column) {
  if (tile.straight) return V::broadcast(row[tile.bias + column]);
  return typename V::template Window<false>(row).at(column, tile.bias_index);
}

template <class V, bool Straight, int R, int C>
NAT_DENSE_NOINLINE void dot_block(const Dot<V>& a, int column) {
  using T = typename V::scalar;
  V sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = a.bias[0] ? bias_of<V>(*a.tile, a.bias[r], column + c) : V::zero();
  }
  const T* y = Straight ? a.y + column : a.y;
  const int32_t* index = Straight ? nullptr : a.tile->index + column * V::kLanes;
  const T* x[R];
  for (int r = 0; r < R; ++r) x[r] = a.x[r];
  for (int64_t d = 0; d < a.dim; ++d) {
    const typename V::template Window<Straight> keys(y);
    V query[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      query[r] = V::load(x[r]);
      x[r] += a.x_step;
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const V key = keys.at(c, index);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][c] = fma(query[r], key, sum[r][c]);
    }
    y += a.y_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c].store(a.out[r] + (column + c) * a.out_step);
  }
}

template <class V, bool Straight, int R, int C>
NAT_DENSE_NOINLINE void mix_block(const Mix<V>& a, int column) {
  using T = typename V::scalar;
  V weight[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) weight[r][c] = V::load(a.weight[r] + (column + c) * a.weight_step);
  }
  const T* y = Straight ? a.y + column : a.y;
  const int32_t* index = Straight ? nullptr : a.index + column * V::kLanes;
  T* out[R];
  for (int r = 0; r < R; ++r) out[r] = a.out[r];
  const int64_t dim = a.dim, y_step = a.y_step, out_step = a.out_step;  // the stores might change `a`, for all it says
  for (int64_t d = 0; d < dim; ++d) {
    const typename V::template Window<Straight> values(y);
    V sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = V::load(out[r]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const V value = values.at(c, index);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] = fma(weight[r][c], value, sum[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum[r].store(out[r]);
      out[r] += out_step;
    }
    y += y_step;
  }
}

// Blocks of the size that fits the registers: the first R rows, C columns at a time.
template <class V, bool Straight, int R = V::kRows, int C = V::kColumns>
NAT_DENSE_INLINE void dot_rows(const Dot<V>& a, int rows, int column, int columns) {
  if constexpr (R > 1) {
    if (rows < R) return dot_rows<V, Straight, R - 1, C>(a, rows, column, columns);
  }
  if constexpr (C > 1) {
    if (columns < C) return dot_rows<V, Straight, R, C - 1>(a, rows, column, columns);
  }
  dot_block<V, Straight, R, C>(a, column);
}

template <class V, bool Straight, int R = V::kRows, int C = V::kColumns>
NAT_DENSE_INLINE void mix_rows(const Mix<V>& a, int rows, int column, int columns) {
  if constexpr (R > 1) {
    if (rows < R) return mix_rows<V, Straight, R - 1, C>(a, rows, column, columns);
  }
  if constexpr (C > 1) {
    if (columns < C) return mix_rows<V, Straight, R, C - 1>(a, rows, column, columns);
  }
  mix_block<V, Straight, R, C>(a, column);
}

// Calls f(first column, columns) for blocks of nearly equal width, none wider than `most`.
template <class F>
NAT_DENSE_INLINE void split_columns(int columns, int most, F&& f) {
  if (columns <= most) return f(0, columns);
  const int blocks = static_cast<int>(ceil_div(columns, most));
  for (int i = 0, column = 0; i < blocks; ++i) {
    const int width = (columns - column) / (blocks - i);
    f(column, width);
    column += width;
  }
}

template <class V>
void dot(const Dot<V>& a, int rows) {
  split_columns(a.tile->columns, V::kColumns, [&](int column, int columns) {
    if (a.tile->straight) {
      dot_rows<V, true>(a, rows, column, columns);
    } else {
      dot_rows<V, false>(a, rows, column, columns);
    }
  });
}

template <class V>
void mix(const Mix<V>& a, int rows, int columns) {
  split_columns(columns, V::kColumns, [&](int column, int columns) {
    if (a.index == nullptr) {
      mix_rows<V, true>(a, rows, column, columns);
    } else {
      mix_rows<V, false>(a, rows, column, columns);
    }
  });
}

// Tokens of one map row and head -> [dim][step], times `factor`: lanes become positions. Writes whole vectors of
// positions; those past the end repeat a token.
template <class V, class S>
void pack(const S* row, int64_t column_stride, const int64_t* columns, int64_t count, int64_t dim,
          typename V::scalar factor, typename V::scalar* out, int64_t step) {
  constexpr int kLanes = V::kLanes;
  const V scale = V::broadcast(factor);
  for (int64_t position = 0; position < count; position += kLanes) {
    const int64_t last = count - 1 - position;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t channels = min_of(kLanes, dim - d);
      V block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] = V::load_part(row + columns[position + min_of(i, last)] * column_stride + d, channels);
      }
      V::transpose(block);
      typename V::scalar* p = out + d * step + position;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < channels) (block[i] * scale).store(p + i * step);
      }
    }
  }
}

// The way back: [dim][step], times `factor` lane by lane, -> tokens. Adds to what is there if `Add`.
template <class V, bool Add, class S>
NAT_DENSE_INLINE void unpack(const typename V::scalar* in, int64_t step, V factor, int64_t dim, S* row,
                             int64_t column_stride, const int64_t* columns, int64_t count) {
  constexpr int kLanes = V::kLanes;
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t channels = min_of(kLanes, dim - d);
    V block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = i < channels ? V::load(in + (d + i) * step) * factor : V::zero();
    V::transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i < count) {
        S* p = row + columns[i] * column_stride + d;
        if constexpr (Add) block[i] = block[i] + V::load_part(p, channels);
        block[i].store_part(p, channels);
      }
    }
  }
}

}  // namespace
}  // namespace nat_dense
