// y = x Wᵀ for up to 64 tokens on tensor cores, straight from SBT. There is a block for each multiprocessor, and it
// owns an equal share of the row tiles, all at once: a team of warps has kRows of them from their first column to the
// last, its warps take turns with the chunks. So weights stream without a pause from the first to the last, each warp
// through a ring of copies of its own. x lies in shared memory, once for all teams: all of it, or two slabs of columns
// by turns. The warps of a team add up in a fixed order at the end. Values are 16-bit floats, or 8-bit integers with a
// scale per row or per row and chunk: what is summed is decoded without rounding, and scales multiply sums.
#pragma once

#include "chunk.cuh"
#include "device_sm90.cuh"
#include "output.cuh"

namespace alphaprune::cuda {

// Warps of a block, as many as the registers for sums leave room for.
ALPHAPRUNE_BOTH constexpr int mma_most_warps(int row_tiles, int token_tiles, bool integers) {
  const int tiles = row_tiles * token_tiles;
  if (integers) return tiles == 1 ? 28 : tiles == 2 ? 24 : tiles <= 4 ? 20 : 12;
  return tiles <= 4 ? 32 : tiles <= 8 ? 20 : 14;
}

// How copies are made. Edges: cols is no multiple of a chunk's. Whole: it is. Bulk: it is, x starts on 16 bytes, and
// the memory system of sm_90 copies by itself.
enum class Copies { edges, whole, bulk };

// Steps that are unrolled together: all of a chunk, or fewer where the sums leave few registers.
ALPHAPRUNE_BOTH constexpr int mma_span(int row_tiles, int token_tiles) {
  return row_tiles * token_tiles > 4 ? 4 : kChunkSteps;
}
// Chunks in a warp's ring: so many warps have one each under way that a third gained nothing on an H200.
constexpr int kStages = 2;
constexpr uint32_t kMaskBytes = kChunk * sbt::kWords * 4;  // of a chunk
constexpr uint32_t kChunkBytes = kChunkCols * 2;           // of a token's activations
// Rows of x are so much longer than their columns, so that those of four tokens are in different banks.
constexpr uint32_t kActivationPad = 32;

// How a product is shared out.
struct MmaPlan {
  int blocks;       // that share the row tiles
  int teams;        // of a block, each with kRows row tiles at a time
  int splits;       // warps of a team
  int slab_chunks;  // whose activations are in shared memory together
  int slabs;        // 1: all of them

