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

// Warps of a block, as many as the registers for sums leave room for. bytes: of a value.
ALPHAPRUNE_BOTH constexpr int mma_most_warps(int row_tiles, int token_tiles, int bytes) {
  const int tiles = row_tiles * token_tiles;
  if (bytes == 4) return tiles <= 2 ? 28 : tiles <= 4 ? 16 : 12;
  if (bytes == 1) return tiles == 1 ? 28 : tiles == 2 ? 24 : tiles <= 4 ? 20 : 12;
  if (row_tiles > 1) return tiles <= 4 ? 24 : tiles <= 8 ? 16 : 14;
  return tiles <= 4 ? 32 : 20;
}

// How copies are made. Edges: cols is no multiple of a chunk's. Whole: it is. Bulk: it is, x starts on 16 bytes, and
// the memory system of sm_90 copies by itself.
enum class Copies { edges, whole, bulk };

// Products of 16 columns that are unrolled together: all of a chunk, or fewer where the sums leave few registers.
ALPHAPRUNE_BOTH constexpr int mma_span(int row_tiles, int token_tiles) {
  return row_tiles * token_tiles > 4 ? 4 : kChunkSteps;
}
// Chunks in a warp's ring: so many warps have one each under way that a third gained nothing on an H200.
constexpr int kStages = 2;
constexpr uint32_t kChunkBytes = kChunkCols * 2;  // of a token's activations
// Steps of a chunk.
template <class Lane>
constexpr int kMmaSteps = Lane::kMacroTiles * sbt::kSteps;
// Of a chunk, whose columns of W are the same for every kind of values.
template <class Lane>
constexpr uint32_t kMaskBytes = Lane::kMacroTiles * sbt::kWords * 4;
// {mask word, address} for each word.
template <class Lane>
constexpr uint32_t kMmaMetaBytes = Lane::kMacroTiles * kMetaBytes / kChunk;
// Rows of x are so much longer than their columns, so that those which are loaded together are in different banks: of
// four tokens 8 bytes a lane, of eight 4.
template <class Lane>
constexpr uint32_t kActivationPad = 32 / Lane::kProducts;

// How a product is shared out.
struct MmaPlan {
  int blocks;       // that share the row tiles
  int teams;        // of a block, each with kRows row tiles at a time
  int splits;       // warps of a team
  int slab_chunks;  // whose activations are in shared memory together
  int slabs;        // 1: all of them

  ALPHAPRUNE_BOTH int warps() const { return teams * splits; }
};

// One of the weights that share x, where it was packed.
struct MmaMember {
  const void* values;
  const uint32_t* mask;
  const uint32_t* offsets;
  const float* scale;  // of integers: [rows, groups]
};

// The row tiles of all members are one sequence. Where a team has several at a time, they are of one member: each
// begins with a multiple of them, and so does every block.
struct MmaProblem {
  MmaMember of[kMostMembers];
  const uint16_t* x;
  Output out;  // which numbers rows as row tiles are
  int cols, tokens;
  int col_tiles;
  int unit, units;  // blocks have a multiple of `unit` row tiles; all are `units` times that, at most 2^32 / blocks
  MmaPlan plan;
  uint32_t value_bytes;  // of the largest chunk, a multiple of 16
  bool eights;           // whether eight neighbouring activations can be copied at once
  Opaque number;
  int groups;  // scales of a row of integers: one for each chunk, or one
};
static_assert(kChunkCols == sbt::kScaleCols, "a chunk has one scale per row");
constexpr int kTileRows = sbt::kTileRows;

