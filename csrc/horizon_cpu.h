// Kernels that run a static int8 program on the CPU: the plain C interface.
//
// A program is a list of operations on memory that the caller owns. The library allocates nothing but scratch memory per thread
// and keeps no state between calls, so that one program may run in many threads at a time, each with an arena of its own.
//
// The arithmetic of every operation is exactly that of docs/numerics.md, on every instruction set:
//     y = float32(acc) * m;   y = fma(float32(r), ratio, y);   activation;   y_q = clamp(round_half_even(y), lo, hi)
#ifndef HORIZON_CPU_H
#define HORIZON_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HZ_ABI 3

// Memory a program works on: slot 0 is the arena, the others are the caller's tensors. The arena, and only it, can be read for
// HZ_SLACK bytes past its end; what lies there is never part of a result.
#define HZ_SLACK 4096
// Vectors over channels (m, bias, ...) are padded with zeros to a multiple of this many channels.
#define HZ_CHANNELS 64

enum hz_dtype { HZ_S8 = 0, HZ_U8 = 1, HZ_F32 = 2 };
enum hz_activation { HZ_NONE = 0, HZ_RELU = 1, HZ_RELU6 = 2 };
enum hz_isa { HZ_PORTABLE = 0, HZ_AVX2 = 1, HZ_AVX512_VNNI = 2, HZ_AMX = 3 };

enum hz_kind {
  HZ_CONV = 0,       // hz_conv
  HZ_DEPTHWISE = 1,  // hz_depthwise
  HZ_ZERO = 2,       // hz_zero
  HZ_QUANTIZE = 3,   // hz_elementwise: float32 -> 8 bits
  HZ_DEQUANTIZE = 4, // hz_elementwise: 8 bits -> float32
  HZ_COPY = 5,       // hz_elementwise: bytes (or float32) unchanged
  HZ_RESCALE = 6,    // hz_elementwise: round(float32(a) * m), one operand of a cat
  HZ_TABLE = 7,      // hz_elementwise: table[a - lo]
  HZ_ADD = 8,        // hz_elementwise: fma(float32(b), ratio, float32(a) * m), activation
  HZ_MUL = 9,        // hz_elementwise: float32(a * b) * m, activation
  HZ_MAX_POOL = 10,  // hz_pool
  HZ_AVG_POOL = 11,  // hz_pool
  HZ_UPSAMPLE = 12,  // hz_upsample: nearest
  HZ_INTERPOLATE = 13, // hz_interpolate: linear, bilinear
  HZ_BANDS = 14,     // hz_bands
};

typedef struct {
  int32_t slot;   // -1: absent
  int32_t dtype;  // hz_dtype
  int64_t offset; // bytes from the slot's start to the first element
} hz_ref;

// A tensor of up to six dimensions, the last of which is channels; strides in bytes. A size of 1 with stride 0 is a dimension not used.
#define HZ_DIMS 6
typedef struct {
  hz_ref ref;
  int64_t stride[HZ_DIMS];
} hz_view;

// What happens between an accumulator and the output. Vectors have one entry per output channel, padded (HZ_CHANNELS).
typedef struct {
  const int32_t *bias;
  const float *m;
  const float *ratio;  // of the residual; NULL without one
  const float *bound;  // 6 / s_y for HZ_RELU6, used where the output is float32
  const uint8_t *hi;   // the largest output as a byte of the output's dtype: 255 or 127, or clamp(round(bound)) for HZ_RELU6
  int32_t activation;
  int32_t clamp;       // 1: float32(acc) * m may leave int32, so y is clamped before it is rounded
} hz_epilogue;

// A convolution over the last two dimensions with stride, dilation and groups 1 and a square kernel, of 3 or 2: output pixel (y, x) reads
// rows y ... y + kernel - 1 of the input and as many columns. The sums, times 4, fit in int32, whatever the input and the weights are.
typedef struct {
  int64_t images, in_image, out_image, res_image;
  int64_t in_row, out_row, res_row;       // bytes from a row to the next
  int64_t in_pixel, out_pixel, res_pixel; // bytes from a pixel to the next
  int32_t height, width;                  // of the output
  int32_t channels;                       // of the input; a multiple of 4 where a step has bytes of two taps
  int32_t kernel;
} hz_plane;