  ALPHAPRUNE_BOTH int warps() const { return teams * splits; }
};

struct MmaProblem {
  const void* values;
  const uint32_t* mask;
  const uint32_t* offsets;
  const uint16_t* x;
  Output out;
  int cols, tokens;
  int row_tiles, col_tiles;
  MmaPlan plan;
  uint32_t value_bytes;  // of the largest chunk, a multiple of 16
  bool eights;           // whether eight neighbouring activations can be copied at once
  Opaque number;
  const float* scale;  // of integers: [rows, groups]; a group is a chunk, or the whole row
  int groups;
};
static_assert(kChunkCols == sbt::kScaleCols, "a chunk has one scale per row");

// Rows of x in shared memory: of few tokens those that are there, else of whole tiles.
ALPHAPRUNE_BOTH constexpr int mma_x_rows(int token_tiles, int tokens) {
  return token_tiles == 1 ? tokens : 8 * token_tiles;
}
ALPHAPRUNE_BOTH constexpr uint32_t mma_x_stride(int slab_chunks) { return slab_chunks * kChunkBytes + kActivationPad; }
ALPHAPRUNE_BOTH constexpr uint32_t mma_slab_bytes(const MmaPlan& plan, int token_tiles, int tokens) {
  return mma_x_rows(token_tiles, tokens) * mma_x_stride(plan.slab_chunks);
}
ALPHAPRUNE_BOTH constexpr uint32_t mma_sum_bytes(int row_tiles, int token_tiles) {
  return row_tiles * token_tiles * 128 * sizeof(float);
}
// Of a warp: the words of its chunk with their addresses, and its ring, of whose stages each has the words and the
// values.
ALPHAPRUNE_BOTH constexpr uint32_t mma_stage_bytes(int row_tiles, Copies copies, uint32_t value_bytes) {
  return row_tiles * ((copies == Copies::bulk ? kMaskBytes : 0) + value_bytes);
}
ALPHAPRUNE_BOTH constexpr uint32_t mma_warp_bytes(int row_tiles, Copies copies, uint32_t value_bytes) {
  return row_tiles * kMetaBytes + kStages * mma_stage_bytes(row_tiles, copies, value_bytes);
}
// Barriers: for each of two slabs of x one that it has landed and one that nobody needs it any more, and one for each
// stage of each warp.
constexpr int kSlabBarriers = 4;
ALPHAPRUNE_BOTH constexpr uint32_t mma_barrier_bytes(int warps, Copies copies) {
  return copies == Copies::bulk ? ((kSlabBarriers + warps * kStages) * kMbarrierBytes + 15) / 16 * 16 : 0;
}
// The lanes' tables come first, of each warp one, then barriers, then x, then the rings; after the last product the
// sums lie over these.
template <class Lane>
ALPHAPRUNE_BOTH constexpr size_t mma_shared_bytes(const MmaPlan& plan, int row_tiles, int token_tiles, Copies copies,
                                                  int tokens, uint32_t value_bytes) {
  const uint32_t ring = mma_warp_bytes(row_tiles, copies, value_bytes);
  const uint32_t sums = mma_sum_bytes(row_tiles, token_tiles);
  return mma_barrier_bytes(plan.warps(), copies) +
         (plan.slabs > 1 ? 2 : 1) * mma_slab_bytes(plan, token_tiles, tokens) +
         plan.warps() * (Lane::kTableBytes + (ring > sums ? ring : sums)) + Lane::kBeyond;
}

// Starts the copies of a slab of x to `to`: zeros past the last column and, of a tile of tokens, past the last token.
template <int kTiles>
ALPHAPRUNE_DEVICE void stage_activations(const MmaProblem& p, int slab, uint32_t to) {
  constexpr int kUnits = kChunkCols / 8;  // of 8 activations; so many lanes copy a chunk's
  const int first_chunk = slab * p.plan.slab_chunks, all = (p.col_tiles + kChunk - 1) / kChunk;
  const int chunks = all - first_chunk < p.plan.slab_chunks ? all - first_chunk : p.plan.slab_chunks;
  const int rows = mma_x_rows(kTiles, p.tokens), unit = thread_index() % kUnits;
  const int first = thread_index() / kUnits, step = p.plan.warps() * kWarp / kUnits;
  // item = token * chunks + chunk, without a division for each.
  int token = first / chunks, chunk = first % chunks;
  const int tokens_further = step / chunks, chunks_further = step % chunks;
  const uint32_t stride = mma_x_stride(p.plan.slab_chunks);
  ALPHAPRUNE_NO_UNROLL
  while (token < rows) {
    const int col = (first_chunk + chunk) * kChunkCols + unit * 8, left = token < p.tokens ? p.cols - col : 0;
    const uint32_t at = to + token * stride + chunk * kChunkBytes + unit * 16;
    const uint16_t* x = p.x + static_cast<size_t>(token) * p.cols + col;
    if (left > 0 && p.eights) {
      copy_async<0, 0>(at, x, left);
    } else {
      uint32_t half[8];
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < 8; ++i) half[i] = i < left ? load_cached(x + i) : 0;
      store_shared_u128(
          at, {half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16, half[6] | half[7] << 16});
    }
    token += tokens_further;
    chunk += chunks_further;
    if (chunk >= chunks) {
      chunk -= chunks;
      ++token;
    }
  }
}

// The same by the copies of sm_90, by one thread.
ALPHAPRUNE_DEVICE void stage_activations_bulk(const MmaProblem& p, int slab, uint32_t to, uint32_t barrier) {
  const int first = slab * p.plan.slab_chunks * kChunkCols, all = p.plan.slab_chunks * kChunkCols;
  const uint32_t bytes = (p.cols - first < all ? p.cols - first : all) * 2, stride = mma_x_stride(p.plan.slab_chunks);
  mbarrier_arrive_expect(barrier, p.tokens * bytes);
  const uint16_t* x = p.x + first;
  ALPHAPRUNE_NO_UNROLL
  for (int token = 0; token < p.tokens; ++token, to += stride, x += p.cols) copy_bulk(to, x, bytes, barrier);
}
// Zeros for tokens of a tile that are not there, in all slabs.
template <int kTiles>
ALPHAPRUNE_DEVICE void clear_activations(const MmaProblem& p, uint32_t all_x) {
  const uint32_t stride = mma_x_stride(p.plan.slab_chunks), rows = mma_x_rows(kTiles, p.tokens);
  const uint32_t first = p.tokens * stride, end = rows * stride;
  for (int i = 0; i < (p.plan.slabs > 1 ? 2 : 1); ++i)
    for (uint32_t at = first + thread_index() * 16; at < end; at += p.plan.warps() * kWarp * 16)
      store_shared_u128(all_x + i * end + at, {0, 0, 0, 0});
}