// Rows of x in shared memory: of few tokens those that are there, else of whole tiles.
ALPHAPRUNE_BOTH constexpr int mma_x_rows(int token_tiles, int tokens) {
  return token_tiles == 1 ? tokens : 8 * token_tiles;
}
template <class Lane>
ALPHAPRUNE_BOTH constexpr uint32_t mma_x_stride(int slab_chunks) {
  return slab_chunks * kChunkBytes + kActivationPad<Lane>;
}
template <class Lane>
ALPHAPRUNE_BOTH constexpr uint32_t mma_slab_bytes(const MmaPlan& plan, int token_tiles, int tokens) {
  return mma_x_rows(token_tiles, tokens) * mma_x_stride<Lane>(plan.slab_chunks);
}
ALPHAPRUNE_BOTH constexpr uint32_t mma_sum_bytes(int row_tiles, int token_tiles) {
  return row_tiles * token_tiles * 128 * sizeof(float);
}
// Of a warp: the words of its chunk with their addresses, and its ring, of whose stages each has the words and the
// values.
template <class Lane>
ALPHAPRUNE_BOTH constexpr uint32_t mma_stage_bytes(int row_tiles, Copies copies, uint32_t value_bytes) {
  return row_tiles * ((copies == Copies::bulk ? kMaskBytes<Lane> : 0) + value_bytes);
}
template <class Lane>
ALPHAPRUNE_BOTH constexpr uint32_t mma_warp_bytes(int row_tiles, Copies copies, uint32_t value_bytes) {
  return row_tiles * kMmaMetaBytes<Lane> + kStages * mma_stage_bytes<Lane>(row_tiles, copies, value_bytes);
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
  const uint32_t ring = mma_warp_bytes<Lane>(row_tiles, copies, value_bytes);
  const uint32_t sums = mma_sum_bytes(row_tiles, token_tiles);
  return mma_barrier_bytes(plan.warps(), copies) +
         (plan.slabs > 1 ? 2 : 1) * mma_slab_bytes<Lane>(plan, token_tiles, tokens) +
         plan.warps() * (Lane::kTableBytes + (ring > sums ? ring : sums)) + Lane::kBeyond;
}

