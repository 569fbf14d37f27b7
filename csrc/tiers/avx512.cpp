// AVX-512 with VNNI: four-byte dot products into registers.
//
// A block is P output pixels by N tiles of 16 channels: for each group of four input bytes, N vectors of weights and P broadcasts
// feed P * N dot products, and the sums become outputs without leaving the registers. The instruction multiplies unsigned by signed bytes; signed inputs are shifted by 128, which
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

// Blocks of pixels of one image, for one block of channels.
struct Strip {
  const hz_conv *c;
  const uint8_t *in;  // of the image
  int tile;           // first tile of channels
  int64_t pixel, end; // first pixel, and where the last block ends at most
  Target target;      // of the image and the channels
};

// RES: whether there is a residual, of dtype R.
template <int P, int N, bool SIGNED, hz_dtype O, bool RES, hz_dtype R> void strip(const Strip &s, int64_t blocks) {
  const hz_conv &c = *s.c;
  const int64_t tile_bytes = int64_t(c.steps) * 1024;
  const int8_t *weights = c.weights + s.tile * tile_bytes;
  const uint8_t *in = s.in + (c.block_offset ? c.block_offset[s.tile] : 0);
  const __m512i shift = _mm512_set1_epi8(char(0x80));
  const Constants<N> constants(s.target, O);
  __m512i bias[N];
  for (int n = 0; n < N; ++n) {
    bias[n] = load(c.epilogue.bias + 16 * (s.tile + n));
    if (SIGNED) bias[n] = _mm512_sub_epi32(bias[n], _mm512_slli_epi32(load(c.weight_sum + 16 * (s.tile + n)), 7));
  }
  for (int64_t f = s.pixel; blocks > 0; --blocks, f += P) {
    const int64_t first = std::min(f, s.end - P);
    __m512i acc[P][N];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[p][n] = bias[n];
    for (int k = 0; k < c.steps; ++k) {
      const uint8_t *a[P];
      for (int p = 0; p < P; ++p) a[p] = in + c.pixel[first + p] + c.step[k];
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
    Target target = s.target;
    target.out_at += first;
    target.res_at += first;
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) finish_pixel<O, RES, R, N>(target, constants, acc[p], p);
  }
}

using Kernel = void (*)(const Strip &, int64_t);

template <int P, int N, bool SIGNED, hz_dtype O> Kernel kernel_for_residual(const hz_ref &res) {
  if (res.slot < 0) return strip<P, N, SIGNED, O, false, HZ_S8>;
  return res.dtype == HZ_S8 ? strip<P, N, SIGNED, O, true, HZ_S8> : strip<P, N, SIGNED, O, true, HZ_U8>;
}

template <int P, int N> Kernel kernel_for(const hz_conv &c) {
  const bool is_signed = c.in.dtype == HZ_S8;
  switch (c.out.dtype) {
  case HZ_S8: return is_signed ? kernel_for_residual<P, N, true, HZ_S8>(c.res) : kernel_for_residual<P, N, false, HZ_S8>(c.res);
  case HZ_U8: return is_signed ? kernel_for_residual<P, N, true, HZ_U8>(c.res) : kernel_for_residual<P, N, false, HZ_U8>(c.res);
  default: return is_signed ? kernel_for_residual<P, N, true, HZ_F32>(c.res) : kernel_for_residual<P, N, false, HZ_F32>(c.res);
  }
}

// Pixels times tiles of 16 channels; P * N accumulators, N weights, an input and a shift are at most 32 registers. For each number of
// pixels that are all numbers of tiles up to its largest, so that the last block of channels can be a narrow one.
Kernel kernel_for(const hz_conv &c, int p, int n) {
  switch (100 * n + p) {
  case 114: return kernel_for<14, 1>(c);
  case 214: return kernel_for<14, 2>(c);
  case 107: return kernel_for<7, 1>(c);
  case 207: return kernel_for<7, 2>(c);
  case 108: return kernel_for<8, 1>(c);
  case 208: return kernel_for<8, 2>(c);
  case 308: return kernel_for<8, 3>(c);
  case 106: return kernel_for<6, 1>(c);
  case 206: return kernel_for<6, 2>(c);
  case 306: return kernel_for<6, 3>(c);
  case 406: return kernel_for<6, 4>(c);
  default: return nullptr;
  }
}

constexpr int64_t chunk_bytes = 1 << 16; // of the output: with its input this stays in the second-level cache

} // namespace

