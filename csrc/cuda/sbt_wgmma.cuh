// y = x Wᵀ for up to 256 tokens on the tensor cores of sm_90a, straight from SBT. There is a block for each
// multiprocessor, and it, or a cluster of them that shares the columns, owns an equal share of the row tiles, done in
// rounds of as many as its warps have. Each warp decodes a row tile into the registers of wgmma's operand a, for all
// tokens at once. One more warpgroup lets the memory system bring x (TMA, swizzled) and the packed weight into a ring
// of stages of 128 columns through nearly all shared memory, from one round to the next without a pause: one warp alone
// could not order so many copies in time, as those of its lanes go one after another. Where there are several
// warpgroups for the same rows, `slices`, they take the stages in turn. At the end of a round they add up through
// shared memory, and where a cluster shares the columns, through that of its blocks, in a fixed order.
#pragma once

#include "chunk.cuh"
#include "device_sm90.cuh"
#include "output.cuh"

namespace alphaprune::cuda {

// Warpgroups of a block that multiply: as many as the registers for sums leave room for.
ALPHAPRUNE_BOTH constexpr int wide_groups(int tokens) { return tokens <= 64 ? 4 : tokens == 128 ? 3 : 2; }
// With 256 tokens the sums leave too few registers for decoding, unless those who copy give some of their own.
ALPHAPRUNE_BOTH constexpr bool wide_trades(int tokens) { return tokens > 128; }
ALPHAPRUNE_BOTH constexpr int wide_threads(int groups) { return (groups + 1) * kWarpgroup; }
// Tokens whose sums are in shared memory at a time where other rounds follow.
ALPHAPRUNE_BOTH constexpr int wide_room(int tokens) { return tokens <= 64 ? 8 : tokens / 8; }

// Steps that are decoded before their products begin; sets of operands of so many, which are decoded by turns.
constexpr int kWideAtOnce = 2, kWideSets = 2;
constexpr int kWideMostStages = 16;
constexpr int kWideMostSplits = 8;                   // blocks of a cluster: all that every device has
constexpr uint32_t kWideTileMask = sbt::kWords * 4;  // bytes of a macro tile
constexpr uint32_t kBoxCols = kSwizzleBytes / 2;     // columns of a box of x
constexpr int kBoxes = kChunkCols / kBoxCols;        // of a chunk, whose columns are the same for all kinds of values

static_assert(kChunkSteps % (kWideSets * kWideAtOnce) == 0, "a chunk begins with the first set");
static_assert(sbt::kUnit * 2 == 16, "the values of every macro tile start on 16 bytes");

// One of the weights that share x, where it was packed.
struct WideMember {
  const unsigned char* values;
  const uint32_t* mask;
  const uint32_t* offsets;
};

struct WideProblem {
  WideMember of[kMostMembers];
  Output out;  // which numbers rows as row tiles are
  int tokens, row_tiles, col_tiles;
  int clusters, splits;  // that share the row tiles; blocks of each, which share the columns
  int groups, slices;    // warpgroups of different rows; for the same ones
  int stages;            // a multiple of slices: the same warps wait for a barrier in all of its phases
  uint32_t value_bytes;  // of the largest chunk, a multiple of 16
  uint32_t mask_bytes;   // of a chunk
  uint32_t stage_bytes;  // of the weight
  bool fours;            // whether four neighbouring outputs can be stored at once
  Opaque number;

  ALPHAPRUNE_BOTH int tiles() const { return 4 * groups; }                          // of a round
  ALPHAPRUNE_BOTH uint32_t tile_bytes() const { return mask_bytes + value_bytes; }  // in a stage
  ALPHAPRUNE_BOTH int warps() const { return tiles() * slices; }
  ALPHAPRUNE_BOTH int sum_row() const { return groups * 64 + 4; }  // floats: lanes store to different banks
  ALPHAPRUNE_BOTH uint32_t x_bytes(int box) const { return kBoxes * box * kSwizzleBytes; }
  ALPHAPRUNE_BOTH uint32_t sum_bytes(int count) const { return slices * count * sum_row() * sizeof(float); }
  // The ring and the words of each warp; after the last product, sums over all of it.
  ALPHAPRUNE_BOTH uint32_t ring_bytes(int box) const {
    const uint32_t ring = stages * (x_bytes(box) + stage_bytes) + warps() * kMetaBytes, sums = sum_bytes(box);
    return ring > sums ? ring : sums;
  }
  // Whether some share takes more than one round.
  ALPHAPRUNE_BOTH bool repeats() const { return (row_tiles + clusters - 1) / clusters > tiles(); }
  ALPHAPRUNE_BOTH size_t shared_bytes(int box) const {
    return kSwizzleAlign + ring_bytes(box) + (repeats() ? sum_bytes(wide_room(box)) : 0) + stages * 2 * kMbarrierBytes;
  }
};

// Where things lie in shared memory: stages of x; {mask word, address} of each warp; stages of the weight; sums of some
// tokens; barriers. After the last product of all the sums lie over everything but barriers.
struct WideShared {
  uint32_t x, meta, weight, sums, barriers;
  uint32_t x_bytes;

