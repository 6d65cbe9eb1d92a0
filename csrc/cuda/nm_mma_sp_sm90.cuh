// What nm_mma_sp is on sm_90a: the weight never waits for anything but memory. One block on a multiprocessor owns up to
// eight panels of rows (launch.h). One of its warps lets the memory system bring, a stage of 128 columns after another,
// the panels of all these rows and x for all of them at once (TMA, swizzled) into a ring of nearly all shared memory;
// the ring goes on from one unit of work to the next. Of the other warps each has a panel of rows; where there are
// several for one, its `slices`, they take the stages in turn. They add up through shared memory, and, where a cluster
// shares the columns, through that of its blocks, in a fixed order.
#pragma once

#include "device_sm90.cuh"
#include "nm_mma_sp.cuh"

namespace alphaprune::cuda {

constexpr int kStreamWarps = 15;  // that multiply, at most: with the one that brings, 128 registers for each thread
constexpr int kStreamGroup = 8;   // panels of a unit, at most
constexpr int kStreamMostStages = 32;
constexpr int kStreamMostSplits = 8;  // blocks of a cluster: all that every device has
constexpr uint32_t kPanelBytes = kNmPanel * 16;
constexpr uint32_t kStreamFlags = (kStreamWarps + 1) * sizeof(float);
constexpr int kStreamBox = kSwizzleBytes / 2;  // columns of a box of x

static_assert(kNmCols == 2 * kStreamBox, "a stage has two boxes of x");

ALPHAPRUNE_BOTH constexpr uint32_t stream_x_bytes(int tiles) { return 2 * tiles * 8 * kSwizzleBytes; }

struct StreamProblem {
  NmProblem nm;
  int row_panels;
  int group;            // panels of rows of a unit
  int slices;           // warps of a panel
  int stages;           // a multiple of slices
  int splits;           // blocks of a cluster that share the columns of a unit
  int units, clusters;  // units of work; blocks, or clusters where they split columns, that take them in turn
  bool fours;           // whether four neighbouring outputs can be stored at once
  ALPHAPRUNE_BOTH int warps() const { return group * slices; }         // that multiply
  ALPHAPRUNE_BOTH int sum_row() const { return group * kNmRows + 4; }  // floats: lanes store to different banks
  ALPHAPRUNE_BOTH uint32_t sum_bytes(int tiles) const { return slices * tiles * 8 * sum_row() * sizeof(float); }
  ALPHAPRUNE_BOTH uint32_t stage_bytes(int tiles) const { return stream_x_bytes(tiles) + group * kPanelBytes; }
  ALPHAPRUNE_BOTH uint32_t ring_bytes(int tiles) const {
    const uint32_t ring = stages * stage_bytes(tiles), sums = sum_bytes(tiles);
    return ring > sums ? ring : sums;
  }
  // Sums of a tile of tokens, for units that others follow.
  ALPHAPRUNE_BOTH uint32_t tile_sum_bytes() const { return units > clusters ? sum_bytes(1) : 0; }
  ALPHAPRUNE_BOTH size_t shared_bytes(int tiles) const {
    return kSwizzleAlign + ring_bytes(tiles) + tile_sum_bytes() + kStreamFlags + stages * 2 * kMbarrierBytes;
  }
};

// Where things lie in shared memory: stages of x, stages of the weight (after the last unit, sums over both), sums of a
// tile, flags, barriers.
struct StreamShared {
  uint32_t x, weight, sums, flags, barriers;
  ALPHAPRUNE_DEVICE StreamShared(const StreamProblem& p, int tiles)
      : x((shared_start() + kSwizzleAlign - 1) / kSwizzleAlign * kSwizzleAlign),
        weight(x + p.stages * stream_x_bytes(tiles)),
        sums(x + p.ring_bytes(tiles)),
        flags(sums + p.tile_sum_bytes()),
        barriers(flags + kStreamFlags) {}
  ALPHAPRUNE_DEVICE uint32_t full(int stage) const { return barriers + stage * 2 * kMbarrierBytes; }
  ALPHAPRUNE_DEVICE uint32_t empty(int stage) const { return full(stage) + kMbarrierBytes; }
};

// The share of a block: panels of columns of every unit.
struct StreamColumns {
  int begin, end;
  ALPHAPRUNE_DEVICE StreamColumns(const StreamProblem& p, int rank)
      : begin(p.nm.col_panels * rank / p.splits), end(p.nm.col_panels * (rank + 1) / p.splits) {}
};

// Panels of rows that a unit has.
ALPHAPRUNE_DEVICE int panels_of(const StreamProblem& p, int unit) {
  const int left = p.row_panels - unit * p.group;
  return left < p.group ? left : p.group;
}

// Lane i brings panel i of every stage, and the lane after these x.
template <int kTiles>
ALPHAPRUNE_DEVICE void bring_panels(const StreamProblem& p, const TensorMap& x, const StreamShared& shared, int cluster,
                                    StreamColumns columns, int lane) {
  // Of the first unit, the weight of as many stages as the ring has: it does not depend on kernels before.
  const int width = columns.end - columns.begin, ahead = width < p.stages ? width : p.stages;
  const auto bring_weight = [&](int index, bool there, const uint4* from) {
    if (lane >= p.group) return;
    const uint32_t full = shared.full(index);
    mbarrier_arrive_expect(full, there ? kPanelBytes : 0);
    if (there) copy_bulk(shared.weight + (index * p.group + lane) * kPanelBytes, from, kPanelBytes, full);
  };
  const auto panel_at = [&](int unit, int col) {
    const bool there = lane < panels_of(p, unit);
    return panels_at(p.nm, unit * p.group + (there ? lane : 0)) + col * kNmPanel;
  };
  {
    const uint4* from = panel_at(cluster, columns.begin);
    ALPHAPRUNE_NO_UNROLL
    for (int i = 0; i < ahead; ++i, from += kNmPanel) bring_weight(i, lane < panels_of(p, cluster), from);
  }
  wait_for_kernels_before();
  int index = 0, before = 0;
  uint32_t parity = 1;
  ALPHAPRUNE_NO_UNROLL
  for (int unit = cluster; unit < p.units; unit += p.clusters) {
    const bool there = lane < panels_of(p, unit);
    const uint4* from = panel_at(unit, columns.begin);
    ALPHAPRUNE_NO_UNROLL
    for (int col = columns.begin; col < columns.end; ++col, ++before, from += kNmPanel) {
      if (before >= p.stages) mbarrier_wait(shared.empty(index), parity);
      if (before >= ahead) bring_weight(index, there, from);
      if (lane == p.group) {
        const uint32_t full = shared.full(index);
        mbarrier_arrive_expect(full, stream_x_bytes(kTiles));
        constexpr uint32_t kBox = stream_x_bytes(kTiles) / 2;
        const uint32_t to = shared.x + index * 2 * kBox;
        const int first = col * kNmCols;
        copy_box(to, x, first, 0, full);
        copy_box(to + kBox, x, first + kStreamBox, 0, full);
      }
      if (++index == p.stages) {
        index = 0;
        parity ^= 1;
      }
    }
  }
}

// A block's share of the outputs of a unit, from `first` on: those of `tokens` tokens whose sums begin at `sums`, of
// every slice `room` tokens.
template <class Value>
ALPHAPRUNE_DEVICE void store_stream(const StreamProblem& p, const StreamShared& shared, uint32_t sums, int room,
                                    int unit, int rank, int first, int tokens) {
  const auto load = [&](uint32_t at, int from) {
    return p.splits > 1 ? load_cluster_u128(at, from) : load_shared_u128(at);
  };
  float any = 0;
  for (int from = 0; from < p.splits; ++from) {
    ALPHAPRUNE_UNROLL
    for (uint32_t at = 0; at < kStreamFlags; at += 16) {
      const uint4 flags = load(shared.flags + at, from);
      any += float_of(flags.x) + float_of(flags.y) + float_of(flags.z) + float_of(flags.w);
    }
  }
  const int fours = p.group * kNmRows / 4, all = fours * tokens;
  const int begin = all * rank / p.splits, end = all * (rank + 1) / p.splits;
  for (int index = begin + thread_index(); index < end; index += p.warps() * kWarp) {
    const int token = index / fours, in_unit = (index - token * fours) * 4;
    const int row = unit * p.group * kNmRows + in_unit;
    if (!p.nm.out.has(row)) continue;
    float total[4] = {};
    for (int from = 0; from < p.splits; ++from)
      for (int slice = 0; slice < p.slices; ++slice) {
        const uint4 part = load(sums + 4 * ((slice * room + token) * p.sum_row() + in_unit), from);
        ALPHAPRUNE_UNROLL
        for (int i = 0; i < 4; ++i) total[i] += float_of(word_of(part, i));
      }
    if (is_nan(any)) {
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < 4; ++i)
        if (prunes_not_finite<Value>(p.nm, row / kNmRows, in_unit % kNmRows + i, first + token))
          total[i] = float_of(0x7fc00000u);
    }
    if (p.fours) {
      store_four_outputs<Value>(p.nm.out, first + token, row, total);
    } else {
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < 4; ++i)
        if (p.nm.out.has(row + i)) store_output<Value>(p.nm.out, first + token, row + i, total[i]);
    }
  }
}

