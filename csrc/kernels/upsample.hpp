// Up-sampling. Nearest: each output pixel is a copy of one input pixel's channels. Linear: a weighted mean of up to four.
#pragma once

#include "lanes.hpp"
#include "places.hpp"

namespace horizon {
namespace {

void nearest(const hz_upsample &p, Slots slots, Part part) {
  const uint8_t *in = at(p.in, slots);
  uint8_t *out = at(p.out, slots);
  Grid{p.images, {p.out_size[0], p.out_size[1], p.out_size[2]}}.visit(1, part, [&](const Place &at, int64_t) {
    int64_t from = at.image * p.in_image, to = at.image * p.out_image;
    for (int d = 0; d < 3; ++d) {
      from += p.from[d][at.index[d]] * p.in_stride[d];
      to += at.index[d] * p.out_stride[d];
    }
    copy_bytes(out + to, in + from, p.bytes);
  });
}

template <int T>
void blend(const uint8_t *const in[4], const int32_t weight[4], float m, uint8_t *out, int64_t channels) {
  lanes::over(channels, [&](auto lane, int64_t i) {
    auto sum = lane.zero();
    for (int k = 0; k < 4; ++k) sum = lane.plus(sum, lane.times(lane.template ints<T>(in[k] + i), lane.whole(weight[k])));
    lane.template store<T>(out + i, lane.times(lane.real(sum), lane.set(m)));
  });
}

void linear(const hz_interpolate &p, Slots slots, Part part) {
  const uint8_t *in = at(p.in, slots);
  uint8_t *out = at(p.out, slots);
  auto *kernel = p.in.dtype == HZ_S8 ? blend<HZ_S8> : blend<HZ_U8>;
  Grid{p.images, {1, p.out_size[1], p.out_size[2]}}.visit(1, part, [&](const Place &at, int64_t) {
    const uint8_t *from[4];
    int32_t weight[4];
    const int32_t row = at.index[1], column = at.index[2];
    for (int k = 0; k < 4; ++k) {
      const int32_t y = 2 * row + k / 2, x = 2 * column + k % 2;
      from[k] = in + at.image * p.in_image + p.place[0][y] * p.in_stride[1] + p.place[1][x] * p.in_stride[2];
      weight[k] = p.weight[0][y] * p.weight[1][x];
    }
    kernel(from, weight, p.m, out + at.image * p.out_image + row * p.out_stride[1] + column * p.out_stride[2], p.channels);
  });
}

void upsample(const hz_op &op, Slots slots, Part part) {
  if (op.kind == HZ_INTERPOLATE) return linear(*static_cast<const hz_interpolate *>(op.params), slots, part);
  nearest(*static_cast<const hz_upsample *>(op.params), slots, part);
}

} // namespace
} // namespace horizon
