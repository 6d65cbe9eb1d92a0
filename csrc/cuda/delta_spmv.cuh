// y = x Wᵀ for up to 4 tokens from nibble-delta rows (DeltaView in launch.h). A lane walks a run of a row's kept values
// of its own: columns are sums along the lane, so no lane asks another before the row is summed. x of a block of
// columns lies in shared memory: one 32-bit word per column, a float for one token, two 16-bit floats for two.
#pragma once

#include "output.cuh"

namespace alphaprune::cuda {

constexpr int kDeltaThreads = 512;
constexpr int kDeltaWarps = kDeltaThreads / kWarp;
constexpr int kDeltaPack = 8;  // values that one lane loads at once
// Packs under way per lane: a warp waits for up to 4 x 32 x 20 bytes.
template <int kTokens>
constexpr int kDeltaAhead = kTokens <= 2 ? 4 : 2;
// Zeros past a block's columns: a row's last pack may run over by 7, and up to 3 empty packs of a lane by 8 each.
constexpr int kDeltaSlack = 4 * kDeltaPack;

struct DeltaProblem {
  const uint4* values;
  const uint32_t* deltas;
  const uint32_t* first;
  const uint16_t* starts;
  const uint32_t* slots;
  const uint32_t* row_of;
  const uint16_t* x;
  Output out;
  int cols, tokens, slot_count, blocks, block_cols;
  bool eights;  // whether eight neighbouring activations can be loaded at once
};

template <int kTokens>
constexpr uint32_t kDeltaColumnBytes = kTokens <= 2 ? 4 : 8;

constexpr size_t delta_shared_bytes(int tokens, int block_cols) {
  return static_cast<size_t>(block_cols + kDeltaSlack) * (tokens <= 2 ? 4 : 8) + kDeltaWarps * sizeof(float);
}

// Eight activations of a token from column `col` on, zeros from `end` on.
ALPHAPRUNE_DEVICE uint4 eight_activations(const DeltaProblem& p, int token, int col, int end) {
  if (token >= p.tokens || col >= end) return {0, 0, 0, 0};
  const uint16_t* at = p.x + static_cast<size_t>(token) * p.cols + col;
  if (p.eights && col + 8 <= end) return load_cached(reinterpret_cast<const uint4*>(at));
  uint32_t half[8];
  ALPHAPRUNE_UNROLL
  for (int i = 0; i < 8; ++i) half[i] = col + i < end ? load_cached(at + i) : 0;
  return {half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16, half[6] | half[7] << 16};
}

// Brings x of the columns from `begin` on into shared memory; NaN unless all of it is finite.
template <class Value, int kTokens>
ALPHAPRUNE_DEVICE float stage_activations(const DeltaProblem& p, int begin) {
  const int end = begin + p.block_cols < p.cols ? begin + p.block_cols : p.cols;
  float poison = 0;
  ALPHAPRUNE_NO_UNROLL
  for (int col = 8 * thread_index(); col < p.block_cols + kDeltaSlack; col += 8 * kDeltaThreads) {
    const uint32_t at = shared_start() + col * kDeltaColumnBytes<kTokens>;
    uint4 x[kTokens];
    ALPHAPRUNE_UNROLL
    for (int t = 0; t < kTokens; ++t) x[t] = eight_activations(p, t, begin + col, end);
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) {
      float low[kTokens], high[kTokens];
      ALPHAPRUNE_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        widen_pair<Value>(word_of(x[t], i), low[t], high[t]);
        poison += poison_of(low[t]) + poison_of(high[t]);
      }
      if constexpr (kTokens == 1) {
        store_shared_u64(at + 8 * i, {bits_of(low[0]), bits_of(high[0])});
      } else if constexpr (kTokens == 2) {
        const uint32_t a = word_of(x[0], i), b = word_of(x[1], i);
        store_shared_u64(at + 8 * i, {pick_bytes<0x5410>(a, b), pick_bytes<0x7632>(a, b)});
      } else {
        const uint32_t a = word_of(x[0], i), b = word_of(x[1], i), c = word_of(x[2], i), d = word_of(x[3], i);
        store_shared_u128(at + 16 * i, {pick_bytes<0x5410>(a, b), pick_bytes<0x5410>(c, d), pick_bytes<0x7632>(a, b),
                                        pick_bytes<0x7632>(c, d)});
      }
    }
  }
  return poison;
}

template <class Value, int kTokens>
ALPHAPRUNE_DEVICE void activations_at(uint32_t at, float (&x)[kTokens]) {
  if constexpr (kTokens == 1) {
    x[0] = load_shared_f32(at);
  } else if constexpr (kTokens == 2) {
    widen_pair<Value>(load_shared_u32(at), x[0], x[1]);
  } else {
    const uint2 four = load_shared_u64(at);
    widen_pair<Value>(four.x, x[0], x[1]);
    widen_pair<Value>(four.y, x[2], x[3]);
  }
}