// What a warp does that multiplies.
template <class Value, int kTiles>
ALPHAPRUNE_DEVICE void multiply_panels(const StreamProblem& p, const StreamShared& shared, int cluster, int rank,
                                       StreamColumns columns) {
  constexpr uint32_t kX = stream_x_bytes(kTiles);
  const int lane = lane_index(), warp = warp_index(), panel = warp % p.group, slice = warp / p.group;
  // Fragments: lane 8 i + r names row r (a token) of columns 8 i to 8 i + 7 of a step.
  const uint32_t mine = shuffle((lane & 7) * kSwizzleBytes + (((lane >> 3) ^ (lane & 7)) << 4), lane);
  // The panels' warps look for what is not finite in different steps of x.
  uint32_t probes = 0;
  ALPHAPRUNE_UNROLL
  for (int step = 0; step < kNmSteps; ++step) probes |= static_cast<uint32_t>(step % p.group == panel) << step;

  int index = slice, stage = slice, past = 0;
  uint32_t parity = 0;
  ALPHAPRUNE_NO_UNROLL
  for (int unit = cluster; unit < p.units; unit += p.clusters) {
    const int panels = panels_of(p, unit);
    // In a stage; who has no panel takes the last one there is, for nothing.
    const uint32_t at = opaque(shared.weight + (panel < panels ? panel : panels - 1) * kPanelBytes + lane * 16);
    // probe: fragments of x times themselves, finite only where all of x is, whatever the metadata selects.
    float sum[2][kTiles][4] = {}, probe[4] = {};
    past += columns.end - columns.begin;
    ALPHAPRUNE_NO_UNROLL
    for (; stage < past; stage += p.slices) {  // cubins: main: the loop around it runs once per unit of work
      mbarrier_wait(shared.full(index), parity);
      const uint32_t x = opaque(shared.x + index * kX + mine), weight = opaque(at + index * p.group * kPanelBytes);
      const uint4 words = load_shared_u128(weight + kNmFragments * kWarp * 16);
      ALPHAPRUNE_UNROLL
      for (int step = 0; step < kNmSteps; ++step) {
        uint4 a[2], b[kTiles];
        ALPHAPRUNE_UNROLL
        for (int r = 0; r < 2; ++r) a[r] = load_shared_u128(weight + (step * 2 + r) * kWarp * 16);
        ALPHAPRUNE_UNROLL
        for (int t = 0; t < kTiles; ++t)
          b[t] = load_matrices((x ^ 64 * (step % 2)) + t * 8 * kSwizzleBytes + step / 2 * kX / 2);
        ALPHAPRUNE_UNROLL
        for (int t = 0; t < kTiles; ++t) {
          ALPHAPRUNE_UNROLL
          for (int r = 0; r < 2; ++r)
            multiply<Value>(sum[r][t], a[r], b[t], word_of(words, step / 2 + 2 * r), step % 2);
          if (probes >> step & 1u) mma_sparse<0, Value>(probe, b[t], b[t], word_of(words, 0));
        }
      }
      sync_warp();  // every lane has read
      if (lane == 0) mbarrier_arrive(shared.empty(index));
      index += p.slices;
      if (index >= p.stages) {
        index -= p.stages;
        parity ^= 1;
      }
    }

    const float poison = sum_lanes(poison_of(probe[0] + probe[1] + probe[2] + probe[3]));
    // Sums in shared memory: [slice][token][row]. After the last unit all of them lie over the ring, before that those
    // of one tile of tokens after another have a place of their own.
    const bool last = unit + p.clusters >= p.units;
    const int threads = p.warps() * kWarp, room = last ? 8 * kTiles : 8;
    const uint32_t sums = last ? shared.x : shared.sums, row_bytes = 4 * p.sum_row();
    if (last) sync_block();     // nobody reads the ring any more
    wait_for_kernels_before();  // they may still read what is written now
    if (lane == 0) store_shared_f32(shared.flags + 4 * warp, poison);
    ALPHAPRUNE_NO_UNROLL
    for (int first = 0; first < 8 * kTiles; first += room) {
      uint32_t to = opaque(sums + (slice * room + 2 * (lane % 4)) * row_bytes + 4 * (panel * kNmRows + lane / 4));
      ALPHAPRUNE_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (8 * t < first || 8 * t >= first + room) continue;
        ALPHAPRUNE_UNROLL
        for (int r = 0; r < 2; ++r) ALPHAPRUNE_UNROLL
        for (int i = 0; i < 4; ++i) store_shared_f32(to + i % 2 * row_bytes + 4 * (16 * r + i / 2 * 8), sum[r][t][i]);
        to += 8 * row_bytes;
      }
      if (p.splits > 1) {
        sync_cluster();
      } else {
        sync_warps(1, threads);
      }
      const int left = p.nm.tokens - first;
      store_stream<Value>(p, shared, sums, room, unit, rank, first, left < room ? left : room);
      if (!last) sync_warps(1, threads);  // nobody writes over sums that are read
    }
  }
}