// What hz_conv.rows is for other algorithms, on AVX2: Winograd's, where there is a plane; all products in 16 bits, where block_offset is NULL.
#define HZ_WINOGRAD 32
#define HZ_WORDS 33

// A fused group: convolution of any dimensions, stride, dilation, groups, one phase of a transposed convolution, or Linear.
//
// The input lies channels-last with its padding in memory (zeros), so that output pixel f reads the 64 bytes at
//     in + image * in_image + pixel[f] + block_offset[t] + step[k]
// for each k, and tile t of 16 output channels multiplies them with weights[t][k]. Steps whose bytes go past a tap's channels
// read whatever comes next; their weights are zero there. pixel, out and res tables have `tiles * 16` entries; those past `pixels`
// repeat the last one's input with out = -1.
typedef struct {
  hz_ref in, out, res;
  int64_t images, in_image, out_image, res_image; // bytes from an image to the next
  int64_t pixels;          // output pixels of an image (those of a padding column included, where out is -1)
  int64_t tiles;           // ceil(pixels / 16)
  const int32_t *pixel;    // bytes; input of output pixel f
  const int32_t *out_at;   // bytes; where its channels go, -1: nowhere
  const int32_t *res_at;   // bytes; its residual
  const int32_t *pitch;    // [tiles]: bytes between the inputs of a tile's pixels where that is one number, else 0
  int32_t steps;           // number of 64-byte steps along the sum
  int32_t channels;        // output channels
  const int32_t *step;     // [steps] bytes
  const uint8_t *used;     // [steps]: how many groups of 4 bytes of a step are not all padding, 1..16
  const int32_t *block_offset; // [ceil(channels / 16)] bytes, or NULL for all 0: where a tile of output channels finds its group's input
  const int8_t *weights;   // [ceil(channels / 16)][steps][16 groups of 4 bytes][16 output channels][4], 64-byte aligned
  const int32_t *weight_sum; // [channels padded] sum of a channel's weights
  hz_epilogue epilogue;
  const hz_plane *plane;   // the same once more, where it is one; its pixels are all those of the tables. Else NULL
  // How to do it; every choice gives the same result.
  int32_t rows;            // pixels per block; AMX: up to 4 these are tiles of 16 pixels; HZ_WINOGRAD, HZ_WORDS; 0: default
  int32_t columns;         // tiles of 16 channels per block, 1..4; 0: default
  int32_t by_channels;     // 1: threads share the output channels, 0: the pixels
  int32_t pixels_inside;   // 1: for each block of channels, all pixels; 0: for each few blocks of pixels, all channels
} hz_conv;

// Depthwise: output channel c reads input channel c. Output pixel (y, x) reads rows y * stride_y + i * dilation_y of the padded input.
typedef struct {
  hz_ref in, out, res;
  int64_t images, in_image, out_image, res_image;
  int64_t in_row, out_row, res_row;       // bytes from a row to the next
  int64_t in_pixel, out_pixel, res_pixel; // bytes from a pixel to the next
  int32_t height, width;                  // of the output
  int32_t channels;
  int32_t kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x;
  const int8_t *weights;      // [kernel_y][kernel_x][channels padded]
  const int32_t *weight_sum;  // [channels padded]
  hz_epilogue epilogue;
} hz_depthwise;

// Fills ranges of the arena with zeros: the padding around a value.
typedef struct {
  hz_ref out;
  int64_t images, image;   // bytes from an image to the next
  int64_t ranges;
  const int64_t *range;    // [ranges][2]: bytes from out, length
} hz_zero;

