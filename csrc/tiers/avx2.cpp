// AVX2: products of four bytes at a time, without the saturation of vpmaddubsw.
//
// vpmaddubsw adds two products of u8 and s8 in 16 bits. It saturates only where |w0 + w1| > 128 (255 * 128 = 32640; weights of opposite
// signs never do). So the groups of four weights along the sum are sorted, once per call and tile of 16 channels: a group without such
// a pair in any channel takes vpmaddubsw, vpmaddwd and vpaddd for 32 products; one that has none when its bytes are paired otherwise
// takes a vpshufb of the input more; the rest is multiplied in 16 bits, even and odd bytes apart, with two vpmaddwd and two vpaddd
// for 32 products. s8 inputs are shifted by 128. Two other ways, where they are faster: avx2_words.hpp, avx2_winograd.hpp.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "../kernels/avx2_epilogue.hpp"
#include "../kernels/avx2_winograd.hpp"
#include "../kernels/avx2_words.hpp"
#include "../kernels/elementwise.hpp"
#include "../kernels/pool.hpp"
#include "../kernels/stretch.hpp"
#include "../kernels/upsample.hpp"
#include "../tier.hpp"

namespace horizon {
namespace {

// ---- weights of a tile of 16 channels, sorted

// How the bytes of a group of four are paired: 01 23, 02 13, 03 21, or not at all.
constexpr int pairings = 3, wide = pairings, kinds = pairings + 1;
template <int PAIRING> HZ_INLINE inline __m256i paired(__m256i v) {
  if (PAIRING == 0) return v;
  constexpr int a = PAIRING == 1 ? 0x03010200 : 0x01020300;
  return _mm256_shuffle_epi8(v, _mm256_setr_epi32(a, a + 0x04040404, a + 0x08080808, a + 0x0c0c0c0c, a, a + 0x04040404,
                                                  a + 0x08080808, a + 0x0c0c0c0c));
}

// The groups of each kind.
struct Sorted {
  int count[kinds];
  const int32_t *at[kinds];     // bytes from a pixel; a group's input
  const int8_t *weights[kinds]; // [16 channels][4], paired; wide: [16 channels][bytes 0 and 2], then [..][1 and 3], in 16 bits
};

// Memory for the sorted weights of a tile: what they are multiplied with and where they come from, for any kind of all groups; then the
// weights, at most all of them wide.
constexpr int64_t places_bytes(int64_t groups) { return (groups * 4 + 63) / 64 * 64; }
constexpr int64_t sorted_bytes(int64_t groups) { return 2 * kinds * places_bytes(groups) + groups * 128; }

// 1 if a sum of two weights of these, 8 channels each, is too large: their products might not fit in 16 bits.
HZ_INLINE inline int unfit(__m256i w0, __m256i w1) {
  const __m256i ones = _mm256_set1_epi8(1);
  const __m256i sum0 = _mm256_abs_epi16(_mm256_maddubs_epi16(ones, w0)), sum1 = _mm256_abs_epi16(_mm256_maddubs_epi16(ones, w1));
  const __m256i over = _mm256_cmpgt_epi16(_mm256_max_epi16(sum0, sum1), _mm256_set1_epi16(128));
  return !_mm256_testz_si256(over, over);
}

// The first kind that fits. All are tried, because which one it is cannot be foreseen.
HZ_INLINE inline int kind_of(__m256i w0, __m256i w1) {
  const int u0 = unfit(w0, w1), u1 = unfit(paired<1>(w0), paired<1>(w1)), u2 = unfit(paired<2>(w0), paired<2>(w1));
  return u0 * (1 + u1 * (1 + u2));
}

// The groups' weights, one after the other, in their pairing.
template <int PAIRING> uint8_t *copy(const int8_t *weights, const int32_t *from, int count, uint8_t *to) {
  for (const int32_t *const end = from + count; from != end; ++from, to += 64) {
    store(to, paired<PAIRING>(load(weights + *from)));
    store(to + 32, paired<PAIRING>(load(weights + *from + 32)));
  }
  return to;
}

uint8_t *copy_wide(const int8_t *weights, const int32_t *from, int count, uint8_t *to) {
  for (const int32_t *const end = from + count; from != end; ++from, to += 128) {
    const __m256i w0 = load(weights + *from), w1 = load(weights + *from + 32);
    store(to, _mm256_srai_epi16(_mm256_slli_epi16(w0, 8), 8));
    store(to + 32, _mm256_srai_epi16(_mm256_slli_epi16(w1, 8), 8));
    store(to + 64, _mm256_srai_epi16(w0, 8));
    store(to + 96, _mm256_srai_epi16(w1, 8));
  }
  return to;
}

Sorted sort_weights(const hz_conv &c, int64_t tile, int64_t groups, uint8_t *memory) {
  const int8_t *const weights = c.weights + tile * c.steps * 1024;
  const int32_t offset = c.block_offset ? c.block_offset[tile] : 0;
  Sorted sorted;
  int32_t *at[kinds], *from[kinds];
  for (int n = 0; n < kinds; ++n) {
    at[n] = reinterpret_cast<int32_t *>(memory + 2 * n * places_bytes(groups));
    from[n] = reinterpret_cast<int32_t *>(memory + (2 * n + 1) * places_bytes(groups));
    sorted.at[n] = at[n];
    sorted.count[n] = 0;
  }
  for (int k = 0; k < c.steps; ++k)
    for (int g = 0; g < c.used[k]; ++g) {
      const int32_t place = k * 1024 + g * 64;
      const int n = kind_of(load(weights + place), load(weights + place + 32));
      const int i = sorted.count[n]++;
      at[n][i] = offset + c.step[k] + 4 * g;
      from[n][i] = place;
    }
  uint8_t *to = memory + 2 * kinds * places_bytes(groups);
  for (int n = 0; n < kinds; ++n) {
    sorted.weights[n] = reinterpret_cast<const int8_t *>(to);
    const auto put = n == 0 ? copy<0> : n == 1 ? copy<1> : n == 2 ? copy<2> : copy_wide;
    to = put(weights, from[n], sorted.count[n], to);
  }
  return sorted;
}

// ---- P pixels by the 16 channels of a tile, or by its first 8, one block after the other

template <int P, bool SIGNED, bool HALF>
void blocks(const Sorted &s, const Channels &c, const uint8_t *const *in, uint8_t *const *out, const uint8_t *const *res, int count) {
  const __m256i shift = _mm256_set1_epi8(char(0x80)), ones = _mm256_set1_epi16(1), low = _mm256_set1_epi16(0xff);
  for (; count > 0; --count, in += P, out += P, res += P) {
    const uint8_t *pixel[P];
    __m256i lo[P], hi[P];
    each<P>([&](auto p) HZ_INLINE {
      pixel[p] = in[p];
      lo[p] = c.start[0];
      hi[p] = c.start[1];
    });
    each<pairings>([&](auto constant) HZ_INLINE {
      constexpr int pairing = decltype(constant)::value;
      const int8_t *w = s.weights[pairing];
      const int32_t *at = s.at[pairing];
      for (const int32_t *const end = at + s.count[pairing]; at != end; ++at, w += 64) {
        const int64_t place = *at;
        const __m256i w0 = load(w), w1 = load(w + 32);
        each<P>([&](auto p) HZ_INLINE {
          __m256i x = paired<pairing>(broadcast4(pixel[p] + place));
          if (SIGNED) x = _mm256_xor_si256(x, shift);
          add(lo[p], _mm256_madd_epi16(_mm256_maddubs_epi16(x, w0), ones));
          if (!HALF) add(hi[p], _mm256_madd_epi16(_mm256_maddubs_epi16(x, w1), ones));
        });
      }
    });
    const int8_t *w = s.weights[wide];
    const int32_t *at = s.at[wide];
    for (const int32_t *const end = at + s.count[wide]; at != end; ++at, w += 128) {
      const int64_t place = *at;
      each<P>([&](auto p) HZ_INLINE {
        __m256i x = broadcast4(pixel[p] + place);
        if (SIGNED) x = _mm256_xor_si256(x, shift);
        const __m256i even = _mm256_and_si256(x, low), odd = _mm256_srli_epi16(x, 8);
        add(lo[p], _mm256_madd_epi16(even, load(w)));
        if (!HALF) add(hi[p], _mm256_madd_epi16(even, load(w + 32)));
        add(lo[p], _mm256_madd_epi16(odd, load(w + 64)));
        if (!HALF) add(hi[p], _mm256_madd_epi16(odd, load(w + 96)));
      });
    }
    finish<P>(c, lo, hi, out, res);
  }
}

using Blocks = void (*)(const Sorted &, const Channels &, const uint8_t *const *, uint8_t *const *, const uint8_t *const *, int);
constexpr int most_pixels = 6, usual_pixels = 5; // of a block

template <bool SIGNED, bool HALF>
const Blocks blocks_of[most_pixels + 1] = {nullptr,
                                           blocks<1, SIGNED, HALF>,
                                           blocks<2, SIGNED, HALF>,
                                           blocks<3, SIGNED, HALF>,
                                           blocks<4, SIGNED, HALF>,
                                           blocks<5, SIGNED, HALF>,
                                           blocks<6, SIGNED, HALF>};

// ---- convolution

void conv(const hz_conv &c, Slots slots, Part part) {
  if (c.rows == HZ_WINOGRAD && c.plane) return winograd(c, slots, part);
  if (c.rows == HZ_WORDS && !c.block_offset) return conv_in_words(c, slots, part);
  const Share share(c, c.images * c.pixels, part);
  if (share.empty()) return;
  const auto [tile0, tile1, first, last] = share;

  int64_t groups = 0;
  for (int k = 0; k < c.steps; ++k) groups += c.used[k];
  // As many tiles at a time as find room for their sorted weights in the second-level cache.
  constexpr int64_t room = 512 << 10;
  constexpr int most_tiles = 64;
  const int64_t bytes = sorted_bytes(groups);
  const int64_t at_a_time = std::min<int64_t>({std::max<int64_t>(room / (128 * groups), 1), most_tiles, tile1 - tile0});
  uint8_t *const memory = scratch(at_a_time * bytes);

  const bool is_signed = c.in.dtype == HZ_S8;
  const Blocks *const whole = is_signed ? blocks_of<true, false> : blocks_of<false, false>;
  const Blocks *const half = is_signed ? blocks_of<true, true> : blocks_of<false, true>;
  const int width = c.rows >= 1 && c.rows <= most_pixels ? c.rows : usual_pixels;
  Sorted sorted[most_tiles];
  Channels channels[most_tiles];
  Stretch stretch;
  for (int64_t begin = tile0; begin < tile1; begin += at_a_time) {
    const int tiles = int(std::min(at_a_time, tile1 - begin));
    for (int t = 0; t < tiles; ++t) {
      sorted[t] = sort_weights(c, begin + t, groups, memory + t * bytes);
      channels[t] = channels_of(c.epilogue, is_signed ? c.weight_sum : nullptr, c.out.dtype, c.res, 16 * (begin + t), c.channels);
    }
    for (int64_t f = first; f < last; f += stretch.count) {
      stretch.fill(c, slots, f, std::min(last, f + Stretch::capacity));
      for (int t = 0; t < tiles; ++t)
        in_blocks(stretch.count, width, [&](int at, int size, int count) {
          const Blocks run = (channels[t].count > 8 ? whole : half)[size];
          run(sorted[t], channels[t], stretch.in + at, stretch.out + at, stretch.res + at, count);
        });
    }
  }
}

// ---- depthwise: 16 channels in words, two taps interleaved for vpmaddwd

struct Taps {
  int pairs;               // of taps
  const int64_t (*at)[2];  // [pairs] bytes from a pixel
  const int16_t *weights;  // [pairs][channels 0..3 and 8..11, then 4..7 and 12..15][2]
};

// Adds P pixels' products. COLUMNS 0: every pair of taps by itself. Else the pairs are of two rows, COLUMNS of them side by side with
// neighbouring pixels `pitch` apart, so that an interleaved pair of inputs serves all the pixels whose windows hold it.
template <int P, bool SIGNED, int COLUMNS>
HZ_INLINE inline void add_taps(const Taps &t, const uint8_t *in, int64_t pitch, __m256i (&lo)[P], __m256i (&hi)[P]) {
  const int16_t *w = t.weights;
  if constexpr (COLUMNS == 0) {
    for (int i = 0; i < t.pairs; ++i, w += 32) {
      const uint8_t *const a = in + t.at[i][0], *const b = in + t.at[i][1];
      const __m256i w0 = load(w), w1 = load(w + 16);
      each<P>([&](auto p) HZ_INLINE {
        const __m256i x = words<SIGNED>(a + p * pitch), y = words<SIGNED>(b + p * pitch);
        add(lo[p], _mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), w0));
        add(hi[p], _mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), w1));
      });
    }
  } else {
    for (int i = 0; i < t.pairs; i += COLUMNS, w += 32 * COLUMNS) {
      const uint8_t *const a = in + t.at[i][0], *const b = in + t.at[i][1];
      each<P + COLUMNS - 1>([&](auto column) HZ_INLINE {
        const __m256i x = words<SIGNED>(a + column * pitch), y = words<SIGNED>(b + column * pitch);
        const __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
        each<P>([&](auto p) HZ_INLINE {
          constexpr int tap = decltype(column)::value - decltype(p)::value;
          if constexpr (tap >= 0 && tap < COLUMNS) {
            add(lo[p], _mm256_madd_epi16(low, load(w + 32 * tap)));
            add(hi[p], _mm256_madd_epi16(high, load(w + 32 * tap + 16)));
          }
        });
      });
    }
  }
}

