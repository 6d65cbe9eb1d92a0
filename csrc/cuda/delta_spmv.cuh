// y = x Wᵀ for up to 4 tokens from nibble-delta rows (DeltaView in launch.h). A block has a share of the rows, and each
// of its threads a run of their packs, as long as the others': columns are sums along the run, and the next packs are
// always under way. Where a row ends a thread leaves its sum in shared memory; the sums of a row are added at the end,
// in their order. x of a block of columns lies in shared memory, too: one 32-bit word per column, a float for one
// token, two 16-bit floats for two.
#pragma once

#include "output.cuh"

namespace alphaprune::cuda {

constexpr int kDeltaWarps = 12;
constexpr int kDeltaBlocks = 2;  // of a multiprocessor
constexpr int kDeltaThreads = kDeltaWarps * kWarp;
constexpr int kDeltaAhead = 4;   // packs of a thread that are under way
constexpr int kDeltaPack = 8;    // values that one lane loads at once
constexpr int kDeltaGroup = 4;   // packs whose fifth bits are one word
constexpr int kDeltaSlack = 8;   // zeros past a block's columns, over which a row's last pack may run
constexpr int kDeltaEmpty = 31;  // empty packs at most behind the last row, each with a sum of its own

struct DeltaProblem {
  const uint4* values;
  const uint32_t* deltas;
  const uint32_t* fifths;
  const uint32_t* begins;
  const uint32_t* starts;
  const uint32_t* counts;
  const uint32_t* sums;
  const uint32_t* rows;
  const uint16_t* x;
  const uint16_t* norm;  // null: none
  float epsilon;
  Output out;
  int cols, tokens, share_rows, lines, words, blocks, block_cols;
  int lanes_log;  // of the lanes that add up a row's sums
  bool eights;    // whether eight neighbouring activations can be loaded at once
  bool pairs;
};

template <int kTokens>
constexpr uint32_t kDeltaColumnBytes = kTokens <= 2 ? 4 : 8;

// x and the sums.
constexpr size_t delta_shared_bytes(int tokens, int block_cols, int share_rows) {
  const size_t sums = kDeltaThreads + share_rows + kDeltaEmpty;
  return static_cast<size_t>(block_cols + kDeltaSlack) * (tokens <= 2 ? 4 : 8) +
         sums * (tokens <= 2 ? tokens : 4) * sizeof(float);
}

// Eight of a row from column `col` on, zeros from `end` on.
ALPHAPRUNE_DEVICE uint4 eight_of(const DeltaProblem& p, const uint16_t* row, int col, int end) {
  if (col >= end) return {0, 0, 0, 0};
  const uint16_t* at = row + col;
  if (p.eights && col + 8 <= end) return load_once(reinterpret_cast<const uint4*>(at));
  uint32_t half[8];
  ALPHAPRUNE_UNROLL
  for (int i = 0; i < 8; ++i) half[i] = col + i < end ? load_cached(at + i) : 0;
  return {half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16, half[6] | half[7] << 16};
}

// Where the sums lie in shared memory.
template <int kTokens>
ALPHAPRUNE_DEVICE uint32_t delta_sums_at(const DeltaProblem& p) {
  return shared_start() + (p.block_cols + kDeltaSlack) * kDeltaColumnBytes<kTokens>;
}

// x of a block of columns on its way into shared memory, eight columns of a thread at a time.
template <class Value, int kTokens>
struct DeltaActivations {
  static constexpr int kStep = 8 * kDeltaThreads, kHead = kTokens > 2 ? 0 : 2 / kTokens,
                       kBatch = kTokens > 2 ? 1 : 4 / kTokens;
  int begin, end;
  uint4 head[kHead + 1][kTokens];  // none of 4 tokens: registers are too few
  float scale[kTokens];            // of the norm