  ALPHAPRUNE_DEVICE WideShared(const WideProblem& p, int box)
      : x((shared_start() + kSwizzleAlign - 1) / kSwizzleAlign * kSwizzleAlign), x_bytes(p.x_bytes(box)) {
    meta = x + p.stages * x_bytes;
    weight = meta + p.warps() * kMetaBytes;
    sums = x + p.ring_bytes(box);
    barriers = sums + (p.repeats() ? p.sum_bytes(wide_room(box)) : 0);
  }
  ALPHAPRUNE_DEVICE uint32_t full(int stage) const { return barriers + stage * 2 * kMbarrierBytes; }
  ALPHAPRUNE_DEVICE uint32_t empty(int stage) const { return full(stage) + kMbarrierBytes; }
};

// What a block does: row tiles by rounds, and of every one of them a range of chunks, of kTiles macro tiles.
template <int kTiles>
struct WideShare {
  int first, tiles, rounds;  // of the cluster
  int begin, end, rank;      // chunks of this block; which one it is

  ALPHAPRUNE_DEVICE explicit WideShare(const WideProblem& p) {
    const int chunks = (p.col_tiles + kTiles - 1) / kTiles, cluster = opaque(block_x()) / p.splits;
    rank = static_cast<int>(cluster_rank());
    first = static_cast<int>(static_cast<int64_t>(p.row_tiles) * cluster / p.clusters);
    tiles = static_cast<int>(static_cast<int64_t>(p.row_tiles) * (cluster + 1) / p.clusters) - first;
    rounds = (tiles + p.tiles() - 1) / p.tiles();
    begin = chunks * rank / p.splits;
    end = chunks * (rank + 1) / p.splits;
  }
  ALPHAPRUNE_DEVICE int width() const { return end - begin; }
  // The first row tile of a round, of all members; that of the one after the last is the share's end.
  ALPHAPRUNE_DEVICE int round_at(int round) const { return first + tiles * round / rounds; }
};

// What a lane brings of the weight: a row tile of every round, chunk by chunk. Of warp w, lane i has tile 4 i + w.
template <class Lane>
struct WideCarrier {
  static constexpr int kTiles = Lane::kMacroTiles;  // of a chunk
  static constexpr int kAtOnce = 4;                 // chunks whose offsets are asked for together
  const WideProblem& p;
  const WideShared& shared;
  int place;  // of the row tile in a round
  bool mine, there = false;
  const unsigned char* values = nullptr;
  const uint32_t *mask = nullptr, *offsets = nullptr;  // of the chunk that is asked for next
  int left = 0;                                        // macro tiles from there on

  ALPHAPRUNE_DEVICE WideCarrier(const WideProblem& problem, const WideShared& at, int warp, int lane)
      : p(problem), shared(at), place(4 * lane + warp), mine(lane < problem.groups) {}

