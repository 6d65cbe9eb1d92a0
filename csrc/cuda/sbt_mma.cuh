// y = x Wᵀ for up to 128 tokens on tensor cores, straight from SBT. A block owns kRows row tiles; its warps share the
// columns between them, each with a ring of asynchronous copies of its own, and add up in a fixed order at the end.
// Past 64 tokens two warps are a team that walks the same columns: each has half of the tokens, decodes half of the row
// tiles, and gets the operands of the others from its partner, through shared memory.
// Values are 16-bit floats, or 8-bit integers with a scale per row or per row and chunk: what is summed is decoded
// without rounding, and scales multiply sums.
#pragma once

#include "chunk.cuh"
#include "output.cuh"

namespace alphaprune::cuda {

constexpr int kMostWarps = 8;
// Chunks in a warp's ring. Four row tiles are so much work that one chunk ahead is enough.
ALPHAPRUNE_BOTH constexpr int mma_stages(int row_tiles) { return row_tiles == 4 ? 2 : 3; }

// Warps of a team, each with so many tiles of 8 tokens. One warp would need registers for the sums of all.
ALPHAPRUNE_BOTH constexpr int mma_sharers(int token_tiles) { return token_tiles > 8 ? 2 : 1; }
constexpr uint32_t kOperandBytes = kWarp * 16;  // of a, for a row tile and step

struct MmaProblem {
  const void* values;
  const uint32_t* mask;
  const uint32_t* offsets;
  const uint16_t* x;
  Output out;
  int cols, tokens;
  int row_tiles, col_tiles, warps;
  uint32_t value_bytes;  // of the largest chunk, a multiple of 16
  bool fours;            // whether four neighbouring activations can be loaded at once
  Opaque number;
  const float* scale;  // of integers: [rows, groups]; a group is a chunk, or the whole row
  int groups;
};
static_assert(kChunkCols == sbt::kScaleCols, "a chunk has one scale per row");

ALPHAPRUNE_BOTH constexpr size_t mma_stage_bytes(int row_tiles, uint32_t value_bytes) {
  return static_cast<size_t>(row_tiles) * (kMetaBytes + value_bytes);
}
ALPHAPRUNE_BOTH constexpr size_t mma_sum_bytes(int row_tiles, int token_tiles) {
  return static_cast<size_t>(row_tiles) * token_tiles * 128 * sizeof(float);
}
// The operands of two steps that a warp gives to its partner.
ALPHAPRUNE_BOTH constexpr uint32_t mma_given_bytes(int row_tiles, int sharers) {
  return sharers > 1 ? 2 * (row_tiles / sharers) * kOperandBytes : 0;
}
// Of a warp: its ring, and what it gives.
ALPHAPRUNE_BOTH constexpr size_t mma_warp_bytes(int row_tiles, int sharers, uint32_t value_bytes) {
  return mma_stages(row_tiles) * mma_stage_bytes(row_tiles / sharers, value_bytes) +
         mma_given_bytes(row_tiles, sharers);
}
// The lanes' tables come first, of each warp one, then the rings; after the last product the sums lie over all of it.
template <class Lane>
ALPHAPRUNE_BOTH constexpr size_t mma_shared_bytes(int row_tiles, int token_tiles, int warps, uint32_t value_bytes) {
  const int sharers = mma_sharers(token_tiles);
  const size_t ring = mma_warp_bytes(row_tiles, sharers, value_bytes);
  const size_t sums = mma_sum_bytes(row_tiles, token_tiles / sharers);
  return warps * (Lane::kTableBytes + (ring > sums ? ring : sums)) + Lane::kBeyond;
}

// The operand b of a step: four neighbouring activations of a token, zero past the last token and the last column.
template <bool kWhole>
ALPHAPRUNE_DEVICE uint2 activations(const MmaProblem& p, const uint16_t* at, int col, bool there) {
  uint2 b{0, 0};
  if (kWhole || p.fours) {
    if (there && (kWhole || col < p.cols)) b = load_cached(reinterpret_cast<const uint2*>(at));
    return b;
  }
  uint32_t four[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i)
    if (there && col + i < p.cols) four[i] = at[i];
  return {four[0] | four[1] << 16, four[2] | four[3] << 16};
}

// Whether the sums leave no registers to keep what can be computed again.
ALPHAPRUNE_BOTH constexpr bool mma_tight(int row_tiles, int token_tiles) { return row_tiles * token_tiles > 16; }

// The row tiles that a warp walks along side by side. Where registers are few they share pointers and counts. kSure:
// the first one is there.
template <int kRows, bool kWhole, bool kTight, bool kSure>
struct Rows {
  static constexpr bool kAll = kRows == 1 && kSure;
  Row<kWhole && kAll> row[kRows];

