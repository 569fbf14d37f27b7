// What an instruction set offers: one table of kernels, filled by each file in tiers/.
#pragma once

#include "horizon_cpu.h"

namespace horizon {

// The share of an operation's work that one thread does.
struct Part {
  int index, count;
  // The part of n units that is this thread's: [begin, end).
  void range(int64_t n, int64_t &begin, int64_t &end) const {
    begin = n * index / count;
    end = n * (index + 1) / count;
  }
};

using Slots = uint8_t *const *;

inline uint8_t *at(const hz_ref &ref, Slots slots) { return ref.slot < 0 ? nullptr : slots[ref.slot] + ref.offset; }

struct Tier {
  void (*conv)(const hz_conv &, Slots, Part);
  void (*depthwise)(const hz_depthwise &, Slots, Part);
  void (*elementwise)(int kind, const hz_elementwise &, Slots, Part);
  void (*max_pool)(const hz_pool &, Slots, Part);
  void (*avg_pool)(const hz_pool &, Slots, Part);
  void (*upsample)(const hz_op &, Slots, Part); // nearest or linear
  void (*begin)(); // before a thread's first operation and after its last; may be null
  void (*end)();
};

extern const Tier portable_tier, avx2_tier, avx512_tier, amx_tier;

// Memory of a thread that lives until the next call in the same thread; 64-byte aligned.
uint8_t *scratch(int64_t bytes);

} // namespace horizon