  ALPHAPRUNE_DEVICE void start(const WideShare<kTiles>& share, int round) {
    const int first = share.round_at(round);
    there = mine && place < share.round_at(round + 1) - first;
    const int tile = first + (there ? place : 0), member = p.out.member_of(tile * static_cast<int>(sbt::kTileRows));
    const WideMember& of = p.of[member];
    const int in_member = tile - p.out.of[member].first / static_cast<int>(sbt::kTileRows);
    const size_t macro = static_cast<size_t>(in_member) * p.col_tiles + share.begin * kTiles;
    values = of.values;
    mask = of.mask + macro * sbt::kWords;
    offsets = of.offsets + macro;
    left = p.col_tiles - share.begin * kTiles;
  }
  // Units of 8 values before the chunk and past it, `further` chunks on.
  ALPHAPRUNE_DEVICE uint2 find(int further = 0) const {
    uint2 found{0, 0};
    const int macro = further * kTiles, past = left - macro < kTiles ? left - macro : kTiles;
    if (there && past > 0) found = {load_cached(offsets + macro), load_cached(offsets + macro + past)};
    return found;
  }
  ALPHAPRUNE_DEVICE void order(int stage, uint2 units) {
    constexpr uint32_t kUnit = Values<Lane::kBytes>::kOffsetBytes;
    const int macro = left < kTiles ? left : kTiles;
    if (mine) {
      const uint32_t full = shared.full(stage), bytes = (units.y - units.x) * kUnit, masks = macro * kWideTileMask;
      mbarrier_arrive_expect(full, there ? masks + bytes : 0);
      if (there) {
        const uint32_t to = shared.weight + stage * p.stage_bytes + place * p.tile_bytes();
        copy_bulk(to, mask, masks, full);
        if (bytes) copy_bulk(to + p.mask_bytes, values + static_cast<size_t>(units.x) * kUnit, bytes, full);
      }
    }
    mask += kTiles * sbt::kWords;
    offsets += kTiles;
    left -= kTiles;
  }
};

// Of the first warp, the lane after those that bring row tiles brings x.
template <class Lane, int kTokens>
ALPHAPRUNE_DEVICE void bring(const WideProblem& p, const TensorMap& x, const WideShared& shared, int warp, int lane) {
  using Carrier = WideCarrier<Lane>;
  const WideShare<Lane::kMacroTiles> share(p);
  // Of the first round, the weight of as many stages as the ring has: it does not depend on kernels before.
  const int width = share.width(), ahead = width < p.stages ? width : p.stages;
  Carrier carrier(p, shared, warp, lane);
  carrier.start(share, 0);
  ALPHAPRUNE_NO_UNROLL
  for (int first = 0; first < ahead; first += Carrier::kAtOnce) {
    uint2 units[Carrier::kAtOnce];
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < Carrier::kAtOnce; ++i)
      if (first + i < ahead) units[i] = carrier.find(i);
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < Carrier::kAtOnce; ++i)
      if (first + i < ahead) carrier.order(first + i, units[i]);
  }
  // Of the two chunks that come next: what is asked for now takes as long as to order one.
  uint2 units = carrier.find(), later = carrier.find(1);
  wait_for_kernels_before();

  RingStage stage{0, 1};
  int before = 0;  // stages
  ALPHAPRUNE_NO_UNROLL
  for (int round = 0; round < share.rounds; ++round) {
    if (round) {
      carrier.start(share, round);
      units = carrier.find(), later = carrier.find(1);
    }
    ALPHAPRUNE_NO_UNROLL
    for (int chunk = share.begin; chunk < share.end; ++chunk, ++before) {
      if (before >= p.stages) mbarrier_wait(shared.empty(stage.index), stage.parity);
      if (before >= ahead) {
        carrier.order(stage.index, units);
        units = later;
        later = carrier.find(1);
      }
      if (warp == 0 && lane == p.groups) {
        const uint32_t full = shared.full(stage.index), to = shared.x + stage.index * shared.x_bytes;
        mbarrier_arrive_expect(full, shared.x_bytes);
        ALPHAPRUNE_UNROLL
        for (int box = 0; box < kBoxes; ++box)
          copy_box(to + box * kTokens * kSwizzleBytes, x, chunk * kChunkCols + box * static_cast<int>(kBoxCols), 0,
                   full);
      }
      stage.pass(1, p.stages);
    }
  }
}

