// Operations element by element: quantize, dequantize, rescale, add, mul, tables and copies, between any two layouts.
//
// Every one of them but tables and copies is y = f(a, b), clamp(y, low, high), and rounded where the output has 8 bits; the bounds of
// an activation and of the dtype are one pair of numbers, because both are clamps. Dimensions are merged as far as strides allow, and
// the innermost is the one along which the output is contiguous. If the input is contiguous along another dimension, the two are
// transposed a tile at a time, on the side that has 8 bits.
#pragma once

#include "lanes.hpp"
#include "transpose.hpp"

#include <algorithm>

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

// ---- the kernel of a kind and its dtypes

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

// ---- dimensions

struct Loops {
  int dims = 0;
  int64_t size[HZ_DIMS], step[HZ_DIMS][OPERANDS];

  void swap(int i, int j) {
    std::swap(size[i], size[j]);
    std::swap(step[i], step[j]);
  }
};

// The dimensions that are left when those of one are dropped and neighbours are merged, in the order of the output's memory.
inline Loops loops_of(const hz_elementwise &p) {
  Loops l;
  for (int d = 0; d < HZ_DIMS; ++d) {
    if (p.size[d] == 1) continue;
    const int64_t steps[OPERANDS] = {p.a.stride[d], p.b.ref.slot < 0 ? 0 : p.b.stride[d], p.per_channel && d == HZ_DIMS - 1 ? 4 : 0,
                                     p.out.stride[d]};
    l.size[l.dims] = p.size[d];
    std::copy_n(steps, int(OPERANDS), l.step[l.dims++]);
    for (int i = l.dims - 1; i > 0 && std::abs(l.step[i][OUT]) > std::abs(l.step[i - 1][OUT]); --i) l.swap(i, i - 1);
  }
  int kept = 0;
  for (int d = 1; d < l.dims; ++d) {
    bool one = true;
    for (int o = 0; o < OPERANDS; ++o) one = one && l.step[kept][o] == l.step[d][o] * l.size[d];
    if (one)
      l.size[d] *= l.size[kept];
    else
      ++kept;
    l.swap(kept, d);
  }
  if (l.dims) l.dims = kept + 1;
  for (; l.dims < 2; ++l.dims) { // at least a row and a number of rows
    for (int d = l.dims; d > 0; --d) {
      l.size[d] = l.size[d - 1];
      std::copy_n(l.step[d - 1], int(OPERANDS), l.step[d]);
    }
    l.size[0] = 1;
    std::fill_n(l.step[0], int(OPERANDS), 0);
  }
  return l;
}

// Where an index over the outer `dims` dimensions leads.
inline void place(const Loops &l, int dims, int64_t index, int64_t (&offset)[OPERANDS]) {
  std::fill_n(offset, int(OPERANDS), 0);
  for (int d = dims - 1; d >= 0; --d) {
    for (int o = 0; o < OPERANDS; ++o) offset[o] += index % l.size[d] * l.step[d][o];
    index /= l.size[d];
  }
}

inline int64_t product(const Loops &l, int dims) {
  int64_t n = 1;
  for (int d = 0; d < dims; ++d) n *= l.size[d];
  return n;
}

struct Job {
  int kind;
  Loops loops;
  Numbers numbers;
  Kernel kernel;
  const uint8_t *a, *b;
  uint8_t *out;
  int size[OPERANDS]; // bytes of an element
  int to;             // dtype of the output
};

// An element of any operand, `step` bytes apart, to a row without gaps, or back.
inline void gather(uint8_t *row, const uint8_t *from, int64_t step, int size, int64_t n) {
  if (size == 1)
    for (int64_t i = 0; i < n; ++i) row[i] = from[i * step];
  else
    for (int64_t i = 0; i < n; ++i) std::memcpy(row + 4 * i, from + i * step, 4);
}
inline void scatter(uint8_t *to, int64_t step, const uint8_t *row, int size, int64_t n) {
  if (size == 1)
    for (int64_t i = 0; i < n; ++i) to[i * step] = row[i];
  else
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * step, row + 4 * i, 4);
}

// Rows along the innermost dimension. Threads share the rows; long ones are cut.
inline void by_rows(const Job &job, Part part) {
  constexpr int64_t most = 4096;
  const Loops &l = job.loops;
  const int inner = l.dims - 1, outer = inner - 1;
  const int64_t *step = l.step[inner];
  const bool direct = step[A] == job.size[A] && (!job.b || step[B] == job.size[B]) && step[OUT] == job.size[OUT];
  const int64_t longest = direct ? most : most / 4;
  const int64_t cuts = (l.size[inner] + longest - 1) / longest;
  int64_t begin, end, offset[OPERANDS];
  part.range(product(l, inner) * cuts, begin, end);
  for (int64_t unit = begin; unit < end;) {
    const int64_t index = unit / cuts, first = unit % cuts * longest;
    place(l, inner, index, offset);
    Rows rows{job.a + offset[A] + first * step[A],
              job.b + offset[B] + first * step[B],
              offset[PARAM] + first * step[PARAM],
              job.out + offset[OUT] + first * step[OUT],
              {},
              1,
              std::min(longest, l.size[inner] - first)};
    if (!direct) {
      alignas(64) uint8_t row[3][most];
      gather(row[0], rows.a, step[A], job.size[A], rows.length);
      if (job.b) gather(row[1], rows.b, step[B], job.size[B], rows.length);
      uint8_t *out = rows.out;
      rows.a = row[0], rows.b = row[1], rows.out = row[2];
      job.kernel(rows, job.numbers);
      scatter(out, step[OUT], row[2], job.size[OUT], rows.length);
      ++unit;
      continue;
    }
    if (cuts == 1) { // as many rows as follow at the same distance
      rows.count = std::min(end - unit, l.size[outer] - index % l.size[outer]);
      std::copy_n(l.step[outer], int(OPERANDS), rows.step);
    }
    job.kernel(rows, job.numbers);
    unit += rows.count;
  }
}