  ALPHAPRUNE_DEVICE void load(const DeltaProblem& p, uint4 (&x)[kTokens], int col) const {
    ALPHAPRUNE_UNROLL
    for (int t = 0; t < kTokens; ++t)
      x[t] = t < p.tokens ? eight_of(p, p.x + static_cast<size_t>(t) * p.cols, begin + col, end) : uint4{0, 0, 0, 0};
  }
  // The first ones, to be waited for later.
  ALPHAPRUNE_DEVICE void first(const DeltaProblem& p, int block) {
    begin = block * p.block_cols;
    end = begin + p.block_cols < p.cols ? begin + p.block_cols : p.cols;
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < kHead; ++i) load(p, head[i], 8 * thread_index() + i * kStep);
  }
  // The inverse roots of the mean squares of all columns, for all threads; takes the place of the sums meanwhile.
  ALPHAPRUNE_DEVICE void find_scales(const DeltaProblem& p) {
    float squares[kTokens] = {};
    const auto add = [&](const uint4(&x)[kTokens]) {
      ALPHAPRUNE_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        ALPHAPRUNE_UNROLL
        for (int i = 0; i < 4; ++i) {
          float low, high;
          widen_pair<Value>(word_of(x[t], i), low, high);
          squares[t] += low * low + high * high;
        }
      }
    };
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < kHead; ++i) add(head[i]);
    ALPHAPRUNE_NO_UNROLL
    for (int col = 8 * thread_index() + kHead * kStep; col < end; col += kStep) {
      uint4 x[kTokens];
      load(p, x, col);
      add(x);
    }
    const uint32_t sums = delta_sums_at<kTokens>(p), mine = sums + warp_index() * kTokens * 4;
    ALPHAPRUNE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      squares[t] = sum_lanes(squares[t]);
      if (lane_index() == 0) store_shared_f32(mine + t * 4, squares[t]);
    }
    sync_block();
    ALPHAPRUNE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      float all = 0;
      for (int w = 0; w < kDeltaWarps; ++w) all += load_shared_f32(sums + (w * kTokens + t) * 4);
      scale[t] = inverse_root(all / p.cols + p.epsilon);
    }
  }
  ALPHAPRUNE_DEVICE void normalize(const DeltaProblem& p, uint4 (&x)[kTokens], int col) const {
    const uint4 weight = eight_of(p, p.norm, begin + col, end);
    ALPHAPRUNE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      uint32_t word[4];
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float low, high, by_low, by_high;
        widen_pair<Value>(word_of(x[t], i), low, high);
        widen_pair<Value>(narrow_pair<Value>(low * scale[t], high * scale[t]), low, high);
        widen_pair<Value>(word_of(weight, i), by_low, by_high);
        word[i] = narrow_pair<Value>(low * by_low, high * by_high);
      }
      x[t] = {word[0], word[1], word[2], word[3]};
    }
  }
  // All of them; NaN unless all are finite.
  ALPHAPRUNE_DEVICE float stage(const DeltaProblem& p) {
    const int limit = p.block_cols + kDeltaSlack;
    if (p.norm) find_scales(p);
    float poison = 0;
    int col = 8 * thread_index();
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < kHead; ++i, col += kStep) {
      if (p.norm) normalize(p, head[i], col);
      if (col < limit) store(head[i], col, poison);
    }
    ALPHAPRUNE_NO_UNROLL
    for (; col < limit; col += kBatch * kStep) {
      uint4 x[kBatch][kTokens];
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < kBatch; ++i) load(p, x[i], col + i * kStep);
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (p.norm) normalize(p, x[i], col + i * kStep);
        if (col + i * kStep < limit) store(x[i], col + i * kStep, poison);
      }
    }
    return poison;
  }
  ALPHAPRUNE_DEVICE void store(const uint4 (&x)[kTokens], int col, float& poison) const {
    const uint32_t at = shared_start() + col * kDeltaColumnBytes<kTokens>;
    uint32_t column[8];
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) {
      float low[kTokens], high[kTokens];
      ALPHAPRUNE_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        widen_pair<Value>(word_of(x[t], i), low[t], high[t]);
        poison += poison_of(low[t]) + poison_of(high[t]);
      }
      if constexpr (kTokens == 1) {
        column[2 * i] = bits_of(low[0]), column[2 * i + 1] = bits_of(high[0]);
      } else if constexpr (kTokens == 2) {
        const uint32_t a = word_of(x[0], i), b = word_of(x[1], i);
        column[2 * i] = pick_bytes<0x5410>(a, b), column[2 * i + 1] = pick_bytes<0x7632>(a, b);
      } else {
        const uint32_t a = word_of(x[0], i), b = word_of(x[1], i), c = word_of(x[2], i), d = word_of(x[3], i);
        store_shared_u128(at + 16 * i, {pick_bytes<0x5410>(a, b), pick_bytes<0x5410>(c, d), pick_bytes<0x7632>(a, b),
                                        pick_bytes<0x7632>(c, d)});
      }
    }
    if constexpr (kTokens <= 2) {  // four of eight lanes write their halves the other way round: all banks at once
      const bool turned = lane_index() & 4;
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < 2; ++i) {
        uint32_t four[4];
        ALPHAPRUNE_UNROLL
        for (int j = 0; j < 4; ++j) four[j] = turned ? column[4 - 4 * i + j] : column[4 * i + j];
        store_shared_u128(at + (turned ? 16 - 16 * i : 16 * i), {four[0], four[1], four[2], four[3]});
      }
    }
  }
};

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
// `at`; fifth: a byte of the deltas' fifth bits, and above it anything.
template <class Value, int kTokens, bool kFifth, class Use>
ALPHAPRUNE_DEVICE void walk_pack(uint4 values, uint32_t deltas, uint32_t fifth, uint32_t& at, const Use& use) {
  constexpr uint32_t kBytes = kDeltaColumnBytes<kTokens>;
  uint32_t even = deltas & 0x0f0f0f0fu, odd = deltas >> 4 & 0x0f0f0f0fu;
  if constexpr (kFifth) {  // bit i of four to bit 8 i + 4
    even |= (fifth & 15u) * 0x02040810u & 0x10101010u;
    odd |= (fifth >> 4 & 15u) * 0x02040810u & 0x10101010u;
  }
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

// Packs of a thread of a warp, of so many lines of 32.
ALPHAPRUNE_DEVICE int steps_of(int lines, int warp) { return (lines - warp + kDeltaWarps - 1) / kDeltaWarps; }
// Words of fifth bits of a thread in a part.
ALPHAPRUNE_DEVICE int groups_of(int lines) { return (steps_of(lines, 0) + kDeltaGroup - 1) / kDeltaGroup; }

// Where a thread is in its run: the column, and the place of the sum that it makes.
struct DeltaPlace {
  uint32_t column, sum, first_column;
};

template <int kTokens>
ALPHAPRUNE_DEVICE DeltaPlace place_of(const DeltaProblem& p, uint32_t start) {
  const uint32_t sums = delta_sums_at<kTokens>(p);
  const uint32_t first = opaque(shared_start());
  return {first + (start & 0xffffu) * kDeltaColumnBytes<kTokens>, sums + (start >> 16) * 4 * kTokens, first};
}

template <int kTokens>
ALPHAPRUNE_DEVICE void leave_sum(DeltaPlace& place, float (&sum)[kTokens]) {
  ALPHAPRUNE_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    store_shared_f32(place.sum + 4 * t, sum[t]);
    sum[t] = 0;
  }
  place.sum += 4 * kTokens;
  place.column = place.first_column;
}