// Where a lane finds its weights of a step: those of the rows g and g + 8 of its row tile in the columns 2 t, 2 t + 1,
// 2 t + 8 and 2 t + 9, as the operand a has them, so that x stays as it is. A load of all lanes is of four mask words,
// whose values lie in different banks, mostly.
struct WideLane {
  static constexpr int kMacroTiles = kChunk, kBytes = 2;
  uint32_t pair, below[2], bits[4], spare[4] = {}, one;
  uint32_t second;  // 1 where the lane's words are of the second macro tile, and not 0
  ALPHAPRUNE_DEVICE WideLane(int lane, Opaque number) : pair(lane / 8 * 16), one(number.one) {
    second = shuffle(lane / (kWarp / kChunk), lane);
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int bit = lane / 4 % 2 * static_cast<int>(sbt::kStepCols) + 2 * (lane % 4) + 8 * i;
      below[i] = shuffle((1u << bit) - 1, lane);
      bits[2 * i] = shuffle(1u << bit, lane);
      bits[2 * i + 1] = shuffle(2u << bit, lane);
    }
  }
  // The words of this lane's rows in a step, and where their values start.
  ALPHAPRUNE_DEVICE uint4 words(uint32_t meta, int step) const {
    return load_shared_u128(meta + step * kStepMeta + (pair ^ swap_of(step)));
  }
  // Of the kWideAtOnce steps from `first` on, whose first words are `next`; then these are the words of what follows.
  ALPHAPRUNE_DEVICE void decode(uint32_t meta, int first, uint4& next, uint32_t (&a)[kWideAtOnce][4]) {
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < kWideAtOnce; ++i) {
      const uint4 these = next;
      if (first + i + 1 < kChunkSteps) next = words(meta, first + i + 1);
      decode(these, a[i]);
    }
  }
  // Stores the words of a stage whose mask and values begin there, as if nothing were kept where there is none; the
  // values of its second macro tile follow the first's on the next 16 bytes.
  ALPHAPRUNE_DEVICE void store_meta(bool there, uint32_t masks, uint32_t values, uint32_t meta, int lane) const {
    uint2 mask{0, 0};
    if (there) mask = load_shared_u64(masks + lane * 8);
    const uint32_t bytes0 = 2 * popcount(mask.x), bytes = bytes0 + 2 * popcount(mask.y);
    const uint32_t through = scan_inclusive<kWarp / kChunk>(bytes);
    const uint32_t first = (shuffle(through, kWarp / kChunk - 1) + 15) & ~15u;
    store_words(mask, first * second + (values + through - bytes), bytes0, meta, lane);
  }

 private:
  ALPHAPRUNE_DEVICE void decode(const uint4& words, uint32_t (&a)[4]) {
    const uint32_t mask[2] = {words.x, words.z};
    uint32_t start[4];
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 2; ++i) {
      start[2 * i] = words.y + 2 * popcount(words.x & below[i]);
      start[2 * i + 1] = words.w + 2 * popcount(words.z & below[i]);
    }
    expand_pairs(mask, bits, start, one, spare, a);
  }
};

// The same of pairs: a step has the operands of two products.
struct WidePairs : PairLane {
  ALPHAPRUNE_DEVICE WidePairs(int lane, Opaque number) : PairLane(lane, number) {}
  ALPHAPRUNE_DEVICE void decode(uint32_t meta, int first, uint4& next, uint32_t (&a)[kProducts][4]) {
    const uint4 these = next;
    if (first + kProducts < kChunkSteps) next = words(meta, first / kProducts + 1);
    PairLane::decode(these, a);
  }
  ALPHAPRUNE_DEVICE void store_meta(bool there, uint32_t masks, uint32_t values, uint32_t meta, int lane) const {
    alphaprune::cuda::store_meta<kBytes>(there ? load_shared_u32(masks + lane * 4) : 0u, 0, values, meta, lane);
  }
};