// Tiles of two dimensions: along `across` the input is contiguous, along the innermost one the output.
inline void by_tiles(const Job &job, Part part) {
  constexpr int64_t side = 64;
  const Loops &l = job.loops;
  const int inner = l.dims - 1, across = inner - 1;
  const int64_t *step = l.step[inner], *cross = l.step[across];
  const bool few = job.kind == HZ_QUANTIZE && l.size[inner] <= 4 && cross[PARAM] == 0;
  const int64_t wide = few ? 512 : side; // along `across`
  const int64_t columns = (l.size[across] + wide - 1) / wide, bands = few ? 1 : (l.size[inner] + side - 1) / side;
  int64_t begin, end, offset[OPERANDS];
  part.range(product(l, across) * columns * bands, begin, end);
  for (int64_t unit = begin; unit < end; ++unit) {
    place(l, across, unit / (columns * bands), offset);
    const int64_t x = unit / bands % columns * wide, y = unit % bands * side;
    const int64_t width = std::min(wide, l.size[across] - x), height = few ? l.size[inner] : std::min(side, l.size[inner] - y);
    const uint8_t *a = job.a + offset[A] + x * cross[A] + y * step[A];
    uint8_t *out = job.out + offset[OUT] + x * cross[OUT] + y * step[OUT];
    const int64_t param = offset[PARAM] + x * cross[PARAM] + y * step[PARAM];
    constexpr int64_t line = 4 * side + 16; // of elements of four bytes
    alignas(64) uint8_t tile[side * line];
    if (few) {
      interleave_for(job.to, height)(a, step[A], out, cross[OUT], width, job.numbers, param, step[PARAM]);
    } else if (job.kind == HZ_QUANTIZE) {
      Rows rows{a, nullptr, param, tile, {step[A], 0, step[PARAM], side}, height, width};
      job.kernel(rows, job.numbers);
      transpose<uint8_t>(tile, side, out, cross[OUT], height, width);
    } else if (job.size[A] == 4) {
      // By way of the tile: a plane's rows often lie a power of two apart, where few of them fit into the cache at a time.
      transpose<uint32_t>(a, step[A], tile, line, height, width);
      for (int64_t i = 0; i < width; ++i) copy_bytes(out + i * cross[OUT], tile + i * line, 4 * height);
    } else {
      transpose<uint8_t>(a, step[A], tile, side, height, width);
      Rows rows{tile, nullptr, param, out, {side, 0, cross[PARAM], cross[OUT]}, width, height};
      job.kernel(rows, job.numbers);
    }
  }
}

} // namespace elements

void elementwise(int kind, const hz_elementwise &p, Slots slots, Part part) {
  using namespace elements;
  for (int64_t size : p.size)
    if (size == 0) return;
  static const float lows[] = {least<HZ_S8>, least<HZ_U8>, least<HZ_F32>}, highs[] = {largest<HZ_S8>, largest<HZ_U8>, largest<HZ_F32>};
  static const float none[HZ_CHANNELS] = {};
  const int to = p.out.ref.dtype;
  const float low = p.activation == HZ_NONE ? lows[to] : std::max(lows[to], 0.f);
  float high1 = highs[to];
  float *high = &high1;
  if (p.per_channel) {
    high = reinterpret_cast<float *>(scratch(4 * p.size[HZ_DIMS - 1]));
    std::fill_n(high, p.size[HZ_DIMS - 1], high1);
  }
  if (p.activation == HZ_RELU6)
    for (int64_t c = 0, n = p.per_channel ? p.size[HZ_DIMS - 1] : 1; c < n; ++c) high[c] = std::min(high[c], p.bound[c]);

  bool nan = false;
  Job job;
  job.kind = kind;
  job.loops = loops_of(p);
  const float *m = p.m ? p.m : none;
  job.numbers = {m, kind == HZ_ADD ? p.ratio : m, high, low, p.table, uint8_t(p.a.ref.dtype == HZ_S8 ? 128 : 0), &nan};
  job.a = at(p.a.ref, slots);
  job.b = at(p.b.ref, slots);
  job.out = at(p.out.ref, slots);
  job.size[A] = p.a.ref.dtype == HZ_F32 ? 4 : 1;
  job.size[B] = 1;
  job.size[OUT] = to == HZ_F32 ? 4 : 1;
  job.to = to;

  Loops &l = job.loops;
  const int inner = l.dims - 1;
  int across = inner;
  if (!job.b && l.step[inner][A] != job.size[A] && l.step[inner][OUT] == job.size[OUT] && l.size[inner] > 1)
    for (int d = 0; d < inner; ++d)
      if (l.step[d][A] == job.size[A]) across = d;
  const bool tiles = across != inner;
  if (tiles) l.swap(across, inner - 1);
  job.kernel = kernel_for(kind, p, l.step[tiles && kind == HZ_QUANTIZE ? inner - 1 : inner][PARAM] != 0);
  if (tiles)
    by_tiles(job, part);
  else
    by_rows(job, part);
  if (nan && p.bad) __atomic_store_n(p.bad, 1, __ATOMIC_RELAXED);
}

} // namespace
} // namespace horizon