// A row of output pixels and their residuals: the first one, and bytes to the next. res is null without residuals.
struct Row {
  const uint8_t *in, *res;
  uint8_t *out;
  int64_t in_pitch, res_pitch, out_pitch;
  int width;
};

// Pixels x ... x + P - 1.
template <int P, bool SIGNED, int COLUMNS>
HZ_INLINE inline void depthwise_block(const Taps &t, const Channels &c, const Row &row, int x) {
  __m256i lo[P], hi[P];
  each<P>([&](auto p) HZ_INLINE { lo[p] = hi[p] = _mm256_setzero_si256(); });
  add_taps<P, SIGNED, COLUMNS>(t, row.in + x * row.in_pitch + c.first, row.in_pitch, lo, hi);
  uint8_t *out[P];
  const uint8_t *res[P];
  each<P>([&](auto p) HZ_INLINE { // in order of channels
    const __m256i sums = _mm256_permute2x128_si256(lo[p], hi[p], 0x20);
    hi[p] = _mm256_add_epi32(c.start[1], _mm256_permute2x128_si256(lo[p], hi[p], 0x31));
    lo[p] = _mm256_add_epi32(c.start[0], sums);
    out[p] = row.out + (x + p) * row.out_pitch;
    res[p] = row.res + (x + p) * row.res_pitch;
  });
  finish<P>(c, lo, hi, out, res);
}

