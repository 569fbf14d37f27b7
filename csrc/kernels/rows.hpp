// Rows of elements: what each element-by-element operation does to contiguous ones.
//
// Every operation but tables and copies is y = f(a, b), clamp(y, low, high), and rounded where the output has 8 bits; the bounds of an
// activation and of the dtype are one pair of numbers, because both are clamps.
#pragma once

#include "lanes.hpp"

namespace horizon {
namespace {
namespace elements {

enum { A, B, PARAM, OUT, OPERANDS };

// Rows of elements; per operand, the first row and bytes from a row to the next. PARAM is bytes into the vectors over channels.
struct Rows {
  const uint8_t *a, *b;
  int64_t param;
  uint8_t *out;
  int64_t step[OPERANDS];
  int64_t count, length;
};

struct Numbers {
  const float *m, *ratio, *high;
  float low;
  const uint8_t *table;
  uint8_t flip;  // from a byte to its index in the table
  bool *nan;
};

using Kernel = void (*)(const Rows &, const Numbers &);

inline const float *moved(const float *p, int64_t bytes) {
  return reinterpret_cast<const float *>(reinterpret_cast<const char *>(p) + bytes);
}

// y of one row. EACH: whether the parameters have an entry per element of the row.
template <int KIND, int TA, int TB, int TO, bool EACH> void arithmetic(const Rows &rows, const Numbers &numbers) {
  bool nan = false;
  for (int64_t row = 0; row < rows.count; ++row) {
    const uint8_t *a = rows.a + row * rows.step[A], *b = KIND == HZ_ADD || KIND == HZ_MUL ? rows.b + row * rows.step[B] : nullptr;
    uint8_t *out = rows.out + row * rows.step[OUT];
    const int64_t param = rows.param + row * rows.step[PARAM];
    const float *m = moved(numbers.m, param), *ratio = moved(numbers.ratio, param), *high = moved(numbers.high, param);
    const float low = numbers.low, m0 = *m, ratio0 = *ratio, high0 = *high;
    const float inverse0 = KIND == HZ_QUANTIZE ? lanes::reciprocal(m0) : 0;
    lanes::over(rows.length, [&](auto lane, int64_t i) {
      using Float = typename decltype(lane)::Float;
      const Float ms = EACH ? lane.floats(m + i) : lane.set(m0), bottom = lane.set(low);
      const Float top = EACH ? lane.floats(high + i) : lane.set(high0);
      Float y;
      if constexpr (KIND == HZ_QUANTIZE) {
        const Float x = lane.template floats<TA>(a + i * size_of<TA>);
        nan |= lane.nan(x);
        y = lane.quotient(x, ms, EACH ? lane.set(NAN) : lane.set(inverse0), bottom, top);
      } else if constexpr (KIND == HZ_ADD) {
        const Float r = EACH ? lane.floats(ratio + i) : lane.set(ratio0);
        y = lane.fma(lane.template floats<TB>(b + i), r, lane.times(lane.template floats<TA>(a + i), ms));
      } else if constexpr (KIND == HZ_MUL) {
        y = lane.times(lane.real(lane.times(lane.template ints<TA>(a + i), lane.template ints<TB>(b + i))), ms);
      } else {
        y = lane.times(lane.template floats<TA>(a + i), ms);
      }
      lane.template store<TO>(out + i * size_of<TO>, lane.clamp(y, bottom, top));
    });
  }
  if (nan) *numbers.nan = true;
}

template <int SIZE> void copy(const Rows &rows, const Numbers &) {
  for (int64_t row = 0; row < rows.count; ++row)
    copy_bytes(rows.out + row * rows.step[OUT], rows.a + row * rows.step[A], rows.length * SIZE);
}

inline void look_up(const Rows &rows, const Numbers &numbers) {
  uint8_t table[256]; // by the byte itself; and a copy that the compiler knows nothing else changes
  for (int i = 0; i < 256; ++i) table[i] = numbers.table[i ^ numbers.flip];
  for (int64_t row = 0; row < rows.count; ++row) {
    const uint8_t *a = rows.a + row * rows.step[A];
    uint8_t *out = rows.out + row * rows.step[OUT];
    int64_t i = 0;
#if defined(__AVX512BW__)
    // Sixteen bytes of the table at a time: the shuffle gives zero for an index with its highest bit, which all but those that
    // begin with this nibble get from the saturating addition.
    const __m512i past = _mm512_set1_epi8(0x70), sixteen = _mm512_set1_epi8(0x10);
    for (; i + 64 <= rows.length; i += 64) {
      const __m512i x = _mm512_loadu_si512(a + i);
      __m512i y = _mm512_setzero_si512(), start = _mm512_setzero_si512();
#pragma GCC unroll 16
      for (int nibble = 0; nibble < 16; ++nibble, start = _mm512_add_epi8(start, sixteen)) {
        const __m512i part = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table + 16 * nibble)));
        y = _mm512_or_si512(y, _mm512_shuffle_epi8(part, _mm512_adds_epu8(_mm512_xor_si512(x, start), past)));
      }
      _mm512_storeu_si512(out + i, y);
    }
#elif defined(__AVX2__)
    const __m256i past = _mm256_set1_epi8(0x70), sixteen = _mm256_set1_epi8(0x10); // as above
    for (; i + 32 <= rows.length; i += 32) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(a + i));
      __m256i y = _mm256_setzero_si256(), start = _mm256_setzero_si256();
#pragma GCC unroll 16
      for (int nibble = 0; nibble < 16; ++nibble, start = _mm256_add_epi8(start, sixteen)) {
        const __m256i part = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table + 16 * nibble)));
        y = _mm256_or_si256(y, _mm256_shuffle_epi8(part, _mm256_adds_epu8(_mm256_xor_si256(x, start), past)));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + i), y);
    }
