// A thread's share of a convolution, and stretches of its output pixels, with their inputs and residuals.
#pragma once

#include "../tier.hpp"

namespace horizon {
namespace {

// Tiles of 16 channels, and units of the output: a thread has a range of the one or the other.
struct Share {
  int64_t tile0 = 0, tile1, first = 0, last;
  Share(const hz_conv &c, int64_t units, Part part) : tile1((c.channels + 15) / 16), last(units) {
    if (c.by_channels)
      part.range(tile1, tile0, tile1);
    else
      part.range(last, first, last);
  }
  bool empty() const { return tile0 >= tile1 || first >= last; }
};

// Blocks of at most so many pixels, all but the last of one size: calls each(first pixel, pixels of a block, blocks) for either.
template <class Each> void in_blocks(int count, int most, const Each &each) {
  if (count == 0) return;
  const int blocks = (count + most - 1) / most, size = (count + blocks - 1) / blocks, whole = count / size;
  each(0, size, whole);
  if (whole * size < count) each(whole * size, count - whole * size, 1);
}

// Pixels of any images: their inputs, outputs and residuals.
struct Stretch {
  static constexpr int capacity = 240; // the inputs of so many pixels fit in the second-level cache
  int count;
  const uint8_t *in[capacity], *res[capacity];
  uint8_t *out[capacity];

  // Pixels [first, last), numbered through all the images.
  void fill(const hz_conv &c, Slots slots, int64_t first, int64_t last) {
    const uint8_t *const from = at(c.in, slots), *const other = at(c.res, slots);
    uint8_t *const to = at(c.out, slots);
    count = int(last - first);
    int64_t image = first / c.pixels, f = first % c.pixels;
    for (int i = 0; i < count; ++i) {
      const bool stored = c.out_at[f] >= 0;
      in[i] = from + image * c.in_image + c.pixel[f];
      out[i] = stored ? to + image * c.out_image + c.out_at[f] : nullptr;
      res[i] = other && stored ? other + image * c.res_image + c.res_at[f] : other;
      if (++f == c.pixels) {
        f = 0;
        ++image;
      }
    }
  }
};

} // namespace
} // namespace horizon
