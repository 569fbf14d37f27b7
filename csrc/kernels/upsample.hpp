// Nearest up-sampling: each output pixel is a copy of one input pixel's channels.
#pragma once

#include "lanes.hpp"
#include "places.hpp"

namespace horizon {
namespace {

void upsample(const hz_upsample &p, Slots slots, Part part) {
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

} // namespace
} // namespace horizon
