// Max and average pools over channels-last tensors: for each output pixel, a few channels over all of its window.
#pragma once

#include "lanes.hpp"
#include "places.hpp"

#include <algorithm>
#include <type_traits>

namespace horizon {
namespace {
namespace pools {

// The window of an output pixel.
struct Window {
  const uint8_t *in; // its first pixel
  int32_t size[3];
  const int64_t *stride;

  template <class Each> void visit(int64_t channel, const Each &each) const {
    for (int32_t z = 0; z < size[0]; ++z) {
      for (int32_t y = 0; y < size[1]; ++y) {
        const uint8_t *row = in + z * stride[0] + y * stride[1] + channel;
        for (int32_t x = 0; x < size[2]; ++x) each(row + x * stride[2]);
      }
    }
  }
  int64_t pixels() const { return int64_t(size[0]) * size[1] * size[2]; }
};

// Channels [begin, end) of one output pixel.
template <int T> void greatest(const Window &w, uint8_t *out, int64_t begin, int64_t end) {
  int64_t c = begin;
#if defined(__AVX512BW__)
  for (; c < end; c += 64) {
    const __mmask64 mask = end - c >= 64 ? ~0ull : (1ull << (end - c)) - 1;
    __m512i most = T == HZ_S8 ? _mm512_set1_epi8(-128) : _mm512_setzero_si512();
    w.visit(c, [&](const uint8_t *p) {
      const __m512i x = _mm512_maskz_loadu_epi8(mask, p);
      most = T == HZ_S8 ? _mm512_max_epi8(most, x) : _mm512_max_epu8(most, x);
    });
    _mm512_mask_storeu_epi8(out + c, mask, most);
  }
#else
#if defined(__AVX2__)
  for (; c + 32 <= end; c += 32) {
    __m256i most = T == HZ_S8 ? _mm256_set1_epi8(-128) : _mm256_setzero_si256();
    w.visit(c, [&](const uint8_t *p) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
      most = T == HZ_S8 ? _mm256_max_epi8(most, x) : _mm256_max_epu8(most, x);
    });
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + c), most);
  }
#endif
  using Byte = std::conditional_t<T == HZ_S8, int8_t, uint8_t>;
  for (; c < end; c += 16) {
    const int64_t n = std::min<int64_t>(16, end - c);
    Byte most[16];
    std::fill_n(most, 16, Byte(least<T>));
    w.visit(c, [&most, n](const uint8_t *p) {
      Byte x[16] = {};
      std::memcpy(x, p, n == 16 ? 16 : size_t(n));
      for (int i = 0; i < 16; ++i) most[i] = most[i] > x[i] ? most[i] : x[i];
    });
    std::memcpy(out + c, most, size_t(n));
  }
#endif
}

// round(float32(sum) * m), and not rounded to float32.
template <int T, int TO> void average(const Window &w, float m, uint8_t *out, int64_t begin, int64_t end) {
  if (w.pixels() > INT32_MAX / 255) { // the sum may need more than 32 bits
    const lanes::One one;
    for (int64_t c = begin; c < end; ++c) {
      int64_t sum = 0;
      w.visit(c, [&](const uint8_t *p) { sum += one.ints<T>(p); });
      one.store<TO>(out + c * size_of<TO>, one.clamp(float(sum) * m, least<TO>, largest<TO>));
    }
    return;
  }
#if defined(__AVX2__)
  lanes::over(end - begin, [&](auto lane, int64_t i) {
    auto sum = lane.zero();
    w.visit(begin + i, [&](const uint8_t *p) { sum = lane.plus(sum, lane.template ints<T>(p)); });
    const auto y = lane.times(lane.real(sum), lane.set(m));
    lane.template store<TO>(out + (begin + i) * size_of<TO>, lane.clamp(y, lane.set(least<TO>), lane.set(largest<TO>)));
  });
#else
  const lanes::One one;
  for (int64_t c = begin; c < end; c += 16) {
    const int64_t n = std::min<int64_t>(16, end - c);
    int32_t sum[16] = {};
    w.visit(c, [&](const uint8_t *p) {
      if (n == 16)
        for (int i = 0; i < 16; ++i) sum[i] += one.ints<T>(p + i);
      else
        for (int i = 0; i < n; ++i) sum[i] += one.ints<T>(p + i);
    });
    for (int i = 0; i < n; ++i)
      one.store<TO>(out + (c + i) * size_of<TO>, one.clamp(float(sum[i]) * m, least<TO>, largest<TO>));
  }
#endif
}

// Calls each(window, output, place, first channel, last): threads share the pixels, and where those are few the channels too.
template <class Each> void run(const hz_pool &p, Slots slots, Part part, const Each &each) {
  const Grid grid{p.images, {p.out_size[0], p.out_size[1], p.out_size[2]}};
  const int64_t step = grid.places() >= 4 * part.count ? p.channels : 64;
  const int64_t cuts = (p.channels + step - 1) / step;
  const uint8_t *in = at(p.in, slots);
  uint8_t *out = at(p.out, slots);
  grid.visit(cuts, part, [&](const Place &at, int64_t cut) {
    Window w{in + at.image * p.in_image, {}, p.in_stride};
    uint8_t *to = out + at.image * p.out_image;
    for (int d = 0; d < 3; ++d) {
      const int32_t start = p.start[d][at.index[d]];
      w.in += start * p.in_stride[d];
      w.size[d] = p.stop[d][at.index[d]] - start;
      to += at.index[d] * p.out_stride[d];
    }
    const int64_t place = (int64_t(at.index[0]) * p.out_size[1] + at.index[1]) * p.out_size[2] + at.index[2];
    each(w, to, place, cut * step, std::min<int64_t>(p.channels, (cut + 1) * step));
  });
}

} // namespace pools

void max_pool(const hz_pool &p, Slots slots, Part part) {
  auto *kernel = p.in.dtype == HZ_S8 ? pools::greatest<HZ_S8> : pools::greatest<HZ_U8>;
  pools::run(p, slots, part, [&](const pools::Window &w, uint8_t *out, int64_t, int64_t begin, int64_t end) {
    kernel(w, out, begin, end);
  });
}

void avg_pool(const hz_pool &p, Slots slots, Part part) {
  using Kernel = void (*)(const pools::Window &, float, uint8_t *, int64_t, int64_t);
  static const Kernel kernels[2][3] = {
      {pools::average<HZ_S8, HZ_S8>, pools::average<HZ_S8, HZ_U8>, pools::average<HZ_S8, HZ_F32>},
      {pools::average<HZ_U8, HZ_S8>, pools::average<HZ_U8, HZ_U8>, pools::average<HZ_U8, HZ_F32>},
  };
  const Kernel kernel = kernels[p.in.dtype][p.out.dtype];
  pools::run(p, slots, part, [&](const pools::Window &w, uint8_t *out, int64_t place, int64_t begin, int64_t end) {
    kernel(w, p.m[place], out, begin, end);
  });
}

} // namespace
} // namespace horizon