template <bool SIGNED, int COLUMNS> void depthwise_row(const Taps &t, const Channels &c, const Row &row) {
  int x = 0;
  for (; x + 4 <= row.width; x += 4) depthwise_block<4, SIGNED, COLUMNS>(t, c, row, x);
  switch (row.width - x) {
  case 3: return depthwise_block<3, SIGNED, COLUMNS>(t, c, row, x);
  case 2: return depthwise_block<2, SIGNED, COLUMNS>(t, c, row, x);
  case 1: return depthwise_block<1, SIGNED, COLUMNS>(t, c, row, x);
  }
}

template <bool SIGNED> auto depthwise_row_for(int columns) {
  return columns == 3 ? depthwise_row<SIGNED, 3> : columns == 5 ? depthwise_row<SIGNED, 5> : depthwise_row<SIGNED, 0>;
}

void depthwise(const hz_depthwise &d, Slots slots, Part part) {
  const int64_t tiles = (d.channels + 15) / 16;
  int64_t first, last;
  part.range(d.images * d.height * tiles, first, last);
  if (first >= last) return;

  // Pairs of taps: of neighbouring rows where neighbouring pixels share columns, else one after the other. What a last one lacks is
  // itself with weight 0.
  const bool shared = d.stride_x == 1 && d.dilation_x == 1 && (d.kernel_x == 3 || d.kernel_x == 5);
  const int columns = shared ? d.kernel_x : 0, all = d.kernel_y * d.kernel_x;
  const int pairs = shared ? (d.kernel_y + 1) / 2 * columns : (all + 1) / 2;
  const int64_t weight_bytes = int64_t(pairs) * 64;
  uint8_t *const memory = scratch(tiles * weight_bytes + pairs * 16);
  auto *const taps_at = reinterpret_cast<int64_t(*)[2]>(memory + tiles * weight_bytes);
  const int64_t padded = (int64_t(d.channels) + HZ_CHANNELS - 1) / HZ_CHANNELS * HZ_CHANNELS;
  for (int i = 0; i < pairs; ++i) {
    const int a = shared ? i / columns * 2 * columns + i % columns : 2 * i, b = shared ? a + columns : a + 1;
    const auto place = [&](int tap) {
      return tap / d.kernel_x * d.dilation_y * d.in_row + tap % d.kernel_x * d.dilation_x * d.in_pixel;
    };
    taps_at[i][0] = place(a);
    taps_at[i][1] = place(b < all ? b : a);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const auto weights = [&](int tap) { return words<true>(reinterpret_cast<const uint8_t *>(d.weights + tap * padded + 16 * tile)); };
      const __m256i x = weights(a), y = b < all ? weights(b) : _mm256_setzero_si256();
      uint8_t *const to = memory + tile * weight_bytes + i * 64;
      store(to, _mm256_unpacklo_epi16(x, y));
      store(to + 32, _mm256_unpackhi_epi16(x, y));
    }
  }

  const auto run = d.in.dtype == HZ_S8 ? depthwise_row_for<true>(columns) : depthwise_row_for<false>(columns);
  const uint8_t *const in = at(d.in, slots), *const other = at(d.res, slots);
  uint8_t *const out = at(d.out, slots);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t tile = unit % tiles, image = unit / tiles / d.height, y = unit / tiles % d.height;
    const Channels channels = channels_of(d.epilogue, nullptr, d.out.dtype, d.res, 16 * tile, d.channels);
    const Taps taps{pairs, taps_at, reinterpret_cast<const int16_t *>(memory + tile * weight_bytes)};
    run(taps, channels,
        {in + image * d.in_image + y * d.stride_y * d.in_row, other ? other + image * d.res_image + y * d.res_row : nullptr,
         out + image * d.out_image + y * d.out_row, d.stride_x * d.in_pixel, other ? d.res_pixel : 0, d.out_pixel, d.width});
  }
}

} // namespace

const Tier avx2_tier = {conv, depthwise, elementwise, max_pool, avg_pool, upsample, nullptr, nullptr};

} // namespace horizon
