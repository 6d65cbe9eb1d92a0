// y = x Wᵀ for many tokens on the sparse tensor cores of sm_90a, from the 2:4 panels of NmView (launch.h). The weight
// is operand a, in registers; x is operand b, in shared memory, where a product of 64 rows reads all of it at the rate
// that shared memory has. What the second-level cache gives in a clock is the other limit: so blocks are pairs, of
// different rows and the same tokens, of which each brings half of x for both (TMA, swizzled, multicast), and its own
// half panels of the weight, into a ring of nearly all shared memory, from one unit of work to the next without a
// pause. Sums stay in registers until they are stored: through shared memory, turned by stmatrix, that took 1.06 times
// as long.
#pragma once

#include "device_sm90.cuh"
#include "nm_mma_sp.cuh"

namespace alphaprune::cuda {

constexpr int kNmPair = 2;                          // blocks of a cluster
constexpr int kNmBox = kSwizzleBytes / 2;           // columns of a stage
constexpr int kNmHalves = kNmCols / kNmBox;         // stages of a panel
constexpr int kNmHalfSteps = kNmSteps / kNmHalves;  // products of a stage
constexpr int kNmMostStages = 12;
constexpr int kNmBand = 8;  // units of tokens whose products are done one after another, so that x stays in the cache
constexpr int kPoisonThreads = 128;
constexpr uint32_t kNmHalfBytes = 2 * kNmHalfSteps * kWarp * 16;  // operands of half a panel
constexpr uint32_t kNmMetaBytes = kWarp * 16;                     // metadata of a panel, which come with its first half
constexpr uint32_t kNmStagePanel = kNmHalfBytes + kNmMetaBytes;

static_assert(kNmHalves == 2 && kNmHalfSteps == 2, "a word of metadata is that of a stage");

// A warpgroup multiplies 64 rows; one more brings x and the weight.
ALPHAPRUNE_BOTH constexpr int nm_wide_threads(int groups) { return (groups + 1) * kWarpgroup; }
ALPHAPRUNE_BOTH constexpr int nm_wide_panels(int groups) { return groups * 64 / kNmRows; }  // of a block
ALPHAPRUNE_BOTH constexpr uint32_t nm_wide_x_bytes(int tokens) { return tokens * kSwizzleBytes; }
ALPHAPRUNE_BOTH constexpr uint32_t nm_wide_stage_bytes(int tokens, int groups) {
  return nm_wide_x_bytes(tokens) + nm_wide_panels(groups) * kNmStagePanel + 2 * kMbarrierBytes;
}

struct NmWideProblem {
  NmProblem nm;
  int row_panels, row_units, token_units;
  int clusters, stages;
  bool fours;  // whether four neighbouring outputs can be stored at once
  ALPHAPRUNE_BOTH int units() const { return row_units * token_units; }
  ALPHAPRUNE_BOTH size_t shared_bytes(int tokens, int groups) const {
    return kSwizzleAlign + stages * size_t{nm_wide_stage_bytes(tokens, groups)};
  }
};

// As many as shared memory of so many bytes has room for.
ALPHAPRUNE_BOTH constexpr int nm_wide_stages(int tokens, int groups, size_t bytes) {
  const size_t room = bytes > kSwizzleAlign ? bytes - kSwizzleAlign : 0;
  const size_t stages = room / nm_wide_stage_bytes(tokens, groups);
  return stages < kNmMostStages ? static_cast<int>(stages) : kNmMostStages;
}

// Where things lie in shared memory, the same in both blocks: stages of x, of half panels, barriers.
template <int kTokens, int kGroups>
struct NmWideShared {
  static constexpr uint32_t kX = nm_wide_x_bytes(kTokens), kPanels = nm_wide_panels(kGroups);
  uint32_t x_start, weight_start, barriers;
  ALPHAPRUNE_DEVICE explicit NmWideShared(const NmWideProblem& p)
      : x_start((shared_start() + kSwizzleAlign - 1) / kSwizzleAlign * kSwizzleAlign),
        weight_start(x_start + p.stages * kX),
        barriers(weight_start + p.stages * kPanels * kNmStagePanel) {}
  ALPHAPRUNE_DEVICE uint32_t x(int stage) const { return x_start + stage * kX; }
  ALPHAPRUNE_DEVICE uint32_t weight(int stage, int panel) const {
    return weight_start + (stage * kPanels + panel) * kNmStagePanel;
  }
  ALPHAPRUNE_DEVICE uint32_t full(int stage) const { return barriers + stage * 2 * kMbarrierBytes; }
  ALPHAPRUNE_DEVICE uint32_t empty(int stage) const { return full(stage) + kMbarrierBytes; }
};

// A unit of work: which rows, which tokens. Neighbouring units have different tokens of a band.
struct NmUnit {
  int rows, tokens;
  ALPHAPRUNE_DEVICE NmUnit(const NmWideProblem& p, int unit) {
    const int band = unit / (p.row_units * kNmBand), in_band = unit - band * p.row_units * kNmBand;
    const int left = p.token_units - band * kNmBand, width = left < kNmBand ? left : kNmBand;
    rows = in_band / width;
    tokens = band * kNmBand + in_band - rows * width;
  }
  // The first panel of a block; where rows have ended, there is none.
  ALPHAPRUNE_DEVICE int panel(int rank, int panels) const { return (rows * kNmPair + rank) * panels; }
};

// Stage by stage, lane i brings half of this block's panel i, and the lane after these half of x to both blocks.
template <int kTokens, int kGroups>
ALPHAPRUNE_DEVICE void bring_halves(const NmWideProblem& p, const TensorMap& x,
                                    const NmWideShared<kTokens, kGroups>& shared, int cluster, int rank, int lane) {
  constexpr int kPanels = nm_wide_panels(kGroups), kHalf = kTokens / kNmPair;
  RingStage stage{0, 1};  // the first time round nobody has to have read
  wait_for_kernels_before();
  ALPHAPRUNE_NO_UNROLL
  for (int unit = cluster; unit < p.units(); unit += p.clusters) {
    const NmUnit here(p, unit);
    const int first = here.tokens * kTokens + rank * kHalf, panel = here.panel(rank, kPanels) + lane;
    // In the place of a panel that is not there the last one, for nothing.
    const uint4* from = panels_at(p.nm, panel < p.row_panels ? panel : p.row_panels - 1);
    ALPHAPRUNE_NO_UNROLL
    for (int col = 0; col < p.nm.col_panels; ++col, from += kNmPanel) {
      ALPHAPRUNE_UNROLL
      for (int half = 0; half < kNmHalves; ++half) {
        const uint32_t full = shared.full(stage.index);
        mbarrier_wait(shared.empty(stage.index), stage.parity);
        if (lane < kPanels) {
          const uint32_t to = shared.weight(stage.index, lane);
          mbarrier_arrive_expect(full, half ? kNmHalfBytes : kNmStagePanel);
          copy_bulk(to, from + half * (kNmHalfBytes / 16), kNmHalfBytes, full);
          if (!half) copy_bulk(to + kNmHalfBytes, from + kNmFragments * kWarp, kNmMetaBytes, full);
        } else if (lane == kPanels) {
          mbarrier_arrive_expect(full, nm_wide_x_bytes(kTokens));
          copy_box_to((1u << kNmPair) - 1, shared.x(stage.index) + rank * nm_wide_x_bytes(kHalf), x,
                      (col * kNmHalves + half) * kNmBox, first, full);
        }
        stage.pass(1, p.stages);
      }
    }
  }
}

// Of the four lanes that hold four neighbouring rows, v[i] of token i each: afterwards lane j of them has token j of
// all four rows.
ALPHAPRUNE_DEVICE void exchange_fours(float (&v)[4], int lane) {
  ALPHAPRUNE_UNROLL
  for (int step = 1; step < 4; step *= 2) {
    const int other = lane ^ 4 * step;
    const bool second = lane / 4 & step;
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const float came = float_of(shuffle(bits_of(second ? v[i] : v[i + step]), other));
      if (second) {
        v[i] = came;
      } else {
        v[i + step] = came;
      }
    }
  }
}