// Starts the copies of a slab of x to `to`: zeros past the last column and, of a tile of tokens, past the last token.
template <int kTiles>
ALPHAPRUNE_DEVICE void stage_activations(const MmaProblem& p, int slab, uint32_t to, uint32_t stride) {
  constexpr int kUnits = kChunkCols / 8;  // of 8 activations; so many lanes copy a chunk's
  const int first_chunk = slab * p.plan.slab_chunks, all = (p.cols + kChunkCols - 1) / kChunkCols;
  const int chunks = all - first_chunk < p.plan.slab_chunks ? all - first_chunk : p.plan.slab_chunks;
  const int rows = mma_x_rows(kTiles, p.tokens), unit = thread_index() % kUnits;
  const int first = thread_index() / kUnits, step = p.plan.warps() * kWarp / kUnits;
  // item = token * chunks + chunk, without a division for each.
  int token = first / chunks, chunk = first % chunks;
  const int tokens_further = step / chunks, chunks_further = step % chunks;
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
ALPHAPRUNE_DEVICE void stage_activations_bulk(const MmaProblem& p, int slab, uint32_t to, uint32_t stride,
                                              uint32_t barrier) {
  const int first = slab * p.plan.slab_chunks * kChunkCols, all = p.plan.slab_chunks * kChunkCols;
  const uint32_t bytes = (p.cols - first < all ? p.cols - first : all) * 2;
  mbarrier_arrive_expect(barrier, p.tokens * bytes);
  const uint16_t* x = p.x + first;
  ALPHAPRUNE_NO_UNROLL
  for (int token = 0; token < p.tokens; ++token, to += stride, x += p.cols) copy_bulk(to, x, bytes, barrier);
}
// Zeros for tokens of a tile that are not there, in all slabs.
template <int kTiles>
ALPHAPRUNE_DEVICE void clear_activations(const MmaProblem& p, uint32_t all_x, uint32_t stride) {
  const uint32_t rows = mma_x_rows(kTiles, p.tokens);
  const uint32_t first = p.tokens * stride, end = rows * stride;
  for (int i = 0; i < (p.plan.slabs > 1 ? 2 : 1); ++i)
    for (uint32_t at = first + thread_index() * 16; at < end; at += p.plan.warps() * kWarp * 16)
      store_shared_u128(all_x + i * end + at, {0, 0, 0, 0});
}

// Where things lie in shared memory, of them those of this warp.
template <class Lane, int kTiles, int kRows, Copies kCopies>
struct MmaShared {
  static constexpr bool kBulk = kCopies == Copies::bulk;
  static constexpr uint32_t kMasks = kMaskBytes<Lane>, kMeta = kMmaMetaBytes<Lane>;  // of a row tile's chunk
  static constexpr uint32_t kValuesAt = kBulk ? kMasks : 0;                          // in a row tile's part of a stage
  uint32_t table, barriers, x, rings, meta, ring;
  uint32_t slab_bytes, x_stride, row_bytes, stage_bytes;  // a row tile's part of a stage; a stage
  uint32_t landed;                                        // the barriers of this warp's stages

  ALPHAPRUNE_DEVICE MmaShared(const MmaProblem& p, int warp) {
    const int warps = p.plan.warps();
    table = shared_start() + warp * Lane::kTableBytes;
    slab_bytes = mma_slab_bytes<Lane>(p.plan, kTiles, p.tokens);
    x_stride = mma_x_stride<Lane>(p.plan.slab_chunks);
    barriers = shared_start() + warps * Lane::kTableBytes;
    x = barriers + mma_barrier_bytes(warps, kCopies);
    rings = x + (p.plan.slabs > 1 ? 2 : 1) * slab_bytes;
    row_bytes = kValuesAt + p.value_bytes;
    stage_bytes = kRows * row_bytes;
    meta = rings + warp * mma_warp_bytes<Lane>(kRows, kCopies, p.value_bytes);
    ring = meta + kRows * kMeta;
    landed = barriers + (kSlabBarriers + warp * kStages) * kMbarrierBytes;
  }
  // Of a slab, by its number over all rounds.
  ALPHAPRUNE_DEVICE uint32_t slab_landed(int number) const { return barriers + number % 2 * kMbarrierBytes; }
  ALPHAPRUNE_DEVICE uint32_t slab_left(int number) const { return barriers + (2 + number % 2) * kMbarrierBytes; }

  ALPHAPRUNE_DEVICE void begin(const MmaProblem& p, int lane) const {
    if constexpr (kBulk) {
      if (thread_index() < kSlabBarriers)
        mbarrier_init(barriers + thread_index() * kMbarrierBytes, thread_index() < 2 ? 1 : p.plan.warps());
      if (lane < kStages) mbarrier_init(landed + lane * kMbarrierBytes, 1);
      mbarrier_fence_init();
      if constexpr (kTiles > 1) clear_activations<kTiles>(p, x, x_stride);
      sync_block();
      let_next_begin();
    }
  }
};

// The chunks of a team's row tiles that a warp has its turns with: where they are, the offsets of those that come next,
// and how they go through its ring. `At` is an MmaShared.
template <class At, class Lane, int kRows, Copies kCopies>
struct Feed {
  static constexpr bool kBulk = kCopies == Copies::bulk, kWhole = kCopies != Copies::edges;
  static constexpr int kBytes = Lane::kBytes, kTiles = Lane::kMacroTiles;
  using RowOf = Row<kWhole && kRows == 1, kTiles>;
  const At& at;
  int lane;
  int stage = 0;       // of the chunk that is decoded
  uint32_t phase = 0;  // of the barriers of the stages
  RowOf row;           // the first row tile
  int there, apart;    // how many there are; macro tiles from one to the next
  const void* values;
  // In flight: the chunk that is decoded now, kStages - 1 that are copied, and the offsets of the one after these.
  Chunk chunk[kStages][kRows];
  [[maybe_unused]] typename RowOf::Words mask[kRows];

  ALPHAPRUNE_DEVICE Feed(const At& shared, int this_lane) : at(shared), lane(this_lane) {}

  ALPHAPRUNE_DEVICE void start(const MmaProblem& p, int tile, int row_tiles, int first_col, int stride) {
    const int member = p.out.member_of(tile * kTileRows);
    const MmaMember& of = p.of[member];
    tile -= p.out.of[member].first / kTileRows;
    row.start(of.mask, of.offsets, static_cast<size_t>(tile) * p.col_tiles + first_col, p.col_tiles - first_col, lane,
              stride);
    there = row_tiles;
    apart = p.col_tiles;
    // Where one lane copies, the others have none: else the compiler keeps it, and the loop's counters with it, in
    // uniform registers, which the loop pays for with more instructions.
    values = !kBulk || lane == 0 ? of.values : nullptr;
  }
  ALPHAPRUNE_DEVICE void next_offsets(Chunk (&to)[kRows]) {
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < kRows; ++r) row.offsets_of(to[r], r * apart, r == 0 || r < there);
    row.pass_offsets();
  }
  ALPHAPRUNE_DEVICE void next_mask() {
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < kRows; ++r) mask[r] = row.mask_of(r * apart, r == 0 || r < there);
    row.pass_mask();
  }

  // Starts the copies of a chunk, whose stage nobody reads any more.
  ALPHAPRUNE_DEVICE void copy(const Chunk (&of)[kRows], int to_stage) {
    const uint32_t to = at.ring + to_stage * at.stage_bytes;
    if constexpr (kBulk) {
      if (lane == 0) copy_bulks(of, to, at.landed + to_stage * kMbarrierBytes);
      row.pass_mask();
    } else {
      ALPHAPRUNE_UNROLL
      for (int r = 0; r < kRows; ++r)
        copy_values<kBytes, kTiles>(values, of[r].first, of[r].last, to + r * at.row_bytes, lane);
    }
  }
  ALPHAPRUNE_DEVICE void copy_bulks(const Chunk (&of)[kRows], uint32_t to, uint32_t barrier) const {
    const auto* from = static_cast<const unsigned char*>(values);
    uint32_t bytes[kRows], all = 0;
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      bytes[r] = (of[r].last - of[r].first) * Values<kBytes>::kOffsetBytes;
      if (r == 0 || r < there) all += bytes[r] + At::kMasks;
    }
    mbarrier_arrive_expect(barrier, all);
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r > 0 && r >= there) continue;
      copy_bulk(to + r * at.row_bytes, row.mask + r * apart * RowOf::kTileLanes, At::kMasks, barrier);
      if (bytes[r])
        copy_bulk(to + r * at.row_bytes + At::kValuesAt,
                  from + static_cast<size_t>(of[r].first) * Values<kBytes>::kOffsetBytes, bytes[r], barrier);
    }
  }

  // Waits for the chunk that is decoded now and stores its words with their addresses. `more`: chunks after it.
  ALPHAPRUNE_DEVICE void arrive(bool more) {
    const uint32_t here = at.ring + stage * at.stage_bytes;
    if constexpr (kBulk) mbarrier_wait(at.landed + stage * kMbarrierBytes, phase);
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kBulk)
        mask[r] = r == 0 || r < there ? RowOf::load(here + r * at.row_bytes, lane) : typename RowOf::Words{};
      store_meta<kBytes>(mask[r], (chunk[0][r].middle - chunk[0][r].first) * Values<kBytes>::kOffsetBytes,
                         here + r * at.row_bytes + At::kValuesAt, at.meta + r * At::kMeta, lane);
    }
    if constexpr (!kBulk) {
      if (more) next_mask();
      copy_wait<kStages - 2>();
    }
    sync_warp();  // every lane's copies have landed, the words are there, and nobody reads the stage before this one
  }
  // Brings the chunk kStages - 1 turns on, where it is `wanted`, and asks for the offsets of the one after it.
  ALPHAPRUNE_DEVICE void bring(bool wanted, bool more) {
    if (wanted) copy(chunk[kStages - 1], stage == 0 ? kStages - 1 : stage - 1);
    if constexpr (!kBulk) copy_commit();
    ALPHAPRUNE_UNROLL
    for (int i = 0; i + 1 < kStages; ++i) {
      ALPHAPRUNE_UNROLL
      for (int r = 0; r < kRows; ++r) chunk[i][r] = chunk[i + 1][r];
    }
    if (more) next_offsets(chunk[kStages - 1]);
  }
  ALPHAPRUNE_DEVICE void leave() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The slabs of x, one multiplied and one on its way, over all rounds.
