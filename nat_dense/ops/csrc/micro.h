// The loops that all the arithmetic is in, and the way of tokens into packed rows and back. See README.md.
#pragma once

#include <type_traits>

#include "problem.h"
#include "vec_generic.h"

namespace nat_dense {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line, or half of one

// Inlined, or GCC takes a function of nothing else for one without effect.
NAT_DENSE_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#endif
}

// Lines of memory that will be needed later: at `first` plus each of [dim] offsets in bytes. They are asked for one with
// each channel of a product: a processor has a few dozen requests under way at most, and drops what comes on top.
struct Lines {
  uintptr_t first;  // 0: there are none. A number: the last ones may lie past the end of the memory
  const int64_t* offset;
};

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
  T* largest[V::kRows];     // [lanes], of each query so far; null where nobody asks
  int64_t out_step;
  int64_t dim;
  const Tile* tile;
  Lines later;
};

// Bias of window column `column`, lane by lane.
template <class V>
NAT_DENSE_INLINE V bias_of(const Tile& tile, const typename V::scalar* row, int column) {
  if (tile.uniform) return V::broadcast(row[tile.bias + column]);
  return typename V::template Window<false>(row).at(column, tile.bias_index);
}

template <class V, bool Straight, bool Later, int R, int C>
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
    if constexpr (Later) prefetch(reinterpret_cast<const void*>(a.later.first + a.later.offset[d]));
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
  T* out[R];  // copies: for all that the compiler knows, a store might change `a`
  for (int r = 0; r < R; ++r) out[r] = a.out[r] + column * a.out_step;
  const int64_t out_step = a.out_step;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c].store(out[r] + c * out_step);
  }
  if (!a.largest[0]) return;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    V largest = V::load(a.largest[r]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) largest = max(largest, sum[r][c]);
    largest.store(a.largest[r]);
  }
}

// Blocks of the size that fits the registers: the first R rows, C columns at a time.
template <class V, bool Straight, bool Later, int R = V::kRows, int C = V::kColumns>
NAT_DENSE_INLINE void dot_rows(const Dot<V>& a, int rows, int column, int columns) {
  if constexpr (R > 1) {
    if (rows < R) return dot_rows<V, Straight, Later, R - 1, C>(a, rows, column, columns);
  }
  if constexpr (C > 1) {
    if (columns < C) return dot_rows<V, Straight, Later, R, C - 1>(a, rows, column, columns);
  }
  dot_block<V, Straight, Later, R, C>(a, column);
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

template <class V, bool Straight>
void dot_columns(const Dot<V>& a, int rows, int column, int columns) {
  if (a.later.first && column == 0) {
    dot_rows<V, Straight, true>(a, rows, column, columns);
  } else {
    dot_rows<V, Straight, false>(a, rows, column, columns);
  }
}

template <class V>
void dot(const Dot<V>& a, int rows) {
  split_columns(a.tile->columns, V::kColumns, [&](int column, int columns) {
    if (a.tile->straight) {
      dot_columns<V, true>(a, rows, column, columns);
    } else {
      dot_columns<V, false>(a, rows, column, columns);
    }
  });
}

// sum[row][query] += sum over window columns of weight[row][query] * (value of that column), for the query rows [First,
// Last), which share a row of values, and Q queries whose windows begin one token after another. Channels are in the
// lanes: D vectors of them. Goes on to the next row of weights.
template <class V, int First, int Last, int Q, int D>
NAT_DENSE_INLINE void add_row(const typename V::scalar* (&weight)[V::kRows], int64_t weight_step, int64_t weight_row,
                              const typename V::scalar* value, int64_t value_step, int columns,
                              V (&sum)[V::kRows][Q][D]) {
  const typename V::scalar* w[V::kRows];
#pragma GCC unroll 8
  for (int r = First; r < Last; ++r) w[r] = weight[r], weight[r] += weight_row;
  V y[Q][D];  // the query that comes next takes this one's value in the next column
#pragma GCC unroll 8
  for (int q = 0; q + 1 < Q; ++q) {
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) y[q][d] = V::load(value + q * value_step + d * V::kLanes);
  }
  value += (Q - 1) * value_step;
  for (int c = 0; c < columns; ++c) {
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      // Not earlier: that would take registers.
#pragma GCC unroll 8
      for (int d = 0; d < D && q == Q - 1; ++d) y[q][d] = V::held(V::load(value + d * V::kLanes));
#pragma GCC unroll 8
      for (int r = First; r < Last; ++r) {
        const V factor = V::held(V::broadcast(w[r][q]));
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) sum[r][q][d] = fma(factor, y[q][d], sum[r][q][d]);
      }
    }