// Where the chunks of the row tiles lie that a warp walks along side by side, `stride` macro tiles at a time. there:
// how many of them are.
template <int kRows, bool kWhole>
struct Rows {
  Row<kWhole && kRows == 1> row[kRows];

  ALPHAPRUNE_DEVICE void start(const MmaProblem& p, int first_tile, int there, int first_col, int stride, int lane) {
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const size_t tile = static_cast<size_t>(r < there ? first_tile + r : first_tile) * p.col_tiles + first_col;
      row[r].start(p.mask, p.offsets, tile, r < there ? p.col_tiles - first_col : 0, lane, stride);
    }
  }
};

// The scales of a chunk for the rows of this lane's sums.
template <int kRows>
struct Scales {
  const float* next;
  int last, stride, further;  // the last row of W from this lane's first one on; of the rows' scales; of the chunks'

  ALPHAPRUNE_DEVICE void start(const MmaProblem& p, int first_row, int first_chunk) {
    next = p.scale + static_cast<int64_t>(first_row) * p.groups + first_chunk;
    last = p.out.of[0].rows - 1 - first_row;
    stride = p.groups;
    further = p.plan.splits;
  }
  // Rows that are not there have the last one's.
  ALPHAPRUNE_DEVICE void load(float (&scale)[kRows][2]) {
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 2 * kRows; ++i)
      scale[i / 2][i % 2] = load_cached(next + (8 * i < last ? 8 * i : last) * stride);
    next += further;
  }
};