template <class At, int kTiles, Copies kCopies>
struct Slabs {
  static constexpr bool kBulk = kCopies == Copies::bulk;
  const MmaProblem& p;
  const At& at;
  int warp, lane;
  uint32_t slab_at = 0;  // where the slab lies that is multiplied
  int number = 0;        // of the slab, over all rounds
  bool fresh = true;     // whether it is on its way, not there from the round before

  ALPHAPRUNE_DEVICE Slabs(const MmaProblem& problem, const At& shared, int this_warp, int this_lane)
      : p(problem), at(shared), warp(this_warp), lane(this_lane) {}

  // The first one of a round, beside the first values.
  ALPHAPRUNE_DEVICE void start() {
    if constexpr (!kBulk)
      if (fresh) stage_activations<kTiles>(p, 0, at.x + slab_at, at.x_stride);
  }
  ALPHAPRUNE_DEVICE void start_bulk() {
    if constexpr (kBulk) {
      if (fresh) {
        wait_for_kernels_before();  // weights were there before them, x may not have been
        if (thread_index() == 0) stage_activations_bulk(p, 0, at.x + slab_at, at.x_stride, at.slab_landed(number));
      }
    }
  }
  // Until it is there; starts the one after it. busy: whether this warp has a chunk of it.
  ALPHAPRUNE_DEVICE void arrive(int slab, bool busy) {
    if (!fresh) return;
    const bool more = slab + 1 < p.plan.slabs;
    if constexpr (kBulk) {
      // The next slab takes the place of the one before this; warps bring them by turns.
      if (more && warp == (number + 1) % p.plan.warps()) {
        if (slab) mbarrier_wait(at.slab_left(number - 1), (number - 1) / 2 % 2);
        if (lane == 0)
          stage_activations_bulk(p, slab + 1, at.x + (at.slab_bytes - slab_at), at.x_stride,
                                 at.slab_landed(number + 1));
      }
      mbarrier_wait(at.slab_landed(number), number / 2 % 2);
    } else {
      if (busy) {
        copy_wait<kStages - 2>();
      } else {
        copy_wait<0>();
      }
      sync_block();  // all of the slab has landed, and nobody reads the one before
      if (more) {
        stage_activations<kTiles>(p, slab + 1, at.x + (at.slab_bytes - slab_at), at.x_stride);
        copy_commit();
      }
    }
  }
  ALPHAPRUNE_DEVICE void leave() {
    if (p.plan.slabs == 1) return;
    if constexpr (kBulk) sync_warp();  // no lane is so far behind that a barrier has gone round meanwhile
    if (kBulk && lane == 0) mbarrier_arrive(at.slab_left(number));
    ++number;
    slab_at = at.slab_bytes - slab_at;
  }
};

