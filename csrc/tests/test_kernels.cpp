// The kernels against the naive model: every operation, instruction set and number of threads, random programs, many callers at a
// time, and a forked child. No byte may differ.
//
//     test_kernels [programs [first seed]]
#include "model.hpp"
#include "programs.hpp"

#include <chrono>
#include <cstdio>
#include <string>
#include <thread>

#include <sys/wait.h>
#include <unistd.h>

namespace {

int failures = 0;

#define CHECK(condition, ...)                                                                                                      \
  do {                                                                                                                             \
    if (!(condition)) {                                                                                                            \
      ++failures;                                                                                                                  \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);                                                                  \
      std::printf(__VA_ARGS__);                                                                                                    \
      std::printf("\n");                                                                                                           \
    }                                                                                                                              \
  } while (0)

// The slots of one run.
class Memory {
public:
  Memory(const Program &program, int threads, uint64_t seed) {
    for (int s = 0; s < SLOTS; ++s) {
      const std::vector<uint8_t> data = program.contents(s, threads, seed);
      bytes_[s] = int64_t(data.size());
      slot_[s] = static_cast<uint8_t *>(::operator new(data.size() + HZ_SLACK, std::align_val_t(64)));
      std::fill_n(slot_[s], data.size() + HZ_SLACK, uint8_t(0xa5));
      std::copy(data.begin(), data.end(), slot_[s]);
    }
  }
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;
  ~Memory() {
    for (uint8_t *p : slot_) ::operator delete(p, std::align_val_t(64));
  }
  void *const *slots() { return reinterpret_cast<void *const *>(slot_); }
  uint8_t **bytes() { return slot_; }

  // Bytes that differ: in the output and the input, and in the arena where it is one for all threads.
  int64_t differing(const Memory &other, bool arena) const {
    int64_t n = 0;
    for (int s = arena ? ARENA : INPUT; s < SLOTS; ++s) {
      for (int64_t i = 0; i < bytes_[s]; ++i) n += slot_[s][i] != other.slot_[s][i];
      for (int64_t i = bytes_[s]; s != ARENA && i < bytes_[s] + HZ_SLACK; ++i) n += slot_[s][i] != 0xa5;
    }
    return n;
  }

private:
  uint8_t *slot_[SLOTS];
  int64_t bytes_[SLOTS];
};

const char *kind_name(int kind) {
  static const char *names[] = {"conv", "depthwise", "zero", "quantize", "dequantize", "copy",    "rescale",
                                "table", "add",      "mul",  "max_pool", "avg_pool",   "upsample", "interpolate"};
  return names[kind];
}

std::string describe(const Program &program) {
  std::string text;
  for (const hz_op &op : program.ops) text += std::string(text.empty() ? "" : ", ") + kind_name(op.kind);
  return text;
}

void run_model(const Program &program, Memory &memory) {
  const hz_program p = program.program();
  for (int64_t i = 0; i < p.iterations; ++i) {
    uint8_t *slots[SLOTS];
    for (int s = 0; s < SLOTS; ++s) slots[s] = memory.bytes()[s] + (s == ARENA ? 0 : i * p.slot_step[s]);
    for (int64_t op = 0; op < p.count; ++op) model::run(p.ops[op], slots);
  }
}

// Counts the bytes of one program that differ on each of these instruction sets.
void compare(Program &program, uint64_t seed, const std::vector<int> &isas, int threads) {
  Memory expected(program, threads, seed);
  program.bad = 0;
  run_model(program, expected);
  const int bad = program.bad;
  for (int isa : isas) {
    Memory actual(program, threads, seed);
    program.bad = 0;
    const hz_program p = program.program();
    const int status = hz_run(&p, actual.slots(), threads, isa);
    CHECK(status == 0, "status %d", status);
    const int64_t differing = actual.differing(expected, !program.apart);
    CHECK(differing == 0 && program.bad == bad, "%lld bytes differ, NaN %d for %d: seed %llu, %s, %d threads, %s%s",
          static_cast<long long>(differing), program.bad, bad, static_cast<unsigned long long>(seed), hz_isa_name(isa), threads,
          describe(program).c_str(), program.apart ? ", apart" : "");
  }
}

