// A vector of N lanes in plain C++: compilers turn it into whatever the target has.
//
// Every vector type of this folder offers the same members, and the algorithm is written on those alone:
//   scalar; kLanes; kSlots, the keys that a tile may reach (0: any number); kRows, the query rows of a block; kColumns,
//   the window columns whose products are summed at once; kVectors, the vectors of channels that are, and kKeyRows, in
//   how many key rows: as many as the registers hold;
//   zero, broadcast, load, store; stream, a store to an aligned address that passes by the caches, and fence after the
//   last of them; + - * /, fma, max; by_sign, which picks lanes; exp2, log2; held;
//   Window<straight>: the keys of a tile, column by column; transpose; load_part, store_part (with conversion).
#pragma once

#include <math.h>
#include <string.h>

#include "storage.h"

#if defined(__GNUC__)
#define NAT_DENSE_INLINE inline __attribute__((always_inline))
#define NAT_DENSE_NOINLINE __attribute__((noinline))
#define NAT_DENSE_INLINE_LAMBDA __attribute__((always_inline))
#else
#define NAT_DENSE_INLINE __forceinline
#define NAT_DENSE_NOINLINE __declspec(noinline)
#define NAT_DENSE_INLINE_LAMBDA
#endif

namespace nat_dense {
namespace {

// Minimax polynomials, found with the Remez algorithm: 2^x on [-1/2, 1/2] to 1.9e-9, log2(1 + x) / x on
// [sqrt(1/2) - 1, sqrt(2) - 1] to 2.6e-8.
constexpr int kExp2Terms = 7;
constexpr float kExp2[kExp2Terms] = {1.000000001f,    0.6931472057f,   0.2402264689f,  0.05550328777f,
                                     0.009618488938f, 0.001339993116f, 0.0001534581723f};
constexpr int kLog2Terms = 9;
constexpr float kLog2[kLog2Terms] = {1.442695004f,   -0.7213473468f, 0.4809106428f,  -0.3607036824f, 0.2879162535f,
                                     -0.2389448328f, 0.2157155629f,  -0.2072696634f, 0.1258370464f};

template <class V, int Terms>
NAT_DENSE_INLINE V polynomial(V x, const float (&coefficients)[Terms]) {
  V sum = V::broadcast(coefficients[Terms - 1]);
  for (int i = Terms - 2; i >= 0; --i) sum = fma(sum, x, V::broadcast(coefficients[i]));
  return sum;
}

inline float exp2_of(float x) {
  x = x < -126.0f ? -126.0f : x;                   // below, 2^x counts as the least normal number; a NaN passes
  const float shifted = x + 12582912.0f;           // 1.5 * 2^23: the integer nearest to x is now in the low bits
  const float rest = x - (shifted - 12582912.0f);  // in [-1/2, 1/2]
  float sum = kExp2[kExp2Terms - 1];
  for (int i = kExp2Terms - 2; i >= 0; --i) sum = sum * rest + kExp2[i];
  uint32_t power;
  memcpy(&power, &shifted, 4);
  power = (power << 23) + (127u << 23);
  float factor;
  memcpy(&factor, &power, 4);
  return sum * factor;
}
inline double exp2_of(double x) { return ::exp2(x); }
inline float log2_of(float x) { return ::log2f(x); }
inline double log2_of(double x) { return ::log2(x); }

template <class T, int N>
struct GenericVec {
  using scalar = T;
  static constexpr int kLanes = N;
  static constexpr int kSlots = 0;
  static constexpr int kRows = 3;
  static constexpr int kColumns = 3;
  static constexpr int kKeyRows = 3;
  static constexpr int kVectors = 4;
#if defined(__GNUC__)
  typedef T Lanes __attribute__((vector_size(N * sizeof(T))));
#else
  struct Lanes {
    T v[N];
    T& operator[](int i) { return v[i]; }
    T operator[](int i) const { return v[i]; }
  };
#endif
  Lanes v;