#endif
    for (; i < rows.length; ++i) out[i] = table[a[i]];
  }
}

// From one to four planes of float32 to the channels of `length` pixels: the input of a network. `plane` and `pitch` are bytes from a
// channel and a pixel to the next.
template <int TO, int CHANNELS>
void interleave(const uint8_t *in, int64_t plane, uint8_t *out, int64_t pitch, int64_t length, const Numbers &numbers, int64_t param,
                int64_t param_step) {
  bool nan = false;
  float m[CHANNELS], high[CHANNELS];
  for (int c = 0; c < CHANNELS; ++c) {
    m[c] = *moved(numbers.m, param + c * param_step);
    high[c] = *moved(numbers.high, param + c * param_step);
  }
  int64_t i = 0;
#if defined(__AVX2__)
  using lanes::Wide;
  const Wide lane;
  const Wide::Float low = lane.set(numbers.low);
  Wide::Float ms[CHANNELS], inverse[CHANNELS], top[CHANNELS];
  for (int c = 0; c < CHANNELS; ++c) {
    ms[c] = lane.set(m[c]);
    inverse[c] = lane.set(lanes::reciprocal(m[c]));
    top[c] = lane.set(high[c]);
  }
  for (; i + Wide::count <= length; i += Wide::count) {
    Wide::Int pixels = lane.zero(); // four bytes each, channel 0 in the lowest
#pragma GCC unroll 4
    for (int c = CHANNELS - 1; c >= 0; --c) {
      const Wide::Float x = lane.floats<HZ_F32>(in + c * plane + 4 * i);
      nan |= lane.nan(x);
      const Wide::Int q = lane.round(lane.clamp(lane.quotient(x, ms[c], inverse[c], low, top[c]), low, top[c]));
#if defined(__AVX512BW__)
      pixels = _mm512_or_si512(_mm512_slli_epi32(pixels, 8), _mm512_and_si512(q, _mm512_set1_epi32(255)));
#else
      pixels = _mm256_or_si256(_mm256_slli_epi32(pixels, 8), _mm256_and_si256(q, _mm256_set1_epi32(255)));
#endif
    }
    uint8_t *to = out + i * pitch;
#if defined(__AVX512BW__)
    if (pitch == 4) { // bytes past the channels may be another tensor's
      _mm512_mask_storeu_epi8(to, 0x1111111111111111ull * ((1u << CHANNELS) - 1), pixels);
      continue;
    }
    if (pitch == 3 && CHANNELS == 3) {
      const __m512i three = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
      const __m512i words = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 0, 0, 0, 0);
      _mm512_mask_storeu_epi8(to, (1ull << 48) - 1, _mm512_permutexvar_epi32(words, _mm512_shuffle_epi8(pixels, three)));
      continue;
    }
#endif
    alignas(64) uint8_t each[4 * Wide::count];
    std::memcpy(each, &pixels, sizeof each);
    for (int p = 0; p < Wide::count; ++p) std::memcpy(to + p * pitch, each + 4 * p, CHANNELS);
  }