// The sum of a row's sums, for each of the lanes that add them.
template <int kTokens>
ALPHAPRUNE_DEVICE void add_sums(const DeltaProblem& p, uint32_t range, float (&total)[kTokens]) {
  const uint32_t sums = delta_sums_at<kTokens>(p);
  const int lanes = 1 << p.lanes_log;
  float sum[kTokens] = {};
  for (uint32_t i = (range & 0xffffu) + (lane_index() & (lanes - 1)); i < range >> 16; i += lanes) {
    ALPHAPRUNE_UNROLL
    for (int t = 0; t < kTokens; ++t) sum[t] += load_shared_f32(sums + (i * kTokens + t) * 4);
  }
  ALPHAPRUNE_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    for (int step = lanes / 2; step; step /= 2) sum[t] += float_of(shuffle(bits_of(sum[t]), lane_index() ^ step));
    total[t] += sum[t];
  }
}

// A thread's run where some x of the block is not finite: its sums, or how many such x its rows keep.
template <class Value, int kTokens, bool kFifth, bool kCount>
ALPHAPRUNE_DEVICE void walk_slowly(const DeltaProblem& p, int part, int steps) {
  const int thread = thread_index(), groups = groups_of(p.lines);
  DeltaPlace place = place_of<kTokens>(p, load_cached(p.starts + part * kDeltaThreads + thread));
  float sum[kTokens] = {};
  ALPHAPRUNE_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    const size_t pack = (static_cast<size_t>(part) * p.lines + step * kDeltaWarps) * kWarp + thread;
    const uint32_t begins = load_cached(p.begins + (part * p.words + step / 32) * kDeltaThreads + thread);
    uint32_t fifth = 0;
    if constexpr (kFifth)
      fifth = load_cached(p.fifths + (part * groups + step / kDeltaGroup) * kDeltaThreads + thread) >> step % 4 * 8;
    if (begins >> step % 32 & 1) leave_sum(place, sum);
    walk_pack<Value, kTokens, kFifth>(load_once(p.values + pack), load_once(p.deltas + pack), fifth, place.column,
                                      [&](const float (&x)[kTokens], float value) {
                                        for (int t = 0; t < kTokens; ++t)
                                          sum[t] += kCount ? float(is_nan(poison_of(x[t]))) : value * x[t];
                                      });
  }
  leave_sum(place, sum);
}

