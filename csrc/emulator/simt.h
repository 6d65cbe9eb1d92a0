// Runs a CUDA kernel's own source on a CPU: one fiber for every thread of a block, blocks one after another, those of a
// cluster at once.
//
// What it checks beside the result: bounds and alignment of every access to shared memory, reads of shared memory that
// nobody wrote, races (two accesses of one byte by two threads, one of them a write, with no barrier between them that
// both passed), bytes that are touched while an asynchronous copy into them is under way, warps that do not arrive
// together at a collective instruction, and deadlocks. A copy happens as late as it may: at the wait of its thread.
// What it cannot show: times, the order in which a real scheduler runs warps, and memory shared between blocks.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// Under its own name: a fortified one takes a jump to another stack, which fibers are made of, for a mistake.
extern "C" [[noreturn]] void alphaprune_jump(jmp_buf to, int value) __asm__("_longjmp");

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
  uint32_t written_cluster = 0, read_cluster = 0;  // read_cluster: 1 + the epoch of the last read of another block
  int16_t barrier = -1;                            // that the copy which wrote it completed on
  uint32_t phase = 0;                              // of that barrier, after the copy
  bool valid = false;
};

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes;
};

// A copy that completes on a barrier in shared memory (sm90.h).
struct Transfer {
  uint32_t to, bytes;
  std::function<void()> perform;
};
struct Mbarrier {
  uint32_t at;
  int arrivals, pending;
  int16_t maker;
  uint32_t made, made_cluster;  // the epochs of the block and of the cluster
  bool known = false;           // to copies
  int64_t bytes = 0;            // that the phase waits for
  uint32_t phase = 0;
  std::vector<Transfer> transfers;
  std::vector<uint32_t> arriving, released;  // clocks of the warps that arrived in this phase, and in those before
};

// A product of a warpgroup that is under way (sm90.h).
struct Product {
  float* c;
  const uint32_t *operand, *meta;  // meta: of one that keeps 2 of 4 columns, null of others
  int selector;                    // of the lanes that bring meta
  uint32_t quad[4][5];             // operand a of the four lanes that have this one's rows, and their meta, as it was
  uint64_t b;
  int tokens;
  float (*widen)(uint32_t);
};
struct Sums {
  float* c;
  std::vector<float> values;
  int products = 0;  // under way
};

struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf where;       // and where it goes on: without the system calls of a switch of contexts
  bool started = false;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;                 // not committed
  uint64_t collectives = 0;
  uint64_t accesses = 0;
  std::vector<uint32_t> waited;                // phases of each barrier that this thread has seen complete
  std::vector<std::vector<Product>> products;  // committed, oldest first
  std::vector<Product> begun;                  // not committed
  std::vector<Sums> sums;
  bool fenced = false;
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
  std::vector<uint32_t> met;  // of each other warp: what it did in epochs before this one, has happened
};

// A barrier of some warps of a block.
struct Meeting {
  int arrived = 0;
  std::vector<int> warps;
  uint64_t generation = 0;
};

struct Block {
  Size index;
  std::vector<Warp> warps;
  std::vector<uint8_t> memory;
  std::vector<Shadow> shadow;
  uint32_t epoch = 0;
  int arrived = 0, finished = 0;
  bool any[2] = {};  // of sync_block_any, by the last bit of the epoch
  Meeting meetings[16];
  std::vector<Mbarrier> mbarriers;
  // Where there are barriers in shared memory: what each warp knows of the clocks of all in the cluster, which go on
  // when one arrives.
  std::vector<std::vector<uint32_t>> clocks;
  // By 16 bytes of shared memory and warp: 1 + the warp's epoch of its last read; and, where there are such barriers,
  // its clock then, to tell what a copy overwrites too early.
  std::vector<uint32_t> read_in, read_at;
};

