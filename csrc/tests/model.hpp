// What every operation means, element by element: the naive model that the kernels are compared with.
#pragma once

#include "horizon_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace model {

using Slots = uint8_t *const *;

inline uint8_t *at(const hz_ref &ref, Slots slots) { return ref.slot < 0 ? nullptr : slots[ref.slot] + ref.offset; }

inline int integer(int dtype, const uint8_t *p) { return dtype == HZ_S8 ? int(int8_t(*p)) : int(*p); }

inline float real(const uint8_t *p) {
  float x;
  std::memcpy(&x, p, 4);
  return x;
}

inline float activate(float y, int activation, const float *bound, int64_t c) {
  if (activation != HZ_NONE) y = std::fmax(y, 0.f);
  return activation == HZ_RELU6 ? std::fmin(y, bound[c]) : y;
}

inline void store(int dtype, uint8_t *p, float y) {
  if (dtype == HZ_F32) {
    std::memcpy(p, &y, 4);
    return;
  }
  const float rounded = std::nearbyint(y);
  *p = uint8_t(int(dtype == HZ_S8 ? std::fmin(std::fmax(rounded, -128.f), 127.f) : std::fmin(std::fmax(rounded, 0.f), 255.f)));
}

// `res` is the channel's residual or null.
inline void finish(int64_t acc, const hz_epilogue &e, int64_t c, const uint8_t *res, int res_dtype, int dtype, uint8_t *out) {
  float y = float(acc) * e.m[c];
  if (res) y = std::fma(float(integer(res_dtype, res)), e.ratio[c], y);
  store(dtype, out, activate(y, e.activation, e.bound, c));
}

inline void conv(const hz_conv &p, Slots slots) {
  const int size = p.out.dtype == HZ_F32 ? 4 : 1;
  for (int64_t n = 0; n < p.images; ++n) {
    for (int64_t f = 0; f < p.pixels; ++f) {
      if (p.out_at[f] < 0) continue;
      for (int c = 0; c < p.channels; ++c) {
        const uint8_t *in = at(p.in, slots) + n * p.in_image + p.pixel[f] + (p.block_offset ? p.block_offset[c / 16] : 0);
        int64_t acc = p.epilogue.bias[c];
        for (int k = 0; k < p.steps; ++k)
          for (int b = 0; b < 64; ++b) {
            const int w = p.weights[((int64_t(c / 16) * p.steps + k) * 16 + b / 4) * 64 + c % 16 * 4 + b % 4];
            if (w) acc += w * integer(p.in.dtype, in + p.step[k] + b);
          }
        const uint8_t *res = p.res.slot < 0 ? nullptr : at(p.res, slots) + n * p.res_image + p.res_at[f] + c;
        finish(acc, p.epilogue, c, res, p.res.dtype, p.out.dtype, at(p.out, slots) + n * p.out_image + p.out_at[f] + c * size);
      }
    }
  }
}

inline void depthwise(const hz_depthwise &p, Slots slots) {
  const int size = p.out.dtype == HZ_F32 ? 4 : 1, padded = (p.channels + HZ_CHANNELS - 1) / HZ_CHANNELS * HZ_CHANNELS;
  for (int64_t n = 0; n < p.images; ++n)
    for (int y = 0; y < p.height; ++y)
      for (int x = 0; x < p.width; ++x)
        for (int c = 0; c < p.channels; ++c) {
          int64_t acc = p.epilogue.bias[c];
          for (int i = 0; i < p.kernel_y; ++i)
            for (int j = 0; j < p.kernel_x; ++j) {
              const int64_t row = y * p.stride_y + i * p.dilation_y, pixel = x * p.stride_x + j * p.dilation_x;
              const uint8_t *in = at(p.in, slots) + n * p.in_image + row * p.in_row + pixel * p.in_pixel + c;
              acc += p.weights[(i * p.kernel_x + j) * padded + c] * integer(p.in.dtype, in);
            }
          const uint8_t *res =
              p.res.slot < 0 ? nullptr : at(p.res, slots) + n * p.res_image + y * p.res_row + x * p.res_pixel + c;
          finish(acc, p.epilogue, c, res, p.res.dtype, p.out.dtype,
                 at(p.out, slots) + n * p.out_image + y * p.out_row + x * p.out_pixel + c * size);
        }
}

inline void zero(const hz_zero &p, Slots slots) {
  for (int64_t n = 0; n < p.images; ++n)
    for (int64_t r = 0; r < p.ranges; ++r)
      for (int64_t i = 0; i < p.range[2 * r + 1]; ++i) at(p.out, slots)[n * p.image + p.range[2 * r] + i] = 0;
}

inline void element(int kind, const hz_elementwise &p, const uint8_t *a, const uint8_t *b, uint8_t *out, int64_t c) {
  const int from = p.a.ref.dtype, to = p.out.ref.dtype;
  switch (kind) {
  case HZ_QUANTIZE:
    if (p.bad && std::isnan(real(a))) *p.bad = 1;
    return store(to, out, real(a) / p.m[c]);
  case HZ_COPY: std::memcpy(out, a, to == HZ_F32 ? 4 : 1); return;
  case HZ_TABLE: *out = p.table[integer(from, a) + (from == HZ_S8 ? 128 : 0)]; return;
  case HZ_ADD: {
    const float y = std::fma(float(integer(p.b.ref.dtype, b)), p.ratio[c], float(integer(from, a)) * p.m[c]);
    return store(to, out, activate(y, p.activation, p.bound, c));
  }
  case HZ_MUL: {
    const float y = float(integer(from, a) * integer(p.b.ref.dtype, b)) * p.m[c];
    return store(to, out, activate(y, p.activation, p.bound, c));
  }
  default: return store(to, out, float(integer(from, a)) * p.m[c]); // HZ_DEQUANTIZE, HZ_RESCALE
  }
}