  ALPHAPRUNE_DEVICE void start(const MmaProblem& p, int first_tile, int first_col, int lane) {
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const bool there = kAll || first_tile + r < p.row_tiles;
      const size_t tile = static_cast<size_t>(there ? first_tile + r : p.row_tiles - 1) * p.col_tiles + first_col;
      row[r].start(p.mask, p.offsets, tile, there ? p.col_tiles - first_col : 0, lane);
    }
  }
  ALPHAPRUNE_DEVICE void next_offsets(int r, Chunk& to) { row[r].next_offsets(to); }
  ALPHAPRUNE_DEVICE uint2 next_mask(int r) { return row[r].next_mask(); }
};
template <int kRows, bool kWhole, bool kSure>
struct Rows<kRows, kWhole, true, kSure> {
  Row<false> all;
  int there, stride;

  ALPHAPRUNE_DEVICE void start(const MmaProblem& p, int first_tile, int first_col, int lane) {
    there = p.row_tiles - first_tile;
    const int first = kSure || there > 0 ? first_tile : p.row_tiles - 1;
    all.start(p.mask, p.offsets, static_cast<size_t>(first) * p.col_tiles + first_col, p.col_tiles - first_col, lane);
    stride = p.col_tiles;
  }
  // The last row tile's turn lets all go on.
  ALPHAPRUNE_DEVICE void next_offsets(int r, Chunk& to) {
    Row<false> one = all;
    one.offsets += (r < there ? r : 0) * stride;
    if (r >= there) one.offsets_left = 0;
    one.next_offsets(to);
    if (r + 1 < kRows) return;
    all.offsets += kChunk;
    all.offsets_left -= kChunk;
  }
  ALPHAPRUNE_DEVICE uint2 next_mask(int r) {
    Row<false> one = all;
    one.mask += (r < there ? r : 0) * stride * (sbt::kWords / 2);
    if (r >= there) one.mask_left = 0;
    const uint2 found = one.next_mask();
    if (r + 1 == kRows) {
      all.mask += kWarp;
      all.mask_left -= kChunk;
    }
    return found;
  }
};

// The scales of a chunk for the rows of this lane's sums.
template <int kRows>
struct Scales {
  const float* next;
  int last, stride;  // the last row of W from this lane's first one on; of the rows' scales

  ALPHAPRUNE_DEVICE void start(const MmaProblem& p, int first_row, int first_chunk) {
    next = p.scale + static_cast<int64_t>(first_row) * p.groups + first_chunk;
    last = p.out.rows - 1 - first_row;
    stride = p.groups;
  }
  // Rows that are not there have the last one's.
  ALPHAPRUNE_DEVICE void load(float (&scale)[kRows][2]) {
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 2 * kRows; ++i)
      scale[i / 2][i % 2] = load_cached(next + (8 * i < last ? 8 * i : last) * stride);
    ++next;
  }
};

