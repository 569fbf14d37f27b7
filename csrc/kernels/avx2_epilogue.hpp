// From int32 accumulators to the output, sixteen channels in two vectors; shared by the AVX2 tier's convolutions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "../tier.hpp"

namespace horizon {
namespace {

#define HZ_INLINE __attribute__((always_inline))

template <class F, int... I> HZ_INLINE inline void each_of(F &&f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}
// Calls f(0) ... f(N - 1) with constants, so that arrays of vectors become registers in the compiler's first passes already.
template <int N, class F> HZ_INLINE inline void each(F &&f) { each_of(f, std::make_integer_sequence<int, N>()); }

// Adds products to a sum. The compiler must neither add the products of two steps before it adds them to the accumulators, nor put all
// of a step's products first: both need more registers than there are. (An array's element as the operand would be kept in memory.)
HZ_INLINE inline void add(__m256i &sum, __m256i products) {
  __m256i added = _mm256_add_epi32(sum, products);
  __asm__("" : "+x"(added));
  sum = added;
}

HZ_INLINE inline __m256i load(const void *p) { return _mm256_load_si256(static_cast<const __m256i *>(p)); }
HZ_INLINE inline void store(void *p, __m256i v) { _mm256_store_si256(static_cast<__m256i *>(p), v); }

HZ_INLINE inline __m256i broadcast4(const void *p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

// Sixteen bytes of a tensor in 16 bits each.
template <bool SIGNED> HZ_INLINE inline __m256i words(const uint8_t *p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return SIGNED ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
}

// Sixteen output channels of an operation: what their accumulators start at, and where they go.
struct Channels {
  __m256i start[2];
  __m128i hi;
  const float *m, *ratio, *bound;
  int64_t first;        // channel
  int count;            // 1..16
  int activation, out, res; // hz_activation, hz_dtype; res -1: no residual
  bool clamp;
};

// weight_sum: null where the inputs are not shifted by 128.
inline Channels channels_of(const hz_epilogue &e, const int32_t *weight_sum, int out, const hz_ref &res, int64_t first, int64_t all) {
  Channels c;
  for (int v = 0; v < 2; ++v) {
    c.start[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(e.bias + first) + v);
    if (weight_sum) {
      const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(weight_sum + first) + v);
      c.start[v] = _mm256_sub_epi32(c.start[v], _mm256_slli_epi32(sum, 7));
    }
  }
  c.hi = out == HZ_F32 ? _mm_setzero_si128() : _mm_loadu_si128(reinterpret_cast<const __m128i *>(e.hi + first));
  c.m = e.m + first;
  c.ratio = e.ratio ? e.ratio + first : nullptr;
  c.bound = e.bound ? e.bound + first : nullptr;
  c.first = first;
  c.count = int(all - first < 16 ? all - first : 16);
  c.activation = e.activation;
  c.out = out;
  c.res = res.slot < 0 ? -1 : res.dtype;
  c.clamp = e.clamp != 0;
  return c;
}

// The first n < 16 bytes.
HZ_INLINE inline void store_bytes(uint8_t *to, __m128i v, int n) {
  if (n & 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i *>(to), v);
    v = _mm_srli_si128(v, 8);
    to += 8;
  }
  uint64_t rest = uint64_t(_mm_cvtsi128_si64(v));
  if (n & 4) {
    std::memcpy(to, &rest, 4);
    rest >>= 32;
    to += 4;
  }
  if (n & 2) {
    std::memcpy(to, &rest, 2);
    rest >>= 16;
    to += 2;
  }
  if (n & 1) std::memcpy(to, &rest, 1);
}

HZ_INLINE inline __m256 scaled(const Channels &c, __m256i acc, int half) {
  return _mm256_mul_ps(_mm256_cvtepi32_ps(acc), _mm256_loadu_ps(c.m + 8 * half));
}

// The P pixels whose accumulators are lo (channels 0..7) and hi (8..15). out and res point to the first of all the channels; out is
// null for a pixel that is not stored.
template <int P>
HZ_INLINE inline void finish(const Channels &c, const __m256i (&lo)[P], const __m256i (&hi)[P], uint8_t *const *out,
                             const uint8_t *const *res) {
  __m256 y[P][2];
  each<P>([&](auto p) HZ_INLINE {
    y[p][0] = scaled(c, lo[p], 0);
    y[p][1] = scaled(c, hi[p], 1);
  });
  if (c.res >= 0) {
    const __m256 ratio0 = _mm256_loadu_ps(c.ratio), ratio1 = _mm256_loadu_ps(c.ratio + 8);
    each<P>([&](auto p) HZ_INLINE {
      const __m128i r = _mm_loadu_si128(reinterpret_cast<const __m128i *>(res[p] + c.first)), r1 = _mm_srli_si128(r, 8);
      const bool is_signed = c.res == HZ_S8;
      const __m256i wide0 = is_signed ? _mm256_cvtepi8_epi32(r) : _mm256_cvtepu8_epi32(r);
      const __m256i wide1 = is_signed ? _mm256_cvtepi8_epi32(r1) : _mm256_cvtepu8_epi32(r1);
      y[p][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide0), ratio0, y[p][0]);
      y[p][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide1), ratio1, y[p][1]);
    });
  }
  if (c.out == HZ_F32) {
    each<P>([&](auto p) HZ_INLINE {
      if (!out[p]) return;
      alignas(32) float row[16];
      each<2>([&](auto v) HZ_INLINE {
        __m256 z = y[p][v];
        if (c.activation != HZ_NONE) z = _mm256_max_ps(z, _mm256_setzero_ps());
        if (c.activation == HZ_RELU6) z = _mm256_min_ps(z, _mm256_loadu_ps(c.bound + 8 * v));
        _mm256_store_ps(row + 8 * v, z);
      });
      std::memcpy(out[p] + 4 * c.first, row, size_t(4 * c.count));
    });
    return;
  }
  if (c.clamp) { // what is too small for int32 becomes its least number, as it should; too large would too
    const __m256 most = _mm256_set1_ps(1 << 20);
    each<P>([&](auto p) HZ_INLINE {
      y[p][0] = _mm256_min_ps(y[p][0], most);
      y[p][1] = _mm256_min_ps(y[p][1], most);
    });
  }
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i most = _mm256_broadcastsi128_si256(c.hi);
  __m256i bytes[(P + 1) / 2]; // two pixels each
  const auto packed = [&](auto pack) HZ_INLINE {
    each<(P + 1) / 2>([&](auto pair) HZ_INLINE {
      constexpr int p = 2 * pair, q = p + 1 < P ? p + 1 : p;
      const __m256i words0 = _mm256_packs_epi32(_mm256_cvtps_epi32(y[p][0]), _mm256_cvtps_epi32(y[p][1]));
      const __m256i words1 = q == p ? words0 : _mm256_packs_epi32(_mm256_cvtps_epi32(y[q][0]), _mm256_cvtps_epi32(y[q][1]));
      bytes[pair] = pack(words0, words1);
    });
  };
  if (c.out == HZ_S8) {
    const __m256i least = c.activation != HZ_NONE ? _mm256_setzero_si256() : _mm256_set1_epi8(-128);
    packed([&](__m256i words0, __m256i words1) HZ_INLINE {
      const __m256i v = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words0, words1), order);
      return _mm256_max_epi8(_mm256_min_epi8(v, most), least);
    });
  } else {
    packed([&](__m256i words0, __m256i words1) HZ_INLINE {
      return _mm256_min_epu8(_mm256_permutevar8x32_epi32(_mm256_packus_epi16(words0, words1), order), most);
    });
  }
  const int64_t first = c.first; // read once: for all the compiler knows, it could be among the outputs
  const int count = c.count;
  const auto stored = [&](auto put) HZ_INLINE {
    each<P>([&](auto p) HZ_INLINE {
      const __m256i both = bytes[p / 2];
      if (out[p]) put(out[p] + first, p % 2 ? _mm256_extracti128_si256(both, 1) : _mm256_castsi256_si128(both));
    });
  };
  if (count == 16)
    stored([](uint8_t *to, __m128i v) HZ_INLINE { _mm_storeu_si128(reinterpret_cast<__m128i *>(to), v); });
  else
    stored([&](uint8_t *to, __m128i v) HZ_INLINE { store_bytes(to, v, count); });
}

} // namespace
} // namespace horizon
