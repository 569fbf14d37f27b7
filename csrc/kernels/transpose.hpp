// out[j][i] = in[i][j]: between channels last and channels first.
#pragma once

#include "../tier.hpp"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace horizon {
namespace {

#if defined(__SSE2__)
// 16 x 16 bytes: four rounds, each of which interleaves row i with row i + 8.
inline void transpose_block(const uint8_t *in, int64_t in_row, uint8_t *out, int64_t out_row) {
  __m128i now[16], next[16];
  for (int i = 0; i < 16; ++i) now[i] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(in + i * in_row));
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = _mm_unpacklo_epi8(now[i], now[i + 8]);
      next[2 * i + 1] = _mm_unpackhi_epi8(now[i], now[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) now[i] = next[i];
  }
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i * out_row), now[i]);
}

// 4 x 4 elements of four bytes.
inline void transpose_block(const uint32_t *in, int64_t in_row, uint32_t *out, int64_t out_row) {
  __m128 row[4];
  for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_ps(reinterpret_cast<const float *>(in + i * in_row));
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(reinterpret_cast<float *>(out + i * out_row), row[i]);
}
#endif

// `in` is [rows][columns]; bytes from a row to the next are multiples of the element's size.
template <class Element>
void transpose(const uint8_t *in, int64_t in_row, uint8_t *out, int64_t out_row, int64_t rows, int64_t columns) {
  const auto *from = reinterpret_cast<const Element *>(in);
  auto *to = reinterpret_cast<Element *>(out);
  const int64_t from_row = in_row / int64_t(sizeof(Element)), to_row = out_row / int64_t(sizeof(Element));
  constexpr int64_t side = 16 / int64_t(sizeof(Element));
  for (int64_t i = 0; i < rows; i += side) {
    for (int64_t j = 0; j < columns; j += side) {
      const int64_t high = rows - i < side ? rows - i : side, wide = columns - j < side ? columns - j : side;
#if defined(__SSE2__)
      if (high == side && wide == side) {
        transpose_block(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
        continue;
      }
#endif
      for (int64_t y = i; y < i + high; ++y)
        for (int64_t x = j; x < j + wide; ++x) to[x * to_row + y] = from[y * from_row + x];
    }
  }
}

} // namespace
} // namespace horizon
