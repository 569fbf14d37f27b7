// Runs programs: finds the instruction set, and leads a team of threads through the operations.
//
// Nothing here outlives a call but what cpuid said and each thread's scratch memory, so programs may run in any number of threads
// at a time, and before and after fork.
#include "tier.hpp"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sched.h>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(HZ_X86)
#include <cpuid.h>
#endif
#if defined(HZ_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define HZ_EXPORT extern "C" __attribute__((visibility("default")))

namespace horizon {
namespace {

struct Isa {
  const char *name;
  const Tier *tier; // null: not part of this build
};

const Isa isas[] = {
    {"portable", &portable_tier},
#if defined(HZ_X86)
    {"avx2", &avx2_tier},
    {"avx512_vnni", &avx512_tier},
    {"amx", &amx_tier},
#else
    {"avx2", nullptr},
    {"avx512_vnni", nullptr},
    {"amx", nullptr},
#endif
};
constexpr int isa_count = sizeof isas / sizeof *isas;

// ---- what the machine has

#if defined(HZ_X86)
bool bit(unsigned word, int index) { return word >> index & 1; }

bool allows_amx() {
#if defined(HZ_EMULATE_AMX)
  return true;
#elif defined(__linux__)
  // Linux switches the tile registers on for a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

int detect() {
  unsigned a, b, c, d, c1;
  if (!__get_cpuid(1, &a, &b, &c1, &d) || !bit(c1, 27)) return HZ_PORTABLE; // OSXSAVE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return HZ_PORTABLE;
  unsigned saved, high; // the registers that the operating system saves
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  const bool avx2 = bit(b, 5) && bit(c1, 12) && bit(c1, 29) && (saved & 0x6) == 0x6; // FMA, F16C
  if (!avx2) return HZ_PORTABLE;
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11) && (saved & 0xe6) == 0xe6;
  if (!avx512) return HZ_AVX2;
#if defined(HZ_EMULATE_AMX)
  const bool amx = true;
#else
  const bool amx = bit(d, 24) && bit(d, 25) && (saved & 0x60000) == 0x60000;
#endif
  return amx && allows_amx() ? HZ_AMX : HZ_AVX512_VNNI;
}
#else
int detect() { return HZ_PORTABLE; }
#endif

// Each thread that comes before the answer is known finds the same one.
int machine_isa() {
  static std::atomic<int> known{-1};
  int isa = known.load(std::memory_order_relaxed);
  if (isa < 0) known.store(isa = detect(), std::memory_order_relaxed);
  return isa;
}

// ---- a team of threads

void relax() {
#if defined(HZ_X86)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Waits a few microseconds with the processor to itself, then lets others have it.
template <class Ready> void wait_until(Ready ready) {
  for (int i = 0; !ready(); ++i) {
    if (i < 256)
      relax();
    else
      sched_yield();
  }
}

// All `count` threads arrive before one of them leaves. The phase, not the counter, is what they wait for, so it can be used again
// at once.
class Barrier {
public:
  void wait(int count) {
    if (count == 1) return;
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      wait_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
    }
  }

private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
};

// libgomp keeps its idle threads in the thread that started them. Only the thread that calls fork goes on in the child, and its
// record of them with it, though they are gone: its next parallel region would wait for them for ever. There the team is made of
// new threads. (If the library is loaded only in the child, nothing tells, and PyTorch's own parallel operators hang alike.)
#if defined(_OPENMP)
thread_local bool forked = false;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// A team of threads started for one call. Where the system refuses to start one, the team is smaller.
template <class Body> void run_started(int threads, const Body &body) {
  std::atomic<int> count{0};
  auto member = [&](int index) {
    wait_until([&] { return count.load(std::memory_order_acquire) != 0; });
    body(Part{index, count.load(std::memory_order_relaxed)});
  };
  std::vector<std::thread> others;
  others.reserve(size_t(threads) - 1);
  try {
    for (int index = 1; index < threads; ++index) others.emplace_back(member, index);
  } catch (const std::system_error &) {
  }
  count.store(int(others.size()) + 1, std::memory_order_release);
  member(0);
  for (std::thread &other : others) other.join();
}

// Calls body(part) in up to `threads` threads at a time; part.count is how many there are.
template <class Body> void run_team(int threads, const Body &body) {
  if (threads <= 1) return body(Part{0, 1});
#if defined(_OPENMP)
  if (!forked) {
#pragma omp parallel num_threads(threads)
    body(Part{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  run_started(threads, body);
}

// ---- operations

void zero(const hz_zero &p, Slots slots, Part part) {
  uint8_t *const out = at(p.out, slots);
  const int64_t units = p.images * p.ranges;
  const bool few = units < 4 * part.count; // then threads share each range
  int64_t begin = 0, end = units;
  if (!few) part.range(units, begin, end);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t *range = p.range + 2 * (unit % p.ranges);
    int64_t first = 0, last = range[1];
    if (few) part.range(range[1], first, last);
    std::memset(out + unit / p.ranges * p.image + range[0] + first, 0, size_t(last - first));
  }
}

void run_bands(const Tier &tier, const hz_bands &p, Slots slots, Part part);

void run_op(const Tier &tier, const hz_op &op, Slots slots, Part part) {
  switch (op.kind) {
  case HZ_CONV: return tier.conv(*static_cast<const hz_conv *>(op.params), slots, part);
  case HZ_DEPTHWISE: return tier.depthwise(*static_cast<const hz_depthwise *>(op.params), slots, part);
  case HZ_ZERO: return zero(*static_cast<const hz_zero *>(op.params), slots, part);
  case HZ_MAX_POOL: return tier.max_pool(*static_cast<const hz_pool *>(op.params), slots, part);
  case HZ_AVG_POOL: return tier.avg_pool(*static_cast<const hz_pool *>(op.params), slots, part);
  case HZ_UPSAMPLE:
  case HZ_INTERPOLATE: return tier.upsample(op, slots, part);
  case HZ_BANDS: return run_bands(tier, *static_cast<const hz_bands *>(op.params), slots, part);
  default: return tier.elementwise(op.kind, *static_cast<const hz_elementwise *>(op.params), slots, part);
  }
}

void run_bands(const Tier &tier, const hz_bands &p, Slots slots, Part part) {
  int64_t begin, end;
  part.range(p.count, begin, end);
  for (int64_t i = begin; i < end; ++i) {
    const hz_band &band = p.bands[i];
    const bool next = i > begin && band.next_count > 0;
    const hz_op *const ops = next ? band.next : band.fresh;
    for (int32_t op = 0, count = next ? band.next_count : band.fresh_count; op < count; ++op)
      run_op(tier, ops[op], slots, Part{0, 1});
  }
}

// What a thread has from its first operation to its last.
struct Session {
  const Tier &tier;
  explicit Session(const Tier &tier) : tier(tier) {
    if (tier.begin) tier.begin();
  }
  ~Session() {
    if (tier.end) tier.end();
  }
  Session(const Session &) = delete;
  Session &operator=(const Session &) = delete;
};

// The memory that one iteration works on.
class Memory {
public:
  Memory(const hz_program &program, void *const *slots, int64_t arena, int thread)
      : program_(program), first_(slots), callers_(program.slots - (program.own_bytes > 0)) {
    now_.resize(size_t(program.slots));
    if (program.slots > 0) now_[0] = static_cast<uint8_t *>(slots[0]) + arena;
    if (program.own_bytes > 0) now_.back() = static_cast<uint8_t *>(slots[callers_]) + thread * program.own_bytes;
  }
  Slots of(int64_t iteration) {
    for (int32_t s = 1; s < callers_; ++s) now_[size_t(s)] = static_cast<uint8_t *>(first_[s]) + iteration * program_.slot_step[s];
    return now_.data();
  }

private:
  const hz_program &program_;
  void *const *first_;
  int32_t callers_; // slots that are not the threads' own
  std::vector<uint8_t *> now_;
};

void run_apart(const hz_program &program, void *const *slots, const Tier &tier, int threads) {
  std::atomic<int64_t> next{0};
  run_team(threads, [&](Part part) {
    Session session(tier);
    Memory memory(program, slots, part.index * program.arena_bytes, part.index);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < program.iterations;) {
      const Slots now = memory.of(i);
      for (int64_t op = 0; op < program.count; ++op) run_op(tier, program.ops[op], now, Part{0, 1});
    }
  });
}

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// seconds: where the time of each operation is written, waiting included; or null.
void run_shared(const hz_program &program, void *const *slots, const Tier &tier, int threads, double *seconds) {
  Barrier barrier;
  run_team(threads, [&](Part part) {
    Session session(tier);
    Memory memory(program, slots, 0, part.index);
    if (seconds) barrier.wait(part.count);
    double before = seconds ? now() : 0;
    for (int64_t i = 0; i < program.iterations; ++i) {
      const Slots memory_now = memory.of(i);
      for (int64_t op = 0; op < program.count; ++op) {
        run_op(tier, program.ops[op], memory_now, part);
        const bool last = op + 1 == program.count; // the next iteration works in the same arena
        if (last ? i + 1 < program.iterations || seconds : program.ops[op].barrier != 0) barrier.wait(part.count);
        if (seconds && part.index == 0) {
          const double after = now();
          seconds[op] = (i ? seconds[op] : 0) + after - before;
          before = after;
        }
      }
    }
  });
}

const Tier *usable(int isa) { return isa < 0 || isa >= isa_count || isa > machine_isa() ? nullptr : isas[isa].tier; }

bool known(const hz_op &op) {
  if (op.kind < HZ_CONV || op.kind > HZ_BANDS || !op.params) return false;
  if (op.kind != HZ_BANDS) return true;
  const auto all = [](const hz_op *ops, int32_t count) {
    for (int32_t i = 0; i < count; ++i)
      if (ops[i].kind == HZ_BANDS || !known(ops[i])) return false;
    return true;
  };
  const hz_bands &p = *static_cast<const hz_bands *>(op.params);
  for (int64_t i = 0; i < p.count; ++i)
    if (!all(p.bands[i].fresh, p.bands[i].fresh_count) || !all(p.bands[i].next, p.bands[i].next_count)) return false;
  return true;
}

struct Free {
  void operator()(uint8_t *p) const { std::free(p); }
};

} // namespace

uint8_t *scratch(int64_t bytes) {
  thread_local std::unique_ptr<uint8_t, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<uint8_t *>(std::aligned_alloc(64, size_t(size))));
    if (!memory) {
      std::fprintf(stderr, "horizon_cpu: no memory for %lld bytes of scratch\n", static_cast<long long>(size));
      std::abort();
    }
  }
  return memory.get();
}

} // namespace horizon

