// Convolutions with fewer products, exactly: Winograd's F(2x2, 3x3) and F(2x2, 2x2) in integers (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", 2015).
//
// Two neighbouring outputs of three taps take four products instead of six: y = A^T ((G g) * (B^T d)), and 2 x 2 outputs take 16 instead
// of 36. G has halves; doubled, all is integers, and four times the sum comes out. Weights (at most 9 * 127) and inputs (at most
// 4 * 255) then fit in 16 bits, whose products vpmaddwd adds in 32. Additions that wrap around on the way do no harm, since the result
// fits. With two taps there are nine products instead of 16, and nothing is halved. s8 inputs are not shifted.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "avx2_epilogue.hpp"
#include "avx2_words.hpp"

namespace horizon {
namespace {

// One dimension: two outputs from KERNEL taps g and KERNEL + 1 inputs d by as many products of weights(g) and inputs(d).
template <int KERNEL> struct Minimal;

template <> struct Minimal<3> {
  static constexpr int doublings = 1; // of the outputs
  static HZ_INLINE inline void weights(const __m256i *g, __m256i *u) {
    const __m256i outer = _mm256_add_epi16(g[0], g[2]);
    u[0] = _mm256_add_epi16(g[0], g[0]);
    u[1] = _mm256_add_epi16(outer, g[1]);
    u[2] = _mm256_sub_epi16(outer, g[1]);
    u[3] = _mm256_add_epi16(g[2], g[2]);
  }
  static HZ_INLINE inline void inputs(const __m256i *d, __m256i *v) {
    v[0] = _mm256_sub_epi16(d[0], d[2]);
    v[1] = _mm256_add_epi16(d[1], d[2]);
    v[2] = _mm256_sub_epi16(d[2], d[1]);
    v[3] = _mm256_sub_epi16(d[1], d[3]);
  }
  static HZ_INLINE inline void outputs(const __m256i *m, __m256i *y) {
    y[0] = _mm256_add_epi32(m[0], _mm256_add_epi32(m[1], m[2]));
    y[1] = _mm256_sub_epi32(_mm256_sub_epi32(m[1], m[2]), m[3]);
  }
};

template <> struct Minimal<2> {
  static constexpr int doublings = 0;
  static HZ_INLINE inline void weights(const __m256i *g, __m256i *u) {
    u[0] = g[0];
    u[1] = _mm256_add_epi16(g[0], g[1]);
    u[2] = g[1];
  }
  static HZ_INLINE inline void inputs(const __m256i *d, __m256i *v) {
    v[0] = _mm256_sub_epi16(d[0], d[1]);
    v[1] = d[1];
    v[2] = _mm256_sub_epi16(d[2], d[1]);
  }
  static HZ_INLINE inline void outputs(const __m256i *m, __m256i *y) {
    y[0] = _mm256_add_epi32(m[0], m[1]);
    y[1] = _mm256_add_epi32(m[1], m[2]);
  }
};

// Both dimensions: x becomes [TO][TO] of [FROM][FROM].
template <int FROM, int TO, class Transform>
HZ_INLINE inline void both_ways(const __m256i (&x)[FROM][FROM], __m256i (&y)[TO][TO], Transform transform) {
  __m256i rows[FROM][TO];
  each<FROM>([&](auto i) HZ_INLINE { transform(x[i], rows[i]); });
  each<TO>([&](auto j) HZ_INLINE {
    __m256i column[FROM], result[TO];
    each<FROM>([&](auto i) HZ_INLINE { column[i] = rows[i][j]; });
    transform(column, result);
    each<TO>([&](auto i) HZ_INLINE { y[i][j] = result[i]; });
  });
}

template <int KERNEL> struct Winograd {
  static constexpr int inputs = KERNEL + 1, positions = inputs * inputs, most_patches = 24;

  // The weights of a tile of 16 output channels: [positions][pairs of input channels][16][2], positions so many words apart.
  static void transform_weights(const hz_conv &c, int64_t tile, int64_t apart, int16_t *u) {
    const int64_t groups = (c.plane->channels + 3) / 4, steps = (c.plane->channels + 63) / 64;
    const bool runs = c.steps < KERNEL * KERNEL * steps; // the taps of a kernel row lie in one run of bytes
    const int64_t row = c.steps / KERNEL * 16, tap = runs ? groups : 16 * steps;
    const int8_t *const weights = c.weights + tile * c.steps * 1024;
    for (int64_t g = 0; g < groups; ++g)
      for (int half = 0; half < 2; ++half) {
        __m256i first[KERNEL][KERNEL], second[KERNEL][KERNEL]; // channels 0 and 1, 2 and 3 of the group
        each<KERNEL>([&](auto i) HZ_INLINE {
          each<KERNEL>([&](auto j) HZ_INLINE {
            widen(load(weights + (i * row + j * tap + g) * 64 + 32 * half), first[i][j], second[i][j]);
          });
        });
        const auto put = [&](const __m256i(&x)[KERNEL][KERNEL], int64_t pair) HZ_INLINE {
          __m256i y[inputs][inputs];
          both_ways(x, y, Minimal<KERNEL>::weights);
          each<inputs>([&](auto i) HZ_INLINE {
            each<inputs>([&](auto j) HZ_INLINE { store(u + (i * inputs + j) * apart + pair * 32 + 16 * half, y[i][j]); });
          });
        };
        put(first, 2 * g);
        put(second, 2 * g + 1);
      }
  }

  // Where a patch of 2 x 2 outputs finds its inputs. What only outputs outside the plane need is read from within it, too.
  struct Patch {
    const uint8_t *row[inputs];
    int64_t column[inputs];
    const uint8_t *res[4];
    uint8_t *out[4];
  };

  static void locate(const hz_conv &c, Slots slots, int64_t index, Patch &patch) {
    const hz_plane &p = *c.plane;
    const int64_t across = (p.width + 1) / 2, down = (p.height + 1) / 2;
    const int64_t image = index / (across * down), y = index / across % down * 2, x = index % across * 2;
    const uint8_t *const in = at(c.in, slots) + image * p.in_image, *const res = at(c.res, slots);
    uint8_t *const out = at(c.out, slots) + image * p.out_image;
    for (int i = 0; i < inputs; ++i) {
      patch.row[i] = in + std::min<int64_t>(y + i, p.height + KERNEL - 2) * p.in_row;
      patch.column[i] = std::min<int64_t>(x + i, p.width + KERNEL - 2) * p.in_pixel;
    }
    for (int i = 0; i < 4; ++i) {
      const int64_t row = y + i / 2, column = x + i % 2;
      const bool stored = row < p.height && column < p.width;
      patch.out[i] = stored ? out + row * p.out_row + column * p.out_pixel : nullptr;
      patch.res[i] = !res ? nullptr : stored ? res + image * p.res_image + row * p.res_row + column * p.res_pixel : patch.res[0];
    }
  }

  // The inputs of a patch: [positions][channels], positions so many apart.
  template <bool SIGNED> static void transform_inputs(const Patch &patch, int64_t channels, int64_t apart, int16_t *v) {
    for (int64_t c = 0; c < channels; c += 16) {
      __m256i x[inputs][inputs], y[inputs][inputs];
      each<inputs>([&](auto i) HZ_INLINE {
        each<inputs>([&](auto j) HZ_INLINE { x[i][j] = words<SIGNED>(patch.row[i] + patch.column[j] + c); });
      });
      both_ways(x, y, Minimal<KERNEL>::inputs);
      each<inputs>([&](auto i) HZ_INLINE {
        each<inputs>([&](auto j) HZ_INLINE { store(v + (i * inputs + j) * apart + c, y[i][j]); });
      });
    }
  }

  // One position of P patches by 16 channels: m of a patch is [positions][16].
  template <int P> static void multiply(const int16_t *v, int64_t channels, const int16_t *u, int64_t groups, int32_t *m) {
    __m256i lo[P], hi[P];
    each<P>([&](auto p) HZ_INLINE { lo[p] = hi[p] = _mm256_setzero_si256(); });
    multiply_words<P>(v, channels, u, groups, lo, hi);
    each<P>([&](auto p) HZ_INLINE {
      store(m + p * positions * 16, lo[p]);
      store(m + p * positions * 16 + 8, hi[p]);
    });
  }

  static void multiply_some(int patches, const int16_t *v, int64_t channels, const int16_t *u, int64_t groups, int32_t *m) {
    switch (patches) {
    case 1: return multiply<1>(v, channels, u, groups, m);
    case 2: return multiply<2>(v, channels, u, groups, m);
    case 3: return multiply<3>(v, channels, u, groups, m);
    case 4: return multiply<4>(v, channels, u, groups, m);
    case 5: return multiply<5>(v, channels, u, groups, m);
    default: return multiply<6>(v, channels, u, groups, m);
    }
  }

  // The outputs of a patch.
  static void transform_outputs(const int32_t *m, const Channels &c, const Patch &patch) {
    __m256i lo[4], hi[4];
    const auto sums = [&](int half, __m256i(&y)[4]) HZ_INLINE {
      __m256i x[inputs][inputs], z[2][2];
      each<inputs>([&](auto i) HZ_INLINE {
        each<inputs>([&](auto j) HZ_INLINE { x[i][j] = load(m + (i * inputs + j) * 16 + 8 * half); });
      });
      both_ways(x, z, Minimal<KERNEL>::outputs);
      each<4>([&](auto p) HZ_INLINE {
        y[p] = _mm256_add_epi32(c.start[half], _mm256_srai_epi32(z[p / 2][p % 2], 2 * Minimal<KERNEL>::doublings));
      });
    };
    sums(0, lo);
    sums(1, hi);
    finish<4>(c, lo, hi, patch.out, patch.res);
  }

  static void run(const hz_conv &c, Slots slots, Part part) {
    const hz_plane &plane = *c.plane;
    const Share share(c, plane.images * ((plane.height + 1) / 2) * ((plane.width + 1) / 2), part);
    if (share.empty()) return;
    const auto [tile0, tile1, first, last] = share;

    // The weights of as many tiles, and the inputs of as many patches, as find room in the second-level cache; the products of patches
    // by a tile in the first-level one.
    constexpr int64_t room_for_weights = 512 << 10, room_for_inputs = 256 << 10;
    constexpr int most_tiles = 64;
    const int64_t groups = (plane.channels + 3) / 4, channels = (plane.channels + 15) / 16 * 16;
    // Words from a position to the next: an odd number of lines, so that they do not share one place in the cache.
    const int64_t weights_apart = 64 * groups + 32, weights = positions * weights_apart;
    const int64_t at_a_time = std::min<int64_t>({std::max<int64_t>(room_for_weights / (2 * weights), 1), most_tiles, tile1 - tile0});
    const int64_t patches = std::clamp<int64_t>(room_for_inputs / (2 * positions * channels), 6, most_patches);
    const int64_t inputs_apart = (patches * channels + 31) / 64 * 64 + 32;
    uint8_t *const memory = scratch(2 * at_a_time * weights + 2 * positions * inputs_apart + 4 * patches * positions * 16);
    int16_t *const u = reinterpret_cast<int16_t *>(memory), *const v = u + at_a_time * weights;
    int32_t *const m = reinterpret_cast<int32_t *>(v + positions * inputs_apart);

    const auto inputs_of = c.in.dtype == HZ_S8 ? transform_inputs<true> : transform_inputs<false>;
    Channels output[most_tiles];
    Patch patch[most_patches];
    for (int64_t begin = tile0; begin < tile1; begin += at_a_time) {
      const int tiles = int(std::min(at_a_time, tile1 - begin));
      for (int t = 0; t < tiles; ++t) {
        transform_weights(c, begin + t, weights_apart, u + t * weights);
        output[t] = channels_of(c.epilogue, nullptr, c.out.dtype, c.res, 16 * (begin + t), c.channels);
      }
      for (int64_t f = first; f < last; f += patches) {
        const int count = int(std::min(patches, last - f)), parts = (count + 5) / 6;
        for (int i = 0; i < count && (count < last - first || begin == tile0); ++i) { // once where they are all
          locate(c, slots, f + i, patch[i]);
          inputs_of(patch[i], channels, inputs_apart, v + i * channels);
        }
        for (int t = 0; t < tiles; ++t) {
          for (int position = 0; position < positions; ++position)
            for (int i = 0; i < parts; ++i) { // of even sizes
              const int at = count * i / parts, end = count * (i + 1) / parts;
              multiply_some(end - at, v + position * inputs_apart + at * channels, channels,
                            u + t * weights + position * weights_apart, groups,
                            m + (at * positions + position) * 16);
            }
          for (int i = 0; i < count; ++i) transform_outputs(m + i * positions * 16, output[t], patch[i]);
        }
      }
    }
  }
};

inline void winograd(const hz_conv &c, Slots slots, Part part) {
  return c.plane->kernel == 2 ? Winograd<2>::run(c, slots, part) : Winograd<3>::run(c, slots, part);
}

} // namespace
} // namespace horizon