struct Machine {
  Size grid;
  int threads = 0;  // of a block
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;  // of the cluster that runs
  uint32_t cluster_epoch = 0;
  int cluster_arrived = 0;
  uint64_t progress = 0;
  int current = 0;
  jmp_buf scheduler;
  std::function<void()> body;
  std::string failure;
  bool tracing = false;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline int thread_index() { return machine().current % machine().threads; }
inline int warp_index() { return thread_index() / kWarp; }
inline uint32_t block_rank() { return static_cast<uint32_t>(machine().current / machine().threads); }
inline Block& block() { return machine().blocks[block_rank()]; }
// The number of a warp in the cluster.
inline size_t clock_of(uint32_t rank, size_t warp) { return rank * machine().blocks[rank].warps.size() + warp; }
inline Fiber& fiber() { return machine().fibers[machine().current]; }
inline Warp& warp() { return block().warps[warp_index()]; }

inline void yield() {
  if (!_setjmp(fiber().where)) alphaprune_jump(machine().scheduler, 1);
}
// The current fiber goes on until it yields.
__attribute__((noinline)) inline void resume() {
  if (_setjmp(machine().scheduler)) return;
  if (fiber().started) alphaprune_jump(fiber().where, 1);
  fiber().started = true;
  setcontext(&fiber().context);
}

// Ends the launch with this sentence.
[[noreturn]] inline void fail(const std::string& what) {
  Machine& m = machine();
  if (m.failure.empty())
    m.failure = "block " + std::to_string(block().index.x) + "," + std::to_string(block().index.y) + " thread " +
                std::to_string(thread_index()) + ": " + what;
  for (;;) yield();
}

inline void start() {
  Machine& m = machine();
  m.body();
  Fiber& f = fiber();
  if (!f.open.empty() || !f.groups.empty()) fail("the thread ended while its asynchronous copies were under way");
  if (!f.begun.empty() || !f.products.empty()) fail("the thread ended while its products were under way");
  if (++block().finished == m.threads)
    for (const Mbarrier& barrier : block().mbarriers)
      if (!barrier.transfers.empty()) fail("the block ended while its copies were under way: a wait is missing");
  f.done = true;
  ++m.progress;
  for (;;) yield();
}

// Barriers.
inline void pass_barrier(Block& b) {
  b.any[++b.epoch & 1] = false;  // all have read it: they have met since
  for (Warp& w : b.warps) ++w.epoch;
  for (Warp& w : b.warps) {
    w.met.resize(b.warps.size());
    for (size_t other = 0; other < b.warps.size(); ++other) w.met[other] = b.warps[other].epoch;
  }
}
// All warps of these blocks know what any of them knew, and go on.
inline void share_clocks(uint32_t first, uint32_t last) {
  std::vector<uint32_t> all;
  for (uint32_t rank = first; rank < last; ++rank)
    for (const auto& known : machine().blocks[rank].clocks) {
      all.resize(known.size());
      for (size_t i = 0; i < known.size(); ++i) all[i] = std::max(all[i], known[i]);
    }
  for (uint32_t rank = first; rank < last; ++rank) {
    auto& clocks = machine().blocks[rank].clocks;
    for (size_t w = 0; w < clocks.size(); ++w) {
      clocks[w] = all;
      ++clocks[w][clock_of(rank, w)];
    }
  }
}

inline void sync_block() {
  Block& b = block();
  ++machine().progress;
  const uint32_t mine = b.epoch;
  if (b.finished) fail("a barrier of the block after a thread ended");
  if (++b.arrived == machine().threads) {
    b.arrived = 0;
    pass_barrier(b);
    share_clocks(block_rank(), block_rank() + 1);
  } else {
    while (b.epoch == mine) yield();
  }
}

inline bool sync_block_any(bool mine) {
  Block& b = block();
  bool& any = b.any[b.epoch & 1];
  any |= mine;
  sync_block();
  return any;
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
  for (int i = 0; i < count; ++i) w.slots[slot][thread_index() % kWarp][i] = values[i];
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

// Some warps of the block meet.
inline void sync_warps(int number, int threads) {
  meet("sync_warps", nullptr, 0);
  Block& b = block();
  if (number < 1 || number > 15) fail("a barrier of some warps has a number from 1 to 15");
  Meeting& here = b.meetings[number];
  if (thread_index() % kWarp == 0) here.warps.push_back(warp_index());
  const uint64_t mine = here.generation;
  if (++here.arrived < threads) {
    while (here.generation == mine) yield();
    return;
  }
  for (const int one : here.warps) ++b.warps[one].epoch;
  for (const int one : here.warps) {
    b.warps[one].met.resize(b.warps.size());
    for (const int other : here.warps) b.warps[one].met[other] = b.warps[other].epoch;
  }
  here.warps.clear();
  here.arrived = 0;
  ++here.generation;
}

// Shared memory.
inline void check_range(const char* kind, uint32_t address, uint32_t bytes) {
  const size_t size = block().memory.size();
  if (address % bytes == 0 && address + size_t{bytes} <= size) return;
  const std::string where = std::string(kind) + " of " + std::to_string(bytes) + " bytes at " + std::to_string(address);
  if (address % bytes) fail(where + " is not aligned");
  fail(where + " is outside of the " + std::to_string(size) + " bytes of shared memory");
}

inline bool ordered(int16_t other, uint16_t other_warp, uint32_t block_epoch, uint32_t warp_epoch) {
  if (other == Shadow::kNobody || other == thread_index() || block().epoch != block_epoch) return true;
  if (other == Shadow::kWarps) return false;
  if (other_warp == warp_index()) return warp().epoch != warp_epoch;
  return other_warp < warp().met.size() && warp_epoch < warp().met[other_warp];
}

// Whether what warps read of these 16 bytes has happened for this one.
inline bool readers_met(uint32_t address) {
  const Block& b = block();
  const Warp& mine = warp();
  const size_t count = b.warps.size(), here = warp_index();
  for (size_t w = 0; w < count; ++w) {
    const uint32_t read = b.read_in[address / 16 * count + w];
    if (read && (w == here ? read > mine.epoch : w >= mine.met.size() || read > mine.met[w])) return false;
  }
  return true;
}

inline std::string who(int16_t thread) {
  return thread >= 0 ? "thread " + std::to_string(thread) : std::string("other threads");
}

inline void touch(const char* kind, uint32_t address, uint32_t bytes, bool write) {
  Block& m = block();
  check_range(kind, address, bytes);
  const auto here = static_cast<uint16_t>(warp_index());
  const auto me = static_cast<int16_t>(thread_index());
  if (!write) {
    const size_t place = address / 16 * m.warps.size() + here;
    m.read_in[place] = warp().epoch + 1;
    if (!m.read_at.empty()) m.read_at[place] = m.clocks[here][clock_of(block_rank(), here)];
  }
  for (uint32_t i = address; i < address + bytes; ++i) {
    Shadow& s = m.shadow[i];
    const auto at = [&] { return std::string(kind) + " byte " + std::to_string(i) + " of shared memory"; };
    if (s.copier != Shadow::kNobody)
      fail(at() + " while a copy of " + who(s.copier) + " into it is under way: a wait is missing");
    if (!write && !s.valid) fail(at() + ", which nobody wrote");
    if (!ordered(s.writer, s.writer_warp, s.written_block, s.written_warp))
      fail(at() + " races with a write of " + who(s.writer) + ": a barrier is missing");
    if (s.barrier >= 0 && s.written_block == m.epoch && fiber().waited[s.barrier] < s.phase)
      fail(at() + ", whose copy this thread did not wait for: a wait is missing");
    if (write) {
      if (s.read_cluster == machine().cluster_epoch + 1)
        fail(at() + " races with a read of another block: a barrier of the cluster is missing");
      if (!ordered(s.reader, s.reader_warp, s.read_block, s.read_warp) &&
          (s.reader != Shadow::kWarps || !readers_met(i)))
        fail(at() + " races with a read of " + who(s.reader) + ": a barrier is missing");
      s.valid = true;
      s.barrier = -1;
      s.writer = me;
      s.writer_warp = here;
      s.written_block = m.epoch;
      s.written_warp = warp().epoch;
      s.written_cluster = machine().cluster_epoch;
      s.reader = Shadow::kNobody;
    } else {
      const bool same_epoch = s.reader != Shadow::kNobody && s.read_block == m.epoch;
      if (same_epoch && s.reader != me) {
        if (s.reader == Shadow::kWarps || s.reader_warp != here) {
          s.reader = Shadow::kWarps;
        } else {
          s.reader = s.read_warp == warp().epoch ? Shadow::kLanes : me;
        }
      } else {
        s.reader = me;
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
  if (on) w.accesses[number].address[thread_index() % kWarp] = address;
}

template <class T>
T load_shared(uint32_t address, bool on = true) {
  T value{};
  trace("load", address, sizeof(T), on);
  fiber().fenced = false;  // the registers of a product may be other ones now
  if (!on) return value;
  touch("load", address, sizeof(T), false);
  std::memcpy(&value, block().memory.data() + address, sizeof(T));
  return value;
}

// An aligned word of which the thread looks at the bytes that have a bit in `wanted`; the others may be anybody's.
inline uint32_t load_shared_part(uint32_t address, uint32_t wanted) {
  trace("load", address, 4, true);
  check_range("load", address, 4);
  fiber().fenced = false;
  uint8_t bytes[4] = {kPoison, kPoison, kPoison, kPoison};
  for (uint32_t i = 0; i < 4; ++i) {
    if (!(wanted >> i & 1u)) continue;
    touch("load", address + i, 1, false);
    bytes[i] = block().memory[address + i];
  }
  uint32_t value;
  std::memcpy(&value, bytes, 4);
  return value;
}

template <class T>
void store_shared(uint32_t address, const T& value, bool on = true) {
  trace("store", address, sizeof(T), on);
  if (!on) return;
  touch("store", address, sizeof(T), true);
  std::memcpy(block().memory.data() + address, &value, sizeof(T));
}

// Asynchronous copies: the bytes are nobody's until the thread that copies them has waited.
inline void copy_async(uint32_t to, const void* from, uint32_t bytes, bool on) {
  trace("copy", to, bytes, on);
  if (!on) return;
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail("the source of an asynchronous copy is not aligned");
  touch("copy into", to, bytes, true);
  Block& m = block();
  for (uint32_t i = 0; i < bytes; ++i) {
    m.memory[to + i] = kPoison;
    m.shadow[to + i].copier = static_cast<int16_t>(thread_index());
  }
  fiber().open.push_back({to, from, bytes});
}

inline void copy_commit() {
  Fiber& f = fiber();
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

inline void copy_wait(size_t pending) {
  Block& m = block();
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
  fiber().fenced = false;
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// What the kernels since the last look had fetched into the second-level cache: addresses and bytes.
inline std::vector<std::pair<const void*, uint32_t>>& fetched() {
  static std::vector<std::pair<const void*, uint32_t>> all;
  return all;
}
inline void fetch(const void* from, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || !bytes) fail("what is fetched ahead is not aligned");
  fetched().emplace_back(from, bytes);
}

// The order in which threads run between barriers: what is right does not depend on it.
enum class Order { forwards, backwards, warps_apart };

// The blocks of a cluster.
inline void run_blocks(Order order) {
  Machine& m = machine();
  const int threads = m.threads * static_cast<int>(m.blocks.size());
  std::vector<int> turns(threads);
  for (int t = 0; t < threads; ++t) {
    turns[t] = order == Order::backwards ? threads - 1 - t : t;
    Fiber& f = m.fibers[t];
    std::unique_ptr<char[]> stack = std::move(f.stack);
    f = Fiber{};
    f.stack = std::move(stack);
    if (!f.stack) f.stack.reset(new char[kStackBytes]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, start, 0);
  }
  const auto running = [&] {
    return std::any_of(m.blocks.begin(), m.blocks.end(), [&](const Block& b) { return b.finished < m.threads; });
  };
  while (running() && m.failure.empty()) {
    const uint64_t before = m.progress;
    for (int i = 0; i < threads && m.failure.empty(); ++i) {
      // Apart: one warp goes as far as it can before the next one starts.
      const int first = order == Order::warps_apart ? i / kWarp * kWarp : i;
      const int last = order == Order::warps_apart ? std::min(first + kWarp, threads) : i + 1;
      for (uint64_t seen = m.progress - 1; seen != m.progress && m.failure.empty();) {
        seen = m.progress;
        for (int t = first; t < last && m.failure.empty(); ++t) {
          if (m.fibers[turns[t]].done) continue;
          m.current = turns[t];
          resume();
        }
        if (order != Order::warps_apart) break;
      }
      i = last - 1;
    }
    if (m.progress == before && m.failure.empty() && running())
      m.failure = "deadlock: no thread of block " + std::to_string(m.blocks[0].index.x) + " can go on";
  }
}

// Runs `body` as every thread of every block; an empty string, or what went wrong first. cluster: neighbouring blocks
// that run at once.
inline std::string launch(Size grid, int threads, size_t shared_bytes, const std::function<void()>& body,
                          Order order = Order::forwards, bool tracing = false, unsigned cluster = 1) {
  Machine& m = machine();
  m.grid = grid;
  m.threads = threads;
  m.body = body;
  m.failure.clear();
  m.tracing = tracing;
  if (grid.x % cluster) return "the grid is no multiple of the cluster";
  if (m.fibers.size() < static_cast<size_t>(threads) * cluster) m.fibers.resize(static_cast<size_t>(threads) * cluster);
  m.blocks.resize(cluster);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += cluster) {
      for (unsigned i = 0; i < cluster; ++i) {
        Block& b = m.blocks[i];
        Block next;  // with the memory of the one before, which is large
        next.memory.swap(b.memory);
        next.shadow.swap(b.shadow);
        next.read_in.swap(b.read_in);
        b = std::move(next);
        b.index = {x + i, y, 0};
        b.memory.assign(shared_bytes, kPoison);
        b.shadow.assign(shared_bytes, Shadow{});
        b.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
        b.read_in.assign((shared_bytes / 16 + 1) * b.warps.size(), 0);
      }
      m.cluster_epoch = 0;
      m.cluster_arrived = 0;
      run_blocks(order);
      if (!m.failure.empty()) return m.failure;
    }
  return {};
}

}  // namespace alphaprune::emulator
