// Plain C++ for any architecture. Loops over the 16 output channels of a tile are what the compiler vectorizes.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../kernels/elementwise.hpp"
#include "../kernels/lanes.hpp"
#include "../kernels/pool.hpp"
#include "../kernels/upsample.hpp"
#include "../tier.hpp"

namespace horizon {
namespace {

constexpr int tile = 16; // output channels

// Accumulators wrap on their way, like those of every other tier; what they end with is in range.
inline int32_t plus(int32_t sum, int32_t product) { return int32_t(uint32_t(sum) + uint32_t(product)); }

struct Output {
  const hz_epilogue &epilogue;
  int dtype, res_dtype;

  // Channels [first, first + count) of a pixel, count <= 16; out and res point to the pixel's first channel.
  void finish(const int32_t *acc, int first, int count, uint8_t *out, const uint8_t *res) const {
    const hz_epilogue &e = epilogue;
    float y[tile];
    for (int c = 0; c < tile; ++c) y[c] = float(acc[c]) * e.m[first + c];
    if (res) {
      for (int c = 0; c < count; ++c) {
        const uint8_t r = res[first + c];
        y[c] = std::fma(float(res_dtype == HZ_S8 ? int8_t(r) : int(r)), e.ratio[first + c], y[c]);
      }
    }
    if (dtype == HZ_F32) {
      if (e.activation != HZ_NONE)
        for (int c = 0; c < tile; ++c) y[c] = y[c] > 0 ? y[c] : 0;
      if (e.activation == HZ_RELU6)
        for (int c = 0; c < tile; ++c) y[c] = y[c] < e.bound[first + c] ? y[c] : e.bound[first + c];
      std::memcpy(out + 4 * first, y, size_t(4 * count));
      return;
    }
    const bool is_signed = dtype == HZ_S8;
    const float lo = is_signed && e.activation == HZ_NONE ? -128.f : 0.f;
    uint8_t q[tile];
    for (int c = 0; c < tile; ++c) {
      const uint8_t byte = e.hi[first + c];
      const float hi = is_signed ? float(int8_t(byte)) : float(byte);
      float z = y[c] > lo ? y[c] : lo;
      z = z < hi ? z : hi;
      q[c] = uint8_t(lanes::One().round(z));
    }
    std::memcpy(out + first, q, size_t(count));
  }
};

Output output_of(const hz_epilogue &e, const hz_ref &out, const hz_ref &res) { return {e, out.dtype, res.dtype}; }

// ---- convolution

// The weights of 16 channels as [byte of the sum][16 channels], and where each group of four bytes finds its input.
struct Weights {
  int64_t groups;
  int16_t *values;
  int32_t *place; // [groups] bytes
};

void arrange(const hz_conv &c, int64_t index, const Weights &w) {
  const int32_t offset = c.block_offset ? c.block_offset[index] : 0;
  const int8_t *from = c.weights + index * c.steps * 64 * tile;
  int16_t *to = w.values;
  int32_t *place = w.place;
  for (int k = 0; k < c.steps; ++k, from += 64 * tile)
    for (int g = 0; g < c.used[k]; ++g) {
      *place++ = offset + c.step[k] + 4 * g;
      for (int byte = 0; byte < 4; ++byte, to += tile)
        for (int channel = 0; channel < tile; ++channel) to[channel] = from[(g * tile + channel) * 4 + byte];
    }
}

// T: int8_t or uint8_t, the input's type; P: pixels. A function of its own, or compilers keep its accumulators in memory.
template <class T, int P>
__attribute__((noinline)) void sums(const Weights &w, const int32_t *bias, const uint8_t *const *in, int32_t (*result)[tile]) {
  int32_t acc[P][tile];
  for (int p = 0; p < P; ++p) std::memcpy(acc[p], bias, sizeof acc[p]);
  const int16_t *value = w.values;
  const int32_t *const place = w.place;
  for (int64_t g = 0, groups = w.groups; g < groups; ++g)
    for (int byte = 0; byte < 4; ++byte, value += tile)
      for (int p = 0; p < P; ++p) {
        const int16_t x = T(in[p][place[g] + byte]);
        for (int c = 0; c < tile; ++c) acc[p][c] = plus(acc[p][c], int32_t(x) * int32_t(value[c]));
      }
  std::memcpy(result, acc, sizeof acc);
}

template <class T> void convolve(const hz_conv &c, Slots slots, Part part) {
  int64_t tile0 = 0, tile1 = (c.channels + tile - 1) / tile, first = 0, last = c.images * c.pixels;
  if (c.by_channels)
    part.range(tile1, tile0, tile1);
  else
    part.range(last, first, last);
  if (tile0 >= tile1 || first >= last) return;

  Weights w{0, nullptr, nullptr};
  for (int k = 0; k < c.steps; ++k) w.groups += c.used[k];
  uint8_t *const memory = scratch(w.groups * (4 * tile * 2 + 4));
  w.values = reinterpret_cast<int16_t *>(memory);
  w.place = reinterpret_cast<int32_t *>(memory + w.groups * (4 * tile * 2));

  const uint8_t *const in = at(c.in, slots), *const res = at(c.res, slots);
  uint8_t *const out = at(c.out, slots);
  const Output output = output_of(c.epilogue, c.out, c.res);
  constexpr int at_a_time = 2; // eight accumulators of four channels: half the registers of most machines
  for (int64_t index = tile0; index < tile1; ++index) {
    arrange(c, index, w);
    const int channel = int(index) * tile, count = std::min(tile, c.channels - channel);
    const int32_t *bias = c.epilogue.bias + channel;
    for (int64_t f = first; f < last; f += at_a_time) {
      const int n = int(std::min<int64_t>(at_a_time, last - f));
      const uint8_t *pixel[at_a_time];
      int32_t acc[at_a_time][tile];
      for (int p = 0; p < n; ++p) pixel[p] = in + (f + p) / c.pixels * c.in_image + c.pixel[(f + p) % c.pixels];
      if (n == at_a_time)
        sums<T, at_a_time>(w, bias, pixel, acc);
      else
        for (int p = 0; p < n; ++p) sums<T, 1>(w, bias, pixel + p, acc + p);
      for (int p = 0; p < n; ++p) {
        const int64_t image = (f + p) / c.pixels, i = (f + p) % c.pixels;
        if (c.out_at[i] < 0) continue;
        output.finish(acc[p], channel, count, out + image * c.out_image + c.out_at[i],
                      res ? res + image * c.res_image + c.res_at[i] : nullptr);
      }
    }
  }
}

void conv(const hz_conv &c, Slots slots, Part part) {
  (c.in.dtype == HZ_S8 ? convolve<int8_t> : convolve<uint8_t>)(c, slots, part);
}

// ---- depthwise

template <class T> void depthwise_rows(const hz_depthwise &d, Slots slots, Part part) {
  int64_t first, last;
  part.range(d.images * d.height, first, last);
  const uint8_t *const in = at(d.in, slots), *const res = at(d.res, slots);
  uint8_t *const out = at(d.out, slots);
  const Output output = output_of(d.epilogue, d.out, d.res);
  const int64_t padded = (d.channels + HZ_CHANNELS - 1) / HZ_CHANNELS * HZ_CHANNELS;
  for (int64_t row = first; row < last; ++row) {
    const int64_t image = row / d.height, y = row % d.height;
    const uint8_t *from = in + image * d.in_image + y * d.stride_y * d.in_row;
    const uint8_t *other = res ? res + image * d.res_image + y * d.res_row : nullptr;
    uint8_t *to = out + image * d.out_image + y * d.out_row;
    for (int x = 0; x < d.width; ++x, from += d.stride_x * d.in_pixel, to += d.out_pixel) {
      for (int channel = 0; channel < d.channels; channel += tile) {
        int32_t acc[tile];
        std::memcpy(acc, d.epilogue.bias + channel, sizeof acc);
        const int8_t *weight = d.weights + channel;
        for (int i = 0; i < d.kernel_y; ++i)
          for (int j = 0; j < d.kernel_x; ++j, weight += padded) {
            const uint8_t *tap = from + i * d.dilation_y * d.in_row + j * d.dilation_x * d.in_pixel + channel;
            for (int c = 0; c < tile; ++c) acc[c] = plus(acc[c], int32_t(int16_t(T(tap[c]))) * int32_t(int16_t(weight[c])));
          }
        output.finish(acc, channel, std::min(tile, d.channels - channel), to, other);
      }
      if (other) other += d.res_pixel;
    }
  }
}

void depthwise(const hz_depthwise &d, Slots slots, Part part) {
  (d.in.dtype == HZ_S8 ? depthwise_rows<int8_t> : depthwise_rows<uint8_t>)(d, slots, part);
}

} // namespace

const Tier portable_tier = {conv, depthwise, elementwise, max_pool, avg_pool, upsample, nullptr, nullptr};

} // namespace horizon