// The scales of a chunk for the rows of this lane's sums of a row tile, `first_row` and the eighth one after it.
struct Scales {
  const float* next;
  int last, stride, further;  // the last row of W from this lane's first one on; of the rows' scales; of the chunks'

  ALPHAPRUNE_DEVICE void start(const MmaProblem& p, int first_row, int first_chunk) {
    const int member = p.out.member_of(first_row), in_member = first_row - p.out.of[member].first;
    next = p.of[member].scale + static_cast<int64_t>(in_member) * p.groups + first_chunk;
    last = p.out.of[member].rows - 1 - in_member;
    stride = p.groups;
    further = p.plan.splits;
  }
  // Rows that are not there have the last one's.
  ALPHAPRUNE_DEVICE void load(float (&scale)[2]) {
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 2; ++i) scale[i] = load_cached(next + (8 * i < last ? 8 * i : last) * stride);
    next += further;
  }
};

// Of the columns that a lane has of a step, for each product.
ALPHAPRUNE_DEVICE void load_activations(uint2 (&b)[1], uint32_t from) { b[0] = load_shared_u64(from); }
ALPHAPRUNE_DEVICE void load_activations(uint2 (&b)[2], uint32_t from) {
  ALPHAPRUNE_UNROLL
  for (int i = 0; i < 2; ++i) b[i] = {load_shared_u32(from + 32 * i), load_shared_u32(from + 32 * i + 16)};
}