#pragma GCC unroll 8
    for (int q = 0; q + 1 < Q; ++q) {
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) y[q][d] = y[q + 1][d];
    }
#pragma GCC unroll 8
    for (int r = First; r < Last; ++r) w[r] += weight_step;
    value += value_step;
  }
}

// The same for rows known at run time.
template <class V, int First, int Last, int Q, int D>
NAT_DENSE_INLINE void add_rows(int first, int last, const typename V::scalar* (&weight)[V::kRows],
                               int64_t weight_step, int64_t weight_row, const typename V::scalar* value,
                               int64_t value_step, int columns, V (&sum)[V::kRows][Q][D]) {
  if constexpr (First + 1 < Last) {
    if (last < Last) {
      return add_rows<V, First, Last - 1>(first, last, weight, weight_step, weight_row, value, value_step, columns,
                                          sum);
    }
    if (first > First) {
      return add_rows<V, First + 1, Last>(first, last, weight, weight_step, weight_row, value, value_step, columns,
                                          sum);
    }
  }
  add_row<V, First, Last>(weight, weight_step, weight_row, value, value_step, columns, sum);
}

// For a run of keys and the rows of a query's window, out[row][key] += sum over the queries of one map row that see
// the key of their weight * their vector. Channels are in the lanes.
template <class V>
struct Scatter {
  using T = typename V::scalar;
  const Viewers* viewers;  // of each key
  int64_t keys;
  const T* weight;         // [rows][...]
  int64_t weight_row;
  const T* y;              // [queries][step]
  T* out[V::kKeyRows];     // [keys][step]
  int64_t step;            // channels, in whole vectors
};

template <class V, int R, int D>
NAT_DENSE_INLINE void scatter_channels(const Scatter<V>& a, int64_t channel) {
  using T = typename V::scalar;
  // Copies: for all that the compiler knows, a store might change `a`.
  const int64_t step = a.step, weight_row = a.weight_row, keys = a.keys;
  const Viewers* const viewers = a.viewers;
  const T *const weights = a.weight, *const ys = a.y + channel;
  T* out[R];
  for (int r = 0; r < R; ++r) out[r] = a.out[r] + channel;
  for (int64_t k = 0; k < keys; ++k) {
    const Viewers seen = viewers[k];
    V sum[R][D];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) sum[r][d] = V::load(out[r] + d * V::kLanes);
    }
    const T* y = ys + seen.query * step;
    for (int i = 0; i < seen.count; ++i) {
      const T* weight = weights + seen.weight[i];
      V query[D];
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) query[d] = V::held(V::load(y + d * V::kLanes));
      y += step;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V factor = V::held(V::broadcast(weight[r * weight_row]));
#pragma GCC unroll 8
        for (int d = 0; d < D; ++d) sum[r][d] = fma(factor, query[d], sum[r][d]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) sum[r][d].store(out[r] + d * V::kLanes);
      out[r] += step;
    }
  }
}

template <class V, int R>
NAT_DENSE_NOINLINE void scatter_block(const Scatter<V>& a) {
  int64_t channel = 0;
  for (; channel + V::kVectors * V::kLanes <= a.step; channel += V::kVectors * V::kLanes) {
    scatter_channels<V, R, V::kVectors>(a, channel);
  }
  for (; channel < a.step; channel += V::kLanes) scatter_channels<V, R, 1>(a, channel);
}

template <class V, int R = V::kKeyRows>
void scatter(const Scatter<V>& a, int rows) {
  if constexpr (R > 1) {
    if (rows < R) return scatter<V, R - 1>(a, rows);
  }
  scatter_block<V, R>(a);
}

// One head of a map row, its tokens in the order of positions. They lie hundreds of bytes apart, further than hardware
// prefetchers follow, so whoever goes through them asks for those that come `ahead` tokens later.
template <class S>
struct Tokens {
  S* row;
  S* next;  // the same of the row that is taken after this one; null if there is none
  int64_t stride;
  const int64_t* columns;
  int64_t count, dim;
  int64_t dilation;  // of the columns
  int64_t ahead;     // 0: they lie in the caches, where asking costs more than it gains