// Stores the sums of a warp, whose row tile is half of this panel: token and row as wgmma has them.
template <class Value, int kTokens>
ALPHAPRUNE_DEVICE void store_sums(const NmWideProblem& p, const float (&sum)[kTokens / 2], int first_token, int panel,
                                  int in_panel, int lane) {
  const int group = lane / 4;
  ALPHAPRUNE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const FourRows<Value> rows(p.nm.out, panel * kNmRows + in_panel + 8 * half + group / 4 * 4);
    ALPHAPRUNE_UNROLL
    for (int j = 0; j < kTokens / 8; j += 2) {
      // One of 16 tokens: lanes of the same `lane % 4` and the same half of the groups exchange.
      const int token = first_token + 8 * (j + group % 4 / 2) + 2 * (lane % 4) + group % 2, at = 4 * j + 2 * half;
      float four[4] = {sum[at], sum[at + 1], sum[at + 4], sum[at + 5]};
      exchange_fours(four, lane);
      if (token < p.nm.tokens) rows.store(token, four, p.fours);
    }
  }
}

// What a warp does that multiplies.
template <class Value, int kTokens, int kGroups>
ALPHAPRUNE_DEVICE void multiply_halves(const NmWideProblem& p, const NmWideShared<kTokens, kGroups>& shared,
                                       int cluster, int rank) {
  const int lane = lane_index(), warp = warp_index();
  // Whoever brings to this stage, here or in the other block, may do so again.
  const auto release = [&](int index) {
    if (lane < kNmPair) mbarrier_arrive_in(lane, shared.empty(index));
  };
  RingStage stage{0};
  ALPHAPRUNE_NO_UNROLL
  for (int unit = cluster; unit < p.units(); unit += p.clusters) {
    const NmUnit here(p, unit);
    uint32_t a[kNmSteps][4], meta[kNmHalves], words = 0;
    float sum[kTokens / 2] = {};
    int before = -1;  // the stage whose products may still be under way
    ALPHAPRUNE_NO_UNROLL
    for (int left = p.nm.col_panels; left > 0; --left) {  // cubins: main: the loop around it runs once per unit of work
      ALPHAPRUNE_UNROLL
      for (int half = 0; half < kNmHalves; ++half) {
        mbarrier_wait(shared.full(stage.index), stage.parity);
        const uint32_t panel = shared.weight(stage.index, warp / 2);
        ALPHAPRUNE_UNROLL
        for (int i = 0; i < kNmHalfSteps; ++i) {
          const uint4 kept = load_shared_u128(panel + ((2 * i + warp % 2) * kWarp + lane) * 16);
          uint32_t (&to)[4] = a[half * kNmHalfSteps + i];
          to[0] = kept.x, to[1] = kept.y, to[2] = kept.z, to[3] = kept.w;
        }
        // Both words are in the stage of the first half. The second one is loaded when it is used: before, products of
        // the panel before may still read the register of theirs, and a copy of it would not be one.
        if (half == 0) words = panel + kNmHalfBytes + lane * 16 + warp % 2 * 8;
        meta[half] = load_shared_u32(words + 4 * half);
        const uint64_t b = operand_at(shared.x(stage.index));
        wgmma_fence();
        wgmma_sparse<0, Value, kTokens>(sum, a[half * kNmHalfSteps], meta[half], b);
        wgmma_sparse<1, Value, kTokens>(sum, a[half * kNmHalfSteps + 1], meta[half], operand_further(b, 64));
        wgmma_commit();
        wgmma_wait<1>();  // those before are complete, and their operands may be other ones
        if (before >= 0) release(before);
        before = stage.index;
        stage.pass(1, p.stages);
      }
    }
    wgmma_wait<0>();
    release(before);
    wait_for_kernels_before();  // they may still read what is written now
    store_sums<Value, kTokens>(p, sum, here.tokens * kTokens, here.panel(rank, nm_wide_panels(kGroups)) + warp / 2,
                               warp % 2 * 16, lane);
  }
}

