// AVX-512 with VNNI: four-byte dot products into registers.
//
// A block is P output pixels by N tiles of 16 channels: for each group of four input bytes, N vectors of weights and P broadcasts
// feed P * N dot products. The instruction multiplies unsigned by signed bytes; signed inputs are shifted by 128, which
// `weight_sum` takes back (the zeros of the padding are shifted like everything else).

#include "../kernels/avx512_epilogue.hpp"
#include "../kernels/elementwise.hpp"
#include "../kernels/pool.hpp"
#include "../kernels/upsample.hpp"
#include "avx512.hpp"

#include <algorithm>

namespace horizon {
namespace {

inline __m512i load(const void *p) { return _mm512_loadu_si512(p); }
inline int32_t word(const uint8_t *p) {
  int32_t w;
  __builtin_memcpy(&w, p, 4);
  return w;
}

// ---- convolution ---------------------------------------------------------------------------------------------------------

struct Block {
  const hz_conv *c;
  const uint8_t *in;      // of the image
  const int32_t *pixel;   // of the first of the block
  int tile;               // first tile of channels
  int32_t *acc;           // [P][16 N]
};

template <int P, int N, bool SIGNED> void products(const Block &b) {
  const hz_conv &c = *b.c;
  const int64_t tile_bytes = int64_t(c.steps) * 1024;
  const int8_t *weights = c.weights + b.tile * tile_bytes;
  const uint8_t *in = b.in + (c.block_offset ? c.block_offset[b.tile] : 0);
  const __m512i shift = _mm512_set1_epi8(char(0x80));
  __m512i acc[P][N];
  for (int n = 0; n < N; ++n) {
    __m512i bias = load(c.epilogue.bias + 16 * (b.tile + n));
    if (SIGNED) bias = _mm512_sub_epi32(bias, _mm512_slli_epi32(load(c.weight_sum + 16 * (b.tile + n)), 7));
    for (int p = 0; p < P; ++p) acc[p][n] = bias;
  }
  for (int k = 0; k < c.steps; ++k) {
    const uint8_t *a[P];
    for (int p = 0; p < P; ++p) a[p] = in + b.pixel[p] + c.step[k];
    const int8_t *w = weights + k * 1024;
    for (int j = 0, used = c.used[k]; j < used; ++j, w += 64) {
      __m512i ws[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) ws[n] = load(w + n * tile_bytes);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        __m512i x = _mm512_set1_epi32(word(a[p] + 4 * j));
        if (SIGNED) x = _mm512_xor_si512(x, shift);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[p][n] = _mm512_dpbusd_epi32(acc[p][n], x, ws[n]);
      }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int n = 0; n < N; ++n) _mm512_store_si512(b.acc + (p * N + n) * 16, acc[p][n]);
}

using Products = void (*)(const Block &);

// Registers: P * N accumulators, N weights, one input, one shift.
template <int P, int N> constexpr bool fits = P *N + N + 2 <= 32;

template <int P, bool SIGNED> Products products_of(int n) {
  if constexpr (fits<P, 4>)
    if (n == 4) return products<P, 4, SIGNED>;
  if constexpr (fits<P, 3>)
    if (n == 3) return products<P, 3, SIGNED>;
  if constexpr (fits<P, 2>)
    if (n == 2) return products<P, 2, SIGNED>;
  return n == 1 ? products<P, 1, SIGNED> : nullptr;
}

template <bool SIGNED> Products products_of(int p, int n) {
  switch (p) {
  case 1: return products_of<1, SIGNED>(n);
  case 2: return products_of<2, SIGNED>(n);
  case 3: return products_of<3, SIGNED>(n);
  case 4: return products_of<4, SIGNED>(n);
  case 5: return products_of<5, SIGNED>(n);
  case 6: return products_of<6, SIGNED>(n);
  case 7: return products_of<7, SIGNED>(n);
  case 8: return products_of<8, SIGNED>(n);
  case 10: return products_of<10, SIGNED>(n);
  case 12: return products_of<12, SIGNED>(n);
  case 14: return products_of<14, SIGNED>(n);
  default: return nullptr;
  }
}

void conv(const hz_conv &c, Slots slots, Part part) {
  const int tiles = (c.channels + 15) / 16;
  const bool is_signed = c.in.dtype == HZ_S8;
  int n = c.block_offset ? 1 : std::min(c.columns > 0 ? c.columns : 4, tiles);
  const auto choose = is_signed ? products_of<true> : products_of<false>;
  static constexpr int largest[] = {0, 14, 12, 8, 6};
  int p = c.rows;
  if (p <= 0 || !choose(p, n)) p = largest[n];

  // Blocks of pixels over all images, blocks of channels; a thread has a range of the one or the other. The tables go on past
  // the last pixel, to a multiple of 16: a last block that would go further moves back and does some pixels twice.
  const int64_t padded = c.tiles * 16, per_image = (c.pixels + p - 1) / p, channel_blocks = (tiles + n - 1) / n;
  int64_t first = 0, last = per_image * c.images, block0 = 0, block1 = channel_blocks;
  if (c.by_channels)
    part.range(channel_blocks, block0, block1);
  else
    part.range(last, first, last);
  if (first >= last || block0 >= block1) return;

  Block b{&c, nullptr, nullptr, 0, reinterpret_cast<int32_t *>(scratch(32 * 64))};
  Target target{&c.epilogue, nullptr, nullptr, nullptr, nullptr, 0, c.channels};
  const uint8_t *in = at(c.in, slots), *res = at(c.res, slots);
  uint8_t *out = at(c.out, slots);
  const int channel_bytes = c.out.dtype == HZ_F32 ? 4 : 1;
  const Products whole = choose(p, n), rest = choose(p, tiles % n ? tiles % n : n);
  const Finish whole_finish = finish_for(n, c.out, c.res), rest_finish = finish_for(tiles % n ? tiles % n : n, c.out, c.res);

  const auto run = [&](int64_t unit, int64_t block) {
    const int64_t image = unit / per_image, f = std::min((unit % per_image) * p, padded - p);
    b.in = in + image * c.in_image;
    b.pixel = c.pixel + f;
    b.tile = int(block) * n;
    target.channel = b.tile * 16;
    target.out = out + image * c.out_image + target.channel * channel_bytes;
    target.res = res ? res + image * c.res_image + target.channel : nullptr;
    target.out_at = c.out_at + f;
    target.res_at = c.res_at + f;
    const bool full = b.tile + n <= tiles;
    (full ? whole : rest)(b);
    (full ? whole_finish : rest_finish)(target, b.acc, 0, p);
  };
  if (c.pixels_inside)
    for (int64_t block = block0; block < block1; ++block)
      for (int64_t unit = first; unit < last; ++unit) run(unit, block);
  else
    for (int64_t unit = first; unit < last; ++unit)
      for (int64_t block = block0; block < block1; ++block) run(unit, block);
}

} // namespace

// ---- depthwise -----------------------------------------------------------------------------------------------------------

namespace {

// 64 channels at a time. Four rows of a column are interleaved, so that each channel's four bytes lie together: one column then
// serves every output pixel whose window covers it. Lane L of vector j holds channels 16 L + 4 j .. + 3, an order that packing
// the result undoes.
constexpr int W = 4; // output pixels at a time

struct Chunk {
  const hz_depthwise *d;
  int groups;              // of four kernel rows
  const int8_t *weights;   // [groups][kernel_x][4 vectors][64]
  const int32_t *bias;     // [4][16]
  const float *m, *ratio, *bound;
  __mmask64 mask;
  int channels;            // of this chunk, 1..64
  const uint8_t *hi;
};

inline void interleave(const uint8_t *const rows[4], int64_t at, __mmask64 mask, __m512i shift, __m512i v[4]) {
  __m512i r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm512_maskz_loadu_epi8(mask, rows[i] + at);
  __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
  __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
  v[0] = _mm512_xor_si512(_mm512_unpacklo_epi16(a, c), shift);
  v[1] = _mm512_xor_si512(_mm512_unpackhi_epi16(a, c), shift);
  v[2] = _mm512_xor_si512(_mm512_unpacklo_epi16(b, d), shift);
  v[3] = _mm512_xor_si512(_mm512_unpackhi_epi16(b, d), shift);
}

// Output pixels [0, count) of a row from `in`; count <= W. KX, SX: kernel width and stride where known, else 0.
template <int KX, int SX>
inline void depthwise_sums(const Chunk &k, const uint8_t *in, int count, __m512i acc[W][4]) {
  const hz_depthwise &d = *k.d;
  const int kernel = KX ? KX : d.kernel_x, stride = SX ? SX : d.stride_x;
  const __m512i shift = _mm512_set1_epi8(d.in.dtype == HZ_S8 ? char(0x80) : 0);
  for (int o = 0; o < W; ++o)
    for (int j = 0; j < 4; ++j) acc[o][j] = load(k.bias + 16 * j);
  for (int g = 0; g < k.groups; ++g) {
    const uint8_t *rows[4];
    for (int i = 0; i < 4; ++i) // rows past the kernel have zero weights: read the last one
      rows[i] = in + int64_t(std::min(4 * g + i, d.kernel_y - 1)) * d.dilation_y * d.in_row;
    const int8_t *w = k.weights + int64_t(g) * kernel * 256;
    __m512i v[4];
    if (KX) { // every column once
#pragma GCC unroll 12
      for (int x = 0; x < (W - 1) * SX + KX; ++x) {
        if (x >= (count - 1) * SX + KX) break;
        interleave(rows, x * d.in_pixel, k.mask, shift, v);
#pragma GCC unroll 4
        for (int o = 0; o < W; ++o) {
          const int i = x - o * SX;
          if (i < 0 || i >= KX) continue;
          for (int j = 0; j < 4; ++j) acc[o][j] = _mm512_dpbusd_epi32(acc[o][j], v[j], load(w + i * 256 + j * 64));
        }
      }
    } else {
      for (int i = 0; i < kernel; ++i)
#pragma GCC unroll 4
        for (int o = 0; o < W; ++o) {
          if (o >= count) break;
          interleave(rows, int64_t(o * stride + i * d.dilation_x) * d.in_pixel, k.mask, shift, v);
          for (int j = 0; j < 4; ++j) acc[o][j] = _mm512_dpbusd_epi32(acc[o][j], v[j], load(w + i * 256 + j * 64));
        }
    }
  }
}

// A vector over 64 channels in the order of the interleaved vectors.
template <class T> void in_lane_order(const T *from, T *to) {
  for (int j = 0; j < 4; ++j)
    for (int lane = 0; lane < 4; ++lane)
      for (int i = 0; i < 4; ++i) to[16 * j + 4 * lane + i] = from[16 * lane + 4 * j + i];
}

// 64 residuals as four vectors in that order.
inline void residual64(const uint8_t *r, __mmask64 mask, bool is_signed, __m512 f[4]) {
  const __m512i bytes = _mm512_maskz_loadu_epi8(mask, r), zero = _mm512_setzero_si512();
  const __m512i sign = is_signed ? _mm512_movm_epi8(_mm512_movepi8_mask(bytes)) : zero;
  const __m512i lo = _mm512_unpacklo_epi8(bytes, sign), hi = _mm512_unpackhi_epi8(bytes, sign);
  const auto wide = [&](__m512i words, bool high) {
    const __m512i s = is_signed ? _mm512_srai_epi16(words, 15) : zero;
    return _mm512_cvtepi32_ps(high ? _mm512_unpackhi_epi16(words, s) : _mm512_unpacklo_epi16(words, s));
  };
  f[0] = wide(lo, false), f[1] = wide(lo, true), f[2] = wide(hi, false), f[3] = wide(hi, true);
}

template <hz_dtype O> inline void depthwise_store(const Chunk &k, const __m512i acc[4], uint8_t *out, const uint8_t *res) {
  const hz_epilogue &e = k.d->epilogue;
  const bool relu = e.activation != HZ_NONE;
  __m512 y[4], r[4];
  if (res) residual64(res, k.mask, k.d->res.dtype == HZ_S8, r);
  for (int j = 0; j < 4; ++j) {
    y[j] = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[j]), _mm512_load_ps(k.m + 16 * j));
    if (res) y[j] = _mm512_fmadd_ps(r[j], _mm512_load_ps(k.ratio + 16 * j), y[j]);
  }
  if (O == HZ_F32) {
    alignas(64) float row[64];
    for (int j = 0; j < 4; ++j) {
      if (relu) y[j] = _mm512_max_ps(y[j], _mm512_setzero_ps());
      if (e.activation == HZ_RELU6) y[j] = _mm512_min_ps(y[j], _mm512_load_ps(k.bound + 16 * j));
      for (int lane = 0; lane < 4; ++lane) {
        alignas(64) float part[16];
        _mm512_store_ps(part, y[j]);
        __builtin_memcpy(row + 16 * lane + 4 * j, part + 4 * lane, 16);
      }
    }
    __builtin_memcpy(out, row, 4 * k.channels);
    return;
  }
  __m512i q[4];
  for (int j = 0; j < 4; ++j) {
    if (e.clamp) y[j] = _mm512_min_ps(y[j], _mm512_set1_ps(O == HZ_S8 ? 127.f : 255.f));
    q[j] = _mm512_cvtps_epi32(y[j]);
  }
  _mm512_mask_storeu_epi8(out, k.mask, bounded<O>(pack64<O>(q[0], q[1], q[2], q[3]), load(k.hi), relu));
}