// The block's part of a row's sum where some x of the block is not finite: a pruned column there makes NaN, as 0 * x
// does in a dense layer. A row keeps every such column, or it does not.
template <class Value, int kTokens, bool kFifth>
ALPHAPRUNE_DEVICE void add_not_finite(const DeltaProblem& p, int part, int steps, uint32_t range,
                                      float (&total)[kTokens]) {
  float kept[kTokens] = {}, present[kTokens] = {};
  walk_slowly<Value, kTokens, kFifth, false>(p, part, steps);
  sync_block();
  add_sums(p, range, total);
  sync_block();
  walk_slowly<Value, kTokens, kFifth, true>(p, part, steps);
  ALPHAPRUNE_NO_UNROLL
  for (int col = lane_index(); col < p.block_cols; col += kWarp) {
    float x[kTokens];
    activations_at<Value>(shared_start() + col * kDeltaColumnBytes<kTokens>, x);
    for (int t = 0; t < kTokens; ++t) present[t] += is_nan(poison_of(x[t]));
  }
  sync_block();
  add_sums(p, range, kept);
  for (int t = 0; t < kTokens; ++t)
    if (kept[t] < sum_lanes(present[t])) total[t] = float_of(0x7fc00000u);
}

// The next packs of a thread's run, in registers or on their way.
template <class Value, int kTokens, bool kFifth>
struct DeltaPacks {
  static_assert(32 % kDeltaAhead == 0 && kDeltaAhead % kDeltaGroup == 0, "words of bits are whole groups of packs");
  static constexpr int kWords = kFifth ? kDeltaAhead / kDeltaGroup : 1;

  uint4 value[kDeltaAhead];
  uint32_t delta[kDeltaAhead], fifth[kWords], now;  // now: the fifth bits of the group
  const uint4* values;                              // where the next packs are
  const uint32_t *deltas, *fifths;

  ALPHAPRUNE_DEVICE void aim(const DeltaProblem& p, int part, int step = kDeltaAhead) {
    const size_t pack = static_cast<size_t>(opaque(part)) * p.lines * kWarp + step * kDeltaThreads + thread_index();
    values = p.values + pack;
    deltas = p.deltas + pack;
    if constexpr (kFifth)
      fifths = p.fifths + static_cast<size_t>(opaque(part) * groups_of(p.lines) + step / kDeltaGroup) * kDeltaThreads +
               thread_index();
  }
  ALPHAPRUNE_DEVICE void advance() {
    values += kDeltaAhead * kDeltaThreads;
    deltas += kDeltaAhead * kDeltaThreads;
    if constexpr (kFifth) fifths += kWords * kDeltaThreads;
  }
  ALPHAPRUNE_DEVICE void load(int i) {
    value[i] = load_once(values + i * kDeltaThreads);
    delta[i] = load_once(deltas + i * kDeltaThreads);
  }
  // Packs kFrom to kTo, of those that the thread has.
  template <int kFrom, int kTo>
  ALPHAPRUNE_DEVICE void first(int steps) {
    ALPHAPRUNE_UNROLL
    for (int i = kFrom; i < kTo; ++i) {
      if (i < steps) load(i);
      if constexpr (kFifth) {
        if (i % kDeltaGroup == 0 && i < steps)
          fifth[i / kDeltaGroup] = load_once(fifths + i / kDeltaGroup * kDeltaThreads);
      }
    }
  }
  // Before pack i is walked; more: whether the next group has one in its place.
  ALPHAPRUNE_DEVICE void fifths_of(int i, bool more) {
    if constexpr (kFifth) {
      if (i % kDeltaGroup) return;
      now = fifth[i / kDeltaGroup];
      if (more) fifth[i / kDeltaGroup] = load_once(fifths + i / kDeltaGroup * kDeltaThreads);
    }
  }
  template <class Use>
  ALPHAPRUNE_DEVICE void walk(int i, uint32_t& column, const Use& use) {
    walk_pack<Value, kTokens, kFifth>(value[i], delta[i], now >> i % kDeltaGroup * 8, column, use);
  }
};

ALPHAPRUNE_DEVICE const uint32_t* words_of(const DeltaProblem& p, int part) {
  return p.begins + part * p.words * kDeltaThreads + thread_index();
}

