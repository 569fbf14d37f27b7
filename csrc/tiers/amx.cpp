// AMX: products of tiles, 16 output pixels by 64 bytes with 64 bytes by 16 channels.
//
// A block is R tiles of pixels by N tiles of channels, R * N <= 4 accumulators. Where the inputs of a tile's pixels are evenly
// spaced (`pitch`), tiles load straight from the input; other tiles are first copied to a panel in scratch memory, once for all
// channels. While a block is multiplied, the results of the block before it are finished row by row between the products, because
// the tile unit and the vector units work side by side.

#include "../kernels/avx512_epilogue.hpp"
#include "../kernels/elementwise.hpp"
#include "../kernels/pool.hpp"
#include "../kernels/tiles.hpp"
#include "../kernels/upsample.hpp"
#include "avx512.hpp"

#include <algorithm>

namespace horizon {
namespace {

constexpr int64_t BLOCK_BYTES = 4 * 16 * 16 * 4; // of the accumulators of a block
constexpr int64_t PANEL_BYTES = 256 * 1024; // of copied pixels at a time: they stay in L2

// Results waiting to be finished while the next block's products run.
struct Pending {
  Target target;
  const int32_t *acc;
  Finish finish = nullptr;
  int row, rows;

  void some(int count) {
    if (row >= rows) return;
    const int end = std::min(row + count, rows);
    finish(target, acc, row, end);
    row = end;
  }
};

struct Block {
  const uint8_t *a[4];     // first input byte of each tile of pixels
  int64_t stride[4];       // bytes from a pixel to the next
  const int32_t *step[4];  // bytes from a step to the next
  const int8_t *weights;   // of the first tile of channels
  int64_t tile_bytes;      // from a tile of channels to the next
  const int32_t *bias;     // of the first tile of channels: a row for each pixel, or one row for all
  int64_t bias_stride;
  int steps;
  int32_t *acc;            // [16 R][16 N]
};

// Accumulator of tile row r, column n: register r * N + n. A step loads its input tiles, R registers, and takes weights one after
// the other through what is left; with one column of channels it is the other way round.
template <int R, int N, bool SIGNED> void products(const Block &b, Pending &before) {
  constexpr int KEPT = R * N, KEPT_COUNT = N == 1 ? 1 : R, PASSING = KEPT + KEPT_COUNT;
  static_assert(PASSING < 8, "eight tile registers");
  const auto each = [](auto f) { // f(integral constant) for 0..3
    f(std::integral_constant<int, 0>());
    f(std::integral_constant<int, 1>());
    f(std::integral_constant<int, 2>());
    f(std::integral_constant<int, 3>());
  };
  each([&](auto r) {
    each([&](auto n) {
      if constexpr (r < R && n < N) tile_load<r * N + n>(b.bias + 16 * n, b.bias_stride);
    });
  });
  const int share = before.finish ? (before.rows - before.row + b.steps - 1) / b.steps : 0;
  for (int k = 0; k < b.steps; ++k) {
    const int8_t *weights = b.weights + k * 1024;
    if constexpr (N == 1) {
      tile_load<KEPT>(weights, 64);
      each([&](auto r) {
        if constexpr (r < R) {
          constexpr int input = PASSING + r % (8 - PASSING);
          tile_load<input>(b.a[r] + b.step[r][k], b.stride[r]);
          tile_multiply<r, input, KEPT, SIGNED>();
        }
      });
    } else {
      each([&](auto r) {
        if constexpr (r < R) tile_load<KEPT + r>(b.a[r] + b.step[r][k], b.stride[r]);
      });
      each([&](auto n) {
        if constexpr (n < N) {
          constexpr int weight = PASSING + n % (8 - PASSING);
          tile_load<weight>(weights + n * b.tile_bytes, 64);
          each([&](auto r) {
            if constexpr (r < R) tile_multiply<r * N + n, KEPT + r, weight, SIGNED>();
          });
        }
      });
    }
    if (share) before.some(share);
  }
  each([&](auto r) {
    each([&](auto n) {
      if constexpr (r < R && n < N) tile_store<r * N + n>(b.acc + r * 256 * N + 16 * n, 64 * N);
    });
  });
}

using Products = void (*)(const Block &, Pending &);

template <bool SIGNED> Products products_of(int r, int n) {
  static constexpr Products table[4][4] = {
      {products<1, 1, SIGNED>, products<1, 2, SIGNED>, products<1, 3, SIGNED>, products<1, 4, SIGNED>},
      {products<2, 1, SIGNED>, products<2, 2, SIGNED>, nullptr, nullptr},
      {products<3, 1, SIGNED>, nullptr, nullptr, nullptr},
      {products<4, 1, SIGNED>, nullptr, nullptr, nullptr},
  };
  return table[r - 1][n - 1];
}

// Copies the inputs of a tile's pixels: [step][pixel][64 bytes].
void copy_tile(const hz_conv &c, const uint8_t *in, const int32_t *pixel, uint8_t *panel) {
  for (int p = 0; p < 16; ++p) {
    const uint8_t *from = in + pixel[p];
    uint8_t *to = panel + 64 * p;
    for (int k = 0; k < c.steps; ++k, to += 1024) _mm512_store_si512(to, _mm512_loadu_si512(from + c.step[k]));
  }
}

// More rows than tiles of pixels can be: as many pixels, by dot products in registers. Where sums are short, a tile is mostly empty,
// and its results cost more on their way through memory than its products save.
constexpr int MOST_ROWS = 4;

void conv(const hz_conv &c, Slots slots, Part part) {
  if (c.rows > MOST_ROWS) return avx512_conv(c, slots, part);
  const int tiles = (c.channels + 15) / 16;
  int n = c.block_offset ? 1 : std::min({c.columns > 0 ? c.columns : 4, 4, tiles}), r = c.rows > 0 ? c.rows : 1;
  const auto choose = c.in.dtype == HZ_S8 ? products_of<true> : products_of<false>;
  while (r > 1 && !choose(r, n)) --r;

  int64_t first = 0, last = c.tiles * c.images, column0 = 0, column1 = (tiles + n - 1) / n;
  if (c.by_channels)
    part.range(column1, column0, column1);
  else
    part.range(last, first, last);
  if (first >= last || column0 >= column1) return;

  // Tiles of pixels are taken `group` at a time; those that must be copied are copied when a group begins.
  bool copies = false;
  for (int64_t t = 0; t < c.tiles && !copies; ++t) copies = !c.pitch[t];
  const int64_t panel_bytes = int64_t(c.steps) * 1024;
  int64_t group = c.pixels_inside ? last - first : r;
  if (copies) group = std::clamp<int64_t>(PANEL_BYTES / panel_bytes, r, std::max<int64_t>(group, r));
  const int64_t step_bytes = (int64_t(c.steps) * 4 + 63) / 64 * 64;
  uint8_t *memory = scratch(3 * BLOCK_BYTES + step_bytes + (copies ? group * panel_bytes : 0));
  int32_t *acc[2] = {reinterpret_cast<int32_t *>(memory), reinterpret_cast<int32_t *>(memory + BLOCK_BYTES)};
  auto *bias_rows = reinterpret_cast<int32_t *>(memory + 2 * BLOCK_BYTES);
  auto *panel_step = reinterpret_cast<int32_t *>(memory + 3 * BLOCK_BYTES);
  uint8_t *panels = memory + 3 * BLOCK_BYTES + step_bytes;
  for (int k = 0; k < c.steps; ++k) panel_step[k] = k * 1024;

  const uint8_t *in = at(c.in, slots), *res = at(c.res, slots);
  uint8_t *out = at(c.out, slots);
  const int channel_bytes = c.out.dtype == HZ_F32 ? 4 : 1;
  Pending pending{};
  int turn = 0;
  // Loading one row sixteen times is slower than loading sixteen rows, which pay where several blocks use them.
  const bool spread = group > r;

  // Tiles [t, t + rows) of the group that begins at `start`, one block of channels.
  const auto run = [&](int64_t start, int64_t t, int rows, int64_t column) {
    const int64_t image = t / c.tiles, f = t % c.tiles * 16;
    const int tile = int(column) * n, columns = std::min(n, tiles - tile);
    const int64_t offset = c.block_offset ? c.block_offset[tile] : 0;
    Block b;
    for (int i = 0; i < rows; ++i) {
      const int64_t pitch = c.pitch[t % c.tiles + i];
      b.a[i] = pitch ? in + image * c.in_image + c.pixel[f + 16 * i] + offset : panels + (t + i - start) * panel_bytes;
      b.stride[i] = pitch ? pitch : 64;
      b.step[i] = pitch ? c.step : panel_step;
    }
    b.tile_bytes = panel_bytes;
    b.weights = c.weights + tile * b.tile_bytes;
    b.bias = spread ? bias_rows : c.epilogue.bias + 16 * tile;
    b.bias_stride = spread ? 256 : 0;
    b.steps = c.steps;
    b.acc = acc[turn];
    choose(rows, columns)(b, pending);
    pending.some(pending.rows);
    const int channel = 16 * tile;
    pending.target = {&c.epilogue, out + image * c.out_image + channel * channel_bytes,
                      res ? res + image * c.res_image + channel : nullptr, c.out_at + f, c.res_at + f, channel, c.channels};
    pending.acc = acc[turn];
    pending.finish = finish_for(columns, c.out, c.res);
    pending.row = 0;
    pending.rows = 16 * rows;
    turn ^= 1;
  };
  const auto copy = [&](int64_t start, int64_t stop, int64_t offset) {
    for (int64_t t = start; t < stop; ++t)
      if (!c.pitch[t % c.tiles])
        copy_tile(c, in + t / c.tiles * c.in_image + offset, c.pixel + t % c.tiles * 16, panels + (t - start) * panel_bytes);
  };

  for (int64_t start = first; start < last; start += group) {
    const int64_t stop = std::min(start + group, last);
    if (copies && !c.block_offset) copy(start, stop, 0);
    for (int64_t column = column0; column < column1; ++column) {
      if (copies && c.block_offset) copy(start, stop, c.block_offset[column]); // n is 1: a group of channels has an input of its own
      if (spread)
        for (int row = 0; row < 16; ++row)
          for (int i = 0; i < std::min<int>(n, tiles - int(column) * n); ++i)
            _mm512_store_si512(bias_rows + 64 * row + 16 * i, _mm512_loadu_si512(c.epilogue.bias + 16 * (column * n + i)));
      for (int64_t t = start; t < stop;) {
        int rows = int(std::min<int64_t>({r, stop - t, c.tiles - t % c.tiles})); // a block stays within an image
        while (!choose(rows, std::min<int>(n, tiles - int(column) * n))) --rows;
        run(start, t, rows, column);
        t += rows;
      }
    }
  }
  pending.some(pending.rows);
}

} // namespace

const Tier amx_tier = {conv,     avx512_depthwise, elementwise,     max_pool,
                       avg_pool, upsample,         tiles_configure, tiles_release};

} // namespace horizon
