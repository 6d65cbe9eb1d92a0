// Twins of what sm_90a adds (csrc/cuda/device_sm90.cuh): barriers in shared memory that count arrivals and the bytes of
// copies, copies through tensor maps, products of a warpgroup that run on while threads do, and clusters.
//
// A copy happens as late as it may: at the first wait that finds nothing else missing; until then its bytes are
// nobody's, and who has not waited itself may not read them. What a copy overwrites must have been read before an
// arrival that its thread knows of. A product happens at the wait of its thread, too: it reads shared memory then, its
// sums are poison until then, and its operands must be as they were.
#pragma once

#include "simt.h"

namespace alphaprune::emulator {

// What the driver makes of a matrix x[rows, cols] of 16-bit elements.
struct TensorMap {
  const uint8_t* x = nullptr;
  int64_t rows = 0, cols = 0, row_bytes = 0;
  uint32_t box_rows = 0, box_cols = 0;
  bool swizzled = false;  // by 128 bytes
};

constexpr uint32_t kSumPoison = 0x7fbadbadu;  // a NaN
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7u) << 4; }

// Barriers in shared memory.
inline void mbarrier_init(uint32_t at, uint32_t arrivals) {
  Block& b = block();
  const size_t warps = b.warps.size(), all = warps * machine().blocks.size();
  check_range("a barrier", at, 8);
  if (b.clocks.empty()) {
    b.clocks.assign(warps, std::vector<uint32_t>(all, 0));
    for (size_t w = 0; w < warps; ++w) b.clocks[w][clock_of(block_rank(), w)] = 1;
    b.read_at.assign(b.read_in.size(), 0);
  }
  for (const Mbarrier& other : b.mbarriers)
    if (other.at == at) fail("a barrier is made twice");
  Mbarrier made;
  made.at = at;
  made.arrivals = made.pending = static_cast<int>(arrivals);
  made.maker = static_cast<int16_t>(thread_index());
  made.made = b.epoch;
  made.made_cluster = machine().cluster_epoch;
  made.arriving = made.released = std::vector<uint32_t>(all, 0);
  b.mbarriers.push_back(made);
}
inline void mbarrier_fence_init() {
  for (Mbarrier& barrier : block().mbarriers)
    if (barrier.maker == thread_index()) barrier.known = true;
}
// Of the barriers of a block of the cluster, the number of that one.
inline int mbarrier_index(uint32_t at, uint32_t rank, bool copies = false) {
  if (rank >= machine().blocks.size()) fail("there is no block " + std::to_string(rank) + " in the cluster");
  Block& b = machine().blocks[rank];
  const bool own = rank == block_rank();
  for (size_t i = 0; i < b.mbarriers.size(); ++i) {
    Mbarrier& found = b.mbarriers[i];
    if (found.at != at) continue;
    if (own && found.maker != thread_index() && found.made == b.epoch)
      fail("a barrier is used that may not be there yet: a barrier of the block is missing");
    if (!own && found.made_cluster == machine().cluster_epoch)
      fail("a barrier of another block is used that may not be there yet: a barrier of the cluster is missing");
    if (!own && b.finished) fail("a barrier of a block that has ended is used: a barrier of the cluster is missing");
    if ((copies || !own) && !found.known)
      fail("a copy completes on a barrier that it does not know: a fence is missing");
    if (own) fiber().waited.resize(b.mbarriers.size(), 0);
    return static_cast<int>(i);
  }
  fail("there is no barrier at " + std::to_string(at));
}
inline void mbarrier_complete(Block& b, int index) {
  Mbarrier& barrier = b.mbarriers[index];
  for (const Transfer& transfer : barrier.transfers) {
    transfer.perform();
    barrier.bytes -= transfer.bytes;
    for (uint32_t i = transfer.to; i < transfer.to + transfer.bytes; ++i) {
      Shadow& s = b.shadow[i];
      s.copier = Shadow::kNobody;
      s.valid = true;
      s.barrier = static_cast<int16_t>(index);
      s.phase = barrier.phase + 1;
      s.written_block = b.epoch;
      s.written_cluster = machine().cluster_epoch;
    }
  }
  barrier.transfers.clear();
  if (barrier.bytes) fail("a barrier waits for " + std::to_string(barrier.bytes) + " bytes more than are copied to it");
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  for (size_t w = 0; w < barrier.arriving.size(); ++w)
    barrier.released[w] = std::max(barrier.released[w], barrier.arriving[w]);
}
inline void mbarrier_arrive(uint32_t at, uint32_t bytes, uint32_t rank) {
  const int index = mbarrier_index(at, rank);
  Block& b = machine().blocks[rank];
  Mbarrier& barrier = b.mbarriers[index];
  ++machine().progress;
  if (barrier.pending == 0) mbarrier_complete(b, index);
  barrier.bytes += bytes;
  --barrier.pending;
  auto& known = block().clocks[warp_index()];
  for (size_t w = 0; w < known.size(); ++w) barrier.arriving[w] = std::max(barrier.arriving[w], known[w]);
  ++known[clock_of(block_rank(), warp_index())];
  if (barrier.pending == 0 && barrier.bytes == 0 && barrier.transfers.empty()) mbarrier_complete(b, index);
}
inline void mbarrier_arrive(uint32_t at, uint32_t bytes) { mbarrier_arrive(at, bytes, block_rank()); }
// Whether another block of the cluster has still to begin copies that the phase waits for.
inline bool awaits_others(const Mbarrier& barrier) {
  int64_t under_way = 0;
  for (const Transfer& transfer : barrier.transfers) under_way += transfer.bytes;
  return machine().blocks.size() > 1 && under_way < barrier.bytes;
}
inline void mbarrier_wait(uint32_t at, uint32_t parity) {
  const int index = mbarrier_index(at, block_rank());
  Block& b = block();
  while ((b.mbarriers[index].phase & 1u) == parity) {
    if (b.mbarriers[index].pending == 0 && !awaits_others(b.mbarriers[index])) {
      ++machine().progress;
      mbarrier_complete(b, index);
    } else {
      yield();
    }
  }
  ++machine().progress;
  fiber().waited.resize(b.mbarriers.size(), 0);
  fiber().waited[index] = b.mbarriers[index].phase;
  auto& known = b.clocks[warp_index()];
  for (size_t w = 0; w < known.size(); ++w) known[w] = std::max(known[w], b.mbarriers[index].released[w]);
}

