// Random programs: operations with their tables and tensors, chained through an arena.
#pragma once

#include "horizon_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <vector>

enum { ARENA, INPUT, OUTPUT, SLOTS };

// Bytes between the tensors of a slot. Kernels may read past a tensor what a neighbour writes meanwhile, and multiply it with zero:
// no fault, but one that ThreadSanitizer reports.
#if defined(__SANITIZE_THREAD__)
constexpr int64_t gap = 512;
#else
constexpr int64_t gap = 0;
#endif

inline int64_t align(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

class Random {
public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t between(int64_t low, int64_t high) { return low + int64_t(engine_() % uint64_t(high - low + 1)); }
  bool chance(int percent) { return between(1, 100) <= percent; }
  float real(float low, float high) { return low + (high - low) * float(engine_() >> 40) * 0x1p-24f; }
  uint8_t byte() { return uint8_t(engine_() >> 32); }
  template <class T> T any_of(std::initializer_list<T> of) { return of.begin()[between(0, int64_t(of.size()) - 1)]; }
  std::mt19937_64 &engine() { return engine_; }

private:
  std::mt19937_64 engine_;
};

// A tensor of the program: [images][depth][height][width][channels] with strides in bytes.
struct Value {
  hz_ref ref;
  int64_t size[5], stride[5];
  int64_t bytes; // from the first element to the end of the last
  bool channels_last() const { return stride[4] == (ref.dtype == HZ_F32 ? 4 : 1); }
};

class Program {
public:
  Program(uint64_t seed, bool alone) : random(seed) {
    iterations = alone || random.chance(50) ? 1 : random.between(2, 5);
    apart = !alone && random.chance(40);
    values.push_back(new_value(INPUT, random.any_of({HZ_S8, HZ_U8, HZ_F32}), random_size()));
  }

  void add_op(int kind) {
    const size_t before = ops.size();
    switch (kind) {
    case HZ_CONV: random.chance(60) ? conv() : plane(); break;
    case HZ_DEPTHWISE: depthwise(); break;
    case HZ_ZERO: zero(); break;
    case HZ_MAX_POOL:
    case HZ_AVG_POOL: pool(kind); break;
    case HZ_UPSAMPLE: upsample(); break;
    case HZ_INTERPOLATE: interpolate(); break;
    default: elementwise(kind);
    }
    if (ops.size() > before && random.chance(50)) ops.back().barrier = wait();
  }

  hz_program program() const {
    hz_program p{};
    p.ops = ops.data();
    p.count = int64_t(ops.size());
    p.iterations = iterations;
    p.slot_step = steps_;
    p.slots = SLOTS;
    p.apart = apart;
    p.arena_bytes = arena_bytes();
    for (int s = INPUT; s < SLOTS; ++s) steps_[s] = align(used_[s], 64);
    return p;
  }
  int64_t arena_bytes() const { return align(used_[ARENA] + HZ_SLACK, 64); }
  // Of a slot, for `threads` arenas and all iterations, without slack.
  int64_t bytes(int slot, int threads) const {
    if (slot == ARENA) return apart ? threads * arena_bytes() : used_[ARENA];
    return iterations * align(used_[slot], 64);
  }

  // Contents to begin with: bytes at random, and float32 near halves of some scale, large ones, infinities and subnormals.
  std::vector<uint8_t> contents(int slot, int threads, uint64_t seed) const {
    Random random(seed + uint64_t(slot));
    std::vector<uint8_t> data(size_t(bytes(slot, threads)));
    const bool extreme = random.chance(20);
    const uint64_t flip = random.any_of<uint64_t>({0, 0x8080808080808080});
    for (size_t i = 0; i < data.size(); i += 8) {
      uint64_t bytes = random.engine()();
      if (extreme) bytes = (bytes & 0x0101010101010101) * 255 ^ flip; // each the least or the largest of one dtype
      std::memcpy(&data[i], &bytes, std::min<size_t>(8, data.size() - i));
    }
    if (slot == ARENA && apart) // every thread's is the same: which of them runs an iteration must not matter
      for (int t = 1; t < threads; ++t) std::copy_n(data.begin(), arena_bytes(), data.begin() + t * arena_bytes());
    for (int64_t i = 0; slot == INPUT && i < iterations; ++i)
      for (const Value &v : values)
        if (v.ref.slot == slot && v.ref.dtype == HZ_F32)
          for (int64_t at = v.ref.offset; at + 4 <= v.ref.offset + v.bytes; at += 4) {
            const float x = awkward(random);
            std::memcpy(&data[size_t(i * align(used_[slot], 64) + at)], &x, 4);
          }
    return data;
  }

  Random random;
  std::vector<hz_op> ops;
  std::vector<Value> values;
  int64_t iterations;
  bool apart;
  int32_t bad = 0;

private:
  using Size = std::vector<int64_t>;

  static float awkward(Random &random) {
    const float half = float(random.between(-300, 300)) + 0.5f, s = random.any_of({0.1f, 1.f, 0.0173f, 3.f});
    switch (random.between(0, 9)) {
    case 0: return half * s;
    case 1: return std::nextafter(half * s, INFINITY);
    case 2: return std::nextafter(half * s, -INFINITY);
    case 3: return random.any_of({INFINITY, -INFINITY, 1e38f, -1e38f, 1e-40f, 0.f, -0.f});
    default: return random.real(-20, 20) * s;
    }
  }

  template <class T> T *keep(std::vector<T> v) {
    auto owner = std::make_shared<std::vector<T>>(std::move(v));
    kept_.push_back(owner);
    return owner->data();
  }

  // Weights, aligned and not a byte longer than they are.
  int8_t *keep_aligned(const std::vector<int8_t> &v) {
    auto *p = static_cast<int8_t *>(::operator new(std::max<size_t>(v.size(), 1), std::align_val_t(64)));
    std::copy(v.begin(), v.end(), p);
    kept_.push_back(std::shared_ptr<int8_t>(p, [](int8_t *q) { ::operator delete(q, std::align_val_t(64)); }));
    return p;
  }

  template <class T> void push(int kind, const T &params) {
    auto owner = std::make_shared<T>(params);
    kept_.push_back(owner);
    ops.push_back({kind, 0, owner.get()});
  }

  int wait() {
    pending_ = values.size();
    return 1;
  }

  Size random_size() {
    const int64_t channels = random.chance(60) ? random.any_of<int64_t>({1, 2, 3, 4, 8, 16, 24, 32, 64}) : random.between(1, 140);
    return {random.between(1, 3), random.chance(80) ? 1 : random.between(1, 3), random.between(1, 9), random.between(1, 12), channels};
  }

  Value new_value(int slot, int dtype, const Size &size, bool channels_first = false) {
    Value v{};
    const int64_t element = dtype == HZ_F32 ? 4 : 1;
    std::copy(size.begin(), size.end(), v.size);
    auto padding = [&] { return random.chance(70) ? 0 : element * random.between(1, 20); };
    int64_t step = element;
    for (int d : channels_first ? std::vector<int>{3, 2, 1, 4, 0} : std::vector<int>{4, 3, 2, 1, 0}) {
      v.stride[d] = step;
      step = step * size[size_t(d)] + (d == 0 ? 0 : padding());
    }
    v.bytes = element;
    for (int d = 0; d < 5; ++d) v.bytes += (v.size[d] - 1) * v.stride[d];
    v.ref = {slot, dtype, align(used_[slot] + gap, random.any_of({4, 64}))};
    if (element == 1) v.ref.offset += random.chance(30) ? random.between(0, 63) : 0;
    used_[slot] = v.ref.offset + v.bytes + gap;
    return v;
  }

  // One of the values so far that fits, after what writes it.
  template <class Fits> Value some(Fits fits) {
    std::vector<size_t> which;
    for (size_t i = 0; i < values.size(); ++i)
      if (fits(values[i])) which.push_back(i);
    if (which.empty()) return values[0];
    const size_t i = random.chance(60) ? which.back() : which[size_t(random.between(0, int64_t(which.size()) - 1))];
    if (i >= pending_ && !ops.empty()) ops.back().barrier = wait();
    return values[i];
  }

  Value bytes_in(bool channels_last = true) {
    auto fits = [&](const Value &v) { return v.ref.dtype != HZ_F32 && (!channels_last || v.channels_last()); };
    Value v = some(fits);
    if (!fits(v)) values.push_back(v = new_value(INPUT, random.any_of({HZ_S8, HZ_U8}), random_size()));
    return v;
  }

  Value out(int dtype, const Size &size, bool channels_first = false) {
    return new_value(random.chance(60) ? ARENA : OUTPUT, dtype, size, channels_first);
  }

  static Size size_of(const Value &v) { return Size(v.size, v.size + 5); }

  // Random numbers of an epilogue whose results lie about the dtype's range; `largest` bounds the accumulator.
  hz_epilogue epilogue(int64_t channels, int64_t largest, bool residual, int dtype) {
    const int64_t padded = align(channels, HZ_CHANNELS);
    std::vector<int32_t> bias(size_t(padded), 0);
    std::vector<float> m(size_t(padded), 0), ratio(size_t(padded), 0), bound(size_t(padded), 0);
    std::vector<uint8_t> hi(size_t(padded), 0);
    hz_epilogue e{};
    e.activation = int32_t(random.between(HZ_NONE, HZ_RELU6));
    e.clamp = random.chance(30);
    const int top = dtype == HZ_S8 ? 127 : 255;
    for (int64_t c = 0; c < channels; ++c) {
      bias[size_t(c)] = int32_t(random.between(-(largest / 4 + 1), largest / 4 + 1));
      m[size_t(c)] = (e.clamp && random.chance(20) ? 1e6f : random.real(50, 1000)) / float(largest);
      ratio[size_t(c)] = random.chance(10) ? 1.f : random.real(0.1f, 2);
      bound[size_t(c)] = random.chance(20) ? 127.5f : random.real(1, 300);
      const float bounded = e.activation == HZ_RELU6 ? std::fmin(std::nearbyint(bound[size_t(c)]), float(top)) : float(top);
      hi[size_t(c)] = uint8_t(bounded);
    }
    e.bias = keep(bias), e.m = keep(m), e.bound = keep(bound), e.hi = keep(hi);
    e.ratio = residual ? keep(ratio) : nullptr;
    return e;
  }

  int random_dtype() { return random.chance(80) ? random.any_of({HZ_S8, HZ_U8}) : HZ_F32; }

  // Tables at random: whatever a planner makes is among them.
  void conv() {
    const Value x = bytes_in();
    hz_conv p{};
    p.in = x.ref;
    p.images = x.size[0];
    p.in_image = x.stride[0];
    const int64_t region = x.bytes - (x.size[0] - 1) * x.stride[0]; // of an image
    p.pixels = random.between(1, 70);
    p.tiles = (p.pixels + 15) / 16;
    p.steps = int32_t(random.between(1, 6));
    p.channels = int32_t(random.chance(50) ? random.any_of({16, 32, 64, 128}) : random.between(1, 140));
    const int64_t blocks = (p.channels + 15) / 16, padded = align(p.channels, HZ_CHANNELS);

    // Of [0, region), pixel + block + step + the bytes used.
    std::vector<uint8_t> used(static_cast<size_t>(p.steps));
    std::vector<int32_t> step(used.size());
    const int64_t most_used = std::min<int64_t>(16, std::max<int64_t>(1, region / 4));
    for (size_t k = 0; k < used.size(); ++k) {
      used[k] = uint8_t(random.chance(50) ? most_used : random.between(1, most_used));
      step[k] = int32_t(random.between(0, std::max<int64_t>(0, (region - 4 * used[k]) / 3)));
    }
    const int64_t room = std::max<int64_t>(0, region - 4 * most_used) / 3;
    std::vector<int32_t> block(size_t(blocks), 0);
    for (int32_t &b : block) b = int32_t(random.between(0, room));
    const bool blocked = random.chance(30);

    const size_t entries = size_t(p.tiles) * 16;
    std::vector<int32_t> pixel(entries), pitch(size_t(p.tiles), 0);
    const bool regular = random.chance(60);
    const int64_t distance = random.between(0, room / 16), start = random.between(0, room - 15 * distance);
    for (size_t f = 0; f < entries; ++f) {
      if (int64_t(f) >= p.pixels)
        pixel[f] = pixel[f - 1];
      else
        pixel[f] = int32_t(regular && random.chance(99) ? start + int64_t(f % 16) * distance : random.between(0, room));
    }
    for (size_t t = 0; t < pitch.size(); ++t) {
      const int32_t first = pixel[16 * t + 1] - pixel[16 * t];
      bool one = true;
      for (size_t f = 16 * t + 1; f < 16 * t + 16; ++f) one = one && pixel[f] - pixel[f - 1] == first;
      pitch[t] = one ? first : 0;
    }

    std::vector<int8_t> weights(size_t(blocks * p.steps) * 1024, 0);
    std::vector<int32_t> sums(size_t(padded), 0);
    const int64_t tail = region < 4 ? region : 4; // bytes of a group of 4 that lie in a tiny tensor
    for (int c = 0; c < p.channels; ++c)
      for (int k = 0; k < p.steps; ++k)
        for (int b = 0; b < 4 * used[size_t(k)]; ++b) {
          if (b % 4 >= tail) continue;
          const int8_t w = random.chance(5) ? int8_t(random.any_of({-127, 127})) : int8_t(random.between(-127, 127));
          weights[size_t(((c / 16 * p.steps + k) * 16 + b / 4) * 64 + c % 16 * 4 + b % 4)] = w;
          sums[size_t(c)] += w;
        }

    // Places of the output, in any order, and a few that are nowhere.
    std::vector<int32_t> out_at(entries, -1), res_at(entries, 0);
    std::vector<int32_t> places;
    for (int64_t f = 0; f < p.pixels; ++f)
      if (f == 0 || random.chance(95)) places.push_back(int32_t(f));
    const Value y = out(random_dtype(), {p.images, 1, 1, int64_t(places.size()), p.channels});
    const bool residual = random.chance(50);
    Value r{};
    r.ref.slot = -1;
    if (residual) {
      r = some([&](const Value &v) {
        return v.ref.dtype != HZ_F32 && v.channels_last() && std::equal(v.size, v.size + 5, y.size);
      });
      if (r.ref.dtype == HZ_F32 || !r.channels_last() || !std::equal(r.size, r.size + 5, y.size))
        values.push_back(r = new_value(INPUT, random.any_of({HZ_S8, HZ_U8}), size_of(y)));
    }
    std::vector<int32_t> order(places.size());
    std::iota(order.begin(), order.end(), 0);
    if (random.chance(30)) std::shuffle(order.begin(), order.end(), random.engine());
    for (size_t i = 0; i < places.size(); ++i) {
      out_at[size_t(places[i])] = int32_t(order[i] * y.stride[3]);
      if (residual) res_at[size_t(places[i])] = int32_t(order[i] * r.stride[3]);
    }

    p.out = y.ref;
    p.out_image = y.stride[0];
    p.res = r.ref;
    p.res_image = residual ? r.stride[0] : 0;
    p.pixel = keep(pixel), p.out_at = keep(out_at), p.res_at = keep(res_at), p.pitch = keep(pitch);
    p.step = keep(step), p.used = keep(used);
    p.block_offset = blocked ? keep(block) : nullptr;
    p.weights = keep_aligned(weights);
    p.weight_sum = keep(sums);
    p.epilogue = epilogue(p.channels, int64_t(p.steps) * 64 * 127 * 255, residual, p.out.dtype);
    push_conv(p);
    values.push_back(y);
  }

  void push_conv(hz_conv &p) {
    p.rows = random.any_of({0, 1, 2, 3, 4, 6, 7, 8, 14, HZ_WINOGRAD, HZ_WORDS}); // what any instruction set has
    if (p.plane && random.chance(50)) p.rows = HZ_WINOGRAD;
    p.columns = int32_t(random.between(0, 4));
    p.by_channels = random.chance(50);
    p.pixels_inside = random.chance(50);
    push(HZ_CONV, p);
  }

  // A convolution with a plane, its tables as a planner makes them.
  void plane() {
    Value x = bytes_in();
    const int64_t kernel = random.between(2, 3);
    if (x.size[1] > 1 || x.size[2] < kernel || x.size[3] < kernel || random.chance(30)) {
      const int64_t channels = random.chance(70) ? random.any_of<int64_t>({4, 8, 16, 24, 40, 64, 72}) : random.between(1, 140);
      x = new_value(INPUT, random.any_of({HZ_S8, HZ_U8}), {random.between(1, 3), 1, random.between(kernel, 20), random.between(kernel, 20), channels});
      values.push_back(x);
    }
    hz_plane q{};
    q.images = x.size[0];
    q.height = int32_t(x.size[2] - kernel + 1);
    q.width = int32_t(x.size[3] - kernel + 1);
    q.channels = int32_t(x.size[4]);
    q.kernel = int32_t(kernel);
    q.in_image = x.stride[0], q.in_row = x.stride[2], q.in_pixel = x.stride[3];
    hz_conv p{};
    p.in = x.ref;
    p.channels = int32_t(random.chance(50) ? random.any_of({16, 32, 64}) : random.between(1, 100));

    // The taps of a kernel row in one run of bytes where they lie so, otherwise each by itself.
    const int64_t wide = align(q.channels, 64) / 64, run = align(kernel * q.channels, 64) / 64;
    const bool runs = q.in_pixel == q.channels && run < kernel * wide;
    const int64_t length = runs ? kernel * q.channels : q.channels, parts = runs ? kernel : kernel * kernel, each = runs ? run : wide;
    p.steps = int32_t(parts * each);
    std::vector<uint8_t> used(static_cast<size_t>(p.steps));
    std::vector<int32_t> step(used.size());
    const int64_t blocks = (p.channels + 15) / 16;
    std::vector<int8_t> weights(size_t(blocks * p.steps) * 1024, 0);
    std::vector<int32_t> sums(size_t(align(p.channels, HZ_CHANNELS)), 0);
    std::vector<int> largest(size_t(p.channels), 0); // of a channel: all weights of this absolute value and sign, or 0 for any
    for (int &w : largest) w = random.chance(10) ? random.any_of({-127, 127}) : 0;
    for (int64_t k = 0; k < p.steps; ++k) {
      const int64_t part = k / each, first = k % each * 64, bytes = std::min<int64_t>(64, length - first);
      step[size_t(k)] = int32_t((runs ? part : part / kernel) * q.in_row + (runs ? 0 : part % kernel * q.in_pixel) + first);
      used[size_t(k)] = uint8_t((bytes + 3) / 4);
      for (int c = 0; c < p.channels; ++c)
        for (int64_t b = 0; b < bytes; ++b) {
          const int8_t w = int8_t(largest[size_t(c)] ? largest[size_t(c)] : random.between(-127, 127));
          weights[size_t(((c / 16 * p.steps + k) * 16 + b / 4) * 64 + c % 16 * 4 + b % 4)] = w;
          sums[size_t(c)] += w;
        }
    }

    const Value y = out(random_dtype(), {q.images, 1, q.height, q.width, p.channels});
    const bool residual = random.chance(50);
    Value r{};
    r.ref.slot = -1;
    if (residual) values.push_back(r = new_value(INPUT, random.any_of({HZ_S8, HZ_U8}), size_of(y)));
    p.out = y.ref, p.res = r.ref;
    q.out_image = y.stride[0], q.out_row = y.stride[2], q.out_pixel = y.stride[3];
    q.res_image = r.stride[0], q.res_row = r.stride[2], q.res_pixel = r.stride[3];

    // One table may cover all images.
    const int64_t together = random.chance(30) ? q.images : 1;
    p.images = q.images / together;
    p.in_image = q.in_image, p.out_image = q.out_image, p.res_image = q.res_image;
    p.pixels = together * q.height * q.width;
    p.tiles = (p.pixels + 15) / 16;
    const size_t entries = size_t(p.tiles) * 16;
    std::vector<int32_t> pixel(entries), out_at(entries, -1), res_at(entries), pitch(size_t(p.tiles), 0);
    for (int64_t f = 0; f < int64_t(entries); ++f) {
      const int64_t g = std::min(f, p.pixels - 1), image = g / (q.height * q.width), row = g / q.width % q.height, column = g % q.width;
      pixel[size_t(f)] = int32_t(image * q.in_image + row * q.in_row + column * q.in_pixel);
      res_at[size_t(f)] = int32_t(image * q.res_image + row * q.res_row + column * q.res_pixel);
      if (f < p.pixels) out_at[size_t(f)] = int32_t(image * q.out_image + row * q.out_row + column * q.out_pixel);
    }
    p.pixel = keep(pixel), p.out_at = keep(out_at), p.res_at = keep(res_at), p.pitch = keep(pitch);
    p.step = keep(step), p.used = keep(used);
    p.weights = keep_aligned(weights);
    p.weight_sum = keep(sums);
    if (!runs || q.channels % 4 == 0) p.plane = keep(std::vector<hz_plane>{q});
    p.epilogue = epilogue(p.channels, kernel * kernel * q.channels * 127 * 255 / 4, residual, p.out.dtype);
    push_conv(p);
    values.push_back(y);
  }

  void depthwise() {
    const Value x = bytes_in();
    hz_depthwise p{};
    const int64_t high = x.size[2], wide = x.size[3];
    p.kernel_y = int32_t(std::min(high, random.any_of<int64_t>({1, 3, 3, 5})));
    p.kernel_x = int32_t(std::min(wide, random.any_of<int64_t>({1, 3, 3, 5, 7})));
    p.stride_y = int32_t(random.between(1, 3));
    p.stride_x = int32_t(random.between(1, 3));
    p.dilation_y = p.kernel_y > 1 ? int32_t(random.between(1, std::min<int64_t>(2, (high - 1) / (p.kernel_y - 1)))) : 1;
    p.dilation_x = p.kernel_x > 1 ? int32_t(random.between(1, std::min<int64_t>(2, (wide - 1) / (p.kernel_x - 1)))) : 1;
    p.height = int32_t((high - (p.kernel_y - 1) * p.dilation_y - 1) / p.stride_y + 1);
    p.width = int32_t((wide - (p.kernel_x - 1) * p.dilation_x - 1) / p.stride_x + 1);
    p.channels = int32_t(x.size[4]);
    p.images = x.size[0];
    p.in = x.ref;
    p.in_image = x.stride[0], p.in_row = x.stride[2], p.in_pixel = x.stride[3];
    const Value y = out(random_dtype(), {p.images, 1, p.height, p.width, p.channels});
    p.out = y.ref;
    p.out_image = y.stride[0], p.out_row = y.stride[2], p.out_pixel = y.stride[3];
    const bool residual = random.chance(30);
    p.res.slot = -1;
    if (residual) {
      const Value r = new_value(INPUT, random.any_of({HZ_S8, HZ_U8}), size_of(y));
      values.push_back(r);
      p.res = r.ref;
      p.res_image = r.stride[0], p.res_row = r.stride[2], p.res_pixel = r.stride[3];
    }
    const int64_t padded = align(p.channels, HZ_CHANNELS), taps = int64_t(p.kernel_y) * p.kernel_x;
    std::vector<int8_t> weights(size_t(taps * padded), 0);
    std::vector<int32_t> sums(size_t(padded), 0);
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < p.channels; ++c)
        sums[size_t(c)] += weights[size_t(t * padded + c)] = int8_t(random.between(-127, 127));
    p.weights = keep_aligned(weights);
    p.weight_sum = keep(sums);
    p.epilogue = epilogue(p.channels, taps * 127 * 255, residual, p.out.dtype);
    push(HZ_DEPTHWISE, p);
    values.push_back(y);
  }

  // The gaps around nothing in particular: a region of its own.
  void zero() {
    const Value y = out(HZ_U8, {random.between(1, 3), 1, 1, random.between(1, 40), random.between(1, 200)});
    std::vector<int64_t> ranges;
    for (int64_t at = 0; at < y.bytes - (y.size[0] - 1) * y.stride[0] - 2;) {
      const int64_t length = random.between(0, std::min<int64_t>(300, y.bytes - (y.size[0] - 1) * y.stride[0] - at));
      ranges.insert(ranges.end(), {at, length});
      at += length + random.between(1, 300);
    }
    if (ranges.empty()) return;
    hz_zero p{};
    p.out = y.ref;
    p.images = y.size[0];
    p.image = y.stride[0];
    p.ranges = int64_t(ranges.size()) / 2;
    p.range = keep(ranges);
    push(HZ_ZERO, p);
    values.push_back(y);
  }

  hz_view view(const Value &v) const {
    hz_view w{};
    w.ref = v.ref;
    std::copy(v.stride, v.stride + 5, w.stride + 1);
    return w;
  }

  void elementwise(int kind) {
    const int from_float = kind == HZ_QUANTIZE;
    auto fits = [&](const Value &v) { return kind == HZ_COPY || (v.ref.dtype == HZ_F32) == from_float; };
    Value a = some(fits);
    if (!fits(a)) {
      const int dtype = from_float ? HZ_F32 : random.any_of({HZ_S8, HZ_U8});
      Size size = random_size();
      if (from_float && random.chance(50)) size[4] = random.between(1, 5), size[3] = random.between(1, 90);
      values.push_back(a = new_value(INPUT, dtype, size, random.chance(50)));
    }
    hz_elementwise p{};
    p.b.ref.slot = -1;
    p.a = view(a);
    if (kind == HZ_ADD || kind == HZ_MUL) { // a new operand, or one of these that broadcasts
      Size size = size_of(a);
      for (int64_t &n : size)
        if (random.chance(20)) n = 1;
      Value b = new_value(INPUT, random.any_of({HZ_S8, HZ_U8}), size, random.chance(20));
      values.push_back(b);
      for (int d = 0; d < 5; ++d)
        if (b.size[d] == 1) b.stride[d] = 0;
      p.b = view(b);
    }
    int to = random.any_of({HZ_S8, HZ_U8});
    if (kind == HZ_DEQUANTIZE || ((kind == HZ_ADD || kind == HZ_MUL) && random.chance(15))) to = HZ_F32;
    if (kind == HZ_COPY) to = a.ref.dtype;
    const Value y = out(to, size_of(a), random.chance(25));
    p.out = view(y);
    p.size[0] = 1;
    std::copy(a.size, a.size + 5, p.size + 1);
    p.per_channel = random.chance(25);
    p.activation = kind == HZ_ADD || kind == HZ_MUL ? int32_t(random.between(HZ_NONE, HZ_RELU6)) : int32_t(HZ_NONE);
    const size_t n = p.per_channel ? size_t(align(a.size[4], HZ_CHANNELS)) : 1;
    std::vector<float> m(n), ratio(n), bound(n);
    for (size_t c = 0; c < n; ++c) {
      m[c] = kind == HZ_QUANTIZE ? random.any_of({0.1f, 1.f, 0.0173f, 3.f, 1e-39f, 1e38f, random.real(0.001f, 2)})
             : kind == HZ_MUL    ? random.real(0.001f, 0.1f)
             : random.chance(10) ? random.any_of({1.f, 0.5f, 1e6f})
                                 : random.real(0.1f, 2);
      ratio[c] = random.any_of({1.f, random.real(0.1f, 2)});
      bound[c] = random.real(1, 300);
    }
    std::vector<uint8_t> table(256);
    for (uint8_t &entry : table) entry = random.byte();
    p.m = keep(m), p.ratio = keep(ratio), p.bound = keep(bound), p.table = keep(table);
    if (kind == HZ_QUANTIZE && random.chance(50)) p.bad = &bad;
    push(kind, p);
    values.push_back(y);
  }

  void pool(int kind) {
    const Value x = bytes_in();
    hz_pool p{};
    Size size = size_of(x);
    double n = 1;
    const bool global = random.chance(20);
    for (int d = 0; d < 3; ++d) {
      const int64_t length = x.size[1 + d], kernel = global ? length : random.between(1, std::min<int64_t>(4, length));
      const int64_t pad = random.between(0, kernel / 2), stride = random.between(1, 3);
      std::vector<int32_t> start, stop;
      for (int64_t at = global ? 0 : -pad; at + kernel <= length + (global ? 0 : pad); at += stride) {
        start.push_back(int32_t(std::max<int64_t>(0, at)));
        stop.push_back(int32_t(std::min(length, at + kernel)));
      }
      size[size_t(1 + d)] = int64_t(start.size());
      p.out_size[d] = int32_t(start.size());
      p.in_stride[d] = x.stride[1 + d];
      p.start[d] = keep(start), p.stop[d] = keep(stop);
      n *= double(kernel);
    }
    const Value y = out(kind == HZ_MAX_POOL ? x.ref.dtype : random_dtype(), size);
    p.images = x.size[0];
    p.in = x.ref, p.out = y.ref;
    p.in_image = x.stride[0], p.out_image = y.stride[0];
    std::copy(y.stride + 1, y.stride + 4, p.out_stride);
    p.channels = int32_t(x.size[4]);
    std::vector<float> m(size_t(p.out_size[0]) * size_t(p.out_size[1]) * size_t(p.out_size[2]));
    for (float &value : m) value = random.chance(20) ? float(1 / n) : random.real(0.3f, 3) / float(n);
    p.m = keep(m);
    push(kind, p);
    values.push_back(y);
  }

  void upsample() {
    const Value x = some([](const Value &v) { return v.channels_last(); });
    if (!x.channels_last()) return;
    hz_upsample p{};
    Size size = size_of(x);
    for (int d = 0; d < 3; ++d) {
      const int64_t length = x.size[1 + d], factor = length > 20 ? 1 : random.between(1, d == 0 ? 1 : 3);
      std::vector<int32_t> from;
      for (int64_t i = 0; i < length * factor; ++i)
        from.push_back(int32_t(random.chance(95) ? i / factor : random.between(0, length - 1)));
      size[size_t(1 + d)] = length * factor;
      p.out_size[d] = int32_t(length * factor);
      p.in_stride[d] = x.stride[1 + d];
      p.from[d] = keep(from);
    }
    const Value y = out(x.ref.dtype, size);
    p.images = x.size[0];
    p.in = x.ref, p.out = y.ref;
    p.in_image = x.stride[0], p.out_image = y.stride[0];
    std::copy(y.stride + 1, y.stride + 4, p.out_stride);
    p.bytes = int32_t(x.size[4] * (x.ref.dtype == HZ_F32 ? 4 : 1));
    push(HZ_UPSAMPLE, p);
    values.push_back(y);
  }

  void interpolate() {
    const Value x = some([](const Value &v) { return v.channels_last() && v.ref.dtype != HZ_F32 && v.size[1] == 1; });
    if (!x.channels_last() || x.ref.dtype == HZ_F32 || x.size[1] != 1) return;
    hz_interpolate p{};
    Size size = size_of(x);
    p.out_size[0] = 1;
    for (int d = 0; d < 2; ++d) {
      const int64_t length = x.size[2 + d], longer = random.between(1, length > 20 ? length : 3 * length);
      std::vector<int32_t> place, weight;
      for (int64_t i = 0; i < longer; ++i) {
        const int32_t w = int32_t(random.chance(50) ? random.between(0, 4) * 512 : random.between(0, 2048));
        for (int k = 0; k < 2; ++k) place.push_back(int32_t(random.between(0, length - 1)));
        weight.push_back(2048 - w);
        weight.push_back(w);
      }
      size[size_t(2 + d)] = longer;
      p.out_size[1 + d] = int32_t(longer);
      p.in_stride[1 + d] = x.stride[2 + d];
      p.place[d] = keep(place), p.weight[d] = keep(weight);
    }
    const Value y = out(x.ref.dtype, size);
    p.images = x.size[0];
    p.in = x.ref, p.out = y.ref;
    p.in_image = x.stride[0], p.out_image = y.stride[0];
    std::copy(y.stride + 1, y.stride + 4, p.out_stride);
    p.channels = int32_t(x.size[4]);
    p.m = 0x1p-22f;
    push(HZ_INTERPOLATE, p);
    values.push_back(y);
  }

  int64_t used_[SLOTS] = {};
  mutable int64_t steps_[SLOTS] = {};
  size_t pending_ = 0; // values from here on are written after the last barrier
  std::vector<std::shared_ptr<void>> kept_;
};
