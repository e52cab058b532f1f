// Sixteen floats in an AVX-512 register (F, BW, DQ, VL). Included by avx512.cpp alone.
#pragma once

#include <immintrin.h>

#include "vec_generic.h"

namespace nat_dense {
namespace {

struct Avx512Vec {
  using scalar = float;
  static constexpr int kLanes = 16;
  static constexpr int kSlots = 32;    // Window<false> picks from two registers
  static constexpr int kRows = 3;      // 3 x 7 sums, 3 queries and a key leave registers to spare
  static constexpr int kColumns = 7;
  static constexpr int kKeyRows = 7;
  static constexpr int kVectors = 2;
  __m512 v;

  static NAT_DENSE_INLINE Avx512Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static NAT_DENSE_INLINE Avx512Vec zero() { return {_mm512_setzero_ps()}; }
  static NAT_DENSE_INLINE Avx512Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  NAT_DENSE_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  NAT_DENSE_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }

  friend NAT_DENSE_INLINE Avx512Vec operator+(Avx512Vec a, Avx512Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend NAT_DENSE_INLINE Avx512Vec operator-(Avx512Vec a, Avx512Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend NAT_DENSE_INLINE Avx512Vec operator*(Avx512Vec a, Avx512Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend NAT_DENSE_INLINE Avx512Vec operator/(Avx512Vec a, Avx512Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend NAT_DENSE_INLINE Avx512Vec fma(Avx512Vec a, Avx512Vec b, Avx512Vec c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  friend NAT_DENSE_INLINE Avx512Vec max(Avx512Vec a, Avx512Vec b) { return {_mm512_max_ps(a.v, b.v)}; }

  static NAT_DENSE_INLINE Avx512Vec by_sign(Avx512Vec x, Avx512Vec negative, Avx512Vec positive) {
    return {_mm512_mask_mov_ps(positive.v, _mm512_movepi32_mask(_mm512_castps_si512(x.v)), negative.v)};
  }

  friend NAT_DENSE_INLINE Avx512Vec exp2(Avx512Vec x) {
    const Avx512Vec rest{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};  // of -inf: 0
    return {_mm512_scalef_ps(polynomial(rest, kExp2).v, _mm512_sub_ps(x.v, rest.v))};
  }
  friend NAT_DENSE_INLINE Avx512Vec log2(Avx512Vec x) {
    __m512 exponent = _mm512_getexp_ps(x.v);
    __m512 mantissa = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const __mmask16 high = _mm512_cmp_ps_mask(mantissa, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
    mantissa = _mm512_mask_mul_ps(mantissa, high, mantissa, _mm512_set1_ps(0.5f));
    exponent = _mm512_mask_add_ps(exponent, high, exponent, _mm512_set1_ps(1.0f));
    const Avx512Vec rest{_mm512_sub_ps(mantissa, _mm512_set1_ps(1.0f))};
    return fma(rest, polynomial(rest, kLog2), Avx512Vec{exponent});
  }

  // Keeps a value that several sums use in its register: compilers load it once more for each of them.
  static NAT_DENSE_INLINE Avx512Vec held(Avx512Vec x) {
#if defined(__GNUC__)
    asm("" : "+v"(x.v));
#endif
    return x;
  }

  template <bool Straight>
  struct Window {
    __m512 low, high;
    explicit NAT_DENSE_INLINE Window(const float* row) : low(_mm512_loadu_ps(row)), high(_mm512_loadu_ps(row + 16)) {}
    NAT_DENSE_INLINE Avx512Vec at(int column, const int32_t* index) const {
      if constexpr (Straight) return held({_mm512_castsi512_ps(shifted(column))});
      return {_mm512_permutex2var_ps(low, _mm512_loadu_si512(index + column * 16), high)};
    }
    // The shift is part of the instruction; loops over columns are unrolled.
    NAT_DENSE_INLINE __m512i shifted(int column) const {
      const __m512i a = _mm512_castps_si512(low), b = _mm512_castps_si512(high);
      switch (column) {
        case 0: return a;
        case 1: return _mm512_alignr_epi32(b, a, 1);
        case 2: return _mm512_alignr_epi32(b, a, 2);
        case 3: return _mm512_alignr_epi32(b, a, 3);
        case 4: return _mm512_alignr_epi32(b, a, 4);
        case 5: return _mm512_alignr_epi32(b, a, 5);
        default: static_assert(kColumns == 7); return _mm512_alignr_epi32(b, a, 6);
      }
    }
  };

  // column(j, {row(0)[j], row(1)[j], ...}). Rows are taken four at a time, and columns given away as soon as they are
  // there: sixteen of both at once don't fit the registers.
  template <class Row, class Column>
  static NAT_DENSE_INLINE void transpose(Row&& row, Column&& column) {
    __m512 quads[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {  // quads[i + j] has column j of rows i..i+3 in every 128-bit part
      const __m512 a = row(i).v, b = row(i + 1).v, c = row(i + 2).v, d = row(i + 3).v;
      const __m512 even_low = _mm512_unpacklo_ps(a, b), even_high = _mm512_unpackhi_ps(a, b);
      const __m512 odd_low = _mm512_unpacklo_ps(c, d), odd_high = _mm512_unpackhi_ps(c, d);
      quads[i] = _mm512_shuffle_ps(even_low, odd_low, 0x44);
      quads[i + 1] = _mm512_shuffle_ps(even_low, odd_low, 0xee);
      quads[i + 2] = _mm512_shuffle_ps(even_high, odd_high, 0x44);
      quads[i + 3] = _mm512_shuffle_ps(even_high, odd_high, 0xee);
    }
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j) {
      const __m512 a = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);
      const __m512 b = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);
      const __m512 c = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
      const __m512 d = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
      column(j, Avx512Vec{_mm512_shuffle_f32x4(a, c, 0x88)});
      column(4 + j, Avx512Vec{_mm512_shuffle_f32x4(b, d, 0x88)});
      column(8 + j, Avx512Vec{_mm512_shuffle_f32x4(a, c, 0xdd)});
      column(12 + j, Avx512Vec{_mm512_shuffle_f32x4(b, d, 0xdd)});
    }
  }

  static NAT_DENSE_INLINE __mmask16 first(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
  }
  static NAT_DENSE_INLINE Avx512Vec load_part(const float* p, int64_t count) {
    return {_mm512_maskz_loadu_ps(first(count), p)};
  }
  static NAT_DENSE_INLINE Avx512Vec load_part(const BFloat16* p, int64_t count) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
  }
  NAT_DENSE_INLINE void store_part(float* p, int64_t count) const { _mm512_mask_storeu_ps(p, first(count), v); }
  NAT_DENSE_INLINE void store_part(BFloat16* p, int64_t count) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i half = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    half = _mm512_srli_epi32(half, 16);
    half = _mm512_mask_mov_epi32(half, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(p, first(count), _mm512_cvtepi32_epi16(half));
  }
};

}  // namespace
}  // namespace nat_dense