  template <class F>
  static NAT_DENSE_INLINE GenericVec make(F&& lane) {
    GenericVec r;
    for (int i = 0; i < N; ++i) r.v[i] = lane(i);
    return r;
  }
  static NAT_DENSE_INLINE GenericVec broadcast(T x) {
    return make([&](int) { return x; });
  }
  static NAT_DENSE_INLINE GenericVec zero() { return broadcast(T(0)); }
  static NAT_DENSE_INLINE GenericVec load(const T* p) {
    GenericVec r;
    memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  NAT_DENSE_INLINE void store(T* p) const { memcpy(p, &v, sizeof(v)); }
  NAT_DENSE_INLINE void stream(T* p) const { store(p); }
  static void fence() {}

#if defined(__GNUC__)
  friend NAT_DENSE_INLINE GenericVec operator+(GenericVec a, GenericVec b) { return {a.v + b.v}; }
  friend NAT_DENSE_INLINE GenericVec operator-(GenericVec a, GenericVec b) { return {a.v - b.v}; }
  friend NAT_DENSE_INLINE GenericVec operator*(GenericVec a, GenericVec b) { return {a.v * b.v}; }
  friend NAT_DENSE_INLINE GenericVec operator/(GenericVec a, GenericVec b) { return {a.v / b.v}; }
  friend NAT_DENSE_INLINE GenericVec fma(GenericVec a, GenericVec b, GenericVec c) { return {a.v * b.v + c.v}; }
#else
  friend GenericVec operator+(GenericVec a, GenericVec b) {
    return make([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend GenericVec operator-(GenericVec a, GenericVec b) {
    return make([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend GenericVec operator*(GenericVec a, GenericVec b) {
    return make([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend GenericVec operator/(GenericVec a, GenericVec b) {
    return make([&](int i) { return a.v[i] / b.v[i]; });
  }
  friend GenericVec fma(GenericVec a, GenericVec b, GenericVec c) {
    return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
#endif
  friend NAT_DENSE_INLINE GenericVec max(GenericVec a, GenericVec b) {
    return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static NAT_DENSE_INLINE GenericVec by_sign(GenericVec x, GenericVec negative, GenericVec positive) {
    return make([&](int i) { return x.v[i] < T(0) ? negative.v[i] : positive.v[i]; });
  }
  friend NAT_DENSE_INLINE GenericVec exp2(GenericVec x) {
    return make([&](int i) { return exp2_of(x.v[i]); });
  }
  friend NAT_DENSE_INLINE GenericVec log2(GenericVec x) {
    return make([&](int i) { return log2_of(x.v[i]); });
  }

  // The keys of a tile from one packed row: `at(column, index)` has lane l's key of that window column.
  template <bool Straight>
  struct Window {
    const T* row;
    explicit NAT_DENSE_INLINE Window(const T* row) : row(row) {}
    NAT_DENSE_INLINE GenericVec at(int column, const int32_t* index) const {
      if constexpr (Straight) return load(row + column);
      return make([&](int i) { return row[index[column * N + i]]; });
    }
  };

  static NAT_DENSE_INLINE GenericVec held(GenericVec x) { return x; }

  // column(j, {row(0)[j], row(1)[j], ...}).
  template <class Row, class Column>
  static NAT_DENSE_INLINE void transpose(Row&& row, Column&& column) {
    GenericVec rows[N];
    for (int i = 0; i < N; ++i) rows[i] = row(i);
    for (int j = 0; j < N; ++j) column(j, make([&](int i) { return rows[i].v[j]; }));
  }

  // The first `count` lanes from or to memory, converted; the others are zero or left alone.
  template <class S>
  static NAT_DENSE_INLINE GenericVec load_part(const S* p, int64_t count) {
    return make([&](int i) { return i < count ? T(widen(p[i])) : T(0); });
  }
  template <class S>
  NAT_DENSE_INLINE void store_part(S* p, int64_t count) const {
    for (int i = 0; i < N && i < count; ++i) narrow(T(v[i]), p + i);
  }
};

}  // namespace
}  // namespace nat_dense
