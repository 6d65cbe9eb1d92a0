// Runs a CUDA kernel's own source on a CPU: one fiber for every thread of a block, blocks one after another.
//
// What it checks beside the result: bounds and alignment of every access to shared memory, reads of shared memory that
// nobody wrote, races (two accesses of one byte by two threads, one of them a write, with no barrier between them that
// both passed), bytes that are touched while an asynchronous copy into them is under way, warps that do not arrive
// together at a collective instruction, and deadlocks. A copy happens as late as it may: at the wait of its thread.
// What it cannot show: times, the order in which a real scheduler runs warps, and memory shared between blocks.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace alphaprune::emulator {

struct Size {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr uint8_t kPoison = 0xCD;

// What is known of one byte of shared memory. Epochs are counts of barriers: a block's, and those of one warp.
struct Shadow {
  static constexpr int16_t kNobody = -1, kLanes = -2, kWarps = -3;  // kLanes: several of one warp; kWarps: of several
  int16_t writer = kNobody, reader = kNobody;
  int16_t copier = kNobody;  // thread whose asynchronous copy is under way
  uint16_t writer_warp = 0, reader_warp = 0;
  uint32_t written_block = 0, written_warp = 0, read_block = 0, read_warp = 0;
  bool valid = false;
};

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;                 // not committed
  uint64_t collectives = 0;
  uint64_t accesses = 0;
};

// One access to shared memory by a warp, for the simulation of bank conflicts.
struct Access {
  const char* kind;
  uint32_t bytes;
  int64_t address[kWarp];  // -1: this lane was switched off
};

struct Warp {
  uint32_t epoch = 0;
  int arrived = 0;
  uint64_t generation = 0;
  const char* operation = nullptr;
  uint32_t slots[2][kWarp][8];
  std::vector<Access> accesses;
};

