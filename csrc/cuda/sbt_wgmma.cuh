// y = x Wᵀ for 32 to 256 tokens on the tensor cores of sm_90a, straight from SBT. A block owns 128 rows: each warp of
// its two warpgroups decodes a row tile into the registers of wgmma's operand a, for all tokens at once. One more warp
// lets the memory system bring x (TMA, swizzled) and the packed weight into a ring of stages of 128 columns. The blocks
// of a cluster share the columns between them and add up through each other's shared memory, in a fixed order.
#pragma once

#include "../layout.h"
#include "device_sm90.cuh"
#include "output.cuh"

namespace alphaprune::cuda {

constexpr int kWideGroups = 2;               // warpgroups
constexpr int kWideTiles = 4 * kWideGroups;  // row tiles of a block, one for each of their warps
constexpr int kWideRows = 16 * kWideTiles;
// With 256 tokens the sums leave too few registers for decoding, unless a whole warpgroup gives some of its own.
ALPHAPRUNE_BOTH constexpr bool wide_trades(int tokens) { return tokens > 128; }
ALPHAPRUNE_BOTH constexpr int wide_threads(int tokens) {
  return wide_trades(tokens) ? (kWideGroups + 1) * kWarpgroup : (kWideTiles + 1) * kWarp;
}
constexpr int kWideChunk = 2;  // macro tiles of a stage
constexpr int kWideCols = kWideChunk * sbt::kTileCols;
constexpr int kWideSteps = kWideChunk * sbt::kSteps;
constexpr int kWideMostStages = 4;
constexpr int kWideMostSplits = 8;                            // blocks of a cluster: all that every device has
constexpr uint32_t kWideMaskBytes = sbt::kWords * 4;          // of a macro tile
constexpr uint32_t kWideMeta = kWideChunk * sbt::kWords * 8;  // {mask word, address} of a warp's stage
constexpr int kWideSumRow = kWideRows + 4;        // floats, so that the lanes of a fragment store to different banks
constexpr uint32_t kBoxCols = kSwizzleBytes / 2;  // columns of a box of x

static_assert(kWideChunk * sbt::kWords == 2 * kWarp, "a lane holds two neighbouring mask words");
static_assert(kSwizzleAlign % (2 * kWideMeta) == 0,
              "of what a warp alternates between, the addresses differ in one bit");
static_assert(kBoxCols == sbt::kTileCols, "a box of x is as wide as a macro tile");

struct WideProblem {
  const unsigned char* values;
  const uint32_t* mask;
  const uint32_t* offsets;
  Output out;
  int tokens, row_tiles, col_tiles;
  int splits;  // blocks of a cluster
  int stages;
  uint32_t value_bytes;  // of the largest macro tile, a multiple of 16
  bool fours;            // whether four neighbouring outputs can be stored at once
  Opaque number;
};

ALPHAPRUNE_BOTH constexpr uint32_t wide_x_bytes(int tokens) { return kWideChunk * tokens * kSwizzleBytes; }
ALPHAPRUNE_BOTH constexpr uint32_t wide_weight_bytes(uint32_t value_bytes) {
  return kWideTiles * kWideChunk * (kWideMaskBytes + value_bytes);
}
ALPHAPRUNE_BOTH constexpr size_t wide_shared_bytes(int tokens, int stages, uint32_t value_bytes) {
  const size_t ring = stages * (static_cast<size_t>(wide_x_bytes(tokens)) + wide_weight_bytes(value_bytes));
  const size_t sums = static_cast<size_t>(tokens) * kWideSumRow * sizeof(float);
  const size_t rest = 2 * kWideTiles * kWideMeta + 2 * kWideMostStages * kMbarrierBytes;
  return kSwizzleAlign + (ring + rest > sums ? ring + rest : sums);
}

// Where things lie in shared memory: stages of x; {mask word, address} of two stages for each warp, the second of which
// differs from the first in one bit of the address; stages of the weight; barriers. After the last product the sums lie
// over all of it.
struct WideShared {
  uint32_t x, weight, meta, barriers;
  uint32_t x_bytes, weight_bytes, value_bytes;