// Copies that complete on a barrier.
inline void copy_to_barrier(uint32_t to, uint32_t bytes, uint32_t at, uint32_t rank, std::function<void()> perform) {
  const int index = mbarrier_index(at, rank, true);
  Block& b = machine().blocks[rank];
  if (to % 16 || bytes % 16 || bytes == 0) fail("a copy that completes on a barrier is not of aligned 16 bytes");
  if (size_t{to} + bytes > b.memory.size()) fail("a copy goes outside of shared memory");
  const auto& known = block().clocks[warp_index()];
  const bool own = rank == block_rank();
  for (uint32_t i = to; i < to + bytes; ++i) {
    Shadow& s = b.shadow[i];
    const auto text = [&] { return "a copy into byte " + std::to_string(i) + " of shared memory "; };
    if (s.copier != Shadow::kNobody) fail(text() + "while another one is under way: a wait is missing");
    if (own ? !ordered(s.writer, s.writer_warp, s.written_block, s.written_warp)
            : s.writer != Shadow::kNobody && s.written_cluster == machine().cluster_epoch)
      fail(text() + "races with a write of " + who(s.writer) + ": a barrier is missing");
    if (i % 16 == 0)
      for (size_t w = 0; w < b.clocks.size(); ++w)
        if (!(own && static_cast<int>(w) == warp_index()) &&
            b.read_at[i / 16 * b.clocks.size() + w] > known[clock_of(rank, w)])
          fail(text() + "races with a read of warp " + std::to_string(w) + ": an arrival or a wait is missing");
    b.memory[i] = kPoison;
    s = Shadow{};
    s.copier = static_cast<int16_t>(thread_index());
  }
  b.mbarriers[index].transfers.push_back({to, bytes, std::move(perform)});
}
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t at) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("the source of an asynchronous copy is not aligned");
  uint8_t* memory = block().memory.data();
  copy_to_barrier(to, bytes, at, block_rank(), [=] { std::memcpy(memory + to, from, bytes); });
}
// Into the shared memory of each block that has a bit in `ranks`, and completes on the barrier of each.
inline void copy_through(uint32_t to, const TensorMap& map, int col, int row, uint32_t at, uint32_t ranks) {
  const uint32_t row_bytes = map.box_cols * 2;
  if (map.swizzled && to % 1024) fail("a swizzled box does not start on 1024 bytes");
  if (ranks >> machine().blocks.size()) fail("a copy goes to a block that the cluster does not have");
  for (uint32_t rank = 0; ranks >> rank; ++rank) {
    if (!(ranks >> rank & 1u)) continue;
    uint8_t* memory = machine().blocks[rank].memory.data();
    copy_to_barrier(to, row_bytes * map.box_rows, at, rank, [=] {
      for (uint32_t r = 0; r < map.box_rows; ++r)
        for (uint32_t c = 0; c < map.box_cols; ++c) {
          uint16_t value = 0;
          if (row + r < map.rows && col + c < map.cols)
            std::memcpy(&value, map.x + (row + r) * map.row_bytes + (col + c) * 2, 2);
          const uint32_t address = to + r * row_bytes + c * 2;
          std::memcpy(memory + (map.swizzled ? swizzle(address) : address), &value, 2);
        }
    });
  }
}
inline void copy_through(uint32_t to, const TensorMap& map, int col, int row, uint32_t at) {
  copy_through(to, map, col, row, at, 1u << block_rank());
}

