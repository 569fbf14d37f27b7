// What the AMX tier shares with AVX-512: a processor with tiles has VNNI.
#pragma once

#include "../tier.hpp"

namespace horizon {
void avx512_conv(const hz_conv &, Slots, Part);
void avx512_depthwise(const hz_depthwise &, Slots, Part);
} // namespace horizon
