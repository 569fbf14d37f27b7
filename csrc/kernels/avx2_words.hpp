// Convolutions by products of 16 bits: inputs and weights are widened once, each for many products.
//
// Four bytes by 16 channels then take four multiplications and four additions: as many multiplications as vpmaddubsw and vpmaddwd together,
// and nothing saturates whatever the weights are. It pays where sums are short, because then most groups of four weights have a pair that is too
// large, and where there are few pixels, because nothing is sorted. s8 inputs are not shifted.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "avx2_epilogue.hpp"
#include "stretch.hpp"

namespace horizon {
namespace {

// Groups of four weights of 8 channels in words: of inputs 0 and 1, and 2 and 3.
HZ_INLINE inline void widen(__m256i w, __m256i &first, __m256i &second) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  const __m256i ordered = _mm256_shuffle_epi8(w, order);
  first = _mm256_srai_epi16(_mm256_slli_epi16(ordered, 8), 8);
  second = _mm256_srai_epi16(ordered, 8);
}

// Adds the products of P rows of inputs, so many words apart, by 16 channels: [groups][2 pairs of inputs][16][2].
template <int P>
HZ_INLINE inline void multiply_words(const int16_t *v, int64_t apart, const int16_t *u, int64_t groups, __m256i (&lo)[P],
                                     __m256i (&hi)[P]) {
  const int16_t *in[P];
  each<P>([&](auto p) HZ_INLINE { in[p] = v + p * apart; });
  // Both products first, then both additions; the compiler would put the products of several steps first, for which there are not enough
  // registers.
  const auto multiply_add = [](__m256i &sum0, __m256i &sum1, __m256i x, __m256i w0, __m256i w1) HZ_INLINE {
    __m256i products, added0 = sum0, added1 = sum1;
    __asm__("vpmaddwd %4, %3, %2\n\tvpmaddwd %5, %3, %3\n\tvpaddd %2, %0, %0\n\tvpaddd %3, %1, %1"
            : "+x"(added0), "+x"(added1), "=&x"(products), "+x"(x)
            : "x"(w0), "x"(w1));
    sum0 = added0;
    sum1 = added1;
  };
  for (int64_t k = 0; k < 4 * groups; k += 4, u += 64)
    each<2>([&](auto pair) HZ_INLINE {
      const __m256i w0 = load(u + 32 * pair), w1 = load(u + 32 * pair + 16);
      each<P>([&](auto p) HZ_INLINE {
        multiply_add(lo[p], hi[p], broadcast4(in[p] + k + 2 * pair), w0, w1);
      });
    });
}

// Blocks of P pixels by 16 channels, one after the other.
template <int P>
void words_blocks(const int16_t *v, int64_t apart, const int16_t *u, int64_t groups, const Channels &c, uint8_t *const *out,
                  const uint8_t *const *res, int blocks) {
  for (; blocks > 0; --blocks, v += P * apart, out += P, res += P) {
    __m256i lo[P], hi[P];
    each<P>([&](auto p) HZ_INLINE {
      lo[p] = c.start[0];
      hi[p] = c.start[1];
    });
    multiply_words<P>(v, apart, u, groups, lo, hi);
    finish<P>(c, lo, hi, out, res);
  }
}

// The inputs of a pixel, group after group; as many as 12 words more are written.
template <bool SIGNED> void widen_inputs(const hz_conv &c, const uint8_t *in, int16_t *to) {
  for (int k = 0; k < c.steps; ++k) {
    const int bytes = 4 * c.used[k];
    for (int b = 0; b < bytes; b += 16) _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + b), words<SIGNED>(in + c.step[k] + b));
    to += bytes;
  }
}

inline void widen_weights(const hz_conv &c, int64_t tile, int16_t *to) {
  const int8_t *const weights = c.weights + tile * c.steps * 1024;
  for (int k = 0; k < c.steps; ++k)
    for (int g = 0; g < c.used[k]; ++g, to += 64)
      each<2>([&](auto half) HZ_INLINE {
        __m256i first, second;
        widen(load(weights + k * 1024 + g * 64 + 32 * half), first, second);
        store(to + 16 * half, first);
        store(to + 32 + 16 * half, second);
      });
}

inline void conv_in_words(const hz_conv &c, Slots slots, Part part) {
  const Share share(c, c.images * c.pixels, part);
  if (share.empty()) return;
  const auto [tile0, tile1, first, last] = share;

  int64_t groups = 0;
  for (int k = 0; k < c.steps; ++k) groups += c.used[k];
  // The weights of as many tiles, and the inputs of as many pixels, as find room in the second-level cache.
  constexpr int64_t room_for_weights = 512 << 10, room_for_inputs = 256 << 10;
  constexpr int most_tiles = 64, most_pixels = 6;
  const int64_t weights = 64 * groups, apart = (4 * groups + 12 + 15) / 16 * 16; // words
  const int64_t at_a_time = std::min<int64_t>({std::max<int64_t>(room_for_weights / (2 * weights), 1), most_tiles, tile1 - tile0});
  const int64_t pixels = std::clamp<int64_t>(room_for_inputs / (2 * apart), most_pixels, Stretch::capacity);
  int16_t *const u = reinterpret_cast<int16_t *>(scratch(2 * at_a_time * weights + 2 * pixels * apart)), *const v = u + at_a_time * weights;

  using Blocks = void (*)(const int16_t *, int64_t, const int16_t *, int64_t, const Channels &, uint8_t *const *, const uint8_t *const *,
                          int);
  static constexpr Blocks blocks_of[most_pixels + 1] = {nullptr,         words_blocks<1>, words_blocks<2>, words_blocks<3>,
                                                        words_blocks<4>, words_blocks<5>, words_blocks<6>};
  const auto inputs_of = c.in.dtype == HZ_S8 ? widen_inputs<true> : widen_inputs<false>;
  Channels channels[most_tiles];
  Stretch stretch;
  for (int64_t begin = tile0; begin < tile1; begin += at_a_time) {
    const int tiles = int(std::min(at_a_time, tile1 - begin));
    for (int t = 0; t < tiles; ++t) {
      widen_weights(c, begin + t, u + t * weights);
      channels[t] = channels_of(c.epilogue, nullptr, c.out.dtype, c.res, 16 * (begin + t), c.channels);
    }
    for (int64_t f = first; f < last; f += stretch.count) {
      if (begin == tile0 || last - first > pixels) { // once where they are all
        stretch.fill(c, slots, f, std::min(last, f + pixels));
        for (int i = 0; i < stretch.count; ++i) inputs_of(c, stretch.in[i], v + i * apart);
      }
      for (int t = 0; t < tiles; ++t)
        in_blocks(stretch.count, most_pixels, [&](int at, int size, int blocks) {
          blocks_of[size](v + at * apart, apart, u + t * weights, groups, channels[t], stretch.out + at, stretch.res + at, blocks);
        });
    }
  }
}

} // namespace
} // namespace horizon