// Calls use(x of the column, value) for the eight values of a pack whose first column is the delta's distance from
// `at`.
template <class Value, int kTokens, class Use>
ALPHAPRUNE_DEVICE void walk_pack(uint4 values, uint32_t deltas, uint32_t& at, const Use& use) {
  constexpr uint32_t kBytes = kDeltaColumnBytes<kTokens>;
  const uint32_t even = deltas & 0x0f0f0f0fu, odd = deltas >> 4 & 0x0f0f0f0fu;
  const uint32_t through_odd = (even + odd) * 0x01010101u;  // byte i: the sum of the deltas of pairs 0 to i
  const uint32_t through_even = through_odd - odd;
  const uint32_t from = at;
  ALPHAPRUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    float x[kTokens], low, high;
    widen_pair<Value>(word_of(values, i), low, high);
    activations_at<Value>(dot_bytes(through_even, kBytes << 8 * i, from) + 2 * i * kBytes, x);
    use(x, low);
    at = dot_bytes(through_odd, kBytes << 8 * i, from) + (2 * i + 1) * kBytes;
    activations_at<Value>(at, x);
    use(x, high);
  }
  at += kBytes;
}

// A run's sums where some x of the block is not finite: a pruned column there makes NaN, as 0 * x does in a dense
// layer. A row keeps every such column, or it does not.
template <class Value, int kTokens>
ALPHAPRUNE_DEVICE void add_not_finite(const DeltaProblem& p, uint32_t pack, uint32_t end, int lanes, uint32_t at,
                                      float (&sum)[kTokens]) {
  float kept[kTokens] = {}, present[kTokens] = {};
  ALPHAPRUNE_NO_UNROLL
  for (; pack < end; pack += lanes)
    walk_pack<Value, kTokens>(load_once(p.values + pack), load_once(p.deltas + pack), at,
                              [&](const float (&x)[kTokens], float value) {
                                for (int t = 0; t < kTokens; ++t) {
                                  sum[t] += value * x[t];
                                  kept[t] += is_nan(poison_of(x[t]));
                                }
                              });
  ALPHAPRUNE_NO_UNROLL
  for (int col = lane_index(); col < p.block_cols; col += kWarp) {
    float x[kTokens];
    activations_at<Value>(shared_start() + col * kDeltaColumnBytes<kTokens>, x);
    for (int t = 0; t < kTokens; ++t) present[t] += is_nan(poison_of(x[t]));
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int step = lanes / 2; step; step /= 2) kept[t] += float_of(shuffle(bits_of(kept[t]), lane_index() ^ step));
    if (kept[t] < sum_lanes(present[t])) sum[t] = float_of(0x7fc00000u);
  }
}

template <class Value, int kTokens>
ALPHAPRUNE_KERNEL __launch_bounds__(kDeltaThreads, 2) delta_spmv(const DeltaProblem p) {
  const int lane = lane_index(), warp = warp_index();
  const int slot = block_x() * kDeltaWarps + warp, known = slot < p.slot_count ? slot : p.slot_count - 1;
  const uint32_t word = load_cached(p.slots + known);
  const int lanes = 1 << (word & 7), within = lane & (lanes - 1);
  const uint32_t row = (word >> 3) + lane / lanes;
  const bool there = slot < p.slot_count && row < load_cached(p.slots + known + 1) >> 3;
  const uint32_t flags = shared_start() + (p.block_cols + kDeltaSlack) * kDeltaColumnBytes<kTokens>;

  float sum[kTokens] = {};
  for (int block = 0; block < p.blocks; ++block) {
    const uint32_t* first = p.first + static_cast<size_t>(row) * p.blocks + block;
    const uint32_t begin = there ? load_cached(first) + within : 0, end = there ? load_cached(first + 1) : 0;
    const uint32_t start = load_cached(p.starts + (static_cast<size_t>(known) * p.blocks + block) * kWarp + lane);
    uint32_t at = shared_start() + start * kDeltaColumnBytes<kTokens>;

    // Past its end a lane loads pack 0, which is empty.
    constexpr int kAhead = kDeltaAhead<kTokens>;
    uint4 values[kAhead];
    uint32_t deltas[kAhead], pack = begin;
    const auto load = [&](int i) {
      const uint32_t from = pack < end ? pack : 0;
      values[i] = load_once(p.values + from);
      deltas[i] = load_once(p.deltas + from);
      pack += lanes;
    };
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < kAhead; ++i) load(i);

    if (block) sync_block();
    const float poison = sum_lanes(stage_activations<Value, kTokens>(p, block * p.block_cols));
    if (lane == 0) store_shared_f32(flags + 4 * warp, poison);
    sync_block();
    float any = 0;
    for (int w = 0; w < kDeltaWarps; ++w) any += load_shared_f32(flags + 4 * w);
    if (is_nan(any)) {
      add_not_finite<Value>(p, begin, end, lanes, at, sum);
      continue;
    }
    const uint32_t past = end + kAhead * lanes;
    ALPHAPRUNE_NO_UNROLL
    while (pack < past) {  // cubins: main: the loop around it runs once per block of columns
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        walk_pack<Value, kTokens>(values[i], deltas[i], at, [&](const float (&x)[kTokens], float value) {
          ALPHAPRUNE_UNROLL
          for (int t = 0; t < kTokens; ++t) sum[t] += value * x[t];
        });
        load(i);
      }
    }
  }
  ALPHAPRUNE_UNROLL
  for (int t = 0; t < kTokens; ++t)
    for (int step = lanes / 2; step; step /= 2) sum[t] += float_of(shuffle(bits_of(sum[t]), lane ^ step));
  if (!there || within) return;
  ALPHAPRUNE_UNROLL
  for (int t = 0; t < kTokens; ++t)
    if (t < p.tokens) store_output<Value>(p.out, t, static_cast<int>(load_cached(p.row_of + row)), sum[t]);
}

}  // namespace alphaprune::cuda