inline void elementwise(int kind, const hz_elementwise &p, Slots slots) {
  int64_t i[HZ_DIMS] = {};
  auto offset = [&](const hz_view &view) {
    int64_t sum = 0;
    for (int d = 0; d < HZ_DIMS; ++d) sum += i[d] * view.stride[d];
    return sum;
  };
  for (;;) {
    const uint8_t *b = p.b.ref.slot < 0 ? nullptr : at(p.b.ref, slots) + offset(p.b);
    element(kind, p, at(p.a.ref, slots) + offset(p.a), b, at(p.out.ref, slots) + offset(p.out), p.per_channel ? i[HZ_DIMS - 1] : 0);
    int d = HZ_DIMS - 1;
    while (d >= 0 && ++i[d] == p.size[d]) i[d--] = 0;
    if (d < 0) return;
  }
}

inline void pool(int kind, const hz_pool &p, Slots slots) {
  int64_t place = 0;
  for (int64_t n = 0; n < p.images; ++n, place = 0)
    for (int z = 0; z < p.out_size[0]; ++z)
      for (int y = 0; y < p.out_size[1]; ++y)
        for (int x = 0; x < p.out_size[2]; ++x, ++place)
          for (int c = 0; c < p.channels; ++c) {
            int64_t sum = 0;
            int most = -128;
            for (int k = p.start[0][z]; k < p.stop[0][z]; ++k)
              for (int j = p.start[1][y]; j < p.stop[1][y]; ++j)
                for (int i = p.start[2][x]; i < p.stop[2][x]; ++i) {
                  const int q = integer(p.in.dtype, at(p.in, slots) + n * p.in_image + k * p.in_stride[0] + j * p.in_stride[1] +
                                                        i * p.in_stride[2] + c);
                  sum += q;
                  most = std::max(most, q);
                }
            uint8_t *out = at(p.out, slots) + n * p.out_image + z * p.out_stride[0] + y * p.out_stride[1] + x * p.out_stride[2];
            if (kind == HZ_MAX_POOL)
              out[c] = uint8_t(most);
            else
              store(p.out.dtype, out + c * (p.out.dtype == HZ_F32 ? 4 : 1), float(sum) * p.m[place]);
          }
}

inline void upsample(const hz_upsample &p, Slots slots) {
  for (int64_t n = 0; n < p.images; ++n)
    for (int z = 0; z < p.out_size[0]; ++z)
      for (int y = 0; y < p.out_size[1]; ++y)
        for (int x = 0; x < p.out_size[2]; ++x) {
          const uint8_t *in = at(p.in, slots) + n * p.in_image + p.from[0][z] * p.in_stride[0] + p.from[1][y] * p.in_stride[1] +
                              p.from[2][x] * p.in_stride[2];
          uint8_t *out = at(p.out, slots) + n * p.out_image + z * p.out_stride[0] + y * p.out_stride[1] + x * p.out_stride[2];
          for (int b = 0; b < p.bytes; ++b) out[b] = in[b];
        }
}

inline void interpolate(const hz_interpolate &p, Slots slots) {
  for (int64_t n = 0; n < p.images; ++n)
    for (int y = 0; y < p.out_size[1]; ++y)
      for (int x = 0; x < p.out_size[2]; ++x)
        for (int c = 0; c < p.channels; ++c) {
          int32_t sum = 0;
          for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) {
              const uint8_t *q = at(p.in, slots) + n * p.in_image + p.place[0][2 * y + i] * p.in_stride[1] +
                                 p.place[1][2 * x + j] * p.in_stride[2] + c;
              sum += (p.in.dtype == HZ_S8 ? int8_t(*q) : *q) * p.weight[0][2 * y + i] * p.weight[1][2 * x + j];
            }
          uint8_t *out = at(p.out, slots) + n * p.out_image + y * p.out_stride[1] + x * p.out_stride[2] + c;
          *out = uint8_t(int32_t(std::nearbyint(float(sum) * p.m)));
        }
}

inline void run(const hz_op &op, Slots slots) {
  switch (op.kind) {
  case HZ_CONV: return conv(*static_cast<const hz_conv *>(op.params), slots);
  case HZ_DEPTHWISE: return depthwise(*static_cast<const hz_depthwise *>(op.params), slots);
  case HZ_ZERO: return zero(*static_cast<const hz_zero *>(op.params), slots);
  case HZ_MAX_POOL:
  case HZ_AVG_POOL: return pool(op.kind, *static_cast<const hz_pool *>(op.params), slots);
  case HZ_INTERPOLATE: return interpolate(*static_cast<const hz_interpolate *>(op.params), slots);
  case HZ_UPSAMPLE: return upsample(*static_cast<const hz_upsample *>(op.params), slots);
  default: return elementwise(op.kind, *static_cast<const hz_elementwise *>(op.params), slots);
  }
}

} // namespace model