#endif
  const lanes::One one;
  for (; i < length; ++i) {
    for (int c = 0; c < CHANNELS; ++c) {
      const float x = one.floats<HZ_F32>(in + c * plane + 4 * i);
      nan |= one.nan(x);
      one.store<TO>(out + i * pitch + c, one.clamp(x / m[c], numbers.low, high[c]));
    }
  }
  if (nan) *numbers.nan = true;
}

using Interleave = decltype(&interleave<HZ_S8, 1>);

inline Interleave interleave_for(int to, int64_t channels) {
  static const Interleave kernels[2][4] = {
      {interleave<HZ_S8, 1>, interleave<HZ_S8, 2>, interleave<HZ_S8, 3>, interleave<HZ_S8, 4>},
      {interleave<HZ_U8, 1>, interleave<HZ_U8, 2>, interleave<HZ_U8, 3>, interleave<HZ_U8, 4>},
  };
  return kernels[to][channels - 1];
}

// The kernel of a kind and its dtypes.

template <int KIND, int TA, int TB, int TO> Kernel kernel(bool each) {
  return each ? arithmetic<KIND, TA, TB, TO, true> : arithmetic<KIND, TA, TB, TO, false>;
}

template <int KIND, int TA, int TB> Kernel kernel_to(int to, bool each) {
  if constexpr (KIND != HZ_QUANTIZE)
    if (to == HZ_F32) return kernel<KIND, TA, TB, HZ_F32>(each);
  return to == HZ_S8 ? kernel<KIND, TA, TB, HZ_S8>(each) : kernel<KIND, TA, TB, HZ_U8>(each);
}

template <int KIND, int TA> Kernel kernel_of_b(int b, int to, bool each) {
  if constexpr (KIND == HZ_ADD || KIND == HZ_MUL)
    if (b == HZ_U8) return kernel_to<KIND, TA, HZ_U8>(to, each);
  return kernel_to<KIND, TA, HZ_S8>(to, each);
}

template <int KIND> Kernel kernel_of_a(int a, int b, int to, bool each) {
  return a == HZ_S8 ? kernel_of_b<KIND, HZ_S8>(b, to, each) : kernel_of_b<KIND, HZ_U8>(b, to, each);
}

inline Kernel kernel_for(int kind, const hz_elementwise &p, bool each) {
  const int a = p.a.ref.dtype, b = p.b.ref.dtype, to = p.out.ref.dtype;
  switch (kind) {
  case HZ_QUANTIZE: return kernel_to<HZ_QUANTIZE, HZ_F32, HZ_S8>(to, each);
  case HZ_COPY: return to == HZ_F32 ? copy<4> : copy<1>;
  case HZ_TABLE: return look_up;
  case HZ_ADD: return kernel_of_a<HZ_ADD>(a, b, to, each);
  case HZ_MUL: return kernel_of_a<HZ_MUL>(a, b, to, each);
  default: return kernel_of_a<HZ_RESCALE>(a, b, to, each); // and HZ_DEQUANTIZE, the same product
  }
}

} // namespace elements
} // namespace
} // namespace horizon
