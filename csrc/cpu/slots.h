// The product of int8 weights with many tokens, activations rounded to integers, that leaves out most of the zeros:
// rows lie in the lanes, and of each row the next four kept weights meet their activations, which vpermb picks out of
// the 64 columns of a token. A macro tile takes as many such slots as its fullest row needs, 0.43 of the 16 that a
// panel has at a density of 0.3 and 0.32 at 0.2; a slot costs a token two instructions, of different units, where the
// panel has one.
//
// A slot is made of the values and the columns of 16 rows by tables: the values of four rows of a step of 16 columns
// lie together in the packed weight, and their columns come from the mask by vpcompressb, so that both are picked by
// one index per byte, which counts along the row. A row goes on in the next step where the one before ends.
#pragma once

#include <algorithm>
#include <new>

#include "integer.h"
#include "pairs.h"

namespace alphaprune {
namespace {

namespace slots {

constexpr int64_t kFours = sbt::kWords / 2;         // four rows of a step: two mask words
constexpr int64_t kMostSlots = sbt::kTileCols / 4;  // of a macro tile
constexpr int64_t kFew = 32;                        // kept weights of four rows that the small tables hold

// Whether this is faster than the panel and, if the weight may go in pairs, than those: ns of a Zen 5 for 1024 weights,
// as measured at 9 to 256 tokens. From 0.36 on most tiles need the large tables. Not measured on other CPUs.
inline bool pays(const sbt::View& weight, int64_t tokens, bool or_pairs) {
  if (tokens <= 8 || !multiplies_twice()) return false;
  const double density = density_of(weight), many = static_cast<double>(tokens);
  if (density > 0.36) return false;
  const double a_token = weight.to_bytes ? 0.69 + 3.1 * density : 1.3 + 5.8 * density;
  const double others = pairs::panel_nanoseconds(weight, tokens);
  return 22 + 47 * density + a_token * many <
         (or_pairs ? std::min(others, pairs::nanoseconds(density, tokens)) : others);
}

struct alignas(64) Slot {
  uint8_t weight[64], column[64];  // [row][4]
};

// The slots of a group of 128 columns, those of its first macro tile before those of its second.
struct alignas(64) Group {
  Slot slot[2 * kMostSlots];
  int32_t start[sbt::kTileRows];  // what sums begin with: -128 times the sum of the weights
  int64_t first, count;           // slots of the first macro tile, and of both
};

// Where the kept weights of a macro tile are, four rows of a step at a time.
struct alignas(64) Kept {
  uint8_t column[kFours][64];  // from kFew * (number of these four) on where that is enough
  const uint8_t* value[kFours];
  int64_t slots;  // that they take
  bool few;
};

struct Constants {
  alignas(64) uint8_t columns[64];   // 0..15 of four rows
  alignas(64) uint8_t count[2][64];  // of the 16-bit numbers of two steps, the low byte, four times for each row
  alignas(64) uint8_t small[64], large[64];  // index of a row's first four weights, less what its four rows have before
  constexpr Constants() : columns(), count(), small(), large() {
    for (int i = 0; i < 64; ++i) {
      columns[i] = static_cast<uint8_t>(i % 16);
      for (int step = 0; step < 2; ++step) count[step][i] = static_cast<uint8_t>(2 * (16 * step + i / 4));
      small[i] = static_cast<uint8_t>(i / 16 * kFew + i % 4);
      large[i] = static_cast<uint8_t>(i / 16 * 64 + i % 4);
    }
  }
};
constexpr Constants kConstants;

template <int64_t kRoom>
inline void find_columns(const uint32_t* words, Kept& kept) {
  __m512i columns = _mm512_load_si512(kConstants.columns);
  uint8_t* to = kept.column[0];
#pragma GCC unroll 4
  for (int64_t step = 0; step < sbt::kSteps; ++step) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i, words += 2, to += kRoom) {
      uint64_t mask;
      std::memcpy(&mask, words, sizeof mask);
      const __m512i found = _mm512_mask_compress_epi8(fresh_zeros(), mask, columns);
      if (kRoom == 64) {
        _mm512_store_si512(to, found);
      } else {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(found));
      }
    }
    columns = _mm512_add_epi8(columns, _mm512_set1_epi8(sbt::kStepCols));
  }
}

// Slots of a macro tile: a quarter of what its fullest row keeps.
inline int64_t slots_of(const uint32_t* words) {
  const __m512i steps = _mm512_add_epi16(_mm512_popcnt_epi16(_mm512_loadu_si512(words)),
                                         _mm512_popcnt_epi16(_mm512_loadu_si512(words + 16)));
  const __m256i rows = _mm256_add_epi16(_mm512_castsi512_si256(steps), _mm512_extracti64x4_epi64(steps, 1));
  const __m128i most = _mm_max_epu16(_mm256_castsi256_si128(rows), _mm256_extracti128_si256(rows, 1));
  const __m128i least = _mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(sbt::kTileCols), most));
  return (sbt::kTileCols - (_mm_cvtsi128_si32(least) & 0xffff) + 3) / 4;
}