// kTiles: of 8 tokens. kGrouped: scales change along a row.
template <class Lane, class Value, int kTiles, int kRows, Copies kCopies, bool kGrouped>
ALPHAPRUNE_DEVICE void multiply_tiles(const MmaProblem& p) {
  constexpr int kBytes = Lane::kBytes;
  constexpr bool kBulk = kCopies == Copies::bulk, kWhole = kCopies != Copies::edges;
  constexpr uint32_t kValuesAt = kBulk ? kMaskBytes : 0;  // in a row tile's part of a stage
  const int lane = lane_index(), warp = warp_index(), group = lane / 4, pair = lane % 4;
  const int splits = p.plan.splits, team = warp / splits, part = warp % splits, warps = p.plan.warps();
  const int chunks = (p.col_tiles + kChunk - 1) / kChunk;
  const int64_t tiles = p.row_tiles;
  const int block_tile = static_cast<int>(tiles * block_x() / p.plan.blocks);
  const int block_end = static_cast<int>(tiles * (block_x() + 1) / p.plan.blocks);

  const uint32_t table = shared_start() + warp * Lane::kTableBytes;
  if constexpr (Lane::kTableBytes > 0) Lane::fill(table, lane);
  Lane mine(lane, p.number, table);

  const uint32_t slab_bytes = mma_slab_bytes(p.plan, kTiles, p.tokens), x_stride = mma_x_stride(p.plan.slab_chunks);
  const uint32_t barriers = shared_start() + warps * Lane::kTableBytes;
  const uint32_t all_x = barriers + mma_barrier_bytes(warps, kCopies);
  const uint32_t rings = all_x + (p.plan.slabs > 1 ? 2 : 1) * slab_bytes;
  const uint32_t row_bytes = kValuesAt + p.value_bytes, stage_bytes = kRows * row_bytes;
  const uint32_t meta = rings + warp * mma_warp_bytes(kRows, kCopies, p.value_bytes);
  const uint32_t ring = meta + kRows * kMetaBytes;
  const uint32_t landed = barriers + (kSlabBarriers + warp * kStages) * kMbarrierBytes;  // of the stages
  const auto slab_landed = [&](int of) { return barriers + of % 2 * kMbarrierBytes; };
  const auto slab_left = [&](int of) { return barriers + (2 + of % 2) * kMbarrierBytes; };
  if constexpr (kBulk) {
    if (thread_index() < kSlabBarriers)
      mbarrier_init(barriers + thread_index() * kMbarrierBytes, thread_index() < 2 ? 1 : warps);
    if (lane < kStages) mbarrier_init(landed + lane * kMbarrierBytes, 1);
    mbarrier_fence_init();
    if constexpr (kTiles > 1) clear_activations<kTiles>(p, all_x);
    sync_block();
    let_next_begin();
  }
  // Of the columns and tokens that this lane holds of b. Tokens that are not there, of a tile alone: the last one
  // again.
  const int token = kTiles > 1 || group < p.tokens ? group : p.tokens - 1;
  const uint32_t x_lane = all_x + token * x_stride + pair * 8;
  uint32_t slab_at = 0;  // where the slab lies that is multiplied
  int number = 0;        // of the slab, over all rounds
  bool fresh = true;     // whether the slab is on its way
  int stage = 0;
  uint32_t phase = 0;  // of the barriers of the stages

  ALPHAPRUNE_NO_UNROLL
  for (int round_tile = block_tile; round_tile < block_end; round_tile += p.plan.teams * kRows) {
    const int first_tile = round_tile + team * kRows, there = block_end - first_tile, end = there > 0 ? chunks : 0;
    Rows<kRows, kWhole> rows;
    rows.start(p, there > 0 ? first_tile : block_tile, there, part * kChunk, splits * kChunk, lane);

    // In flight: the chunk that is decoded now, kStages - 1 that are copied, and the offsets of the one after these.
    Chunk chunk_of[kStages][kRows];
    [[maybe_unused]] uint2 mask[kRows];
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < kStages; ++i) {
      ALPHAPRUNE_UNROLL
      for (int r = 0; r < kRows; ++r)
        if (part + i * splits < end) rows.row[r].next_offsets(chunk_of[i][r]);
    }
    if constexpr (!kBulk) {
      ALPHAPRUNE_UNROLL
      for (int r = 0; r < kRows; ++r) mask[r] = part < end ? rows.row[r].next_mask() : uint2{0, 0};
    }
    if constexpr (!kBulk)
      if (fresh) stage_activations<kTiles>(p, 0, all_x + slab_at);
    // Starts the copies of a chunk, whose stage nobody reads any more.
    const auto copy = [&](const Chunk(&of)[kRows], int to_stage) {
      const uint32_t to = ring + to_stage * stage_bytes;
      if constexpr (kBulk) {
        const uint32_t barrier = landed + to_stage * kMbarrierBytes;
        if (lane == 0) {
          uint32_t bytes[kRows], all = 0;
          ALPHAPRUNE_UNROLL
          for (int r = 0; r < kRows; ++r) {
            bytes[r] = (of[r].last - of[r].first) * Values<kBytes>::kOffsetBytes;
            if (kRows == 1 || r < there) all += bytes[r] + kMaskBytes;
          }
          mbarrier_arrive_expect(barrier, all);
          ALPHAPRUNE_UNROLL
          for (int r = 0; r < kRows; ++r) {
            if (kRows > 1 && r >= there) continue;
            copy_bulk(to + r * row_bytes, rows.row[r].mask, kMaskBytes, barrier);
            if (bytes[r])
              copy_bulk(to + r * row_bytes + kValuesAt,
                        static_cast<const unsigned char*>(p.values) +
                            static_cast<size_t>(of[r].first) * Values<kBytes>::kOffsetBytes,
                        bytes[r], barrier);
          }
        }
        ALPHAPRUNE_UNROLL
        for (int r = 0; r < kRows; ++r) rows.row[r].skip_mask();
      } else {
        ALPHAPRUNE_UNROLL
        for (int r = 0; r < kRows; ++r)
          copy_values<kBytes>(p.values, of[r].first, of[r].last, to + r * row_bytes, lane);
      }
    };
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < kStages - 1; ++i) {
      if (part + i * splits < end) copy(chunk_of[i], (stage + i) % kStages);
      if constexpr (!kBulk) copy_commit();
    }
    if constexpr (kBulk) {
      if (fresh) {
        wait_for_kernels_before();  // weights were there before them, x may not have been
        if (thread_index() == 0) stage_activations_bulk(p, 0, all_x + slab_at, slab_landed(number));
      }
    }

    float sum[kRows][kTiles][4] = {};
    [[maybe_unused]] Scales<kRows> scales;
    if constexpr (kGrouped) scales.start(p, (there > 0 ? first_tile : block_tile) * 16 + group, part);
    int chunk = part;
    ALPHAPRUNE_NO_UNROLL
    for (int slab = 0; slab < p.plan.slabs; ++slab) {
      const int first_chunk = slab * p.plan.slab_chunks, next_slab = first_chunk + p.plan.slab_chunks;
      const int slab_end = next_slab < end ? next_slab : end;
      if (fresh) {
        if constexpr (kBulk) {
          // The next slab takes the place of the one before this; warps bring them by turns.
          if (slab + 1 < p.plan.slabs && warp == (number + 1) % warps) {
            if (slab) mbarrier_wait(slab_left(number - 1), (number - 1) / 2 % 2);
            if (lane == 0) stage_activations_bulk(p, slab + 1, all_x + (slab_bytes - slab_at), slab_landed(number + 1));
          }
          mbarrier_wait(slab_landed(number), number / 2 % 2);
        } else {
          if (chunk < slab_end) {
            copy_wait<kStages - 2>();
          } else {
            copy_wait<0>();
          }
          sync_block();  // all of the slab has landed, and nobody reads the one before
          if (slab + 1 < p.plan.slabs) {
            stage_activations<kTiles>(p, slab + 1, all_x + (slab_bytes - slab_at));
            copy_commit();
          }
        }
      }
      uint32_t x = x_lane + slab_at + (chunk - first_chunk) * kChunkBytes;
      ALPHAPRUNE_NO_UNROLL
      for (; chunk < slab_end; chunk += splits) {  // cubins: main: those around it run once per slab and round
        const uint32_t here = ring + stage * stage_bytes;
        if constexpr (kBulk) mbarrier_wait(landed + stage * kMbarrierBytes, phase);
        ALPHAPRUNE_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if constexpr (kBulk)
            mask[r] = kRows == 1 || r < there ? load_shared_u64(here + r * row_bytes + lane * 8) : uint2{0, 0};
          store_meta<kBytes>(mask[r], (chunk_of[0][r].middle - chunk_of[0][r].first) * Values<kBytes>::kOffsetBytes,
                             here + r * row_bytes + kValuesAt, meta + r * kMetaBytes, lane);
          if constexpr (!kBulk)
            if (chunk + splits < end) mask[r] = rows.row[r].next_mask();
        }
        if constexpr (!kBulk) copy_wait<kStages - 2>();
        sync_warp();  // every lane's copies have landed, the words are there, and nobody reads the stage before this
                      // one

        if (chunk + (kStages - 1) * splits < end) copy(chunk_of[kStages - 1], stage == 0 ? kStages - 1 : stage - 1);
        if constexpr (!kBulk) copy_commit();
        ALPHAPRUNE_UNROLL
        for (int r = 0; r < kRows; ++r) {
          ALPHAPRUNE_UNROLL
          for (int i = 0; i + 1 < kStages; ++i) chunk_of[i][r] = chunk_of[i + 1][r];
          if (chunk + kStages * splits < end) rows.row[r].next_offsets(chunk_of[kStages - 1][r]);
        }

        [[maybe_unused]] float scale[kRows][2], part_sum[kRows][kTiles][4] = {};
        if constexpr (kGrouped) scales.load(scale);
        // Where registers are few, no activations of steps further on.
        constexpr int kSpan = mma_span(kRows, kTiles);
        uint4 words = mine.words(meta, 0);
        ALPHAPRUNE_NO_UNROLL
        for (int span = 0; span < kChunkSteps; span += kSpan) {  // cubins: trips 2: kChunkSteps / kSpan, or 1
          ALPHAPRUNE_UNROLL
          for (int in_span = 0; in_span < kSpan; ++in_span) {
            const int step = span + in_span;
            uint2 b[kTiles];
            ALPHAPRUNE_UNROLL
            for (int t = 0; t < kTiles; ++t) b[t] = load_shared_u64(x + 8 * t * x_stride + step * sbt::kStepCols * 2);
            ALPHAPRUNE_UNROLL
            for (int r = 0; r < kRows; ++r) {
              const uint4 these = words;
              const int next = step * kRows + r + 1;
              if (next < kChunkSteps * kRows) words = mine.words(meta + next % kRows * kMetaBytes, next / kRows);
              uint32_t a[4];
              mine.decode(these, a);
              ALPHAPRUNE_UNROLL
              for (int t = 0; t < kTiles; ++t) mma<Value>(kGrouped ? part_sum[r][t] : sum[r][t], a, b[t]);
            }
          }
        }
        sync_warp();  // nobody reads the words of this chunk any more
        if constexpr (kGrouped) {
          ALPHAPRUNE_UNROLL
          for (int r = 0; r < kRows; ++r) ALPHAPRUNE_UNROLL
          for (int t = 0; t < kTiles; ++t) ALPHAPRUNE_UNROLL
          for (int i = 0; i < 4; ++i) sum[r][t][i] += scale[r][i / 2] * part_sum[r][t][i];
        }
        x += splits * kChunkBytes;
        if (++stage == kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
      if (p.plan.slabs > 1) {
        if constexpr (kBulk) sync_warp();  // no lane is so far behind that a barrier has gone round meanwhile
        if (kBulk && lane == 0) mbarrier_arrive(slab_left(number));
        ++number;
        slab_at = slab_bytes - slab_at;
      }
    }
    fresh = p.plan.slabs > 1;

    // The rings become sums[warp][row tile][token tile][i][lane].
    if constexpr (kBulk) {
      wait_for_kernels_before();  // they may still read what y overwrites
    } else {
      copy_wait<0>();
    }
    sync_block();
    constexpr uint32_t kSums = kRows * kTiles * 128;
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < kRows; ++r) ALPHAPRUNE_UNROLL
    for (int t = 0; t < kTiles; ++t) ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i)
      store_shared_f32(rings + 4 * (warp * kSums + ((r * kTiles + t) * 4 + i) * kWarp + lane), sum[r][t][i]);
    sync_block();
    // Half a warp takes a row tile and a token at a time.
    const int all = p.plan.teams * kRows, round_tiles = block_end - round_tile < all ? block_end - round_tile : all;
    const int in_tile = thread_index() % 16;
    ALPHAPRUNE_NO_UNROLL
    for (int item = thread_index() / 16; item < round_tiles * 8 * kTiles; item += warps * 2) {
      const int tile = item / (8 * kTiles), token = item % (8 * kTiles), row = (round_tile + tile) * 16 + in_tile;
      if (token >= p.tokens || !p.out.has(row)) continue;
      const int i = in_tile / 8 * 2 + token % 2, holder = in_tile % 8 * 4 + token % 8 / 2;
      uint32_t at =
          rings + 4 * (tile / kRows * splits * kSums + ((tile % kRows * kTiles + token / 8) * 4 + i) * kWarp + holder);
      float total = 0;
      for (int w = 0; w < splits; ++w, at += 4 * kSums) total += load_shared_f32(at);
      if constexpr (kBytes == 1) total *= Lane::kFactor;
      if constexpr (kBytes == 1 && !kGrouped) total *= p.scale[row];
      store_output<Value>(p.out, token, row, total);
    }
    if constexpr (kBulk) fence_for_copies();
    sync_block();  // the sums are read: the rings may be filled again
  }
}

template <class Value, int kTiles, int kRows, Copies kCopies>
ALPHAPRUNE_KERNEL __launch_bounds__(mma_most_warps(kRows, kTiles, false) * kWarp, 1) sbt_mma(const MmaProblem p) {
  if constexpr (ALPHAPRUNE_SM90 || kCopies != Copies::bulk)
    multiply_tiles<FloatLane, Value, kTiles, kRows, kCopies, false>(p);
}

// The same of 8-bit integers; activations and outputs are in `Value`.
template <class Value, int kTiles, int kRows, Copies kCopies, bool kGrouped>
ALPHAPRUNE_KERNEL __launch_bounds__(mma_most_warps(kRows, kTiles, true) * kWarp, 1) sbt_mma_int8(const MmaProblem p) {
  if constexpr (ALPHAPRUNE_SM90 || kCopies != Copies::bulk)
    multiply_tiles<IntegerLane<Value>, Value, kTiles, kRows, kCopies, kGrouped>(p);
}

}  // namespace alphaprune::cuda
