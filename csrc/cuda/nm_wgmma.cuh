// y = x Wᵀ for many tokens on the sparse tensor cores of sm_90a, from the 2:4 panels of NmView (launch.h). The weight
// is operand a: each warp takes what a lane needs of a row tile from memory to registers, half a panel while the other
// half is multiplied, and reads it anew for each tile of tokens. x is operand b, in shared memory, where a product of
// 64 rows reads all of it at the rate that shared memory has: so nothing else goes through there. Blocks are pairs, of
// different rows and the same tokens: each brings half of x for both (TMA, swizzled, multicast) into rings of nearly
// all shared memory, from one unit of work to the next without a pause. Sums stay in registers until they are stored.
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

static_assert(kNmHalfSteps == 2, "a word of metadata is that of a stage: of one of its steps for each selector");

// A warpgroup multiplies 64 rows; one more brings x.
ALPHAPRUNE_BOTH constexpr int nm_wide_threads(int groups) { return (groups + 1) * kWarpgroup; }
ALPHAPRUNE_BOTH constexpr int nm_wide_panels(int groups) { return groups * 64 / kNmRows; }  // of a block

struct NmWideProblem {
  NmProblem nm;
  int row_panels, row_units, token_units;
  int clusters, stages;
  bool fours;  // whether four neighbouring outputs can be stored at once
  ALPHAPRUNE_BOTH int units() const { return row_units * token_units; }
  ALPHAPRUNE_BOTH uint32_t x_bytes(int tokens) const { return tokens * kSwizzleBytes; }
  ALPHAPRUNE_BOTH size_t shared_bytes(int tokens) const {
    return kSwizzleAlign + stages * (size_t{x_bytes(tokens)} + 2 * kMbarrierBytes);
  }
};

// As many as shared memory of so many bytes has room for.
ALPHAPRUNE_BOTH constexpr int nm_wide_stages(int tokens, size_t bytes) {
  const size_t room = bytes > kSwizzleAlign ? bytes - kSwizzleAlign : 0;
  const size_t stages = room / (tokens * kSwizzleBytes + 2 * kMbarrierBytes);
  return stages < kNmMostStages ? static_cast<int>(stages) : kNmMostStages;
}

// Where things lie in shared memory, of both blocks: stages of x, barriers.
struct NmWideShared {
  uint32_t x, barriers;
  ALPHAPRUNE_DEVICE NmWideShared(const NmWideProblem& p, int tokens)
      : x((shared_start() + kSwizzleAlign - 1) / kSwizzleAlign * kSwizzleAlign),
        barriers(x + p.stages * p.x_bytes(tokens)) {}
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
};

