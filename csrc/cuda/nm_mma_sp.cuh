// y = x Wᵀ for up to 64 tokens on sparse tensor cores, from the 2:4 panels of NmView in launch.h. A block owns a panel
// of 32 rows; its warps share the columns between them and add up in a fixed order at the end. The weight goes straight
// from memory to the registers of mma.sp, one panel of 32 x 128 ahead; x goes through a ring of asynchronous copies of
// the warp's own and comes out as fragments by ldmatrix.
#pragma once

#include "output.cuh"

namespace alphaprune::cuda {

constexpr int kNmRows = 32;
constexpr int kNmCols = 128;
constexpr int kNmSteps = kNmCols / 32;  // mma.sp steps of a panel
constexpr int kNmRing = 2;

// Fewer warps and shorter stages where there are many tokens, so that two blocks fit on a multiprocessor.
ALPHAPRUNE_BOTH constexpr int nm_warps(int tiles) { return tiles <= 2 ? 8 : 4; }
// Per multiprocessor, as registers allow.
ALPHAPRUNE_BOTH constexpr int nm_blocks(int tiles) { return tiles == 1 || tiles == 8 ? 3 : tiles; }
ALPHAPRUNE_BOTH constexpr int nm_stage_cols(int tiles) { return tiles <= 4 ? kNmCols : kNmCols / 2; }
ALPHAPRUNE_BOTH constexpr uint32_t nm_stage_bytes(int tiles) { return tiles * 8 * nm_stage_cols(tiles) * 2; }
// A row of sums is 4 floats longer than a panel, so that the lanes of a fragment store to different banks.
constexpr int kNmSumRow = kNmRows + 4;
ALPHAPRUNE_BOTH constexpr uint32_t nm_sum_bytes(int tiles) { return tiles * 8 * kNmSumRow * sizeof(float); }
ALPHAPRUNE_BOTH constexpr size_t nm_shared_bytes(int tiles) {
  const uint32_t ring = kNmRing * nm_stage_bytes(tiles), sums = nm_sum_bytes(tiles);
  return nm_warps(tiles) * ((ring > sums ? ring : sums) + sizeof(float));
}

constexpr int kNmFragments = kNmSteps * 2;            // 16 bytes per lane each
constexpr int kNmPanel = (kNmFragments + 1) * kWarp;  // of 16 bytes, metadata included

struct NmProblem {
  const uint4* panels[kMostMembers];  // whose row panels are one sequence
  const uint16_t* x;
  Output out;  // which numbers rows by whole panels
  int cols, tokens, col_panels;
  bool eights;  // whether eight neighbouring activations can be copied at once
};

// Of all members; and what the kernels are given.
int nm_row_panels(const Call& call);
NmProblem nm_problem(const NmView& weight, const Call& call);

// The panels of 32 rows, from the first column on.
ALPHAPRUNE_DEVICE const uint4* panels_at(const NmProblem& p, int row_panel) {
  const int member = p.out.member_of(row_panel * kNmRows);
  return p.panels[member] + static_cast<size_t>(row_panel - p.out.of[member].first / kNmRows) * p.col_panels * kNmPanel;
}

// A lane's part of the copies of kCols activations of every token into a stage of the ring. Row t of a stage has 16
// bytes of neighbours at chunk ^ (t % 8), so that ldmatrix finds those of eight tokens in different banks.
template <int kTiles, bool kWhole>
struct NmCopier {
  static constexpr int kCols = nm_stage_cols(kTiles), kChunks = kCols / 8, kAtOnce = kWarp / kChunks;
  int col, first;        // of the chunk in a stage; the first of its tokens, the others are kAtOnce apart
  const uint16_t* from;  // where the next stage's begin
  uint32_t to;           // in a stage