struct Machine {
  Size grid, block_index;
  int threads = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint8_t> memory;
  std::vector<Shadow> shadow;
  uint32_t epoch = 0;
  int arrived = 0, finished = 0;
  uint64_t progress = 0;
  int current = 0;
  ucontext_t scheduler;
  std::function<void()> body;
  std::string failure;
  bool tracing = false;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline int thread_index() { return machine().current; }
inline Fiber& fiber() { return machine().fibers[machine().current]; }
inline Warp& warp() { return machine().warps[machine().current / kWarp]; }

inline void yield() {
  Machine& m = machine();
  const int me = m.current;
  swapcontext(&m.fibers[me].context, &m.scheduler);
}

// Ends the launch with this sentence.
[[noreturn]] inline void fail(const std::string& what) {
  Machine& m = machine();
  if (m.failure.empty())
    m.failure = "block " + std::to_string(m.block_index.x) + "," + std::to_string(m.block_index.y) + " thread " +
                std::to_string(m.current) + ": " + what;
  for (;;) yield();
}

inline void start() {
  Machine& m = machine();
  m.body();
  Fiber& f = fiber();
  if (!f.open.empty() || !f.groups.empty()) fail("the thread ended while its asynchronous copies were under way");
  f.done = true;
  ++m.finished;
  ++m.progress;
  for (;;) yield();
}

// Barriers.
inline void sync_block() {
  Machine& m = machine();
  ++m.progress;
  const uint32_t mine = m.epoch;
  if (m.finished) fail("a barrier of the block after a thread ended");
  if (++m.arrived == m.threads) {
    m.arrived = 0;
    ++m.epoch;
  } else {
    while (m.epoch == mine) yield();
  }
}

// All lanes of the warp meet in `operation`; returns which of the two slots holds what they brought.
inline int meet(const char* operation, const uint32_t* values, int count) {
  Machine& m = machine();
  Warp& w = warp();
  ++m.progress;
  const int slot = static_cast<int>(fiber().collectives++ & 1);
  if (w.arrived == 0) w.operation = operation;
  if (std::strcmp(w.operation, operation) != 0)
    fail(std::string("lanes of a warp are in ") + w.operation + " and in " + operation);
  for (int i = 0; i < count; ++i) w.slots[slot][m.current % kWarp][i] = values[i];
  const uint64_t mine = w.generation;
  if (++w.arrived == kWarp) {
    w.arrived = 0;
    ++w.generation;
  } else {
    while (w.generation == mine) yield();
  }
  return slot;
}

inline void sync_warp() {
  Warp& w = warp();
  const uint32_t before = w.epoch;
  meet("sync_warp", nullptr, 0);
  if (w.epoch == before) w.epoch = before + 1;  // the first lane that goes on advances it for all
}

// Shared memory.
inline void check_range(const char* kind, uint32_t address, uint32_t bytes) {
  const size_t size = machine().memory.size();
  if (address % bytes == 0 && address + size_t{bytes} <= size) return;
  const std::string where = std::string(kind) + " of " + std::to_string(bytes) + " bytes at " + std::to_string(address);
  if (address % bytes) fail(where + " is not aligned");
  fail(where + " is outside of the " + std::to_string(size) + " bytes of shared memory");
}

inline bool ordered(int16_t other, uint16_t other_warp, uint32_t block_epoch, uint32_t warp_epoch) {
  const Machine& m = machine();
  if (other == Shadow::kNobody || other == m.current || m.epoch != block_epoch) return true;
  return other != Shadow::kWarps && other_warp == m.current / kWarp && warp().epoch != warp_epoch;
}

inline std::string who(int16_t thread) {
  return thread >= 0 ? "thread " + std::to_string(thread) : std::string("other threads");
}

inline void touch(const char* kind, uint32_t address, uint32_t bytes, bool write) {
  Machine& m = machine();
  check_range(kind, address, bytes);
  const auto here = static_cast<uint16_t>(m.current / kWarp);
  for (uint32_t i = address; i < address + bytes; ++i) {
    Shadow& s = m.shadow[i];
    const auto at = [&] { return std::string(kind) + " byte " + std::to_string(i) + " of shared memory"; };
    if (s.copier != Shadow::kNobody)
      fail(at() + " while a copy of " + who(s.copier) + " into it is under way: a wait is missing");
    if (!write && !s.valid) fail(at() + ", which nobody wrote");
    if (!ordered(s.writer, s.writer_warp, s.written_block, s.written_warp))
      fail(at() + " races with a write of " + who(s.writer) + ": a barrier is missing");
    if (write) {
      if (!ordered(s.reader, s.reader_warp, s.read_block, s.read_warp))
        fail(at() + " races with a read of " + who(s.reader) + ": a barrier is missing");
      s.valid = true;
      s.writer = static_cast<int16_t>(m.current);
      s.writer_warp = here;
      s.written_block = m.epoch;
      s.written_warp = warp().epoch;
      s.reader = Shadow::kNobody;
    } else {
      const bool same_epoch = s.reader != Shadow::kNobody && s.read_block == m.epoch;
      if (same_epoch && s.reader != m.current) {
        if (s.reader == Shadow::kWarps || s.reader_warp != here) {
          s.reader = Shadow::kWarps;
        } else {
          s.reader = s.read_warp == warp().epoch ? Shadow::kLanes : static_cast<int16_t>(m.current);
        }
      } else {
        s.reader = static_cast<int16_t>(m.current);
      }
      s.reader_warp = here;
      s.read_block = m.epoch;
      s.read_warp = warp().epoch;
    }
  }
}

inline void trace(const char* kind, uint32_t address, uint32_t bytes, bool on) {
  Machine& m = machine();
  if (!m.tracing) return;
  Warp& w = warp();
  const uint64_t number = fiber().accesses++;
  if (number >= w.accesses.size()) {
    Access blank{kind, bytes, {}};
    std::fill(std::begin(blank.address), std::end(blank.address), -1);
    w.accesses.resize(number + 1, blank);
  }
  w.accesses[number].kind = kind;
  w.accesses[number].bytes = bytes;
  if (on) w.accesses[number].address[m.current % kWarp] = address;
}

template <class T>
T load_shared(uint32_t address, bool on = true) {
  T value{};
  trace("load", address, sizeof(T), on);
  if (!on) return value;
  touch("load", address, sizeof(T), false);
  std::memcpy(&value, machine().memory.data() + address, sizeof(T));
  return value;
}

template <class T>
void store_shared(uint32_t address, const T& value, bool on = true) {
  trace("store", address, sizeof(T), on);
  if (!on) return;
  touch("store", address, sizeof(T), true);
  std::memcpy(machine().memory.data() + address, &value, sizeof(T));
}

// Asynchronous copies: the bytes are nobody's until the thread that copies them has waited.
inline void copy_async(uint32_t to, const void* from, uint32_t bytes, bool on) {
  trace("copy", to, bytes, on);
  if (!on) return;
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail("the source of an asynchronous copy is not aligned");
  touch("copy into", to, bytes, true);
  Machine& m = machine();
  for (uint32_t i = 0; i < bytes; ++i) {
    m.memory[to + i] = kPoison;
    m.shadow[to + i].copier = static_cast<int16_t>(m.current);
  }
  fiber().open.push_back({to, from, bytes});
}

inline void copy_commit() {
  Fiber& f = fiber();
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

inline void copy_wait(size_t pending) {
  Machine& m = machine();
  Fiber& f = fiber();
  while (f.groups.size() > pending) {
    for (const Copy& copy : f.groups.front()) {
      std::memcpy(m.memory.data() + copy.to, copy.from, copy.bytes);
      for (uint32_t i = copy.to; i < copy.to + copy.bytes; ++i) {
        Shadow& s = m.shadow[i];
        s.copier = Shadow::kNobody;
        s.written_block = m.epoch;
        s.written_warp = warp().epoch;
      }
    }
    f.groups.erase(f.groups.begin());
  }
}

template <class T>
T load_global(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T) || reinterpret_cast<uintptr_t>(from) % sizeof(T))
    fail("a load of " + std::to_string(sizeof(T)) + " bytes from global memory is not aligned");
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// The order in which threads run between barriers: what is right does not depend on it.
enum class Order { forwards, backwards, warps_apart };

inline void run_block(Order order) {
  Machine& m = machine();
  std::vector<int> turns(m.threads);
  for (int t = 0; t < m.threads; ++t) {
    turns[t] = order == Order::backwards ? m.threads - 1 - t : t;
    Fiber& f = m.fibers[t];
    f.done = false;
    f.groups.clear();
    f.open.clear();
    f.collectives = f.accesses = 0;
    if (!f.stack) f.stack.reset(new char[kStackBytes]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, start, 0);
  }
  while (m.finished < m.threads && m.failure.empty()) {
    const uint64_t before = m.progress;
    for (int i = 0; i < m.threads && m.failure.empty(); ++i) {
      // Apart: one warp goes as far as it can before the next one starts.
      const int first = order == Order::warps_apart ? i / kWarp * kWarp : i;
      const int last = order == Order::warps_apart ? std::min(first + kWarp, m.threads) : i + 1;
      for (uint64_t seen = m.progress - 1; seen != m.progress && m.failure.empty();) {
        seen = m.progress;
        for (int t = first; t < last && m.failure.empty(); ++t) {
          if (m.fibers[turns[t]].done) continue;
          m.current = turns[t];
          swapcontext(&m.scheduler, &m.fibers[turns[t]].context);
        }
        if (order != Order::warps_apart) break;
      }
      i = last - 1;
    }
    if (m.progress == before && m.failure.empty() && m.finished < m.threads)
      m.failure = "deadlock: no thread of block " + std::to_string(m.block_index.x) + " can go on";
  }
}

// Runs `body` as every thread of every block; an empty string, or what went wrong first.
inline std::string launch(Size grid, int threads, size_t shared_bytes, const std::function<void()>& body,
                          Order order = Order::forwards, bool tracing = false) {
  Machine& m = machine();
  m.grid = grid;
  m.threads = threads;
  m.body = body;
  m.failure.clear();
  m.tracing = tracing;
  if (static_cast<int>(m.fibers.size()) < threads) m.fibers.resize(threads);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      m.block_index = {x, y, 0};
      m.memory.assign(shared_bytes, kPoison);
      m.shadow.assign(shared_bytes, Shadow{});
      m.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
      m.epoch = 0;
      m.arrived = m.finished = 0;
      run_block(order);
      if (!m.failure.empty()) return m.failure;
    }
  return {};
}

}  // namespace alphaprune::emulator