// Clusters.
inline uint32_t cluster_rank() { return block_rank(); }
inline void sync_cluster() {
  Machine& m = machine();
  ++m.progress;
  const uint32_t mine = m.cluster_epoch;
  for (const Block& b : m.blocks)
    if (b.finished) fail("a barrier of the cluster after a thread ended");
  if (++m.cluster_arrived == m.threads * static_cast<int>(m.blocks.size())) {
    m.cluster_arrived = 0;
    ++m.cluster_epoch;
    for (Block& b : m.blocks) pass_barrier(b);
    share_clocks(0, static_cast<uint32_t>(m.blocks.size()));
  } else {
    while (m.cluster_epoch == mine) yield();
  }
}
template <class T>
T load_cluster(uint32_t address, uint32_t rank) {
  Machine& m = machine();
  if (rank >= m.blocks.size()) fail("there is no block " + std::to_string(rank) + " in the cluster");
  if (rank == cluster_rank()) return load_shared<T>(address);
  Block& other = m.blocks[rank];
  check_range("a load from another block", address, sizeof(T));
  if (other.finished) fail("a load from a block that has ended: a barrier of the cluster is missing");
  for (uint32_t i = address; i < address + sizeof(T); ++i) {
    Shadow& s = other.shadow[i];
    const auto text = [&] { return "a load of byte " + std::to_string(i) + " of another block"; };
    if (s.copier != Shadow::kNobody) fail(text() + " while a copy into it is under way");
    if (!s.valid) fail(text() + ", which nobody wrote");
    if (s.written_cluster == m.cluster_epoch) fail(text() + " races with a write: a barrier of the cluster is missing");
    s.read_cluster = m.cluster_epoch + 1;
  }
  T value;
  std::memcpy(&value, other.memory.data() + address, sizeof(T));
  return value;
}