  ALPHAPRUNE_DEVICE NmCopier(const NmProblem& p, int at, int lane)
      : col(at + 8 * (lane % kChunks)), first(lane / kChunks), from(p.x + static_cast<size_t>(first) * p.cols + col) {
    to = first * kCols * 2 + ((lane % kChunks ^ first) << 4);
  }
  // Columns go on by `further`.
  ALPHAPRUNE_DEVICE void copy(const NmProblem& p, uint32_t stage, bool on, int further) {
    constexpr int kTurns = 8 * kTiles / kAtOnce;
    const int left = on ? p.tokens - first : 0;
    const auto to_of = [&](int i) { return ((stage + to) ^ ((i * kAtOnce & 7) << 4)) + i * kAtOnce * kCols * 2; };
    const auto from_of = [&](int i) { return from + static_cast<size_t>(i * kAtOnce) * p.cols; };
    if constexpr (kWhole) {
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < kTurns; ++i) copy_async<0, 0>(to_of(i), from_of(i), left > i * kAtOnce);
    } else {
      ALPHAPRUNE_NO_UNROLL
      for (int i = 0; i < kTurns && left > i * kAtOnce; ++i) copy_edge(p, to_of(i), from_of(i));
      col += further;
    }
    from += further;
  }
  // Where columns end inside of a panel, or x is not aligned.
  ALPHAPRUNE_DEVICE void copy_edge(const NmProblem& p, uint32_t at, const uint16_t* x) const {
    if (p.eights && col < p.cols) {
      copy_async<0, 0>(at, x, 1);
      return;
    }
    uint32_t half[8];
    ALPHAPRUNE_UNROLL
    for (int k = 0; k < 8; ++k) half[k] = col + k < p.cols ? load_cached(x + k) : 0;
    store_shared_u128(
        at, {half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16, half[6] | half[7] << 16});
  }
};

// A word of metadata serves two steps: the even one's is in lanes 4 g and 4 g + 1, the odd one's in the two after
// these.
template <class Value>
ALPHAPRUNE_DEVICE void multiply(float (&sum)[4], uint4 a, uint4 b, uint32_t meta, bool odd) {
  if (odd)
    mma_sparse<1, Value>(sum, a, b, meta);
  else
    mma_sparse<0, Value>(sum, a, b, meta);
}

// Whether a pruned weight of the row meets an activation that is not finite: 0 * x is NaN there in a dense layer.
template <class Value>
ALPHAPRUNE_DEVICE bool prunes_not_finite(const NmProblem& p, int panel, int row, int token) {
  const uint16_t* x = p.x + static_cast<size_t>(token) * p.cols;
  for (int col = 0; col < p.cols; ++col) {
    if (!is_nan(poison_of(Value::widen(load_cached(x + col))))) continue;
    const uint4* at = panels_at(p, panel) + col / kNmCols * kNmPanel;
    const uint4 words = load_cached(at + kNmFragments * kWarp + row % 8 * 4 + col % 64 / 16);
    const uint32_t pair = word_of(words, row / 16 * 2 + col % kNmCols / 64) >> (row % 16 / 8 * 16 + col % 16 / 4 * 4);
    if ((pair & 3) != (col & 3u) && (pair >> 2 & 3) != (col & 3u)) return true;
  }
  return false;
}