// kTiles: of 8 tokens, as many as boxes of x have rows of.
template <class Value, int kTiles>
ALPHAPRUNE_KERNEL __launch_bounds__((kStreamWarps + 1) * kWarp, 1)
    nm_mma_sp_sm90(const StreamProblem p, const __grid_constant__ TensorMap x) {
#if ALPHAPRUNE_SM90
  const int rank = static_cast<int>(cluster_rank()), cluster = block_x() / p.splits;
  const StreamShared shared(p, kTiles);
  const StreamColumns columns(p, rank);
  let_next_begin();
  if (thread_index() == 0) {
    ALPHAPRUNE_NO_UNROLL
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(shared.full(i), p.group + 1);
      mbarrier_init(shared.empty(i), p.group);
    }
    mbarrier_fence_init();
  }
  if (thread_index() <= kStreamWarps) store_shared_f32(shared.flags + 4 * thread_index(), 0);
  sync_block();

  if (warp_index() < p.warps()) {
    multiply_panels<Value, kTiles>(p, shared, cluster, rank, columns);
  } else {
    bring_panels<kTiles>(p, x, shared, cluster, columns, lane_index());
    sync_block();
    if (p.splits > 1) sync_cluster();
  }
  if (p.splits > 1) sync_cluster();  // nobody leaves while others read its sums
#endif
}

}  // namespace alphaprune::cuda