std::vector<int> up_to(int best) {
  std::vector<int> isas(size_t(best) + 1);
  std::iota(isas.begin(), isas.end(), 0);
  return isas;
}

void test_each_operation(int best, int cases) {
  for (int kind = HZ_CONV; kind <= HZ_INTERPOLATE; ++kind)
    for (int i = 0; i < cases; ++i) {
      const uint64_t seed = uint64_t(kind) * 100000 + uint64_t(i);
      Program program(seed, true);
      program.add_op(kind);
      compare(program, seed, up_to(best), 1 << i % 3);
    }
}

void test_programs(int best, uint64_t first, int count) {
  for (int i = 0; i < count; ++i) {
    const uint64_t seed = first + uint64_t(i);
    Program program(seed, false);
    for (int64_t op = 0, n = program.random.between(2, 8); op < n; ++op) program.add_op(int(program.random.between(HZ_CONV, HZ_INTERPOLATE)));
    compare(program, seed, up_to(best), 1 << program.random.between(0, 2));
  }
}

void long_program(Program &program) {
  while (program.ops.size() < 8) program.add_op(int(program.random.between(HZ_CONV, HZ_INTERPOLATE)));
}

void test_callers(int best) {
  for (uint64_t seed = 1; seed <= 2; ++seed) {
    Program program(seed, false);
    long_program(program);
    const hz_program p = program.program();
    Memory expected(program, 2, seed);
    run_model(program, expected);
    std::vector<int64_t> differing(3, -1);
    std::vector<std::thread> callers;
    for (int64_t &count : differing)
      callers.emplace_back([&] {
        for (int repeat = 0; repeat < 2 && count <= 0; ++repeat) {
          Memory memory(program, 2, seed);
          hz_run(&p, memory.slots(), 2, best);
          count = memory.differing(expected, !program.apart);
        }
      });
    for (std::thread &caller : callers) caller.join();
    for (int64_t count : differing) CHECK(count == 0, "%lld bytes differ", static_cast<long long>(count));
  }
}