inline void find(const uint32_t* words, const uint8_t* value, Kept& kept) {
  kept.slots = slots_of(words);
  int most = 0;
#pragma GCC unroll 16
  for (int64_t i = 0; i < kFours; ++i) {
    uint64_t mask;
    std::memcpy(&mask, words + 2 * i, sizeof mask);
    const int here = __builtin_popcountll(mask);
    kept.value[i] = value;
    value += here;
    most = std::max(most, here);
  }
  kept.few = most <= kFew;
  if (kept.few) {
    find_columns<kFew>(words, kept);
  } else {
    find_columns<64>(words, kept);
  }
}

// Finds what a macro tile keeps, and asks for what comes later.
inline void look(const sbt::View& weight, int64_t tile, Kept& kept) {
  constexpr int64_t kLines = 8;  // of values at half density; as many at any other, which is known to the CPU
  const uint32_t* words = weight.mask + tile * sbt::kWords;
  const uint8_t* value = tile_values<uint8_t>(weight, tile);
  AsksBy<kFarBytes> asks;
  asks.start(words, value, tile_values<uint8_t>(weight, tile + 1) - value, kLines);
  for (int64_t i = 0; i < kLines; ++i) asks.more();
  find(words, value, kept);
}

// 32 bytes from each of two places.
inline __m512i two_halves(const uint8_t* low, const uint8_t* high) {
  const auto half = [](const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  return _mm512_inserti64x4(_mm512_castsi256_si512(half(low)), half(high), 1);
}

// The bytes of 16 rows of a step, those of each four rows in 32 or in 64 of the table.
template <bool kSmall>
struct Table {
  __m512i part[kSmall ? 2 : 4];

  explicit Table(const uint8_t* const* fours) {
    for (int i = 0; i < (kSmall ? 2 : 4); ++i)
      part[i] = kSmall ? two_halves(fours[2 * i], fours[2 * i + 1]) : _mm512_loadu_si512(fours[i]);
  }
  explicit Table(const uint8_t* together) {
    for (int i = 0; i < (kSmall ? 2 : 4); ++i) part[i] = _mm512_load_si512(together + 64 * i);
  }
  __m512i at(__m512i index) const {
    const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
    if constexpr (kSmall) return low;
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(index), _mm512_permutex2var_epi8(part[2], index, part[3]));
  }
  // The same in bytes `here` of `other`.
  __m512i at(__m512i index, __mmask64 here, __m512i other) const {
    if constexpr (!kSmall) return _mm512_mask_mov_epi8(other, here, at(index));
    return _mm512_mask2_permutex2var_epi8(part[0], _mm512_mask_mov_epi8(other, here, index), here, part[1]);
  }
};

// The slots of a macro tile; returns what comes after the last. Adds 128 times their weights to `offset`.
template <bool kSmall>
inline Slot* fill(const uint32_t* words, const Kept& kept, Slot* to, __m512i& offset) {
  __m512i index[sbt::kSteps], end[sbt::kSteps];  // of each step: of the next four weights; where rows end
  const __m512i fours = _mm512_load_si512(kSmall ? kConstants.small : kConstants.large);
#pragma GCC unroll 2
  for (int64_t two = 0; two < 2; ++two) {
    const __m512i counts = _mm512_popcnt_epi16(_mm512_loadu_si512(words + 16 * two));
    __m512i before = _mm512_add_epi16(counts, _mm512_slli_epi64(counts, 16));
    before = _mm512_sub_epi16(_mm512_add_epi16(before, _mm512_slli_epi64(before, 32)), counts);
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t step = 2 * two + i;
      const __m512i order = _mm512_load_si512(kConstants.count[i]);
      index[step] = _mm512_add_epi8(_mm512_permutexvar_epi8(order, before), fours);
      end[step] = _mm512_permutexvar_epi8(order, counts);
      if (step == 0) continue;
      index[step] = _mm512_sub_epi8(index[step], end[step - 1]);
      end[step] = _mm512_add_epi8(end[step], end[step - 1]);
    }
  }
  constexpr int64_t kStepBytes = 4 * (kSmall ? kFew : 64);
  const Table<kSmall> value[] = {Table<kSmall>(kept.value), Table<kSmall>(kept.value + 4),
                                 Table<kSmall>(kept.value + 8), Table<kSmall>(kept.value + 12)};
  const Table<kSmall> column[] = {Table<kSmall>(kept.column[0]), Table<kSmall>(kept.column[0] + kStepBytes),
                                  Table<kSmall>(kept.column[0] + 2 * kStepBytes),
                                  Table<kSmall>(kept.column[0] + 3 * kStepBytes)};
  const __m512i next = _mm512_set1_epi8(4);
  __m512i place = _mm512_set1_epi32(0x03020100), sum = offset;
  for (Slot* const after = to + kept.slots; to < after; ++to) {
    __m512i w = value[0].at(index[0]), c = column[0].at(index[0]);
#pragma GCC unroll 4
    for (int64_t step = 1; step < sbt::kSteps; ++step) {
      const __mmask64 here = _mm512_cmpge_epu8_mask(place, end[step - 1]);
      w = value[step].at(index[step], here, w);
      c = column[step].at(index[step], here, c);
    }
    w = _mm512_maskz_mov_epi8(_mm512_cmplt_epu8_mask(place, end[sbt::kSteps - 1]), w);
    _mm512_store_si512(to->weight, w);
    _mm512_store_si512(to->column, c);
    sum = add_products(sum, _mm512_set1_epi8(-128), w);
    place = _mm512_add_epi8(place, next);
#pragma GCC unroll 4
    for (int64_t step = 0; step < sbt::kSteps; ++step) index[step] = _mm512_add_epi8(index[step], next);
  }
  offset = sum;
  return to;
}