// sum += the chunk whose words are at `meta` times the activations from `x` on, rows of a tile's tokens x_stride apart.
template <class Value, int kTiles, int kRows, class Lane>
ALPHAPRUNE_DEVICE void multiply_chunk(float (&sum)[kRows][kTiles][4], Lane& mine, uint32_t meta, uint32_t x,
                                      uint32_t x_stride) {
  constexpr int kSteps = kMmaSteps<Lane>, kProducts = Lane::kProducts;
  constexpr int kSpan =
      mma_span(kRows, kTiles) / kProducts;  // where registers are few, no activations of steps further on
  uint4 words = mine.words(meta, 0);
  ALPHAPRUNE_NO_UNROLL
  for (int span = 0; span < kSteps; span += kSpan) {  // cubins: trips 2: kSteps / kSpan, or 1
    ALPHAPRUNE_UNROLL
    for (int in_span = 0; in_span < kSpan; ++in_span) {
      const int step = span + in_span;
      uint2 b[kTiles][kProducts];
      ALPHAPRUNE_UNROLL
      for (int t = 0; t < kTiles; ++t)
        load_activations(b[t], x + 8 * t * x_stride + step * kProducts * sbt::kStepCols * 2);
      ALPHAPRUNE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const uint4 these = words;
        const int next = step * kRows + r + 1;
        if (next < kSteps * kRows) words = mine.words(meta + next % kRows * kMmaMetaBytes<Lane>, next / kRows);
        uint32_t a[kProducts][4];
        mine.decode(these, a);
        ALPHAPRUNE_UNROLL
        for (int i = 0; i < kProducts; ++i) ALPHAPRUNE_UNROLL
        for (int t = 0; t < kTiles; ++t) mma<Value>(sum[r][t], a[i], b[t][i]);
      }
    }
  }
}

// Adds up what the warps of each team have in shared memory, sums[warp][row tile][token tile][i][lane], and stores the
// outputs of `tiles` row tiles from `round_tile` on. Half a warp takes a row tile and a token at a time.
template <class Lane, class Value, int kTiles, int kRows, bool kGrouped>
ALPHAPRUNE_DEVICE void store_tiles(const MmaProblem& p, uint32_t sums, int round_tile, int tiles) {
  constexpr uint32_t kSums = kRows * kTiles * 128;
  const int in_tile = thread_index() % kTileRows, splits = p.plan.splits;
  ALPHAPRUNE_NO_UNROLL
  for (int item = thread_index() / 16; item < tiles * 8 * kTiles; item += p.plan.warps() * 2) {
    const int tile = item / (8 * kTiles), token = item % (8 * kTiles), row = (round_tile + tile) * kTileRows + in_tile;
    if (token >= p.tokens || !p.out.has(row)) continue;
    const int i = in_tile / 8 * 2 + token % 2, holder = in_tile % 8 * 4 + token % 8 / 2;
    uint32_t at =
        sums + 4 * (tile / kRows * splits * kSums + ((tile % kRows * kTiles + token / 8) * 4 + i) * kWarp + holder);
    float total = 0;
    for (int w = 0; w < splits; ++w, at += 4 * kSums) total += load_shared_f32(at);
    if constexpr (Lane::kBytes == 1) total *= Lane::kFactor;
    if constexpr (Lane::kBytes == 1 && !kGrouped) {
      const int member = p.out.member_of(row);
      total *= p.of[member].scale[row - p.out.of[member].first];
    }
    store_output<Value>(p.out, token, row, total);
  }
}