void avx512_conv(const hz_conv &c, Slots slots, Part part) {
  const int tiles = (c.channels + 15) / 16;
  int n = c.block_offset ? 1 : std::min({c.columns > 0 ? c.columns : 4, 4, tiles});
  static constexpr int largest[] = {0, 14, 14, 8, 6};
  int p = c.rows;
  if (p <= 0 || !kernel_for(c, p, n)) p = largest[n];

  // Blocks of pixels over all images, blocks of channels; a thread has a range of the one or the other. The tables go on past
  // the last pixel, to a multiple of 16: a last block that would go further moves back and does some pixels twice.
  const int64_t padded = c.tiles * 16, per_image = (c.pixels + p - 1) / p, channel_blocks = (tiles + n - 1) / n;
  int64_t first = 0, last = per_image * c.images, block0 = 0, block1 = channel_blocks;
  if (c.by_channels)
    part.range(channel_blocks, block0, block1);
  else
    part.range(last, first, last);
  if (first >= last || block0 >= block1) return;

  const uint8_t *in = at(c.in, slots), *res = at(c.res, slots);
  uint8_t *out = at(c.out, slots);
  const int channel_bytes = c.out.dtype == HZ_F32 ? 4 : 1;
  const Kernel whole = kernel_for(c, p, n), rest = kernel_for(c, p, tiles % n ? tiles % n : n);
  const int64_t chunk = c.pixels_inside ? last - first : std::max<int64_t>(1, chunk_bytes / (int64_t(p) * c.channels * channel_bytes));

  Strip s{&c, nullptr, 0, 0, padded, {&c.epilogue, nullptr, nullptr, c.out_at, c.res_at, 0, c.channels}};
  for (int64_t begin = first; begin < last; begin += chunk)
    for (int64_t block = block0; block < block1; ++block)
      for (int64_t unit = begin, stop = std::min(begin + chunk, last), blocks; unit < stop; unit += blocks) {
        const int64_t image = unit / per_image;
        blocks = std::min(stop, (image + 1) * per_image) - unit;
        s.in = in + image * c.in_image;
        s.tile = int(block) * n;
        s.pixel = (unit - image * per_image) * p;
        s.target.channel = s.tile * 16;
        s.target.out = out + image * c.out_image + s.target.channel * channel_bytes;
        s.target.res = res ? res + image * c.res_image + s.target.channel : nullptr;
        (s.tile + n <= tiles ? whole : rest)(s, blocks);
      }
}