// Brings this block's half of x, stage by stage, to both.
template <int kTokens>
ALPHAPRUNE_DEVICE void bring_tokens(const NmWideProblem& p, const TensorMap& x, const NmWideShared& shared, int cluster,
                                    int rank, int lane) {
  constexpr int kHalf = kTokens / kNmPair;
  const int stages = p.nm.col_panels * kNmHalves;  // of a unit
  RingStage stage{0, 1};                           // the first time round nobody has to have read
  wait_for_kernels_before();
  ALPHAPRUNE_NO_UNROLL
  for (int unit = cluster; unit < p.units(); unit += p.clusters) {
    const int first = NmUnit(p, unit).tokens * kTokens + rank * kHalf;
    ALPHAPRUNE_NO_UNROLL
    for (int i = 0; i < stages; ++i) {
      mbarrier_wait(shared.empty(stage.index), stage.parity);
      if (lane == 0) {
        const uint32_t to = shared.x + stage.index * p.x_bytes(kTokens) + rank * p.x_bytes(kHalf);
        mbarrier_arrive_expect(shared.full(stage.index), p.x_bytes(kTokens));
        copy_box_to((1u << kNmPair) - 1, to, x, i * kNmBox, first, shared.full(stage.index));
      }
      stage.pass(1, p.stages);
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
ALPHAPRUNE_DEVICE void multiply_half_panels(const NmWideProblem& p, const NmWideShared& shared, int cluster, int rank) {
  const int lane = lane_index(), warp = warp_index();
  RingStage stage{0};
  ALPHAPRUNE_NO_UNROLL
  for (int unit = cluster; unit < p.units(); unit += p.clusters) {
    const NmUnit here(p, unit);
    const int panel = (here.rows * kNmPair + rank) * nm_wide_panels(kGroups) + warp / 2;
    // Who has no panel takes the last one there is, for nothing.
    const uint4* from = panels_at(p.nm, panel < p.row_panels ? panel : p.row_panels - 1) + lane;
    uint32_t a[kNmSteps][4], meta[kNmHalves];
    const auto load = [&](int half) {
      ALPHAPRUNE_UNROLL
      for (int i = half * kNmHalfSteps; i < (half + 1) * kNmHalfSteps; ++i) {
        const uint4 kept = load_once(from + (2 * i + warp % 2) * kWarp);
        a[i][0] = kept.x, a[i][1] = kept.y, a[i][2] = kept.z, a[i][3] = kept.w;
      }
      meta[half] = load_once(reinterpret_cast<const uint32_t*>(from + kNmFragments * kWarp) + 2 * (warp % 2) + half);
    };
    // Whoever brings x into this stage, here or in the other block, may do so again.
    const auto release = [&](int index) {
      if (lane < kNmPair) mbarrier_arrive_in(lane, shared.empty(index));
    };
    float sum[kTokens / 2] = {};
    int before = -1;  // the stage whose products may still be under way
    load(0);
    ALPHAPRUNE_NO_UNROLL
    for (int left = p.nm.col_panels; left > 0; --left) {  // cubins: main: the loop around it runs once per unit of work
      ALPHAPRUNE_UNROLL
      for (int half = 0; half < kNmHalves; ++half) {
        mbarrier_wait(shared.full(stage.index), stage.parity);
        const uint64_t b = operand_at(shared.x + stage.index * p.x_bytes(kTokens));
        wgmma_fence();
        wgmma_sparse<0, Value, kTokens>(sum, a[half * kNmHalfSteps], meta[half], b);
        wgmma_sparse<1, Value, kTokens>(sum, a[half * kNmHalfSteps + 1], meta[half], operand_further(b, 64));
        wgmma_commit();
        wgmma_wait<1>();  // those before are complete, and their operands may be other ones
        if (before >= 0) release(before);
        before = stage.index;
        stage.pass(1, p.stages);
        if (half == 0) {
          load(1);
          from += kNmPanel;
        } else if (left > 1) {
          load(0);
        }
      }
    }
    wgmma_wait<0>();
    release(before);
    wait_for_kernels_before();  // they may still read what is written now
    store_sums<Value, kTokens>(p, sum, here.tokens * kTokens, panel, warp % 2 * 16, lane);
  }
}

// kTokens: of a unit of work, 128 or 256. kGroups: warpgroups that multiply, 2 or 4.
template <class Value, int kTokens, int kGroups>
ALPHAPRUNE_KERNEL __launch_bounds__(nm_wide_threads(kGroups), 1)
    nm_wgmma(const NmWideProblem p, const __grid_constant__ TensorMap x) {
#if ALPHAPRUNE_SM90
  const int rank = static_cast<int>(cluster_rank()), cluster = block_x() / kNmPair;
  const NmWideShared shared(p, kTokens);
  let_next_begin();
  if (thread_index() == 0) {
    ALPHAPRUNE_NO_UNROLL
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(shared.full(i), 1);
      mbarrier_init(shared.empty(i), kNmPair * 4 * kGroups);
    }
    mbarrier_fence_init();
  }
  sync_cluster();

  // Who brings x gives registers to those who multiply.
  if (warp_index() < 4 * kGroups) {
    take_registers<kGroups == 2 ? 232 : 112>();
    multiply_half_panels<Value, kTokens, kGroups>(p, shared, cluster, rank);
  } else {
    give_registers<kGroups == 2 ? 40 : 24>();
    if (warp_index() == 4 * kGroups) bring_tokens<kTokens>(p, x, shared, cluster, rank, lane_index());
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