inline void make(const sbt::View& weight, int64_t tile, int64_t width, const Kept* kept, Group& group) {
  __m512i offset = _mm512_setzero_si512();
  Slot* to = group.slot;
  for (int64_t i = 0; i < width; ++i) {
    const uint32_t* words = weight.mask + (tile + i) * sbt::kWords;
    to = kept[i].few ? fill<true>(words, kept[i], to, offset) : fill<false>(words, kept[i], to, offset);
    if (i == 0) group.first = to - group.slot;
  }
  group.count = to - group.slot;
  _mm512_store_si512(group.start, _mm512_sub_epi32(_mm512_setzero_si512(), offset));
}

template <int kBytes>
struct Slots {
  using Made = Rounded<kBytes>;
  static constexpr int kBlock = 16 / kBytes;  // tokens of which all sums are in registers
  static constexpr int64_t kPass = 256;       // for which slots are made once

  // T tokens; sums are [token][row]. Not inlined: the loop has the registers to itself.
  template <int T>
  __attribute__((noinline)) static void block(const Group& made, const Made& rounded, const void* x, int64_t group,
                                              int64_t token, const __m512* scale, float* sums) {
    __m512i sum[T][kBytes];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int b = 0; b < kBytes; ++b) sum[t][b] = _mm512_load_si512(made.start);
    const uint8_t* at = rounded.columns(x, group, token);
    const Slot* slot = made.slot;
    for (const Slot *second = slot + made.first, *end = slot + made.count; slot < end; ++slot) {
      const uint8_t* here = at + (slot < second ? 0 : sbt::kTileCols);
      const __m512i w = _mm512_load_si512(slot->weight), c = _mm512_load_si512(slot->column);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int b = 0; b < kBytes; ++b) {
          const __m512i all = _mm512_load_si512(here + t * Made::kTokenBytes + b * kGroupCols);
          sum[t][b] = add_products(sum[t][b], _mm512_permutexvar_epi8(c, all), w);
        }
    }
    const float* units = rounded.units(x, group, token);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512 unit = _mm512_set1_ps(units[t]), factor = scale ? _mm512_mul_ps(unit, *scale) : unit;
      float* to = sums + t * sbt::kTileRows;
      _mm512_store_ps(to, _mm512_fmadd_ps(total<kBytes>(sum[t]), factor, _mm512_load_ps(to)));
    }
  }

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    auto* made = new (scratch) Group;
    auto* kept = new (made + 1) Kept[4];
    auto* sums = reinterpret_cast<float*>(kept + 4);
    static_assert(sizeof(Group) + 4 * sizeof(Kept) + kPass * sbt::kTileRows * sizeof(float) <= kScratchBytes, "fits");
    const Made rounded(p.weight, p.tokens);
    const int64_t tiles = p.weight.col_tiles();
    for (int64_t token = 0; token < p.tokens; token += kPass) {
      const int64_t pass = std::min(p.tokens - token, kPass), some = ceil_div(pass, ceil_div(pass, kBlock));
      for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
        const int64_t first = row_tile * tiles;
        std::fill(sums, sums + pass * sbt::kTileRows, 0.0f);
        for (int64_t c = -2; c < tiles; c += 2) {  // kept weights are found a group ahead
          for (int64_t i = c + 2; i < std::min(c + 4, tiles); ++i) look(p.weight, first + i, kept[i % 4]);
          if (c < 0) continue;
          make(p.weight, first + c, std::min(tiles - c, int64_t{2}), kept + c % 4, *made);
          const __m512 scale = p.weight.grouped() ? row_scales(p.weight, row_tile, c) : _mm512_setzero_ps();
          for (int64_t t = 0; t < pass; t += some) {
            known<1, kBlock>(std::min(some, pass - t), [&](auto count) {
              block<decltype(count)::value>(*made, rounded, p.x, c / 2, token + t,
                                            p.weight.grouped() ? &scale : nullptr, sums + t * sbt::kTileRows);
            });
          }
        }
        for (int64_t t = 0; t < pass; ++t)
          store_sums(p, row_tile, token + t, _mm512_load_ps(sums + t * sbt::kTileRows));
      }
    }
    exact_tokens<NearBytes>(p, begin, end, rounded);
  }
};

inline void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (p.weight.to_bytes) return Slots<1>::product(p, begin, end, scratch);
  Slots<2>::product(p, begin, end, scratch);
}

}  // namespace slots

}  // namespace
}  // namespace alphaprune