// kTiles: of 8 tokens. kWhole: cols is a multiple of 128 and x aligned to 16 bytes.
template <class Value, int kTiles, bool kWhole>
ALPHAPRUNE_KERNEL __launch_bounds__(nm_warps(kTiles) * kWarp, kWhole ? nm_blocks(kTiles) : 1)
    nm_mma_sp(const NmProblem p) {
  constexpr int kWarps = nm_warps(kTiles), kStageCols = nm_stage_cols(kTiles);
  constexpr int kStages = kNmCols / kStageCols, kStageSteps = kStageCols / 32;
  constexpr uint32_t kStage = nm_stage_bytes(kTiles);
  const int lane = lane_index(), warp = warp_index();
  const uint32_t ring = shared_start() + warp * kNmRing * kStage;

  // Tokens that are not there: zeros, once.
  for (uint32_t at = lane * 16; at < kNmRing * kStage; at += kWarp * 16)
    if (static_cast<int>(at % kStage / (kStageCols * 2)) >= p.tokens) store_shared_u128(ring + at, {0, 0, 0, 0});

  const uint4* panel = panels_at(p, block_x()) + warp * kNmPanel + lane;
  uint4 a[kNmSteps][2], words{};
  const auto load_step = [&](int step) {
    ALPHAPRUNE_UNROLL
    for (int r = 0; r < 2; ++r) a[step][r] = load_once(panel + (step * 2 + r) * kWarp);
  };
  NmCopier<kTiles, kWhole> copier(p, warp * kNmCols, lane);
  // Columns from one stage to the next: the warps take panels in turn.
  const auto further = [](int part) { return part + 1 < kStages ? kStageCols : kWarps * kNmCols - part * kStageCols; };

  int left = (p.col_panels - warp + kWarps - 1) / kWarps;  // panels, the one in registers included
  if (left > 0) {
    words = load_once(panel + kNmFragments * kWarp);
    ALPHAPRUNE_UNROLL
    for (int step = 0; step < kNmSteps; ++step) load_step(step);
  }
  copier.copy(p, ring, left > 0, further(0));
  copy_commit();

  // Fragments: lane 8 i + r names row r (a token) of columns 8 i to 8 i + 7 of a step.
  // Shuffled from the lane itself, so that the compiler keeps the number instead of computing it in the loop again.
  const uint32_t mine = shuffle((lane & 7) * kStageCols * 2 + (((lane >> 3) ^ (lane & 7)) << 4), lane);
  // probe: fragments of x times themselves, finite only where all of x is, whatever the metadata selects.
  float sum[2][kTiles][4] = {}, probe[4] = {};
  uint32_t stage = ring;
  ALPHAPRUNE_NO_UNROLL
  for (; left > 0; --left) {
    panel += kWarps * kNmPanel;
    ALPHAPRUNE_UNROLL
    for (int part = 0; part < kStages; ++part) {
      copy_wait<0>();
      sync_warp();  // every lane's copies have landed, and nobody reads the other stage any more
      const uint32_t other = ring + (ring + kStage - stage);
      const int next = (part + 1) % kStages;
      copier.copy(p, other, next || left > 1, further(next));
      copy_commit();
      ALPHAPRUNE_UNROLL
      for (int s = 0; s < kStageSteps; ++s) {
        const int step = part * kStageSteps + s;
        uint4 b[kTiles];
        ALPHAPRUNE_UNROLL
        for (int t = 0; t < kTiles; ++t)
          b[t] = load_matrices(((stage + mine) ^ 64 * (s % 2)) + t * 8 * kStageCols * 2 + 128 * (s / 2));
        ALPHAPRUNE_UNROLL
        for (int t = 0; t < kTiles; ++t) {
          ALPHAPRUNE_UNROLL
          for (int r = 0; r < 2; ++r)
            multiply<Value>(sum[r][t], a[step][r], b[t], word_of(words, 2 * r + step / 2), step % 2);
          mma_sparse<0, Value>(probe, b[t], b[t], words.x);
        }
        if (left > 1) load_step(step);
      }
      if (part + 1 == kStages && left > 1) words = load_once(panel + kNmFragments * kWarp);
      stage = other;
    }
  }

  // The rings become sums[warp][token][row].
  copy_wait<0>();
  sync_block();
  constexpr uint32_t kSums = nm_sum_bytes(kTiles);
  ALPHAPRUNE_UNROLL
  for (int r = 0; r < 2; ++r) {
    ALPHAPRUNE_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * r + i / 2 * 8 + lane / 4, token = 8 * t + 2 * (lane % 4) + i % 2;
        store_shared_f32(shared_start() + warp * kSums + 4 * (token * kNmSumRow + row), sum[r][t][i]);
      }
    }
  }
  const uint32_t flags = shared_start() + nm_shared_bytes(kTiles) - kWarps * sizeof(float);
  const float poison = sum_lanes(poison_of(probe[0] + probe[1] + probe[2] + probe[3]));
  if (lane == 0) store_shared_f32(flags + 4 * warp, poison);
  sync_block();
  float any = 0;
  for (int w = 0; w < kWarps; ++w) any += load_shared_f32(flags + 4 * w);
  for (int index = thread_index(); index < kNmRows * p.tokens; index += kWarps * kWarp) {
    const int in_panel = index % kNmRows, token = index / kNmRows, row = block_x() * kNmRows + in_panel;
    if (!p.out.has(row)) continue;
    float total = 0;
    for (int w = 0; w < kWarps; ++w)
      total += load_shared_f32(shared_start() + w * kSums + 4 * (token * kNmSumRow + in_panel));
    if (is_nan(any) && prunes_not_finite<Value>(p, block_x(), in_panel, token)) total = float_of(0x7fc00000u);
    store_output<Value>(p.out, token, row, total);
  }
}

}  // namespace alphaprune::cuda