// kTokens: of a unit of work, 128 or 256. kGroups: warpgroups that multiply, 2 or 4.
template <class Value, int kTokens, int kGroups>
ALPHAPRUNE_KERNEL __launch_bounds__(nm_wide_threads(kGroups), 1)
    nm_wgmma(const NmWideProblem p, const __grid_constant__ TensorMap x) {
#if ALPHAPRUNE_SM90
  const int rank = static_cast<int>(cluster_rank()), cluster = block_x() / kNmPair;
  const NmWideShared<kTokens, kGroups> shared(p);
  let_next_begin();
  if (thread_index() == 0) {
    ALPHAPRUNE_NO_UNROLL
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(shared.full(i), nm_wide_panels(kGroups) + 1);
      mbarrier_init(shared.empty(i), kNmPair * 4 * kGroups);
    }
    mbarrier_fence_init();
  }
  sync_cluster();

  // Who brings gives registers to those who multiply.
  if (warp_index() < 4 * kGroups) {
    take_registers<kGroups == 2 ? 232 : 112>();
    multiply_halves<Value, kTokens, kGroups>(p, shared, cluster, rank);
  } else {
    give_registers<kGroups == 2 ? 40 : 24>();
    if (warp_index() == 4 * kGroups) bring_halves<kTokens, kGroups>(p, x, shared, cluster, rank, lane_index());
  }
  sync_cluster();  // nobody leaves while the other block brings something or arrives here
#endif
}

// Runs after the product, for sparse tensor cores do not see what pruned weights meet: y is NaN where that is not
// finite, as in a dense layer. A block for each token.
template <class Value>
ALPHAPRUNE_KERNEL __launch_bounds__(kPoisonThreads) poison_not_finite(const NmProblem p, const int row_panels) {
  let_next_begin();
  wait_for_kernels_before();
  const int token = block_x();
  // Of two halves at once: where an exponent has ones only, its lowest bit added reaches the sign.
  constexpr uint32_t kExponent = Value::code == Bfloat16::code ? 0x7f807f80u : 0x7c007c00u;
  constexpr uint32_t kLowest = Value::code == Bfloat16::code ? 0x00800080u : 0x04000400u;
  const auto found = [](uint32_t pair) { return ((pair & kExponent) + kLowest) & 0x80008000u; };
  const auto* x = reinterpret_cast<const uint4*>(p.x + static_cast<size_t>(token) * p.cols);
  uint32_t any = 0;
  for (int i = thread_index(); i < p.cols / 8; i += kPoisonThreads) {
    const uint4 eight = load_cached(x + i);
    any |= found(eight.x) | found(eight.y) | found(eight.z) | found(eight.w);
  }
  if (!sync_block_any(any)) return;
  for (int row = thread_index(); row < row_panels * kNmRows; row += kPoisonThreads)
    if (p.out.has(row) && prunes_not_finite<Value>(p, row / kNmRows, row % kNmRows, token))
      store_output<Value>(p.out, token, row, float_of(0x7fc00000u));
}

}  // namespace alphaprune::cuda
