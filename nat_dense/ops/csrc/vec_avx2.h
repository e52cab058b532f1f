// Eight floats in an AVX register (AVX2, FMA). Included by avx2.cpp alone.
#pragma once

#include <immintrin.h>

#include "vec_generic.h"

namespace nat_dense {
namespace {

struct Avx2Vec {
  using scalar = float;
  static constexpr int kLanes = 8;
  static constexpr int kSlots = 0;
  static constexpr int kRows = 3;
  static constexpr int kColumns = 4;  // 3 x 4 sums, 3 queries and a key are the sixteen registers
  static constexpr int kKeyRows = 6;
  static constexpr int kVectors = 2;
  __m256 v;

  static NAT_DENSE_INLINE Avx2Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static NAT_DENSE_INLINE Avx2Vec zero() { return {_mm256_setzero_ps()}; }
  static NAT_DENSE_INLINE Avx2Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  NAT_DENSE_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  NAT_DENSE_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }

  friend NAT_DENSE_INLINE Avx2Vec operator+(Avx2Vec a, Avx2Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend NAT_DENSE_INLINE Avx2Vec operator-(Avx2Vec a, Avx2Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend NAT_DENSE_INLINE Avx2Vec operator*(Avx2Vec a, Avx2Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend NAT_DENSE_INLINE Avx2Vec operator/(Avx2Vec a, Avx2Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend NAT_DENSE_INLINE Avx2Vec fma(Avx2Vec a, Avx2Vec b, Avx2Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend NAT_DENSE_INLINE Avx2Vec max(Avx2Vec a, Avx2Vec b) { return {_mm256_max_ps(a.v, b.v)}; }

  static NAT_DENSE_INLINE Avx2Vec by_sign(Avx2Vec x, Avx2Vec negative, Avx2Vec positive) {
    return {_mm256_blendv_ps(positive.v, negative.v, x.v)};
  }

  friend NAT_DENSE_INLINE Avx2Vec exp2(Avx2Vec x) {
    const Avx2Vec bounded = max(broadcast(-126.0f), x);  // a NaN in the second operand passes
    const __m256 whole = _mm256_round_ps(bounded.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return polynomial(Avx2Vec{_mm256_sub_ps(bounded.v, whole)}, kExp2) * Avx2Vec{_mm256_castsi256_ps(power)};
  }
  // Of a sum of weights whose largest is 1: positive and normal, or NaN.
  friend NAT_DENSE_INLINE Avx2Vec log2(Avx2Vec x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i one = _mm256_set1_epi32(0x3f800000);
    __m256 exponent = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sub_epi32(bits, one), 23));
    __m256 mantissa = _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff)), one));
    const __m256 high = _mm256_cmp_ps(mantissa, _mm256_set1_ps(1.41421356f), _CMP_GT_OQ);
    mantissa = _mm256_blendv_ps(mantissa, _mm256_mul_ps(mantissa, _mm256_set1_ps(0.5f)), high);
    exponent = _mm256_add_ps(exponent, _mm256_and_ps(high, _mm256_set1_ps(1.0f)));
    const Avx2Vec rest{_mm256_sub_ps(mantissa, _mm256_set1_ps(1.0f))};
    const Avx2Vec result = fma(rest, polynomial(rest, kLog2), Avx2Vec{exponent});
    return {_mm256_blendv_ps(result.v, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))};
  }

  // Keeps a value that several sums use in its register: compilers load it once more for each of them.
  static NAT_DENSE_INLINE Avx2Vec held(Avx2Vec x) {
#if defined(__GNUC__)
    asm("" : "+x"(x.v));
#endif
    return x;
  }

  template <bool Straight>
  struct Window {
    const float* row;
    explicit NAT_DENSE_INLINE Window(const float* row) : row(row) {}
    NAT_DENSE_INLINE Avx2Vec at(int column, const int32_t* index) const {
      if constexpr (Straight) return held(load(row + column));
      const __m256i slots = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + column * 8));
      return {_mm256_i32gather_ps(row, slots, 4)};
    }
  };

  // column(j, {row(0)[j], row(1)[j], ...}).
  template <class Row, class Column>
  static NAT_DENSE_INLINE void transpose(Row&& row, Column&& column) {
    __m256 quads[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {  // quads[i + j] has column j of rows i..i+3 in both 128-bit parts
      const __m256 a = row(i).v, b = row(i + 1).v, c = row(i + 2).v, d = row(i + 3).v;
      const __m256 even_low = _mm256_unpacklo_ps(a, b), even_high = _mm256_unpackhi_ps(a, b);
      const __m256 odd_low = _mm256_unpacklo_ps(c, d), odd_high = _mm256_unpackhi_ps(c, d);
      quads[i] = _mm256_shuffle_ps(even_low, odd_low, 0x44);
      quads[i + 1] = _mm256_shuffle_ps(even_low, odd_low, 0xee);
      quads[i + 2] = _mm256_shuffle_ps(even_high, odd_high, 0x44);
      quads[i + 3] = _mm256_shuffle_ps(even_high, odd_high, 0xee);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 4; ++j) {
      column(j, Avx2Vec{_mm256_permute2f128_ps(quads[j], quads[4 + j], 0x20)});
      column(4 + j, Avx2Vec{_mm256_permute2f128_ps(quads[j], quads[4 + j], 0x31)});
    }
  }

  static NAT_DENSE_INLINE __m256i first(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }
  static NAT_DENSE_INLINE Avx2Vec load_part(const float* p, int64_t count) {
    return {_mm256_maskload_ps(p, first(count))};
  }
  static NAT_DENSE_INLINE Avx2Vec load_part(const BFloat16* p, int64_t count) {
    BFloat16 part[8] = {};
    if (count < 8) {
      memcpy(part, p, count * sizeof(BFloat16));
      p = part;
    }
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  NAT_DENSE_INLINE void store_part(float* p, int64_t count) const { _mm256_maskstore_ps(p, first(count), v); }
  NAT_DENSE_INLINE void store_part(BFloat16* p, int64_t count) const {
    float lanes[8];
    store(lanes);
    for (int i = 0; i < 8 && i < count; ++i) narrow(lanes[i], p + i);
  }
};

}  // namespace
}  // namespace nat_dense