using namespace horizon;

HZ_EXPORT int hz_abi(void) { return HZ_ABI; }

HZ_EXPORT int hz_has_openmp(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

HZ_EXPORT const char *hz_isa_name(int isa) { return isa < 0 || isa >= isa_count ? nullptr : isas[isa].name; }

HZ_EXPORT int hz_best_isa(void) {
  const char *cap = std::getenv("HORIZON_MAX_CPU_ISA");
  int isa = isa_count - 1;
  if (cap && *cap)
    while (isa >= 0 && std::strcmp(cap, isas[isa].name) != 0) --isa;
  while (isa >= 0 && !usable(isa)) --isa;
  return isa; // -1: the variable names no instruction set
}

HZ_EXPORT int hz_run(const hz_program *program, void *const *slots, int threads, int isa) {
  const Tier *tier = usable(isa);
  if (!tier) return -1;
  for (int64_t op = 0; op < program->count; ++op)
    if (!known(program->ops[op])) return -2;
  if (program->apart)
    run_apart(*program, slots, *tier, int(threads < program->iterations ? threads : program->iterations));
  else
    run_shared(*program, slots, *tier, threads, nullptr);
  return 0;
}

HZ_EXPORT int hz_profile(const hz_program *program, void *const *slots, int threads, int isa, double *seconds) {
  const Tier *tier = usable(isa);
  if (!tier) return -1;
  for (int64_t op = 0; op < program->count; ++op)
    if (!known(program->ops[op])) return -2;
  run_shared(*program, slots, *tier, threads, seconds);
  return 0;
}

HZ_EXPORT int hz_time(const hz_op *op, void *const *slots, int threads, int isa, int repeats, double *seconds) {
  using Clock = std::chrono::steady_clock;
  const Tier *tier = usable(isa);
  if (!tier) return -1;
  if (!known(*op)) return -2;
  Barrier barrier;
  run_team(threads, [&](Part part) {
    Session session(*tier);
    const Slots memory = reinterpret_cast<Slots>(slots);
    barrier.wait(part.count); // the team is there
    for (int i = 0; i < repeats; ++i) {
      const Clock::time_point start = Clock::now(); // not behind the barrier: the others may have finished when this thread sees it open
      barrier.wait(part.count);
      run_op(*tier, *op, memory, part);
      barrier.wait(part.count);
      if (part.index == 0) seconds[i] = std::chrono::duration<double>(Clock::now() - start).count();
    }
  });
  return 0;
}
