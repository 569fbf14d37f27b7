// From int32 accumulators to the output, sixteen channels to a vector; shared by the AVX-512 and AMX tiers.
#pragma once

#include <immintrin.h>

#include "../tier.hpp"

namespace horizon {
namespace {

// Where the pixels of a block go. `at` are byte offsets from the tensors' bases, negative for a pixel that is not stored.
struct Target {
  const hz_epilogue *epilogue;
  uint8_t *out;
  const uint8_t *res;
  const int32_t *out_at, *res_at;
  int channel, channels; // first channel of the block, and channels in all
};

// The first n of 64 bytes, or of 16 floats.
inline __mmask64 first_bytes(int n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }
inline __mmask16 first_floats(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// 16 residuals as float32.
template <hz_dtype R> inline __m512 residual16(const uint8_t *r) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(r));
  return _mm512_cvtepi32_ps(R == HZ_S8 ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
}

// Four vectors of 16 rounded values to 64 bytes of the output, in order.
template <hz_dtype O> inline __m512i pack64(__m512i a, __m512i b, __m512i c, __m512i d) {
  __m512i ab = _mm512_packs_epi32(a, b), cd = _mm512_packs_epi32(c, d);
  return O == HZ_S8 ? _mm512_packs_epi16(ab, cd) : _mm512_packus_epi16(ab, cd);
}

template <hz_dtype O> inline __m512i bounded(__m512i y, __m512i hi, bool relu) {
  if (O == HZ_U8) return _mm512_min_epu8(y, hi);
  y = _mm512_min_epi8(y, hi);
  return relu ? _mm512_max_epi8(y, _mm512_setzero_si512()) : y;
}

// Packing works within 128-bit lanes; this puts lane L's groups of four bytes a_L b_L c_L d_L back to a a a a b b b b ...
inline __m512i lanes_in_order(__m512i y) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, y);
}

// What the pixels of a block have in common.
template <int N> struct Constants {
  int left;              // channels from the block's first to the last of all
  __mmask64 mask;        // bytes of the output that are theirs
  bool relu;
  __m512 m[N], top;
  __m512i hi;

  Constants(const Target &t, hz_dtype out)
      : left(t.channels - t.channel), mask(first_bytes(left < 16 * N ? left : 16 * N)), relu(t.epilogue->activation != HZ_NONE),
        top(_mm512_set1_ps(out == HZ_S8 ? 127.f : 255.f)),
        hi(out == HZ_F32 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi8(mask, t.epilogue->hi + t.channel)) {
    for (int n = 0; n < N; ++n) m[n] = _mm512_loadu_ps(t.epilogue->m + t.channel + 16 * n);
  }
};

// One pixel: accumulators of N tiles of 16 channels. RES: whether there is a residual, of dtype R.
template <hz_dtype O, bool RES, hz_dtype R, int N>
inline __attribute__((always_inline)) void finish_pixel(const Target &t, const Constants<N> &c, const __m512i acc[N], int row) {
  const hz_epilogue &e = *t.epilogue;
  if (t.out_at[row] < 0) return;
  __m512 y[4];
  for (int n = 0; n < N; ++n) {
    y[n] = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[n]), c.m[n]);
    if (RES) {
      const uint8_t *r = t.res + t.res_at[row] + 16 * n;
      y[n] = _mm512_fmadd_ps(residual16<R>(r), _mm512_loadu_ps(e.ratio + t.channel + 16 * n), y[n]);
    }
  }
  uint8_t *out = t.out + t.out_at[row];
  if (O == HZ_F32) {
    for (int n = 0; n < N; ++n) {
      if (c.relu) y[n] = _mm512_max_ps(y[n], _mm512_setzero_ps());
      if (e.activation == HZ_RELU6) y[n] = _mm512_min_ps(y[n], _mm512_loadu_ps(e.bound + t.channel + 16 * n));
      _mm512_mask_storeu_ps(out + 64 * n, first_floats(c.left - 16 * n), y[n]);
    }
    return;
  }
  __m512i q[4];
  for (int n = 0; n < 4; ++n) {
    if (n >= N) {
      q[n] = _mm512_setzero_si512();
      continue;
    }
    if (e.clamp) y[n] = _mm512_min_ps(y[n], c.top); // what is too small for int32 becomes its least, which is right
    q[n] = _mm512_cvtps_epi32(y[n]);
  }
  const __m512i bytes = bounded<O>(lanes_in_order(pack64<O>(q[0], q[1], q[2], q[3])), c.hi, c.relu);
  if (c.mask == ~0ull)
    _mm512_storeu_si512(out, bytes);
  else
    _mm512_mask_storeu_epi8(out, c.mask, bytes);
}

// Rows [begin, end) of `acc`, [row][16 N] accumulators.
template <hz_dtype O, bool RES, hz_dtype R, int N>
void finish_rows(const Target &t, const int32_t *acc, int begin, int end) {
  const Constants<N> constants(t, O);
  for (int row = begin; row < end; ++row) {
    __m512i sums[N];
    for (int n = 0; n < N; ++n) sums[n] = _mm512_load_si512(acc + row * (16 * N) + 16 * n);
    finish_pixel<O, RES, R, N>(t, constants, sums, row);
  }
}

using Finish = void (*)(const Target &, const int32_t *, int, int);

template <hz_dtype O, int N> Finish finish_for_residual(const hz_ref &res) {
  if (res.slot < 0) return finish_rows<O, false, HZ_S8, N>;
  return res.dtype == HZ_S8 ? finish_rows<O, true, HZ_S8, N> : finish_rows<O, true, HZ_U8, N>;
}

template <int N> Finish finish_for(const hz_ref &out, const hz_ref &res) {
  switch (out.dtype) {
  case HZ_S8: return finish_for_residual<HZ_S8, N>(res);
  case HZ_U8: return finish_for_residual<HZ_U8, N>(res);
  default: return finish_for_residual<HZ_F32, N>(res);
  }
}

inline Finish finish_for(int n, const hz_ref &out, const hz_ref &res) {
  switch (n) {
  case 1: return finish_for<1>(out, res);
  case 2: return finish_for<2>(out, res);
  case 3: return finish_for<3>(out, res);
  default: return finish_for<4>(out, res);
  }
}

} // namespace
} // namespace horizon