template <int KX, int SX, hz_dtype O>
void depthwise_rows(const Chunk &k, const uint8_t *in, const uint8_t *res, uint8_t *out, int x0, int x1) {
  const hz_depthwise &d = *k.d;
  for (int x = x0; x < x1; x += W) {
    const int count = std::min(W, x1 - x);
    __m512i acc[W][4];
    depthwise_sums<KX, SX>(k, in + int64_t(x) * d.stride_x * d.in_pixel, count, acc);
#pragma GCC unroll 4
    for (int o = 0; o < W; ++o) {
      if (o >= count) break;
      depthwise_store<O>(k, acc[o], out + (x + o) * d.out_pixel, res ? res + (x + o) * d.res_pixel : nullptr);
    }
  }
}

using Rows = void (*)(const Chunk &, const uint8_t *, const uint8_t *, uint8_t *, int, int);

template <int KX, int SX> Rows rows_for(int dtype) {
  return dtype == HZ_S8 ? depthwise_rows<KX, SX, HZ_S8>
         : dtype == HZ_U8 ? depthwise_rows<KX, SX, HZ_U8> : depthwise_rows<KX, SX, HZ_F32>;
}

Rows rows_for(const hz_depthwise &d) {
  if (d.dilation_x == 1 && d.kernel_x == 3 && d.stride_x == 1) return rows_for<3, 1>(d.out.dtype);
  if (d.dilation_x == 1 && d.kernel_x == 3 && d.stride_x == 2) return rows_for<3, 2>(d.out.dtype);
  if (d.dilation_x == 1 && d.kernel_x == 5 && d.stride_x == 1) return rows_for<5, 1>(d.out.dtype);
  if (d.dilation_x == 1 && d.kernel_x == 5 && d.stride_x == 2) return rows_for<5, 2>(d.out.dtype);
  return rows_for<0, 0>(d.out.dtype);
}

} // namespace