  // Whether the next `run` tokens are a dilation apart. Ends of groups, and copies of columns, put others elsewhere.
  NAT_DENSE_INLINE bool even(int64_t position, int64_t run) const {
    return position + run <= count && columns[position + run - 1] - columns[position] == (run - 1) * dilation;
  }

  NAT_DENSE_INLINE S* at(int64_t position) const { return row + columns[position] * stride; }

  // While the tokens [position, position + run) are worked on.
  NAT_DENSE_INLINE void look_ahead(int64_t position, int64_t run) const {
    if (ahead == 0) return;
    const int64_t later = position + ahead, in_row = min_of(max_of(count - later, 0), run);
    for (int64_t i = later; i < later + in_row; ++i) fetch(at(i), dim);
    if (!next) return;
    const int64_t end = min_of(later + run - count, count);
    for (int64_t i = later + in_row - count; i < end; ++i) fetch(next + columns[i] * stride, dim);
  }

  static constexpr int64_t kRun = 8;  // tokens that are copied from one request to the next

  static NAT_DENSE_INLINE void fetch(const S* token, int64_t dim) {
    for (int64_t d = 0; d < dim; d += kLine / sizeof(S)) prefetch(token + d);
  }
};

// N vectors of channels of the tokens [begin, end) -> [position][step].
template <class V, int N, class S>
NAT_DENSE_INLINE void copy_channels(const Tokens<const S>& tokens, int64_t begin, int64_t end, int64_t channel,
                                    typename V::scalar* out, int64_t step) {
  const S* const row = tokens.row + channel;
  const int64_t* const columns = tokens.columns;
  const int64_t stride = tokens.stride;
  out += begin * step + channel;
  for (int64_t i = begin; i < end; ++i, out += step) {
    const S* token = row + columns[i] * stride;
    V x[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n] = V::load_part(token + n * V::kLanes, V::kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n].store(out + n * V::kLanes);
  }
}

// The tokens [begin, end) -> [position][step], in the type that is computed in. Channels past the last are zero.
template <class V, class S>
void copy(const Tokens<const S>& tokens, int64_t begin, int64_t end, typename V::scalar* out, int64_t step) {
  for (int64_t last; begin < end; begin = last) {
    last = tokens.ahead ? min_of(begin + tokens.kRun, end) : end;
    tokens.look_ahead(begin, last - begin);
    int64_t d = 0;
    for (; d + V::kVectors * V::kLanes <= tokens.dim; d += V::kVectors * V::kLanes) {
      copy_channels<V, V::kVectors>(tokens, begin, last, d, out, step);
    }
    for (; d + V::kLanes <= tokens.dim; d += V::kLanes) copy_channels<V, 1>(tokens, begin, last, d, out, step);
    for (int64_t i = begin; i < last && d < tokens.dim; ++i) {
      V::load_part(tokens.at(i) + d, tokens.dim - d).store(out + i * step + d);
    }
  }
}

// first + i * step for i < N, from one pointer to every fourth. Compilers would compute all of them, ahead of a loop,
// and have no registers to keep them in. The last ones may lie past the end of the memory, where nobody reads them.
template <class T, int N>
class Spaced {
 public:
  NAT_DENSE_INLINE Spaced(T* first, int64_t step) : step_(step) {
#pragma GCC unroll 8
    for (int i = 0; i < N; i += 4) fourth_[i / 4] = held(first + i * step);
  }
  NAT_DENSE_INLINE T* operator()(int i) const { return fourth_[i / 4] + i % 4 * step_; }

 private:
  static NAT_DENSE_INLINE T* held(T* p) {
#if defined(__GNUC__)
    asm("" : "+r"(p));
#endif
    return p;
  }
  T* fourth_[N / 4 + (N % 4 > 0)];
  int64_t step_;
};

// A vector of tokens -> [dim][...], times `factor`: lanes become positions. `token(d)(i)` is channel d of the i-th, and
// `out(d)(i)` where channel d + i goes.
template <class V, class Token, class Out>
NAT_DENSE_INLINE void pack_vector(Token&& token, int64_t dim, typename V::scalar factor, Out&& out) {
  const V scale = V::broadcast(factor);
  const auto channels = [&](int64_t d, int64_t count) NAT_DENSE_INLINE_LAMBDA {
    const auto tokens = token(d);
    const auto rows = out(d);
    V::transpose([&](int i) NAT_DENSE_INLINE_LAMBDA { return V::load_part(tokens(i), count); },
                 [&](int i, V x) NAT_DENSE_INLINE_LAMBDA {
                   if (i < count) (x * scale).store(rows(i));
                 });
  };
  int64_t d = 0;
  for (; d + V::kLanes <= dim; d += V::kLanes) channels(d, V::kLanes);
  if (d < dim) channels(d, dim - d);
}

