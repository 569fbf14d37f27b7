// The pixels of a batch of images, shared between threads.
#pragma once

#include "../tier.hpp"

namespace horizon {
namespace {

struct Place {
  int64_t image;
  int32_t index[3]; // depth, row, column
};

struct Grid {
  int64_t images;
  int32_t size[3];

  int64_t places() const { return images * size[0] * size[1] * size[2]; }

  // Calls each(place, cut) for this thread's share of all places times `cuts`, in order.
  template <class Each> void visit(int64_t cuts, Part part, const Each &each) const {
    int64_t begin, end;
    part.range(places() * cuts, begin, end);
    if (begin == end) return;
    int64_t cut = begin % cuts, rest = begin / cuts;
    Place at;
    for (int d = 2; d >= 0; rest /= size[d--]) at.index[d] = int32_t(rest % size[d]);
    at.image = rest;
    for (int64_t i = begin; i < end; ++i) {
      each(at, cut);
      if (++cut < cuts) continue;
      cut = 0;
      int d = 2;
      while (d >= 0 && ++at.index[d] == size[d]) at.index[d--] = 0;
      if (d < 0) ++at.image;
    }
  }
};

} // namespace
} // namespace horizon