// How many of the kRows row tiles from `first` on a team has: none past the block's, nor past a member's.
template <int kRows>
ALPHAPRUNE_DEVICE int tiles_there(const MmaProblem& p, int first, int block_end) {
  int end = block_end;
  if constexpr (kRows > 1) {
    const OutputRows& out = p.out.holder(first * kTileRows);
    const int member_end = (out.first + out.rows + kTileRows - 1) / kTileRows;
    end = member_end < end ? member_end : end;
  }
  return end - first;
}

// kTiles: of 8 tokens. kGrouped: scales change along a row.
template <class Lane, class Value, int kTiles, int kRows, Copies kCopies, bool kGrouped>
ALPHAPRUNE_DEVICE void multiply_tiles(const MmaProblem& p) {
  using At = MmaShared<Lane, kTiles, kRows, kCopies>;
  constexpr bool kBulk = kCopies == Copies::bulk;
  const int lane = lane_index(), warp = warp_index(), group = lane / 4, pair = lane % 4;
  const int splits = p.plan.splits, team = warp / splits, part = warp % splits;
  const int chunks = (p.col_tiles + Lane::kMacroTiles - 1) / Lane::kMacroTiles;
  const uint32_t units = p.units, blocks = p.plan.blocks;
  const int block_tile = static_cast<int>(units * block_x() / blocks) * p.unit;
  const int block_end = static_cast<int>(units * (block_x() + 1) / blocks) * p.unit;

  const At at(p, warp);
  if constexpr (Lane::kTableBytes > 0) Lane::fill(at.table, lane);
  Lane mine(lane, p.number, at.table);
  at.begin(p, lane);
  // Of the columns and tokens that this lane holds of b. Tokens that are not there, of a tile alone: the last one
  // again.
  const int token = kTiles > 1 || group < p.tokens ? group : p.tokens - 1;
  const uint32_t x_lane = at.x + token * at.x_stride + pair * 8 / Lane::kProducts;
  Feed<At, Lane, kRows, kCopies> feed(at, lane);
  Slabs<At, kTiles, kCopies> slabs(p, at, warp, lane);

  ALPHAPRUNE_NO_UNROLL
  for (int round_tile = block_tile; round_tile < block_end; round_tile += p.plan.teams * kRows) {
    const int first_tile = round_tile + team * kRows, there = tiles_there<kRows>(p, first_tile, block_end);
    const int tile = there > 0 ? first_tile : block_tile, end = there > 0 ? chunks : 0;
    feed.start(p, tile, there, part * Lane::kMacroTiles, splits * Lane::kMacroTiles);
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < kStages; ++i)
      if (part + i * splits < end) feed.next_offsets(feed.chunk[i]);
    if constexpr (!kBulk)
      if (part < end) feed.next_mask();
    slabs.start();
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < kStages - 1; ++i) {
      if (part + i * splits < end) feed.copy(feed.chunk[i], (feed.stage + i) % kStages);
      if constexpr (!kBulk) copy_commit();
    }
    slabs.start_bulk();

    float sum[kRows][kTiles][4] = {};
    [[maybe_unused]] Scales scales[kRows];
    if constexpr (kGrouped) {
      ALPHAPRUNE_UNROLL
      for (int r = 0; r < kRows; ++r) scales[r].start(p, (r < there ? tile + r : tile) * kTileRows + group, part);
    }
    int chunk = part;
    ALPHAPRUNE_NO_UNROLL
    for (int slab = 0; slab < p.plan.slabs; ++slab) {
      const int first_chunk = slab * p.plan.slab_chunks, next_slab = first_chunk + p.plan.slab_chunks;
      const int slab_end = next_slab < end ? next_slab : end;
      slabs.arrive(slab, chunk < slab_end);
      uint32_t x = x_lane + slabs.slab_at + (chunk - first_chunk) * kChunkBytes;
      ALPHAPRUNE_NO_UNROLL
      for (; chunk < slab_end; chunk += splits) {  // cubins: main: those around it run once per slab and round
        feed.arrive(chunk + splits < end);
        feed.bring(chunk + (kStages - 1) * splits < end, chunk + kStages * splits < end);
        [[maybe_unused]] float scale[kRows][2], part_sum[kRows][kTiles][4] = {};
        if constexpr (kGrouped) {
          ALPHAPRUNE_UNROLL
          for (int r = 0; r < kRows; ++r) scales[r].load(scale[r]);
        }
        multiply_chunk<Value>(kGrouped ? part_sum : sum, mine, at.meta, x, at.x_stride);
        sync_warp();  // nobody reads the words of this chunk any more
        if constexpr (kGrouped) {
          ALPHAPRUNE_UNROLL
          for (int r = 0; r < kRows; ++r) ALPHAPRUNE_UNROLL
          for (int t = 0; t < kTiles; ++t) ALPHAPRUNE_UNROLL
          for (int i = 0; i < 4; ++i) sum[r][t][i] += scale[r][i / 2] * part_sum[r][t][i];
        }
        x += splits * kChunkBytes;
        feed.leave();
      }
      slabs.leave();
    }
    slabs.fresh = p.plan.slabs > 1;

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
      store_shared_f32(at.rings + 4 * (warp * kSums + ((r * kTiles + t) * 4 + i) * kWarp + lane), sum[r][t][i]);
    sync_block();
    const int all = p.plan.teams * kRows, left = block_end - round_tile;
    store_tiles<Lane, Value, kTiles, kRows, kGrouped>(p, at.rings, round_tile, left < all ? left : all);
    if constexpr (kBulk) fence_for_copies();
    sync_block();  // the sums are read: the rings may be filled again
  }
}

