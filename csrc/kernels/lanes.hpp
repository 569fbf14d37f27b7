// Several elements at a time, in the widest form that the flags of the including file allow.
//
// A kernel is written once, as a body that takes a lane type and a position; `over` calls it along a row. No lane reads or writes past
// the row's end.
#pragma once

#include "../tier.hpp"

#include <cmath>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace horizon {
namespace {

template <int T> constexpr int size_of = T == HZ_F32 ? 4 : 1;
template <int T> constexpr float least = T == HZ_S8 ? -128.f : T == HZ_U8 ? 0.f : -INFINITY;
template <int T> constexpr float largest = T == HZ_S8 ? 127.f : T == HZ_U8 ? 255.f : INFINITY;

namespace lanes {

// Within this of an integer, a product with 1 / s rounds to the integer that the quotient rounds to: of |x / s| <= 256 the product
// of the rounded reciprocal differs from the rounded quotient by less than 1.5 * 2^-23 * 256 < 2^-13.
constexpr float clear_of_ties = 0.5f - 0x1p-13f;

// 1 / s where its relative error is that of a normal number; NaN, which no comparison accepts, elsewhere.
inline float reciprocal(float s) { return s >= 0x1p-126f && s <= 0x1p125f ? 1 / s : NAN; }

// One element; loops of it are left to the compiler to vectorize.
struct One {
  using Float = float;
  using Int = int32_t;
  Float set(float x) const { return x; }
  Int zero() const { return 0; }
  Int whole(int32_t x) const { return x; }
  template <int T> Int ints(const uint8_t *p) const { return T == HZ_S8 ? int8_t(*p) : *p; }
  template <int T> Float floats(const uint8_t *p) const {
    if constexpr (T != HZ_F32) return Float(ints<T>(p));
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  Float floats(const float *p) const { return *p; }
  Float real(Int x) const { return float(x); }
  Int plus(Int x, Int y) const { return x + y; }
  Int times(Int x, Int y) const { return x * y; }
  Float times(Float x, Float y) const { return x * y; }
  Float fma(Float x, Float y, Float z) const { return std::fma(x, y, z); }
  Float clamp(Float x, Float low, Float high) const {
    x = x > low ? x : low;
    return x < high ? x : high;
  }
  Float quotient(Float x, Float s, Float, Float, Float) const { return x / s; }
  bool nan(Float x) const { return x != x; }
  // Rounds half to even for |x| < 2^22: there adding 1.5 * 2^23 leaves no bit for a fraction.
  Int round(Float x) const {
    x += 0x1.8p23f;
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits - 0x4b400000;
  }
  // An 8-bit result lies within its dtype already.
  template <int T> void store(uint8_t *p, Float x) const {
    if constexpr (T == HZ_F32)
      std::memcpy(p, &x, 4);
    else
      *p = uint8_t(round(x));
  }
};

#if defined(__AVX512BW__) && defined(__AVX512VL__)

struct Wide {
  static constexpr int count = 16;
  using Float = __m512;
  using Int = __m512i;
  Float set(float x) const { return _mm512_set1_ps(x); }
  Int zero() const { return _mm512_setzero_si512(); }
  Int whole(int32_t x) const { return _mm512_set1_epi32(x); }
  static Int widen(__m128i bytes, bool is_signed) { return is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes); }
  template <int T> Int ints(const uint8_t *p) const { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)), T == HZ_S8); }
  template <int T> Float floats(const uint8_t *p) const {
    if constexpr (T == HZ_F32)
      return _mm512_loadu_ps(p);
    else
      return real(ints<T>(p));
  }
  Float floats(const float *p) const { return _mm512_loadu_ps(p); }
  Float real(Int x) const { return _mm512_cvtepi32_ps(x); }
  Int plus(Int x, Int y) const { return _mm512_add_epi32(x, y); }
  Int times(Int x, Int y) const { return _mm512_mullo_epi32(x, y); }
  Float times(Float x, Float y) const { return _mm512_mul_ps(x, y); }
  Float fma(Float x, Float y, Float z) const { return _mm512_fmadd_ps(x, y, z); }
  Float clamp(Float x, Float low, Float high) const { return _mm512_min_ps(high, _mm512_max_ps(low, x)); }
  // x / s, or another number that rounds and clamps to the same integer; r is the reciprocal of s.
  Float quotient(Float x, Float s, Float r, Float low, Float high) const {
    const Float one = set(1.f);
    const Float y = clamp(_mm512_mul_ps(x, r), _mm512_sub_ps(low, one), _mm512_add_ps(high, one));
    const Float off = _mm512_abs_ps(_mm512_sub_ps(y, _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
    return _mm512_cmp_ps_mask(off, set(clear_of_ties), _CMP_NLE_UQ) == 0 ? y : _mm512_div_ps(x, s);
  }
  bool nan(Float x) const { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
  Int round(Float x) const { return _mm512_cvtps_epi32(x); }
  template <int T> void store(uint8_t *p, Float x) const {
    if constexpr (T == HZ_F32)
      _mm512_storeu_ps(p, x);
    else
      _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(round(x)));
  }
};

// The first few of sixteen.
struct Masked : Wide {
  __mmask16 mask;
  explicit Masked(int64_t n) : mask(__mmask16((1u << n) - 1)) {}
  template <int T> Int ints(const uint8_t *p) const { return widen(_mm_maskz_loadu_epi8(mask, p), T == HZ_S8); }
  template <int T> Float floats(const uint8_t *p) const {
    if constexpr (T == HZ_F32)
      return _mm512_maskz_loadu_ps(mask, p);
    else
      return real(ints<T>(p));
  }
  Float floats(const float *p) const { return _mm512_maskz_loadu_ps(mask, p); }
  Float quotient(Float x, Float s, Float, Float, Float) const { return _mm512_maskz_div_ps(mask, x, s); }
  template <int T> void store(uint8_t *p, Float x) const {
    if constexpr (T == HZ_F32)
      _mm512_mask_storeu_ps(p, mask, x);
    else
      _mm_mask_storeu_epi8(p, mask, _mm512_cvtepi32_epi8(round(x)));
  }
};

template <class Body> inline void over(int64_t n, const Body &body) {
  int64_t i = 0;
  for (; i + Wide::count <= n; i += Wide::count) body(Wide{}, i);
  if (i < n) body(Masked(n - i), i);
}

#elif defined(__AVX2__)

struct Wide {
  static constexpr int count = 8;
  using Float = __m256;
  using Int = __m256i;
  Float set(float x) const { return _mm256_set1_ps(x); }
  Int zero() const { return _mm256_setzero_si256(); }
  Int whole(int32_t x) const { return _mm256_set1_epi32(x); }
  template <int T> Int ints(const uint8_t *p) const {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    return T == HZ_S8 ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
  }
  template <int T> Float floats(const uint8_t *p) const {
    if constexpr (T == HZ_F32)
      return floats(reinterpret_cast<const float *>(p));
    else
      return real(ints<T>(p));
  }
  Float floats(const float *p) const { return _mm256_loadu_ps(p); }
  Float real(Int x) const { return _mm256_cvtepi32_ps(x); }
  Int plus(Int x, Int y) const { return _mm256_add_epi32(x, y); }
  Int times(Int x, Int y) const { return _mm256_mullo_epi32(x, y); }
  Float times(Float x, Float y) const { return _mm256_mul_ps(x, y); }
  Float fma(Float x, Float y, Float z) const { return _mm256_fmadd_ps(x, y, z); }
  Float clamp(Float x, Float low, Float high) const { return _mm256_min_ps(high, _mm256_max_ps(low, x)); }
  Float quotient(Float x, Float s, Float r, Float low, Float high) const {
    const Float one = set(1.f);
    const Float y = clamp(_mm256_mul_ps(x, r), _mm256_sub_ps(low, one), _mm256_add_ps(high, one));
    const Float off = _mm256_sub_ps(y, _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const Float size = _mm256_andnot_ps(set(-0.f), off);
    return _mm256_movemask_ps(_mm256_cmp_ps(size, set(clear_of_ties), _CMP_NLE_UQ)) == 0 ? y : _mm256_div_ps(x, s);
  }
  bool nan(Float x) const { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
  Int round(Float x) const { return _mm256_cvtps_epi32(x); }
  template <int T> void store(uint8_t *p, Float x) const {
    if constexpr (T == HZ_F32) {
      _mm256_storeu_ps(reinterpret_cast<float *>(p), x);
    } else {
      const Int q = round(x);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
      const __m128i bytes = T == HZ_S8 ? _mm_packs_epi16(words, words) : _mm_packus_epi16(words, words);
      _mm_storel_epi64(reinterpret_cast<__m128i *>(p), bytes);
    }
  }
};

template <class Body> inline void over(int64_t n, const Body &body) {
  int64_t i = 0;
  for (; i + Wide::count <= n; i += Wide::count) body(Wide{}, i);
  for (; i < n; ++i) body(One{}, i);
}

#else

template <class Body> inline void over(int64_t n, const Body &body) {
  for (int64_t i = 0; i < n; ++i) body(One{}, i);
}

#endif

} // namespace lanes

// memcpy without its call: rows are often the few channels of one pixel.
inline void copy_bytes(uint8_t *out, const uint8_t *in, int64_t n) {
#if defined(__AVX512BW__)
  for (; n >= 64; n -= 64, in += 64, out += 64) _mm512_storeu_si512(out, _mm512_loadu_si512(in));
  if (n) {
    const __mmask64 mask = (1ull << n) - 1;
    _mm512_mask_storeu_epi8(out, mask, _mm512_maskz_loadu_epi8(mask, in));
  }
#else
  std::memcpy(out, in, size_t(n));
#endif
}

} // namespace
} // namespace horizon