// Products of a warpgroup.
inline void wgmma_fence() {
  meet("wgmma.fence", nullptr, 0);
  fiber().fenced = true;
}
// meta: of a product that keeps 2 of 4 columns, whose operand b has twice as many; null of others.
inline void wgmma(float* c, int tokens, const uint32_t (&a)[4], const uint32_t* meta, int selector, uint64_t b,
                  float (*widen)(uint32_t)) {
  Fiber& f = fiber();
  if (!f.fenced) fail("a product after its registers may have been written: a fence is missing");
  const uint32_t brought[5] = {a[0], a[1], a[2], a[3], meta ? *meta : 0};
  const auto& lanes = warp().slots[meet("wgmma", brought, 5)];
  Product made{c, a, meta, selector, {}, b, tokens, widen};
  const int lane = thread_index() % kWarp;
  for (int i = 0; i < 4; ++i) std::copy(lanes[lane / 4 * 4 + i], lanes[lane / 4 * 4 + i] + 5, made.quad[i]);
  auto sums = std::find_if(f.sums.begin(), f.sums.end(), [&](const Sums& s) { return s.c == c; });
  if (sums == f.sums.end()) {
    f.sums.push_back({c, std::vector<float>(c, c + tokens / 2)});
    sums = f.sums.end() - 1;
    for (int i = 0; i < tokens / 2; ++i) std::memcpy(c + i, &kSumPoison, 4);
  }
  ++sums->products;
  f.begun.push_back(made);
}
inline void wgmma_commit() {
  Fiber& f = fiber();
  f.products.push_back(std::move(f.begun));
  f.begun.clear();
}
inline float operand_b(const Product& p, int k, int token) {
  const auto start = static_cast<uint32_t>(p.b & 0x3fffu) << 4, stride = static_cast<uint32_t>(p.b >> 32 & 0x3fffu)
                                                                         << 4;
  uint32_t address = start + token / 8 * stride + token % 8 * 128 + 2 * k;
  if (p.b >> 62 == 1) address = swizzle(address);
  touch("a product reads", address, 2, false);
  uint16_t half;
  std::memcpy(&half, block().memory.data() + address, 2);
  return p.widen(half);
}
// The column of b that kept value k of row g (half 0) or g + 8 meets.
inline int column_of(const Product& p, int k, int half) {
  if (!p.meta) return k;
  // Of the two lanes that bring meta, each has 16 columns, which are 8 kept values; 2 bits for each of them.
  const uint32_t word = p.quad[2 * p.selector + k / 8][4] >> 16 * half;
  return 4 * (k / 2) + static_cast<int>(word >> 2 * (k % 8) & 3u);
}
inline void wgmma_perform(const Product& p) {
  Fiber& f = fiber();
  const int lane = thread_index() % kWarp;
  if (!std::equal(p.operand, p.operand + 4, p.quad[lane % 4]) || (p.meta && *p.meta != p.quad[lane % 4][4]))
    fail("the operand of a product was written while it is under way: a wait is missing");
  auto sums = std::find_if(f.sums.begin(), f.sums.end(), [&](const Sums& s) { return s.c == p.c; });
  for (int j = 0; j < p.tokens / 8; ++j)
    for (int odd = 0; odd < 2; ++odd)
      for (int k = 0; k < 16; ++k)
        for (int half = 0; half < 2; ++half)
          sums->values[4 * j + 2 * half + odd] +=
              p.widen(p.quad[k % 8 / 2][half + 2 * (k / 8)] >> 16 * (k % 2) & 0xffffu) *
              operand_b(p, column_of(p, k, half), 8 * j + 2 * (lane % 4) + odd);
  if (--sums->products) return;
  for (size_t i = 0; i < sums->values.size(); ++i) {
    if (std::memcmp(p.c + i, &kSumPoison, 4)) fail("the sums of a product were written while it is under way");
    p.c[i] = sums->values[i];
  }
  f.sums.erase(sums);
}
inline void wgmma_wait(size_t pending) {
  Fiber& f = fiber();
  while (f.products.size() > pending) {
    for (const Product& p : f.products.front()) wgmma_perform(p);
    f.products.erase(f.products.begin());
  }
  meet("wgmma.wait_group", nullptr, 0);
}

}  // namespace alphaprune::emulator