template <class Value, int kTiles, int kRows, Copies kCopies>
ALPHAPRUNE_KERNEL __launch_bounds__(mma_most_warps(kRows, kTiles, 2) * kWarp, 1) sbt_mma(const MmaProblem p) {
  if constexpr (ALPHAPRUNE_SM90 || kCopies != Copies::bulk)
    multiply_tiles<FloatLane, Value, kTiles, kRows, kCopies, false>(p);
}

// The same of pairs of floats.
template <class Value, int kTiles, int kRows, Copies kCopies>
ALPHAPRUNE_KERNEL __launch_bounds__(mma_most_warps(kRows, kTiles, 4) * kWarp, 1) pair_mma(const MmaProblem p) {
  if constexpr (ALPHAPRUNE_SM90 || kCopies != Copies::bulk)
    multiply_tiles<PairLane, Value, kTiles, kRows, kCopies, false>(p);
}

// The same of 8-bit integers; activations and outputs are in `Value`.
template <class Value, int kTiles, int kRows, Copies kCopies, bool kGrouped>
ALPHAPRUNE_KERNEL __launch_bounds__(mma_most_warps(kRows, kTiles, 1) * kWarp, 1) sbt_mma_int8(const MmaProblem p) {
  if constexpr (ALPHAPRUNE_SM90 || kCopies != Copies::bulk)
    multiply_tiles<IntegerLane<Value>, Value, kTiles, kRows, kCopies, kGrouped>(p);
}

}  // namespace alphaprune::cuda