// The same for tokens `stride` apart, the first of them at `first`: -> [dim][step].
template <class V, class S>
NAT_DENSE_INLINE void pack_even(const S* first, int64_t stride, int64_t dim, typename V::scalar factor,
                                typename V::scalar* out, int64_t step) {
  using T = typename V::scalar;
  const auto tokens = [=](int64_t d) NAT_DENSE_INLINE_LAMBDA { return Spaced<const S, V::kLanes>(first + d, stride); };
  const auto rows = [=](int64_t d) NAT_DENSE_INLINE_LAMBDA { return Spaced<T, V::kLanes>(out + d * step, step); };
  pack_vector<V>(tokens, dim, factor, rows);
}

// The same for tokens at any addresses: the i-th is at `at(i)`.
template <class V, class At>
NAT_DENSE_INLINE void pack_any(At&& at, int64_t dim, typename V::scalar factor, typename V::scalar* out, int64_t step) {
  decltype(at(0)) tokens[V::kLanes];
  for (int i = 0; i < V::kLanes; ++i) tokens[i] = at(i);
  pack_vector<V>(
      [&](int64_t d) NAT_DENSE_INLINE_LAMBDA {
        return [&tokens, d](int i) NAT_DENSE_INLINE_LAMBDA { return tokens[i] + d; };
      },
      dim, factor,
      [=](int64_t d) NAT_DENSE_INLINE_LAMBDA {
        return [=](int i) NAT_DENSE_INLINE_LAMBDA { return out + (d + i) * step; };
      });
}

// The tokens from `position` on; those past the last repeat it.
template <class V, class S>
NAT_DENSE_INLINE void pack(const Tokens<const S>& tokens, int64_t position, typename V::scalar factor,
                           typename V::scalar* out, int64_t step) {
  tokens.look_ahead(position, V::kLanes);
  if (tokens.even(position, V::kLanes)) {
    return pack_even<V>(tokens.at(position), tokens.stride * tokens.dilation, tokens.dim, factor, out, step);
  }
  pack_any<V>([&](int i) { return tokens.at(min_of(position + i, tokens.count - 1)); }, tokens.dim, factor, out, step);
}

// The tokens [begin, end), in whole vectors.
template <class V, class S>
void pack(const Tokens<const S>& tokens, int64_t begin, int64_t end, typename V::scalar* out, int64_t step) {
  for (int64_t i = begin; i < end; i += V::kLanes) pack<V>(tokens, i, typename V::scalar(1), out + i, step);
}

// Whether results that are stored as S go past the caches: whole lines of the type that is computed in can.
template <class V, class S>
bool streams(const Call& call) {
  return call.stream && std::is_same<S, typename V::scalar>::value && call.dim * sizeof(S) % 64 == 0;
}

template <class V, class S>
NAT_DENSE_INLINE void write(V x, S* p, int64_t count, bool stream) {
  if constexpr (std::is_same<S, typename V::scalar>::value) {
    if (stream) return x.stream(p);
    if (count >= V::kLanes) return x.store(p);
  }
  x.store_part(p, count);
}

// [position][step], times `factor`, -> tokens. Those before position `begun` have a part of their sum already.
template <class V, class S>
void put(const typename V::scalar* in, int64_t step, typename V::scalar factor, Tokens<S> tokens, int64_t begun,
         bool stream) {
  const V scale = V::broadcast(factor);
  for (int64_t i = 0; i < tokens.count; ++i, in += step) {
    if (!stream && i % tokens.kRun == 0) tokens.look_ahead(i, tokens.kRun);
    S* token = tokens.at(i);
    for (int64_t d = 0; d < tokens.dim; d += V::kLanes) {
      V sum = V::load(in + d) * scale;
      if (i < begun) sum = sum + V::load_part(token + d, tokens.dim - d);
      write(sum, token + d, tokens.dim - d, stream);
    }
  }
}

}  // namespace
}  // namespace nat_dense