// Element by element over size[0..5]; a stride of 0 broadcasts.
typedef struct {
  hz_view a, b, out;       // b: HZ_ADD and HZ_MUL only
  int64_t size[HZ_DIMS];
  const float *m;          // the scale for HZ_QUANTIZE and HZ_DEQUANTIZE, the multiplier else
  const float *ratio;      // HZ_ADD
  const float *bound;      // HZ_RELU6
  int32_t per_channel;     // 1: m, ratio and bound have an entry per index of the last dimension, else one
  int32_t activation;
  const uint8_t *table;    // HZ_TABLE: 256 bytes
  int32_t *bad;            // HZ_QUANTIZE: set to 1 if the input holds NaN; NULL: not looked for
} hz_elementwise;

// Pools over windows [start, stop) of each of three spatial dimensions: depth, height, width.
typedef struct {
  hz_ref in, out;
  int64_t images, in_image, out_image;
  int64_t in_stride[3], out_stride[3];    // bytes; depth, row, pixel
  int32_t out_size[3];
  int32_t channels;
  const int32_t *start[3], *stop[3];      // [out_size]: windows within the input
  const float *m;                         // HZ_AVG_POOL: one per output place [depth][height][width]
} hz_pool;

// out[d][y][x] = in[from[0][d]][from[1][y]][from[2][x]], all channels.
typedef struct {
  hz_ref in, out;
  int64_t images, in_image, out_image;
  int64_t in_stride[3], out_stride[3];
  int32_t out_size[3];
  int32_t bytes;                          // of a pixel's channels
  const int32_t *from[3];
} hz_upsample;

// out[0][y][x] = round(float32(sum of in[0][place[0][y][i]][place[1][x][j]] * weight[0][y][i] * weight[1][x][j] over i and j) * m), all
// channels. The weights of an output are not negative and add up to at most 2^22, and to 1 / m at most.
typedef struct {
  hz_ref in, out;
  int64_t images, in_image, out_image;
  int64_t in_stride[3], out_stride[3];
  int32_t out_size[3];                    // the first is 1
  int32_t channels;
  const int32_t *place[2], *weight[2];    // rows and columns: [out_size][2]
  float m;
} hz_interpolate;

typedef struct {
  int32_t kind;     // hz_kind
  int32_t barrier;  // 1: all threads finish before the next operation begins
  const void *params;
} hz_op;

// A chain of operations, depth first: a band of the last one's rows after the other goes through the whole chain, so that what lies
// between two of its operations stays in a cache. Threads share the bands, each takes neighbouring ones, and works in its own memory
// (hz_program.own_bytes). A thread's first band begins afresh; where `next_count` is not 0, a band that follows goes on from what
// the one before it has left.
typedef struct {
  const hz_op *fresh, *next; // their barriers are ignored; no HZ_BANDS
  int32_t fresh_count, next_count;
} hz_band;
typedef struct {
  int64_t count;
  const hz_band *bands;
} hz_bands;

// The operations run `iterations` times, on slots that advance by slot_step bytes each time (slot 0 stays). The last slot, where
// own_bytes is not 0, is memory of the threads' own: so many bytes for each of them.
typedef struct {
  const hz_op *ops;
  int64_t count;
  int64_t iterations;
  const int64_t *slot_step; // [slots]
  int32_t slots;
  int32_t apart;            // 1: each thread runs whole iterations in an arena of its own, 0: threads share each operation
  int64_t arena_bytes;      // apart: bytes from a thread's arena to the next
  int64_t own_bytes;
} hz_program;

int hz_abi(void);
int hz_best_isa(void);               // what this machine has, capped by HORIZON_MAX_CPU_ISA=amx|avx512_vnni|avx2|portable
const char *hz_isa_name(int isa);
int hz_has_openmp(void);

// 0, or a negative number: an instruction set this machine or build does not have (-1), an operation that does not exist (-2).
int hz_run(const hz_program *program, void *const *slots, int threads, int isa);
// The same with threads sharing each operation, and the seconds that each took: what it costs where it stands, with the caches as the
// operations before it leave them.
int hz_profile(const hz_program *program, void *const *slots, int threads, int isa, double *seconds);
// Seconds of each of `repeats` runs of one operation, on what the slots hold.
int hz_time(const hz_op *op, void *const *slots, int threads, int isa, int repeats, double *seconds);

#ifdef __cplusplus
}
#endif
#endif