template <class Value, int kTokens, bool kFifth>
ALPHAPRUNE_KERNEL __launch_bounds__(kDeltaThreads, kDeltaBlocks) delta_spmv(const DeltaProblem p) {
  using Packs = DeltaPacks<Value, kTokens, kFifth>;
  const int at = thread_index() >> p.lanes_log;  // of the row, in the share, whose sums this thread adds
  const bool there = at < p.share_rows;
  uint32_t row = ~0u;

  let_next_begin();
  float total[kTokens] = {};
  for (int block = 0; block < p.blocks; ++block) {
    const int part = block_x() * p.blocks + block;
    // Nothing that is loaded here needs another load: all lines up to p.lines may be read. x is not last, as all wait
    // for it, and not first, as the kernel before may still be making it.
    DeltaActivations<Value, kTokens> activations;
    const int left = steps_of(p.lines, warp_index());
    const int steps = steps_of(static_cast<int>(load_once(p.counts + part)), warp_index());
    const uint32_t start = load_once(p.starts + part * kDeltaThreads + thread_index());
    uint32_t begins = load_once(words_of(p, part));
    Packs packs{};
    packs.aim(p, part, 0);
    constexpr int kEarly = kTokens > 2 ? 0 : kDeltaAhead, kMiddle = kEarly / 2;
    packs.template first<0, kMiddle>(left);
    wait_for_kernels_before();
    activations.first(p, block);
    packs.template first<kMiddle, kEarly>(left);
    uint32_t later = 0;
    if (p.words > 1) later = load_once(words_of(p, part) + kDeltaThreads);
    if (there) row = load_once(p.rows + block_x() * p.share_rows + at);
    const uint32_t range = there ? load_once(p.sums + part * p.share_rows + at) : 0;

    const bool finite = !is_nan(activations.stage(p));
    packs.template first<kEarly, kDeltaAhead>(left);
    if (sync_block_any(!finite)) {
      add_not_finite<Value, kTokens, kFifth>(p, part, steps, range, total);
      continue;
    }
    float sum[kTokens] = {};
    DeltaPlace place = place_of<kTokens>(p, start);
    packs.aim(p, part);
    const auto walk = [&](int i) {
      if (begins >> i & 1) leave_sum(place, sum);
      packs.walk(i, place.column, [&](const float (&x)[kTokens], float value) {
        ALPHAPRUNE_UNROLL
        for (int t = 0; t < kTokens; ++t) sum[t] += value * x[t];
      });
    };
    const auto next = [&](int step) {  // the next group's word of `begins`
      begins >>= kDeltaAhead;
      if (step % 32) return;
      begins = later;
      if (step / 32 + 1 < p.words) later = load_once(words_of(p, part) + (step / 32 + 1) * kDeltaThreads);
    };
    int step = 0;
    ALPHAPRUNE_NO_UNROLL
    while (step + 2 * kDeltaAhead <= steps) {  // cubins: main: the loop around it runs once per block of columns
      step += kDeltaAhead;
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < kDeltaAhead; ++i) {
        packs.fifths_of(i, true);
        walk(i);
        packs.load(i);
      }
      packs.advance();
      next(step);
    }
    ALPHAPRUNE_NO_UNROLL
    while (step < steps) {
      const int left = steps - step;
      step += kDeltaAhead;
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < kDeltaAhead; ++i) {
        packs.fifths_of(i, i + kDeltaAhead < left);
        if (i < left) walk(i);
        if (i + kDeltaAhead < left) packs.load(i);
      }
      packs.advance();
      next(step);
    }
    leave_sum(place, sum);
    sync_block();
    add_sums(p, range, total);
  }
  float other[kTokens] = {};
  if (p.pairs) {  // the second member's row is that of the next lanes
    ALPHAPRUNE_UNROLL
    for (int t = 0; t < kTokens; ++t)
      other[t] = float_of(shuffle(bits_of(total[t]), lane_index() ^ (1 << p.lanes_log)));
  }
  const int lanes = (p.pairs ? 2 : 1) << p.lanes_log;  // of an output
  if (row == ~0u || lane_index() % lanes) return;
  ALPHAPRUNE_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    if (t >= p.tokens) continue;
    if (p.pairs) {
      store_swiglu<Value>(p.out, t, static_cast<int>(row), total[t], other[t]);
    } else {
      store_output<Value>(p.out, t, static_cast<int>(row), total[t]);
    }
  }
}

}  // namespace alphaprune::cuda