void avx512_depthwise(const hz_depthwise &d, Slots slots, Part part) {
  int64_t first, last;
  part.range(d.images * d.height, first, last);
  if (first >= last) return;
  const uint8_t *in = at(d.in, slots), *res = at(d.res, slots);
  uint8_t *out = at(d.out, slots);
  const int padded = (d.channels + HZ_CHANNELS - 1) / HZ_CHANNELS * HZ_CHANNELS;
  const int groups = (d.kernel_y + 3) / 4, chunks = padded / 64;
  const int channel_bytes = d.out.dtype == HZ_F32 ? 4 : 1;
  const Rows rows = rows_for(d);

  // Weights and vectors of all channels in the order of the interleaved vectors.
  const int64_t weight_bytes = int64_t(groups) * d.kernel_x * 256, vector_bytes = 4 * 256;
  uint8_t *memory = scratch(chunks * (weight_bytes + vector_bytes));
  for (int chunk = 0; chunk < chunks; ++chunk) {
    auto *w = reinterpret_cast<int8_t *>(memory + chunk * (weight_bytes + vector_bytes));
    for (int g = 0; g < groups; ++g)
      for (int x = 0; x < d.kernel_x; ++x, w += 256)
        for (int i = 0; i < 4; ++i) {
          const int y = 4 * g + i;
          const int8_t *from = d.weights + (int64_t(y) * d.kernel_x + x) * padded + 64 * chunk;
          for (int j = 0; j < 4; ++j)
            for (int lane = 0; lane < 4; ++lane)
              for (int c = 0; c < 4; ++c) w[64 * j + 16 * lane + 4 * c + i] = y < d.kernel_y ? from[16 * lane + 4 * j + c] : 0;
        }
    alignas(64) int32_t bias[64];
    for (int c = 0; c < 64; ++c) {
      bias[c] = d.epilogue.bias[64 * chunk + c];
      if (d.in.dtype == HZ_S8) bias[c] = int32_t(uint32_t(bias[c]) - 128u * uint32_t(d.weight_sum[64 * chunk + c]));
    }
    auto *vectors = reinterpret_cast<float *>(w);
    in_lane_order(bias, reinterpret_cast<int32_t *>(vectors));
    in_lane_order(d.epilogue.m + 64 * chunk, vectors + 64);
    if (d.epilogue.ratio) in_lane_order(d.epilogue.ratio + 64 * chunk, vectors + 128);
    if (d.epilogue.bound) in_lane_order(d.epilogue.bound + 64 * chunk, vectors + 192);
  }
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t image = unit / d.height, y = unit % d.height;
    const uint8_t *from = in + image * d.in_image + y * d.stride_y * d.in_row;
    const uint8_t *other = res ? res + image * d.res_image + y * d.res_row : nullptr;
    uint8_t *to = out + image * d.out_image + y * d.out_row;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const uint8_t *base = memory + chunk * (weight_bytes + vector_bytes);
      const auto *vectors = reinterpret_cast<const float *>(base + weight_bytes);
      const int channel = 64 * chunk, channels = std::min(64, d.channels - channel);
      const Chunk k{&d, groups, reinterpret_cast<const int8_t *>(base), reinterpret_cast<const int32_t *>(vectors),
                    vectors + 64, vectors + 128, vectors + 192, first_bytes(channels), channels, d.epilogue.hi + channel};
      rows(k, from + channel, other ? other + channel : nullptr, to + channel * channel_bytes, 0, d.width);
    }
  }
}

const Tier avx512_tier = {conv, avx512_depthwise, elementwise, max_pool, avg_pool, upsample, nullptr, nullptr};

} // namespace horizon