// y of `tokens` tokens from `first` on, a share of them for each block of the cluster, four rows at a time: what the
// slices of all blocks summed, which begins at `sums`, of every slice `room` tokens. kParts: of an output, that are
// loaded at once, as each takes its time.
template <class Value, int kParts>
ALPHAPRUNE_DEVICE void store_wide(const WideProblem& p, uint32_t sums, int room, int first_tile, int tiles, int rank,
                                  int first, int tokens) {
  const auto load = [&](uint32_t at, int from) {
    return p.splits > 1 ? load_cluster_u128(at, from) : load_shared_u128(at);
  };
  const int fours = tiles * static_cast<int>(sbt::kTileRows) / 4, all = fours * tokens;
  const int begin = all * rank / p.splits, end = all * (rank + 1) / p.splits;
  for (int index = begin + thread_index(); index < end; index += p.warps() * kWarp) {
    const int token = index / fours, in_round = (index - token * fours) * 4;
    const int row = first_tile * static_cast<int>(sbt::kTileRows) + in_round;
    if (!p.out.has(row)) continue;
    float total[4] = {};
    int from = 0, slice = 0;
    ALPHAPRUNE_NO_UNROLL
    while (from < p.splits) {
      uint4 part[kParts];
      int count = 0;
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < kParts; ++i) {
        if (from == p.splits) continue;
        part[i] = load(sums + 4 * ((slice * room + token) * p.sum_row() + in_round), from);
        ++count;
        if (++slice == p.slices) slice = 0, ++from;
      }
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < kParts; ++i) {
        if (i >= count) continue;
        ALPHAPRUNE_UNROLL
        for (int j = 0; j < 4; ++j) total[j] += float_of(word_of(part[i], j));
      }
    }
    if (p.fours) {
      store_four_outputs<Value>(p.out, first + token, row, total);
    } else {
      for (int i = 0; i < 4; ++i)
        if (p.out.has(row + i)) store_output<Value>(p.out, first + token, row + i, total[i]);
    }
  }
}

// What a warp of the warpgroups does. Where its rounds begin and end is worked out anew each time: the loop needs the
// registers.
template <class Lane, class Value, int kTokens>
ALPHAPRUNE_DEVICE void multiply_wide(const WideProblem& p, const WideShared& shared) {
  const int lane = static_cast<int>(shuffle(lane_index(), lane_index())), warp = warp_index(), slice = warp / p.tiles(),
            place = warp % p.tiles();
  Lane mine(lane, p.number);
  // Shuffled from the lane itself, as numbers that the compiler keeps.
  const uint32_t tile = shuffle(shared.weight + place * p.tile_bytes(), lane);
  const uint32_t meta = shuffle(shared.meta + warp * kMetaBytes, lane), full = shared.full(0);
  const uint64_t ring = with_low(operand_at(shared.x), shuffle(static_cast<uint32_t>(operand_at(shared.x)), lane));
  RingStage stage{slice};
  int round = 0, number = slice, past = 0;  // of a stage, over all rounds
  bool more;
  ALPHAPRUNE_NO_UNROLL
  do {
    int limit = 0;  // stages that have the macro tile of this lane's mask words
    {
      const WideShare<Lane::kMacroTiles> share(p);
      if (place < share.round_at(round + 1) - share.round_at(round))
        limit = past - share.begin +
                (p.col_tiles - lane / (kWarp / Lane::kMacroTiles) + Lane::kMacroTiles - 1) / Lane::kMacroTiles;
      past += share.width();
    }
    float sum[kTokens / 2] = {};
    uint32_t a[kWideSets][kWideAtOnce][4] = {};
    ALPHAPRUNE_NO_UNROLL
    for (; number < past; number += p.slices) {  // cubins: main: the loop around it runs once per round
      const uint32_t barrier = full + stage.index * 2 * kMbarrierBytes;
      mbarrier_wait(barrier, stage.parity);
      const uint32_t here = tile + stage.index * p.stage_bytes;
      mine.store_meta(number < limit, here, here + p.mask_bytes, meta, lane);
      sync_warp();  // the words are there

      const uint64_t boxes = operand_further(ring, stage.index * p.x_bytes(kTokens));
      uint4 next = mine.words(meta, 0);
      ALPHAPRUNE_UNROLL
      for (int first = 0; first < kChunkSteps; first += kWideAtOnce) {
        auto& set = a[first / kWideAtOnce % kWideSets];
        mine.decode(meta, first, next, set);
        wgmma_fence();
        ALPHAPRUNE_UNROLL
        for (int i = 0; i < kWideAtOnce; ++i) {
          const int box = (first + i) / sbt::kSteps, further = (first + i) % sbt::kSteps * 32;  // bytes of 16 columns
          wgmma<Value, kTokens>(sum, set[i], operand_further(boxes, box * kTokens * kSwizzleBytes + further));
        }
        wgmma_commit();
        // Those that took the operands which are decoded next are complete; after the last ones, all of the stage.
        if (first + kWideAtOnce == kChunkSteps) {
          wgmma_wait<0>();
        } else if (first + 2 * kWideAtOnce > kWideSets * kWideAtOnce) {
          wgmma_wait<kWideSets - 1>();
        }
      }
      sync_warp();  // every lane has read
      if (lane == 0) mbarrier_arrive(barrier + kMbarrierBytes);
      stage.pass(p.slices, p.stages);
    }

    const WideShare<Lane::kMacroTiles> share(p);
    more = ++round < share.rounds;
    // Sums in shared memory: [slice][token][row], those of `room` tokens. After the last round all of them lie over the
    // ring, before that those of some tokens after others have a place of their own.
    const int first_tile = share.round_at(round - 1), tiles = share.round_at(round) - first_tile;
    const auto leave = [&](uint32_t sums, int first, int room) {
      const uint32_t row_bytes = 4 * p.sum_row();
      uint32_t to = opaque(sums + (slice * room + 2 * (lane % 4)) * row_bytes + 4 * (place * 16 + lane / 4));
      ALPHAPRUNE_UNROLL
      for (int j = 0; j < kTokens / 8; ++j) {
        if (8 * j < first || 8 * j >= first + room) continue;
        ALPHAPRUNE_UNROLL
        for (int i = 0; i < 4; ++i) store_shared_f32(to + i % 2 * row_bytes + 4 * (i / 2 * 8), sum[4 * j + i]);
        to += 8 * row_bytes;
      }
    };
    if (!more) sync_block();    // nobody reads the ring any more
    wait_for_kernels_before();  // they may still read what is written now
    if (more) {
      constexpr int kRoom = wide_room(kTokens);
      ALPHAPRUNE_NO_UNROLL
      for (int first = 0; first < p.tokens; first += kRoom) {
        leave(shared.sums, first, kRoom);
        sync_warps(1, p.warps() * kWarp);
        const int count = p.tokens - first < kRoom ? p.tokens - first : kRoom;
        store_wide<Value, 1>(p, shared.sums, kRoom, first_tile, tiles, share.rank, first, count);
        sync_warps(1, p.warps() * kWarp);  // nobody writes over sums that are read
      }
    } else {
      leave(shared.x, 0, kTokens);
      if (p.splits > 1) {
        sync_cluster();
      } else {
        sync_warps(1, p.warps() * kWarp);
      }
      store_wide<Value, kTokens <= 32 ? 4 : 2>(p, shared.x, kTokens, first_tile, tiles, share.rank, 0, p.tokens);
    }
  } while (more);
}