  ALPHAPRUNE_DEVICE WideShared(int tokens, int stages, uint32_t values)
      : x((shared_start() + kSwizzleAlign - 1) / kSwizzleAlign * kSwizzleAlign),
        x_bytes(wide_x_bytes(tokens)),
        weight_bytes(wide_weight_bytes(values)),
        value_bytes(values) {
    meta = x + stages * x_bytes;
    weight = meta + 2 * kWideTiles * kWideMeta;
    barriers = weight + stages * weight_bytes;
  }
  ALPHAPRUNE_DEVICE uint32_t full(int stage) const { return barriers + stage * 2 * kMbarrierBytes; }
  ALPHAPRUNE_DEVICE uint32_t empty(int stage) const { return full(stage) + kMbarrierBytes; }
  // Of a row tile's macro tiles in a stage; their values, each `value_bytes` long, follow all masks.
  ALPHAPRUNE_DEVICE uint32_t mask_at(int stage, int tile) const {
    return weight + stage * weight_bytes + tile * kWideChunk * kWideMaskBytes;
  }
  ALPHAPRUNE_DEVICE uint32_t values_at(int stage, int tile) const {
    return weight + stage * weight_bytes + kWideTiles * kWideChunk * kWideMaskBytes + tile * kWideChunk * value_bytes;
  }
};

// A place in the ring, and how often it came round.
struct WideStage {
  int index = 0;
  uint32_t parity = 0;
  ALPHAPRUNE_DEVICE void next(int stages) {
    if (++index == stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// Lane 2 r + i brings macro tile i of every stage of row tile r; lane 0 brings x besides.
template <int kTokens>
ALPHAPRUNE_DEVICE void bring(const WideProblem& p, const TensorMap& x, const WideShared& shared, int first_tile,
                             int begin, int end, int lane) {
  constexpr int kLanes = kWideTiles * kWideChunk;
  const int tile = lane / kWideChunk, half = lane % kWideChunk;
  const bool there = lane < kLanes && first_tile + tile < p.row_tiles;
  const size_t row = static_cast<size_t>(there ? first_tile + tile : 0) * p.col_tiles;
  uint32_t first = 0, last = 0;
  const auto find = [&](int chunk) {
    const int col = chunk * kWideChunk + half;
    if (!there || chunk >= end || col >= p.col_tiles) return;
    first = load_cached(p.offsets + row + col);
    last = load_cached(p.offsets + row + col + 1);
  };
  find(begin);
  WideStage stage;
  ALPHAPRUNE_NO_UNROLL
  for (int chunk = begin; chunk < end; ++chunk) {
    const size_t at = static_cast<size_t>(first) * 16;
    const uint32_t bytes = (last - first) * 16;
    find(chunk + 1);
    if (chunk - begin >= p.stages) mbarrier_wait(shared.empty(stage.index), stage.parity ^ 1);
    const uint32_t full = shared.full(stage.index);
    const int col = chunk * kWideChunk + half;
    const bool kept = there && col < p.col_tiles;
    if (lane < kLanes) {
      mbarrier_arrive_expect(full, (kept ? kWideMaskBytes + bytes : 0) + (lane == 0 ? shared.x_bytes : 0));
      if (kept) {
        copy_bulk(shared.mask_at(stage.index, tile) + half * kWideMaskBytes, p.mask + (row + col) * sbt::kWords,
                  kWideMaskBytes, full);
        if (bytes)
          copy_bulk(shared.values_at(stage.index, tile) + half * shared.value_bytes, p.values + at, bytes, full);
      }
      if (lane == 0) {
        ALPHAPRUNE_UNROLL
        for (int box = 0; box < kWideChunk; ++box)
          copy_box(shared.x + stage.index * shared.x_bytes + box * kTokens * kSwizzleBytes, x,
                   chunk * kWideCols + box * static_cast<int>(kBoxCols), 0, full);
      }
    }
    stage.next(p.stages);
  }
}

// Where a lane finds its weights of a sub-tile step: those of a pair of rows, 2 g and 2 g + 1, in the columns 2 t,
// 2 t + 1, 2 t + 8 and 2 t + 9. Rows 2 g are rows g of the operand and rows 2 g + 1 its rows g + 8, so that one mask
// word serves a lane; the columns are those of the operand, so that x stays as it is.
struct WideLane {
  uint32_t below[4], bits[8], spare[4] = {};
  Opaque number;
  ALPHAPRUNE_DEVICE WideLane(int lane, Opaque numbers) : number(numbers) {
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int bit = 2 * (lane % 4) + 8 * i;
      below[i] = shuffle((1u << bit) - 1, lane);
      bits[2 * i] = shuffle(1u << bit, lane);
      bits[2 * i + 1] = shuffle(2u << bit, lane);
    }
  }
  // The operand a: {row 2 g, row 2 g + 1} of columns 2 t and 2 t + 1, then of the two 8 further on.
  ALPHAPRUNE_DEVICE void decode(uint2 word, uint32_t (&a)[4]) {
    uint32_t start[4];
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) start[i] = word.y + 2 * popcount(word.x & below[i]);
    expand_pairs(word.x, bits, start, number, spare, a);
  }
};

// The mask words 2 * lane and 2 * lane + 1 of a stage beside the addresses of their values.
ALPHAPRUNE_DEVICE void store_wide_meta(uint2 mask, uint32_t values, uint32_t meta, int lane) {
  const uint32_t bytes0 = 2 * popcount(mask.x), bytes = bytes0 + 2 * popcount(mask.y);
  const uint32_t start = values + scan_inclusive<kWarp / kWideChunk>(bytes) - bytes;
  store_shared_u128(meta + lane * 16, {mask.x, start, mask.y, start + bytes0});
}

// y of the tokens from `first` on, `count` of them, four rows at a time: the sums of all blocks of the cluster.
template <class Value>
ALPHAPRUNE_DEVICE void store_wide(const WideProblem& p, uint32_t sums, int64_t first_row, int first, int count) {
  constexpr int kFours = kWideRows / 4;
  for (int index = thread_index(); index < kFours * count; index += kWideTiles * kWarp) {
    const int token = first + index / kFours, in_block = index % kFours * 4;
    const int64_t row = first_row + in_block;
    if (row >= p.out.of[0].rows) continue;
    float total[4] = {};
    for (int rank = 0; rank < p.splits; ++rank) {
      const uint4 part = load_cluster_u128(sums + 4 * (token * kWideSumRow + in_block), rank);
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < 4; ++i) total[i] += float_of(word_of(part, i));
    }
    if (p.fours) {
      store_four_outputs<Value>(p.out, token, static_cast<int>(row), total);
    } else {
      for (int i = 0; i < 4 && row + i < p.out.of[0].rows; ++i)
        store_output<Value>(p.out, token, static_cast<int>(row) + i, total[i]);
    }
  }
}

// What a warp of the warpgroups does with the stages of its block, and with the sums of all blocks of the cluster.
template <class Value, int kTokens>
ALPHAPRUNE_DEVICE void multiply_wide(const WideProblem& p, const WideShared& shared, int first_tile, int rank,
                                     int begin, int end) {
  const int lane = lane_index(), warp = warp_index(), group = lane / 4;
  WideLane mine(lane, p.number);
  float sum[kTokens / 2] = {};
  uint32_t a[2][4] = {};
  // Macro tiles that this lane's mask words may come from.
  int left = first_tile + warp < p.row_tiles ? p.col_tiles - begin * kWideChunk - lane / (kWarp / kWideChunk) : 0;
  const uint64_t ring = operand_at(shared.x);
  WideStage stage;
  uint32_t meta = shared.meta + warp * 2 * kWideMeta, before = 0;
  // Every block has at least one stage: without that knowledge the sums would need registers twice.
  int chunk = begin;
  ALPHAPRUNE_NO_UNROLL
  do {
    mbarrier_wait(shared.full(stage.index), stage.parity);
    uint2 mask{0, 0};
    if (left > 0) mask = load_shared_u64(shared.mask_at(stage.index, warp) + lane * 8);
    left -= kWideChunk;
    store_wide_meta(mask, shared.values_at(stage.index, warp) + lane / (kWarp / kWideChunk) * p.value_bytes, meta,
                    lane);
    sync_warp();  // the words are there, and every lane has decoded the stage before

    const uint64_t boxes = operand_further(ring, stage.index * shared.x_bytes);
    uint2 next = load_shared_u64(meta + group * 8);
    ALPHAPRUNE_UNROLL
    for (int step = 0; step < kWideSteps; ++step) {
      const uint2 word = next;
      if (step + 1 < kWideSteps) next = load_shared_u64(meta + (step + 1) * 64 + group * 8);
      mine.decode(word, a[step % 2]);
      wgmma_fence();
      const int box = step / sbt::kSteps, at = step % sbt::kSteps * 32;  // bytes of 16 columns
      wgmma<Value, kTokens>(sum, a[step % 2], operand_further(boxes, box * kTokens * kSwizzleBytes + at));
      wgmma_commit();
      wgmma_wait<1>();  // the step before is complete: its operand may be written again
      if (step == 0 && chunk > begin && lane == 0) mbarrier_arrive(before);
    }
    before = shared.empty(stage.index);
    meta ^= kWideMeta;
    stage.next(p.stages);
  } while (++chunk < end);
  wgmma_wait<0>();

  // The ring becomes sums[token][row].
  sync_block();
  ALPHAPRUNE_UNROLL
  for (int j = 0; j < kTokens / 8; ++j) ALPHAPRUNE_UNROLL
  for (int k = 0; k < 2; ++k) {
    const int token = 8 * j + 2 * (lane % 4) + k, row = warp * 16 + 2 * group;
    store_shared_u64(shared.x + 4 * (token * kWideSumRow + row),
                     {bits_of(sum[4 * j + k]), bits_of(sum[4 * j + 2 + k])});
  }
  sync_cluster();
  const int first = p.tokens * rank / p.splits, past = p.tokens * (rank + 1) / p.splits;
  store_wide<Value>(p, shared.x, static_cast<int64_t>(first_tile) * 16, first, past - first);
  sync_cluster();  // nobody leaves while others read its sums
}

// kTokens: 32, 64, 128 or 256, at least p.tokens; boxes of x have so many rows.
template <class Value, int kTokens>
ALPHAPRUNE_KERNEL __launch_bounds__(wide_threads(kTokens), 1)
    sbt_wgmma(const WideProblem p, const __grid_constant__ TensorMap x) {
#if ALPHAPRUNE_SM90
  const int rank = static_cast<int>(cluster_rank()), first_tile = block_x() / p.splits * kWideTiles;
  const int chunks = (p.col_tiles + kWideChunk - 1) / kWideChunk;
  const int begin = chunks * rank / p.splits, end = chunks * (rank + 1) / p.splits;
  const WideShared shared(kTokens, p.stages, p.value_bytes);

  if (thread_index() == 0) {
    ALPHAPRUNE_NO_UNROLL
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(shared.full(i), kWideTiles * kWideChunk);
      mbarrier_init(shared.empty(i), kWideTiles);
    }
    mbarrier_fence_init();
  }
  sync_block();

  if (warp_index() < kWideTiles) {
    if constexpr (wide_trades(kTokens)) take_registers<232>();
    multiply_wide<Value, kTokens>(p, shared, first_tile, rank, begin, end);
  } else {
    if constexpr (wide_trades(kTokens)) give_registers<40>();
    if (warp_index() == kWideTiles) bring<kTokens>(p, x, shared, first_tile, begin, end, lane_index());
    sync_block();
    sync_cluster();
    sync_cluster();
  }
#endif
}

}  // namespace alphaprune::cuda