// kTiles: of 8 tokens. kWhole: cols is a multiple of a chunk's, and x aligned to 8 bytes. kGrouped: scales change along
// a row.
template <class Lane, class Value, int kTiles, int kRows, bool kWhole, bool kGrouped>
ALPHAPRUNE_DEVICE void multiply_tiles(const MmaProblem& p) {
  constexpr int kStages = mma_stages(kRows), kBytes = Lane::kBytes;
  // Of a warp: row tiles that it decodes, tiles of tokens that it multiplies them and its partner's with.
  constexpr int kSharers = mma_sharers(kTiles), kMine = kRows / kSharers, kWarpTiles = kTiles / kSharers;
  constexpr bool kTight = mma_tight(kRows, kWarpTiles);
  const int lane = lane_index(), warp = warp_index(), group = lane / 4, pair = lane % 4;
  const int team = warp / kSharers, member = warp % kSharers, teams = p.warps / kSharers;
  const int block_tile = block_x() * kRows, first_tile = block_tile + member * kMine;
  const int first_token = member * kWarpTiles * 8;
  const uint32_t table = shared_start() + warp * Lane::kTableBytes;
  if constexpr (Lane::kTableBytes > 0) Lane::fill(table, lane);
  Lane mine(lane, p.number, table);
  const int chunks = (p.col_tiles + kChunk - 1) / kChunk;
  const int begin = chunks * team / teams, end = chunks * (team + 1) / teams;

  Rows<kMine, kWhole, kTight, kSharers == 1> rows;
  rows.start(p, first_tile, begin * kChunk, lane);

  const uint32_t stage_bytes = static_cast<uint32_t>(mma_stage_bytes(kMine, p.value_bytes));
  const uint32_t warp_bytes = static_cast<uint32_t>(mma_warp_bytes(kRows, kSharers, p.value_bytes));
  const uint32_t rings = shared_start() + p.warps * Lane::kTableBytes;
  const uint32_t ring = rings + warp * warp_bytes, ring_end = ring + kStages * stage_bytes;
  const auto values_at = [&](uint32_t stage, int r) { return stage + kMine * kMetaBytes + r * p.value_bytes; };
  // What this lane gives to its partner's, and how much further on that one's gift is.
  [[maybe_unused]] uint32_t given = ring_end + lane * 16, taken = member == 0 ? warp_bytes : 0 - warp_bytes;

  // In flight: the chunk that is decoded now, kStages - 1 that are copied, and the offsets of the one after these.
  Chunk chunk_of[kStages][kMine];
  uint2 mask[kMine];
  ALPHAPRUNE_UNROLL
  for (int i = 0; i < kStages; ++i) {
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < kMine; ++r) {
      if (begin + i < end) rows.next_offsets(r, chunk_of[i][r]);
      if (i < kStages - 1 && begin + i < end)
        copy_values<kBytes>(p.values, chunk_of[i][r].first, chunk_of[i][r].last, values_at(ring + i * stage_bytes, r),
                            lane);
    }
    if (i < kStages - 1) copy_commit();
  }
  ALPHAPRUNE_UNROLL
  for (int r = 0; r < kMine; ++r) mask[r] = begin < end ? rows.next_mask(r) : uint2{0, 0};

  // Of the row tiles that this warp decodes, then of the others.
  float sum[kRows][kWarpTiles][4] = {};
  [[maybe_unused]] Scales<kMine> scales[kSharers];
  if constexpr (kGrouped) {
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < kSharers; ++i) scales[i].start(p, (block_tile + (member ^ i) * kMine) * 16 + group, begin);
  }
  const uint16_t* x = p.x + static_cast<size_t>(first_token + group) * p.cols + begin * kChunkCols + 4 * pair;
  uint32_t stage = ring;
  ALPHAPRUNE_NO_UNROLL
  for (int chunk = begin; chunk < end; ++chunk) {
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < kMine; ++r) {
      store_meta<kBytes>(mask[r], (chunk_of[0][r].middle - chunk_of[0][r].first) * Values<kBytes>::kOffsetBytes,
                         values_at(stage, r), stage + r * kMetaBytes, lane);
      if (chunk + 1 < end) mask[r] = rows.next_mask(r);
    }
    copy_wait<kStages - 2>();
    sync_warp();  // every lane's copies have landed, the words are there, and nobody reads the stage before this one

    if (chunk + kStages - 1 < end) {
      const uint32_t before = stage == ring ? ring_end - stage_bytes : stage - stage_bytes;
      ALPHAPRUNE_UNROLL
      for (int r = 0; r < kMine; ++r)
        copy_values<kBytes>(p.values, chunk_of[kStages - 1][r].first, chunk_of[kStages - 1][r].last,
                            values_at(before, r), lane);
    }
    copy_commit();
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < kMine; ++r) {
      ALPHAPRUNE_UNROLL
      for (int i = 0; i + 1 < kStages; ++i) chunk_of[i][r] = chunk_of[i + 1][r];
      if (kTight) {  // all that is needed of it, in fewer registers
        chunk_of[0][r].middle = opaque(chunk_of[0][r].middle - chunk_of[0][r].first);
        chunk_of[0][r].first = 0;
      }
      if (chunk + kStages < end) rows.next_offsets(r, chunk_of[kStages - 1][r]);
    }

    [[maybe_unused]] float scale[kSharers][kMine][2], part[kRows][kWarpTiles][4] = {};
    if constexpr (kGrouped) {
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < kSharers; ++i) scales[i].load(scale[i]);
    }
    constexpr int kSpan = kTight ? 1 : kChunkSteps;  // no activations of a step further on
    uint4 words = mine.words(stage, 0);
    ALPHAPRUNE_NO_UNROLL
    for (int span = 0; span < kChunkSteps; span += kSpan) {  // cubins: trips 8: kChunkSteps, where it is tight
      ALPHAPRUNE_UNROLL
      for (int in_span = 0; in_span < kSpan; ++in_span) {
        const int step = span + in_span;
        uint2 b[kWarpTiles];
        const uint16_t* at = x + step * sbt::kStepCols;
        ALPHAPRUNE_UNROLL
        for (int t = 0; t < kWarpTiles; ++t) {
          if (kTight) at = opaque(at);  // no addresses of all tokens
          b[t] = activations<kWhole>(p, at, chunk * kChunkCols + step * static_cast<int>(sbt::kStepCols) + 4 * pair,
                                     first_token + 8 * t + group < p.tokens);
          at += static_cast<size_t>(8) * p.cols;
        }
        const auto multiply = [&](int r, const uint32_t (&a)[4]) {
          ALPHAPRUNE_UNROLL
          for (int t = 0; t < kWarpTiles; ++t) mma<Value>(kGrouped ? part[r][t] : sum[r][t], a, b[t]);
        };
        ALPHAPRUNE_UNROLL
        for (int r = 0; r < kMine; ++r) {
          const uint4 here = words;
          const int next = step * kMine + r + 1;
          if (next < kChunkSteps * kMine) words = mine.words(stage + next % kMine * kMetaBytes, next / kMine);
          uint32_t a[4];
          mine.decode(here, a);
          if constexpr (kSharers > 1) store_shared_u128(given + r * kOperandBytes, {a[0], a[1], a[2], a[3]});
          multiply(r, a);
        }
        if constexpr (kSharers > 1) {
          sync_warps(1 + team, kSharers * kWarp);
          ALPHAPRUNE_UNROLL
          for (int r = 0; r < kMine; ++r) {
            const uint4 other = load_shared_u128(given + taken + r * kOperandBytes);
            multiply(kMine + r, {other.x, other.y, other.z, other.w});
          }
          // The partner may still read what it was given: the next step's gift goes elsewhere.
          given = step % 2 == 0 ? given + kMine * kOperandBytes : given - kMine * kOperandBytes;
        }
      }
    }
    if constexpr (kGrouped) {
      ALPHAPRUNE_UNROLL
      for (int r = 0; r < kRows; ++r) ALPHAPRUNE_UNROLL
      for (int t = 0; t < kWarpTiles; ++t) ALPHAPRUNE_UNROLL
      for (int i = 0; i < 4; ++i) sum[r][t][i] += scale[r / kMine][r % kMine][i / 2] * part[r][t][i];
    }
    x += kChunkCols;
    stage = stage + stage_bytes == ring_end ? ring : stage + stage_bytes;
  }

  // The rings become sums[warp][row tile][token tile][i][lane].
  copy_wait<0>();
  sync_block();
  constexpr uint32_t kSums = kRows * kWarpTiles * 128;
  ALPHAPRUNE_UNROLL
  for (int r = 0; r < kRows; ++r) ALPHAPRUNE_UNROLL
  for (int t = 0; t < kWarpTiles; ++t) ALPHAPRUNE_UNROLL
  for (int i = 0; i < 4; ++i)
    store_shared_f32(shared_start() + 4 * (warp * kSums + ((r * kWarpTiles + t) * 4 + i) * kWarp + lane), sum[r][t][i]);
  sync_block();
  for (int index = thread_index(); index < kRows * 16 * p.tokens; index += p.warps * kWarp) {
    const int in_block = index % (kRows * 16), token = index / (kRows * 16), in_tile = in_block % 16;
    const int64_t at_row = static_cast<int64_t>(block_tile) * 16 + in_block;
    if (at_row >= p.out.rows) continue;
    const int i = in_tile / 8 * 2 + token % 2, holder = in_tile % 8 * 4 + token % 8 / 2;
    const int tile = token / 8, of = tile / kWarpTiles;  // the member of each team that has the token
    const int r = in_block / 16 ^ of * kMine;            // the place of the row tile among its sums
    const uint32_t at = ((r * kWarpTiles + tile % kWarpTiles) * 4 + i) * kWarp + holder;
    float total = 0;
    for (int w = of; w < p.warps; w += kSharers) total += load_shared_f32(shared_start() + 4 * (w * kSums + at));
    if constexpr (kBytes == 1) total *= Lane::kFactor;
    if constexpr (kBytes == 1 && !kGrouped) total *= p.scale[at_row];
    store_output<Value>(p.out, token, static_cast<int>(at_row), total);
  }
}

template <class Value, int kTiles, int kRows, bool kWhole>
ALPHAPRUNE_KERNEL __launch_bounds__(kMostWarps* kWarp) sbt_mma(const MmaProblem p) {
  multiply_tiles<FloatLane, Value, kTiles, kRows, kWhole, false>(p);
}

// The same of 8-bit integers; activations and outputs are in `Value`.
template <class Value, int kTiles, int kRows, bool kWhole, bool kGrouped>
ALPHAPRUNE_KERNEL __launch_bounds__(kMostWarps* kWarp) sbt_mma_int8(const MmaProblem p) {
  multiply_tiles<IntegerLane<Value>, Value, kTiles, kRows, kWhole, kGrouped>(p);
}

}  // namespace alphaprune::cuda