namespace {

// ---- depthwise -----------------------------------------------------------------------------------------------------------

// A vector of 64 channels, or of 32 where a tensor has no more than that left. Four rows of a column are interleaved, so that each
// channel's four bytes lie together: one column then serves every output pixel whose window covers it. Of the four vectors that
// come out, lane L of vector j holds channels 16 L + 4 j .. + 3, an order that packing the result undoes.
struct Vector64 {
  static constexpr int channels = 64, lanes = 4;
  using I = __m512i;
  using F = __m512;
  static I load(const void *p) { return _mm512_loadu_si512(p); }
  static F load_floats(const float *p) { return _mm512_loadu_ps(p); }
  static I bytes(int b) { return _mm512_set1_epi8(char(b)); }
  static I exclusive_or(I a, I b) { return _mm512_xor_si512(a, b); }
  static I lo8(I a, I b) { return _mm512_unpacklo_epi8(a, b); }
  static I hi8(I a, I b) { return _mm512_unpackhi_epi8(a, b); }
  static I lo16(I a, I b) { return _mm512_unpacklo_epi16(a, b); }
  static I hi16(I a, I b) { return _mm512_unpackhi_epi16(a, b); }
  static I sign16(I a) { return _mm512_srai_epi16(a, 15); }
  static I sign8(I a) { return _mm512_movm_epi8(_mm512_movepi8_mask(a)); }
  static I dot(I sum, I a, I b) { return _mm512_dpbusd_epi32(sum, a, b); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F all(float x) { return _mm512_set1_ps(x); }
  static void store(float *p, F a) { _mm512_storeu_ps(p, a); }
  template <hz_dtype O> static void store(uint8_t *p, int count, const I q[4], const uint8_t *hi, bool relu) {
    _mm512_mask_storeu_epi8(p, first_bytes(count), bounded<O>(pack64<O>(q[0], q[1], q[2], q[3]), load(hi), relu));
  }
};

struct Vector32 {
  static constexpr int channels = 32, lanes = 2;
  using I = __m256i;
  using F = __m256;
  static I load(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
  static F load_floats(const float *p) { return _mm256_loadu_ps(p); }
  static I bytes(int b) { return _mm256_set1_epi8(char(b)); }
  static I exclusive_or(I a, I b) { return _mm256_xor_si256(a, b); }
  static I lo8(I a, I b) { return _mm256_unpacklo_epi8(a, b); }
  static I hi8(I a, I b) { return _mm256_unpackhi_epi8(a, b); }
  static I lo16(I a, I b) { return _mm256_unpacklo_epi16(a, b); }
  static I hi16(I a, I b) { return _mm256_unpackhi_epi16(a, b); }
  static I sign16(I a) { return _mm256_srai_epi16(a, 15); }
  static I sign8(I a) { return _mm256_movm_epi8(_mm256_movepi8_mask(a)); }
  static I dot(I sum, I a, I b) { return _mm256_dpbusd_epi32(sum, a, b); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I to_int(F a) { return _mm256_cvtps_epi32(a); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F all(float x) { return _mm256_set1_ps(x); }
  static void store(float *p, F a) { _mm256_storeu_ps(p, a); }
  template <hz_dtype O> static void store(uint8_t *p, int count, const I q[4], const uint8_t *hi, bool relu) {
    const I ab = _mm256_packs_epi32(q[0], q[1]), cd = _mm256_packs_epi32(q[2], q[3]);
    I y = O == HZ_S8 ? _mm256_min_epi8(_mm256_packs_epi16(ab, cd), load(hi)) : _mm256_min_epu8(_mm256_packus_epi16(ab, cd), load(hi));
    if (O == HZ_S8 && relu) y = _mm256_max_epi8(y, _mm256_setzero_si256());
    _mm256_mask_storeu_epi8(p, __mmask32(first_bytes(count)), y);
  }
};

constexpr int W = 4; // output pixels at a time

// A vector of channels: its weights and constants in the order of the interleaved vectors.
struct Chunk {
  const hz_depthwise *d;
  int groups;            // of four kernel rows
  const int8_t *weights; // [groups][kernel_x][4 vectors]
  const int32_t *bias;   // [4 vectors], like the three below
  const float *m, *ratio, *bound;
  const uint8_t *hi;
  int channels;          // 1..64
};

template <class V, bool SIGNED> inline void interleave(const uint8_t *const rows[4], int64_t at, typename V::I v[4]) {
  using I = typename V::I;
  I r[4];
  for (int i = 0; i < 4; ++i) {
    r[i] = V::load(rows[i] + at);
    if (SIGNED) r[i] = V::exclusive_or(r[i], V::bytes(0x80));
  }
  const I a = V::lo8(r[0], r[1]), b = V::hi8(r[0], r[1]), c = V::lo8(r[2], r[3]), d = V::hi8(r[2], r[3]);
  v[0] = V::lo16(a, c), v[1] = V::hi16(a, c), v[2] = V::lo16(b, d), v[3] = V::hi16(b, d);
}

// Output pixels [0, count) of a row from `in`; count <= W. KX, SX: kernel width and stride where known, else 0.
template <class V, bool SIGNED, int KX, int SX>
inline void depthwise_sums(const Chunk &k, const uint8_t *in, int count, typename V::I acc[W][4]) {
  constexpr int vector = V::channels; // bytes
  const hz_depthwise &d = *k.d;
  const int kernel = KX ? KX : d.kernel_x, stride = SX ? SX : d.stride_x;
  for (int o = 0; o < W; ++o)
    for (int j = 0; j < 4; ++j) acc[o][j] = V::load(k.bias + vector / 4 * j);
  for (int g = 0; g < k.groups; ++g) {
    const uint8_t *rows[4];
    for (int i = 0; i < 4; ++i) // rows past the kernel have zero weights: read the last one
      rows[i] = in + int64_t(std::min(4 * g + i, d.kernel_y - 1)) * d.dilation_y * d.in_row;
    const int8_t *w = k.weights + int64_t(g) * kernel * 4 * vector;
    typename V::I v[4];
    if (KX) { // every column once
#pragma GCC unroll 12
      for (int x = 0; x < (W - 1) * SX + KX; ++x) {
        if (x >= (count - 1) * SX + KX) break;
        interleave<V, SIGNED>(rows, x * d.in_pixel, v);
#pragma GCC unroll 4
        for (int o = 0; o < W; ++o) {
          const int i = x - o * SX;
          if (i < 0 || i >= KX) continue;
          for (int j = 0; j < 4; ++j) acc[o][j] = V::dot(acc[o][j], v[j], V::load(w + (4 * i + j) * vector));
        }
      }
    } else {
      for (int i = 0; i < kernel; ++i)
#pragma GCC unroll 4
        for (int o = 0; o < W; ++o) {
          if (o >= count) break;
          interleave<V, SIGNED>(rows, int64_t(o * stride + i * d.dilation_x) * d.in_pixel, v);
          for (int j = 0; j < 4; ++j) acc[o][j] = V::dot(acc[o][j], v[j], V::load(w + (4 * i + j) * vector));
        }
    }
  }
}

// Channel `index` of the interleaved order.
template <class V> inline int interleaved(int index) {
  const int j = index / (4 * V::lanes), lane = index / 4 % V::lanes;
  return 16 * lane + 4 * j + index % 4;
}

// A chunk's residuals as four vectors in that order.
template <class V> inline void residuals(const uint8_t *r, bool is_signed, typename V::F f[4]) {
  using I = typename V::I;
  const I bytes = V::load(r), zero = V::bytes(0), sign = is_signed ? V::sign8(bytes) : zero;
  const I lo = V::lo8(bytes, sign), hi = V::hi8(bytes, sign);
  const auto wide = [&](I words, bool high) {
    const I s = is_signed ? V::sign16(words) : zero;
    return V::to_float(high ? V::hi16(words, s) : V::lo16(words, s));
  };
  f[0] = wide(lo, false), f[1] = wide(lo, true), f[2] = wide(hi, false), f[3] = wide(hi, true);
}

template <class V, hz_dtype O>
inline void depthwise_store(const Chunk &k, const typename V::I acc[4], uint8_t *out, const uint8_t *res) {
  constexpr int vector = V::channels / 4; // entries
  const hz_epilogue &e = k.d->epilogue;
  const bool relu = e.activation != HZ_NONE;
  typename V::F y[4], r[4];
  if (res) residuals<V>(res, k.d->res.dtype == HZ_S8, r);
  for (int j = 0; j < 4; ++j) {
    y[j] = V::mul(V::to_float(acc[j]), V::load_floats(k.m + vector * j));
    if (res) y[j] = V::fma(r[j], V::load_floats(k.ratio + vector * j), y[j]);
  }
  if (O == HZ_F32) {
    float values[V::channels], row[V::channels];
    for (int j = 0; j < 4; ++j) {
      if (relu) y[j] = V::max(y[j], V::all(0));
      if (e.activation == HZ_RELU6) y[j] = V::min(y[j], V::load_floats(k.bound + vector * j));
      V::store(values + vector * j, y[j]);
    }
    for (int i = 0; i < V::channels; ++i) row[interleaved<V>(i)] = values[i];
    __builtin_memcpy(out, row, 4 * k.channels);
    return;
  }
  typename V::I q[4];
  for (int j = 0; j < 4; ++j) {
    if (e.clamp) y[j] = V::min(y[j], V::all(O == HZ_S8 ? 127.f : 255.f));
    q[j] = V::to_int(y[j]);
  }
  V::template store<O>(out, k.channels, q, k.hi, relu);
}

template <class V, bool SIGNED, int KX, int SX, hz_dtype O>
void depthwise_row(const Chunk &k, const uint8_t *in, const uint8_t *res, uint8_t *out) {
  const hz_depthwise &d = *k.d;
  for (int x = 0; x < d.width; x += W) {
    const int count = std::min(W, d.width - x);
    typename V::I acc[W][4];
    depthwise_sums<V, SIGNED, KX, SX>(k, in + int64_t(x) * d.stride_x * d.in_pixel, count, acc);
#pragma GCC unroll 4
    for (int o = 0; o < W; ++o) {
      if (o >= count) break;
      depthwise_store<V, O>(k, acc[o], out + (x + o) * d.out_pixel, res ? res + (x + o) * d.res_pixel : nullptr);
    }
  }
}

using Row = void (*)(const Chunk &, const uint8_t *, const uint8_t *, uint8_t *);

template <class V, bool SIGNED, int KX, int SX> Row row_for(int dtype) {
  return dtype == HZ_S8 ? depthwise_row<V, SIGNED, KX, SX, HZ_S8>
         : dtype == HZ_U8 ? depthwise_row<V, SIGNED, KX, SX, HZ_U8> : depthwise_row<V, SIGNED, KX, SX, HZ_F32>;
}

template <class V, bool SIGNED> Row row_for(const hz_depthwise &d) {
  if (d.dilation_x == 1 && d.kernel_x == 3 && d.stride_x == 1) return row_for<V, SIGNED, 3, 1>(d.out.dtype);
  if (d.dilation_x == 1 && d.kernel_x == 3 && d.stride_x == 2) return row_for<V, SIGNED, 3, 2>(d.out.dtype);
  if (d.dilation_x == 1 && d.kernel_x == 5 && d.stride_x == 1) return row_for<V, SIGNED, 5, 1>(d.out.dtype);
  if (d.dilation_x == 1 && d.kernel_x == 5 && d.stride_x == 2) return row_for<V, SIGNED, 5, 2>(d.out.dtype);
  return row_for<V, SIGNED, 0, 0>(d.out.dtype);
}

template <class V> Row row_for(const hz_depthwise &d) {
  return d.in.dtype == HZ_S8 ? row_for<V, true>(d) : row_for<V, false>(d);
}

// Fills `memory` with a chunk's weights and constants, interleaved, and returns what lies behind them.
template <class V> uint8_t *prepare(const hz_depthwise &d, int channel, Chunk &k, uint8_t *memory) {
  const int padded = (d.channels + HZ_CHANNELS - 1) / HZ_CHANNELS * HZ_CHANNELS;
  auto *w = reinterpret_cast<int8_t *>(memory);
  k.weights = w;
  for (int g = 0; g < k.groups; ++g)
    for (int x = 0; x < d.kernel_x; ++x)
      for (int c = 0; c < V::channels; ++c)
        for (int i = 0; i < 4; ++i, ++w) {
          const int y = 4 * g + i;
          *w = y < d.kernel_y ? d.weights[(int64_t(y) * d.kernel_x + x) * padded + channel + interleaved<V>(c)] : 0;
        }
  auto *vectors = reinterpret_cast<float *>(w);
  auto *bias = reinterpret_cast<int32_t *>(w);
  const hz_epilogue &e = d.epilogue;
  for (int i = 0; i < V::channels; ++i) {
    const int c = channel + interleaved<V>(i);
    bias[i] = d.in.dtype == HZ_S8 ? int32_t(uint32_t(e.bias[c]) - 128u * uint32_t(d.weight_sum[c])) : e.bias[c];
    vectors[V::channels + i] = e.m[c];
    vectors[2 * V::channels + i] = e.ratio ? e.ratio[c] : 0;
    vectors[3 * V::channels + i] = e.bound ? e.bound[c] : 0;
  }
  k.bias = bias;
  k.m = vectors + V::channels, k.ratio = vectors + 2 * V::channels, k.bound = vectors + 3 * V::channels;
  k.hi = e.hi + channel;
  k.channels = std::min(V::channels, d.channels - channel);
  return reinterpret_cast<uint8_t *>(vectors + 4 * V::channels);
}

} // namespace

void avx512_depthwise(const hz_depthwise &d, Slots slots, Part part) {
  int64_t first, last;
  part.range(d.images * d.height, first, last);
  if (first >= last) return;
  const uint8_t *in = at(d.in, slots), *res = at(d.res, slots);
  uint8_t *out = at(d.out, slots);
  const int chunks = (d.channels + 63) / 64, groups = (d.kernel_y + 3) / 4;
  const int channel_bytes = d.out.dtype == HZ_F32 ? 4 : 1;
  const Row row64 = row_for<Vector64>(d), row32 = row_for<Vector32>(d);

  const int64_t most = int64_t(groups) * d.kernel_x * 256 + 4 * 256; // of a chunk
  auto *chunk = reinterpret_cast<Chunk *>(scratch(chunks * (int64_t(sizeof(Chunk)) + most) + 64));
  uint8_t *memory = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(chunk + chunks) + 63) / 64 * 64);
  for (int i = 0; i < chunks; ++i) {
    chunk[i].d = &d;
    chunk[i].groups = groups;
    const bool wide = d.channels - 64 * i > 32;
    memory = wide ? prepare<Vector64>(d, 64 * i, chunk[i], memory) : prepare<Vector32>(d, 64 * i, chunk[i], memory);
  }
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t image = unit / d.height, y = unit % d.height;
    const uint8_t *from = in + image * d.in_image + y * d.stride_y * d.in_row;
    const uint8_t *other = res ? res + image * d.res_image + y * d.res_row : nullptr;
    uint8_t *to = out + image * d.out_image + y * d.out_row;
    for (int i = 0; i < chunks; ++i) {
      const int channel = 64 * i;
      const Row row = d.channels - channel > 32 ? row64 : row32;
      row(chunk[i], from + channel, other ? other + channel : nullptr, to + channel * channel_bytes);
    }
  }
}

const Tier avx512_tier = {avx512_conv, avx512_depthwise, elementwise, max_pool, avg_pool, upsample, nullptr, nullptr};

} // namespace horizon