// The parent's threads are gone in the child, which must run nevertheless.
void test_fork(int best) {
  Program program(7, false);
  long_program(program);
  compare(program, 7, {best}, 2);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    failures = 0;
    for (int repeat = 0; repeat < 3; ++repeat) compare(program, 7, {best}, 2);
    std::thread([&] { compare(program, 7, {best}, 2); }).join();
    std::fflush(stdout);
    _exit(failures != 0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child's status is %d", status);
  compare(program, 7, {best}, 2);
}

void test_quantize_finds_nan(int best) {
  for (int isa = 0; isa <= best; ++isa)
    for (int64_t channels : {1, 3, 5, 64})
      for (int64_t pixels : {1, 7, 40})
        for (int64_t where = -1; where < channels * pixels; where += 3) {
          std::vector<float> x(size_t(channels * pixels), 1.f);
          std::vector<uint8_t> y(x.size());
          if (where >= 0) x[size_t(where)] = NAN;
          const float scale = 0.5f;
          int32_t bad = 0;
          hz_elementwise e{};
          e.a.ref = {0, HZ_F32, 0}, e.b.ref.slot = -1, e.out.ref = {1, HZ_S8, 0};
          std::fill_n(e.size, HZ_DIMS, 1);
          e.size[4] = pixels, e.size[5] = channels;
          e.a.stride[4] = 4, e.a.stride[5] = 4 * pixels; // channels first
          e.out.stride[4] = channels, e.out.stride[5] = 1;
          e.m = &scale;
          e.bad = &bad;
          const hz_op op{HZ_QUANTIZE, 0, &e};
          const int64_t steps[2] = {};
          const hz_program p{&op, 1, 1, steps, 2, 0, 0, 0};
          void *slots[] = {x.data(), y.data()};
          CHECK(hz_run(&p, slots, 1, isa) == 0 && bad == (where >= 0), "bad is %d, NaN at %lld", bad, static_cast<long long>(where));
        }
}

// A sum past 2^31, of one pixel that lies at every place of its window.
void test_large_average(int best) {
  const int32_t start = 0, one = 1, wide = 9000000;
  const float m = 1.f / 9000000.f;
  const uint8_t x[3] = {255, 254, 3};
  for (int isa = 0; isa <= best; ++isa) {
    uint8_t y[3] = {};
    hz_pool pool{};
    pool.in = {0, HZ_U8, 0}, pool.out = {1, HZ_U8, 0};
    pool.images = 1;
    pool.channels = 3;
    pool.m = &m;
    for (int d = 0; d < 3; ++d) pool.out_size[d] = 1, pool.start[d] = &start, pool.stop[d] = d == 2 ? &wide : &one;
    const hz_op op{HZ_AVG_POOL, 0, &pool};
    const int64_t steps[2] = {};
    const hz_program p{&op, 1, 1, steps, 2, 0, 0, 0};
    void *slots[] = {const_cast<uint8_t *>(x), y};
    CHECK(hz_run(&p, slots, 1, isa) == 0 && std::equal(x, x + 3, y), "averages of 255, 254, 3: %d %d %d", y[0], y[1], y[2]);
  }
}

// Row r of the output is row r of the input, looked up, plus the row after it. A band looks up two rows, or one and keeps the other.
void test_bands(int best) {
  constexpr int64_t rows = 23, width = 130, images = 2;
  const float one = 1.f;
  uint8_t table[256];
  for (int i = 0; i < 256; ++i) table[i] = uint8_t(i * i / 700);
  std::vector<uint8_t> x(images * (rows + 1) * width), expected(images * rows * width);
  Random random(3);
  for (uint8_t &value : x) value = random.byte();
  std::deque<hz_elementwise> made;
  const auto row_of = [&](int kind, hz_ref a, hz_ref b, hz_ref out) {
    hz_elementwise e{};
    e.a.ref = a, e.b.ref = b, e.out.ref = out;
    std::fill_n(e.size, HZ_DIMS, 1);
    e.size[5] = width;
    e.a.stride[5] = e.b.stride[5] = e.out.stride[5] = 1;
    e.m = e.ratio = &one;
    e.table = table;
    made.push_back(e);
    return hz_op{kind, 0, &made.back()};
  };
  const hz_ref none{-1, HZ_U8, 0}, own0{2, HZ_U8, 0}, own1{2, HZ_U8, width};
  std::deque<std::vector<hz_op>> ops;
  std::vector<hz_band> bands;
  for (int64_t image = 0; image < images; ++image)
    for (int64_t r = 0; r < rows; ++r) {
      const hz_ref in{0, HZ_U8, (image * (rows + 1) + r) * width}, after{0, HZ_U8, in.offset + width}, out{1, HZ_U8, (image * rows + r) * width};
      const hz_op second = row_of(HZ_TABLE, after, none, own1), sum = row_of(HZ_ADD, own0, own1, out);
      ops.push_back({row_of(HZ_TABLE, in, none, own0), second, sum});
      ops.push_back({row_of(HZ_COPY, own1, none, own0), second, sum});
      const std::vector<hz_op> &next = ops.back(), &fresh = ops[ops.size() - 2];
      bands.push_back({fresh.data(), next.data(), 3, r ? 3 : 0});
      for (int64_t i = 0; i < width; ++i)
        expected[size_t(out.offset + i)] = uint8_t(std::min(255, table[x[size_t(in.offset + i)]] + table[x[size_t(after.offset + i)]]));
    }
  const hz_bands p{int64_t(bands.size()), bands.data()};
  const hz_op op{HZ_BANDS, 0, &p};
  const int64_t steps[3] = {};
  const hz_program program{&op, 1, 1, steps, 3, 0, 0, 2 * width};
  for (int isa = 0; isa <= best; ++isa)
    for (int threads = 1; threads <= 4; ++threads) {
      std::vector<uint8_t> y(expected.size()), own(size_t(threads) * 2 * width);
      void *slots[] = {x.data(), y.data(), own.data()};
      CHECK(hz_run(&program, slots, threads, isa) == 0 && y == expected, "bands, %s, %d threads", hz_isa_name(isa), threads);
    }
  const hz_op nested{HZ_BANDS, 0, &p};
  const hz_band band{&nested, nullptr, 1, 0};
  const hz_bands around{1, &band};
  const hz_op outer{HZ_BANDS, 0, &around};
  const hz_program refused{&outer, 1, 1, steps, 3, 0, 0, 2 * width};
  void *slots[] = {x.data(), x.data(), x.data()};
  CHECK(hz_run(&refused, slots, 1, best) == -2, "bands within bands");
}

void test_interface(int best) {
  CHECK(hz_abi() == HZ_ABI, "abi %d", hz_abi());
  const char *variable = std::getenv("HORIZON_MAX_CPU_ISA");
  const std::string cap = variable ? variable : "";
  unsetenv("HORIZON_MAX_CPU_ISA");
  const int machine = hz_best_isa();
  for (int isa = 0; isa <= HZ_AMX; ++isa) {
    setenv("HORIZON_MAX_CPU_ISA", hz_isa_name(isa), 1);
    CHECK(hz_best_isa() == std::min(isa, machine), "capped by %s: %d", hz_isa_name(isa), hz_best_isa());
  }
  setenv("HORIZON_MAX_CPU_ISA", "sse", 1);
  CHECK(hz_best_isa() == -1, "a cap that is none: %d", hz_best_isa());
  setenv("HORIZON_MAX_CPU_ISA", cap.c_str(), 1);
  CHECK(hz_best_isa() == best, "%d", hz_best_isa());
  CHECK(!hz_isa_name(-1) && !hz_isa_name(HZ_AMX + 1), "names of nothing");

  Program program(11, true);
  program.add_op(HZ_CONV);
  Memory memory(program, 2, 11), expected(program, 2, 11);
  hz_program p = program.program();
  CHECK(hz_run(&p, memory.slots(), 1, -1) == -1 && hz_run(&p, memory.slots(), 1, HZ_AMX + 1) == -1, "instruction sets that are none");
  if (machine < HZ_AMX) CHECK(hz_run(&p, memory.slots(), 1, machine + 1) == -1, "an instruction set that this machine lacks");
  for (int kind : {-1, HZ_BANDS + 1}) {
    const hz_op unknown{kind, 0, program.ops[0].params};
    p.ops = &unknown;
    CHECK(hz_run(&p, memory.slots(), 1, best) == -2, "operation %d", kind);
  }
  CHECK(memory.differing(expected, true) == 0, "a refused program wrote something");

  double seconds[3] = {-1, -1, -1};
  CHECK(hz_time(&program.ops[0], memory.slots(), 2, best, 3, seconds) == 0, "hz_time");
  for (double s : seconds) CHECK(s >= 0 && s < 60, "%g s", s);
  run_model(program, expected);
  CHECK(memory.differing(expected, true) == 0, "hz_time computes something else");
}

void test_profile(int best) {
  Program program(5, true);
  program.apart = false;
  program.iterations = 3;
  long_program(program);
  const hz_program p = program.program();
  Memory memory(program, 2, 5), expected(program, 2, 5);
  run_model(program, expected);
  std::vector<double> seconds(program.ops.size(), -1);
  CHECK(hz_profile(&p, memory.slots(), 2, best, seconds.data()) == 0, "hz_profile");
  for (double s : seconds) CHECK(s >= 0 && s < 60, "%g s", s);
  CHECK(memory.differing(expected, true) == 0, "hz_profile computes something else");
}

} // namespace

int main(int argc, char **argv) {
  const int programs = argc > 1 ? std::atoi(argv[1]) : 1000;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1000;
  const int best = hz_best_isa();
  std::printf("up to %s, OpenMP: %s\n", hz_isa_name(best), hz_has_openmp() ? "yes" : "no");
  auto timed = [&](const char *name, auto test) {
    const auto start = std::chrono::steady_clock::now();
    test();
    std::printf("%-20s %.1f s\n", name, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    std::fflush(stdout);
  };
  timed("interface", [&] { test_interface(best); });
  timed("profile", [&] { test_profile(best); });
  timed("bands", [&] { test_bands(best); });
  timed("NaN", [&] { test_quantize_finds_nan(best); });
  timed("large average", [&] { test_large_average(best); });
  timed("each operation", [&] { test_each_operation(best, std::max(10, programs / 10)); });
  timed("programs", [&] { test_programs(best, first, programs); });
  timed("callers", [&] { test_callers(best); });
  timed("fork", [&] { test_fork(best); });
  std::printf("%d failures\n", failures);
  return failures != 0;
}
