// Operations element by element: quantize, dequantize, rescale, add, mul, tables and copies, between any two layouts.
//
// Dimensions are merged as far as strides allow, and the innermost is the one along which the output is contiguous. If the input is
// contiguous along another dimension, the two are transposed a tile at a time, on the side that has 8 bits.
#pragma once

#include "rows.hpp"
#include "transpose.hpp"

#include <algorithm>

namespace horizon {
namespace {
namespace elements {

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
