// The tile registers: eight of 16 rows by 64 bytes. With HZ_EMULATE_AMX they are plain memory, so that the kernels written for them
// can be tested on any machine.
#pragma once

#include <cstdint>
#include <cstring>

namespace horizon {
namespace {

#ifdef HZ_EMULATE_AMX

struct Tiles {
  alignas(64) int8_t bytes[8][16][64];
};
inline Tiles &tiles() {
  static thread_local Tiles t;
  return t;
}
inline void tiles_configure() {}
inline void tiles_release() {}
template <int T> inline void tile_load(const void *p, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tiles().bytes[T][r], static_cast<const char *>(p) + r * stride, 64);
}
template <int T> inline void tile_store(void *p, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char *>(p) + r * stride, tiles().bytes[T][r], 64);
}
template <int D, int A, int B, bool SIGNED> inline void tile_multiply() {
  Tiles &t = tiles();
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      std::memcpy(&sum, &t.bytes[D][r][4 * n], 4);
      for (int k = 0; k < 64; ++k) {
        const int a = SIGNED ? t.bytes[A][r][k] : uint8_t(t.bytes[A][r][k]);
        sum = int32_t(uint32_t(sum) + uint32_t(a * t.bytes[B][k / 4][4 * n + k % 4]));
      }
      std::memcpy(&t.bytes[D][r][4 * n], &sum, 4);
    }
}

#else

inline void tiles_configure() {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = 16;
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); // "memory": or the compiler may drop the stores above
}
inline void tiles_release() { asm volatile("tilerelease" ::: "memory"); }
template <int T> inline void tile_load(const void *p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> inline void tile_store(void *p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int D, int A, int B, bool SIGNED> inline void tile_multiply() {
  if constexpr (SIGNED)
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(D), "i"(A), "i"(B));
  else
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(D), "i"(A), "i"(B));
}

#endif

} // namespace
} // namespace horizon