// kTokens: 32, 64, 128 or 256, at least p.tokens; boxes of x have so many rows.
template <class Lane, class Value, int kTokens>
ALPHAPRUNE_DEVICE void multiply_wide_tiles(const WideProblem& p, const TensorMap& x) {
  const WideShared shared(p, kTokens);
  let_next_begin();
  if (thread_index() == 0) {
    ALPHAPRUNE_NO_UNROLL
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(shared.full(i), p.tiles() + 1);
      mbarrier_init(shared.empty(i), p.tiles());
    }
    mbarrier_fence_init();
  }
  sync_block();

  if (warp_index() < p.warps()) {
    if constexpr (wide_trades(kTokens)) take_registers<232>();
    multiply_wide<Lane, Value, kTokens>(p, shared);
  } else {
    if constexpr (wide_trades(kTokens)) give_registers<40>();
    bring<Lane, kTokens>(p, x, shared, warp_index() - p.warps(), lane_index());
    sync_block();
    if (p.splits > 1) sync_cluster();
  }
  if (p.splits > 1) sync_cluster();  // nobody leaves while others read its sums
}

template <class Value, int kTokens>
ALPHAPRUNE_KERNEL __launch_bounds__(wide_threads(wide_groups(kTokens)), 1)
    sbt_wgmma(const WideProblem p, const __grid_constant__ TensorMap x) {
#if ALPHAPRUNE_SM90
  multiply_wide_tiles<WideLane, Value, kTokens>(p, x);
#endif
}

// The same of pairs of floats.
template <class Value, int kTokens>
ALPHAPRUNE_KERNEL __launch_bounds__(wide_threads(wide_groups(kTokens)), 1)
    pair_wgmma(const WideProblem p, const __grid_constant__ TensorMap x) {
#if ALPHAPRUNE_SM90
  multiply_wide_tiles<WidePairs, Value, kTokens>(p, x);
#endif
}

}  // namespace alphaprune::cuda
