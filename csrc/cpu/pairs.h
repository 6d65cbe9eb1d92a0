// The product with many tokens that touches non-zeros only, in bfloat16: tokens lie in the lanes, and VDPBF16PS takes
// two kept weights of a row at a time, whose columns of activations are interleaved in registers. A few macro tiles are
// first turned into a list of values and columns per row, so that the loop over them runs without branches that depend
// on the mask; a list serves all tokens.
//
// Activations are laid out in blocks of tokens, each [spans of a few macro tiles][their columns and one of zeros]
// [tokens], in the order of the tokens in which interleaving leaves the sums in theirs. Of each kTokenBlock tokens a
// mark says whether all are finite, because a zero times infinity is NaN and zeros were skipped.
#pragma once

#include <algorithm>
#include <limits>
#include <new>

#include "vbmi2.h"

namespace alphaprune {
namespace {

namespace pairs {

constexpr int64_t kLanes = 32;  // tokens of a vector of activations
constexpr int64_t kMostVectors = 2;
constexpr int64_t kMostSpan = 4;
constexpr int64_t kMostTiles = 4;  // row tiles whose lists are made before they are multiplied
constexpr int64_t kRun = 8;        // lists are filled up to a multiple of so many
constexpr int64_t kCapacity = kMostSpan * sbt::kTileCols + 32;  // of a list: 32 may be written past its last

// Tiles along a row that are taken together: their activations are two thirds of the L1 of a Zen 5, half of a Zen 4's.
inline int64_t tiles_at_once() { return multiplies_twice() ? kMostSpan : 2; }

// Blocks of tokens. The last one has fewer vectors where it has fewer tokens.
struct Blocks {
  int64_t tokens, width, count, tiles, cols;  // tiles, cols: of a span

  explicit Blocks(int64_t tokens)
      : tokens(tokens),
        width(tokens <= kLanes ? kLanes : kMostVectors * kLanes),
        count(ceil_div(tokens, width)),
        tiles(tiles_at_once()),
        cols(tiles * sbt::kTileCols) {}
  int64_t column() const { return width * static_cast<int64_t>(sizeof(uint16_t)); }
  int64_t span() const { return (cols + 1) * column(); }
  // Where in a block column `col` of the activations stands; that of the zeros stands after the last of its span.
  int64_t at(int64_t col) const { return (col / cols * (cols + 1) + col % cols) * column(); }
  int64_t zeros_of(int64_t span) const { return (span * (cols + 1) + cols) * column(); }
  int64_t left(int64_t b) const { return std::min(width, tokens - b * width); }
  int64_t header() const { return 64; }
  int64_t bytes(const sbt::View& weight) const { return header() + ceil_div(weight.col_tiles(), tiles) * span(); }
};

// What 1024 weights take on a Zen 5, as measured at 17 to 256 tokens and 50 to 90 % of zeros, 11008 x 4096 from memory:
// the lists, and then two vectors of tokens or one alone; and what a panel takes.
inline double nanoseconds(double density, int64_t tokens) {
  const int64_t vectors = ceil_div(tokens, kLanes);
  const auto twos = static_cast<double>(vectors / 2), ones = static_cast<double>(vectors % 2);
  return 25 + 107 * density + twos * (42 + 410 * density) + ones * (31 + 277 * density);
}
inline double panel_nanoseconds(const sbt::View& weight, int64_t tokens) {
  const auto many = static_cast<double>(tokens);
  return weight.to_bytes ? 15 + 2.4 * many : 14 + 5 * many;
}

// Whether skipping the zeros is faster than the panel. On a Zen 4 by the time that the panel takes for a token, 0.6 of
// it with activations of 8 bits: the lists cost 11, a vector of tokens 3 and 40 times the density.
inline bool pays(const sbt::View& weight, int64_t tokens) {
  const double density = density_of(weight);
  if (multiplies_twice()) return nanoseconds(density, tokens) < panel_nanoseconds(weight, tokens);
  const double panel = static_cast<double>(tokens) * (weight.to_bytes ? 0.6 : 1);
  const auto vectors = static_cast<double>(ceil_div(tokens, kLanes));
  return 10 + vectors * (3 + 40 * density) < 1.05 * panel;
}

// The non-zeros of a few macro tiles: per row, values and the byte offsets of their columns in a block of activations.
struct Lists {
  alignas(64) uint16_t value[sbt::kTileRows][kCapacity];
  alignas(64) uint16_t offset[sbt::kTileRows][kCapacity];
  int32_t count[sbt::kTileRows];
};
constexpr int64_t kOffsets = sizeof(Lists::value) / sizeof(uint16_t);  // from a value to its column's offset

inline int64_t prepared_bytes(const Activations& x, const sbt::View& weight) {
  const Blocks blocks(x.tokens);
  return blocks.count * blocks.bytes(weight);
}

// Columns of eight tokens, `kept` of eight columns each, as vectors of tokens; whether all are finite.
inline bool turn_eight(const uint16_t* const* from, int64_t col, int64_t kept, __m128i* columns) {
  __m128i row[8], half[8];
  const __m128i exponent = _mm_set1_epi16(0x7f80);
  __m128i odd = _mm_setzero_si128();
  for (int t = 0; t < 8; ++t) {
    if (kept >= 8) {
      row[t] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[t] + col));
    } else {
      alignas(16) uint16_t some[8] = {};
      for (int64_t k = 0; k < kept; ++k) some[k] = from[t][col + k];
      row[t] = _mm_load_si128(reinterpret_cast<const __m128i*>(some));
    }
    odd = _mm_or_si128(odd, _mm_cmpeq_epi16(_mm_and_si128(row[t], exponent), exponent));
  }
  for (int i = 0; i < 4; ++i) {
    half[2 * i] = _mm_unpacklo_epi16(row[2 * i], row[2 * i + 1]);
    half[2 * i + 1] = _mm_unpackhi_epi16(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {  // i: which four columns
    const __m128i a = _mm_unpacklo_epi32(half[i], half[2 + i]), b = _mm_unpackhi_epi32(half[i], half[2 + i]);
    const __m128i c = _mm_unpacklo_epi32(half[4 + i], half[6 + i]), d = _mm_unpackhi_epi32(half[4 + i], half[6 + i]);
    columns[4 * i] = _mm_unpacklo_epi64(a, c);
    columns[4 * i + 1] = _mm_unpackhi_epi64(a, c);
    columns[4 * i + 2] = _mm_unpacklo_epi64(b, d);
    columns[4 * i + 3] = _mm_unpackhi_epi64(b, d);
  }
  return _mm_movemask_epi8(odd) == 0;
}

// kTokenBlock tokens from `first` on, and what no token fills up to the next whole vector.
inline void prepare_tokens(const Activations& x, const sbt::View& weight, int64_t first, void* to) {
  static_assert(kTokenBlock == 16 && kLanes == 32, "half a vector");
  const Blocks blocks(x.tokens);
  char* block = static_cast<char*>(to) + first / blocks.width * blocks.bytes(weight);
  const int64_t token = first % blocks.width;  // in the block
  char* vector = block + blocks.header() + token / kLanes * 64;
  const int64_t upper = token % kLanes / kTokenBlock;  // which half of the vector
  const bool alone = !upper && first + kTokenBlock >= x.tokens;
  const auto* data = static_cast<const uint16_t*>(x.data);
  const int64_t padded = weight.padded_cols();
  bool finite = true;
  for (int64_t eight = 0; eight < 2; ++eight) {
    const uint16_t* from[8];
    int64_t there = 0;
    for (int64_t t = 0; t < 8; ++t) {
      const int64_t at = first + eight * 8 + t;
      if (at < x.tokens) there = t + 1;
      from[t] = data + std::min(at, x.tokens - 1) * x.stride;
    }
    const __m128i lanes = _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7);
    const __m128i given = _mm_cmpgt_epi16(_mm_set1_epi16(static_cast<short>(there)), lanes);
    for (int64_t col = 0; col < padded; col += 8) {
      __m128i columns[8];
      finite &= turn_eight(from, col, weight.cols - col, columns);
      char* out = vector + blocks.at(col) + eight * 32;
      for (int64_t k = 0; k < 8; ++k, out += blocks.column()) {
        const __m128i four = _mm_and_si128(columns[k], given);
        auto* at = reinterpret_cast<__m128i*>(out + upper * 8);
        _mm_storel_epi64(at, four);
        _mm_storel_epi64(at + 1, _mm_unpackhi_epi64(four, four));
        if (!alone) continue;
        at = reinterpret_cast<__m128i*>(out + 8);
        _mm_storel_epi64(at, _mm_setzero_si128());
        _mm_storel_epi64(at + 1, _mm_setzero_si128());
      }
    }
  }
  for (int64_t span = 0; span < ceil_div(padded, blocks.cols); ++span) {
    char* zeros = vector + blocks.zeros_of(span);
    for (int64_t i = 0; i < 8; i += 2) {
      std::memset(zeros + (i + upper) * 8, 0, 8);
      if (alone) std::memset(zeros + (i + 1) * 8, 0, 8);
    }
  }
  reinterpret_cast<int64_t*>(block)[token / kTokenBlock] = finite;
}

// 16 values from `p` on, as bfloat16.
inline __m256i sixteen(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i sixteen(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m512 floats = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  const __m512bh halves = _mm512_cvtne2ps_pbh(floats, floats);
  return _mm512_castsi512_si256(reinterpret_cast<const __m512i&>(halves));
}

// The masks of the rows of a macro tile, 64 bits each, from words of two rows and 16 columns.
inline void mask_rows(const uint32_t* words, uint16_t (*rows)[sbt::kSteps]) {
  alignas(64) static constexpr struct Order {
    uint16_t from[2][32];
    constexpr Order() : from() {
      for (int i = 0; i < 64; ++i) from[i / 32][i % 32] = static_cast<uint16_t>(i % 4 * 16 + i / 4);
    }
  } kOrder;
  const __m512i low = _mm512_loadu_si512(words), high = _mm512_loadu_si512(words + 16);
  for (int i = 0; i < 2; ++i)
    _mm512_store_si512(rows + 8 * i, _mm512_permutex2var_epi16(low, _mm512_load_si512(kOrder.from[i]), high));
}

// Where the values of the next row begin, of each step of 16 columns.
template <class Value>
struct Places {
  const Value* step[sbt::kSteps];

  Places(const Value* value, const uint32_t* words) {
    for (int64_t s = 0; s < sbt::kSteps; ++s, words += sbt::kPairs) {
      step[s] = value;
      for (int64_t i = 0; i < sbt::kPairs; i += 2) {
        const Kept kept(words + i);
        value += kept.of[0] + kept.of[1];
      }
    }
  }
};

// How many of 16 are kept. By an instruction of 32 bits: each of 16 would wait for the one before.
inline int kept_of(uint32_t bits) {
  asm("" : "+r"(bits));
  return __builtin_popcount(bits);
}

// Appends the non-zeros of a row of a macro tile to its list; returns the list's end.
template <class Value>
inline uint16_t* append_row(const uint16_t* bits, const __m512i (&here)[2], Places<Value>& places, uint16_t* to) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    uint32_t mask;
    std::memcpy(&mask, bits + 2 * half, sizeof mask);
    _mm512_storeu_si512(to + kOffsets, _mm512_mask_compress_epi16(fresh_zeros(), mask, here[half]));
#pragma GCC unroll 2
    for (int s = 2 * half; s < 2 * half + 2; ++s) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sixteen(places.step[s]));
      const int more = kept_of(bits[s]);
      places.step[s] += more;
      to += more;
    }
  }
  return to;
}

// Appends the non-zeros of one macro tile to the lists, whose ends are `end`; `here` the offsets of its columns. Asks
// for the tile `asked`.
template <class Value>
inline void append(const sbt::View& weight, int64_t tile, int64_t asked, const __m512i (&here)[2], uint16_t** end) {
  const uint32_t* words = weight.mask + tile * sbt::kWords;
  alignas(64) uint16_t rows[sbt::kTileRows][sbt::kSteps];
  mask_rows(words, rows);
  Places<Value> places(tile_values<Value>(weight, tile), words);
  AsksBy<0> asks;
  const auto* values = tile_values<Value>(weight, asked);
  const auto bytes = (tile_values<Value>(weight, asked + 1) - values) * static_cast<int64_t>(sizeof(Value));
  asks.start(weight.mask + asked * sbt::kWords, values, bytes, sbt::kTileRows);
  for (int64_t row = 0; row < sbt::kTileRows; row += sbt::kSteps) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < sbt::kSteps; ++i) {
      asks.more();
      end[row + i] = append_row(rows[row + i], here, places, end[row + i]);
    }
  }
}

// Where the columns of a span stand in a block, in bytes.
struct Columns {
  alignas(64) uint16_t offset[kMostSpan * sbt::kTileCols];
  explicit Columns(int64_t column) {
    for (int64_t i = 0; i < kMostSpan * sbt::kTileCols; ++i) offset[i] = static_cast<uint16_t>(i * column);
  }
};

// The lists of `span` tiles of a row tile from column tile `first` on, filled up with zeros that meet the column of
// zeros.
template <class Value>
inline void gather(const sbt::View& weight, int64_t row_tile, int64_t first, int64_t span, const Blocks& blocks,
                   const Columns& columns, Lists& lists) {
  const int64_t tiles = weight.col_tiles(), tile = row_tile * tiles + first;
  const int64_t asked = std::min(row_tile + kMostTiles, weight.row_tiles() - 1) * tiles + first;
  uint16_t* end[sbt::kTileRows];
  for (int64_t row = 0; row < sbt::kTileRows; ++row) end[row] = lists.value[row];
  for (int64_t i = 0; i < span; ++i) {
    const uint16_t* here = columns.offset + i * sbt::kTileCols;
    append<Value>(weight, tile + i, asked + i, {_mm512_load_si512(here), _mm512_load_si512(here + 32)}, end);
  }
  for (int64_t row = 0; row < sbt::kTileRows; ++row) {
    lists.count[row] = static_cast<int32_t>(end[row] - lists.value[row]);
    for (int64_t i = 0; i < kRun; ++i) {
      end[row][i] = 0;
      end[row][kOffsets + i] = static_cast<uint16_t>(blocks.cols * blocks.column());
    }
  }
}

inline __m512 add_products(__m512 sum, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(w), reinterpret_cast<const __m512bh&>(x));
}

// A vector of activations in a register, where the compiler would load it twice.
inline __m512i loaded(const char* p) {
  __m512i v = _mm512_load_si512(p);
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}

// One row's list times V vectors of tokens; four sums each, or products would wait for one another.
template <int V>
inline void multiply_row(const uint16_t* entry, int32_t count, const char* x, float* sums) {
  constexpr int kChains = 4;
  static_assert(kRun == 2 * kChains, "a run is a pair for each sum");
  __m512 sum[kChains][2 * V];
#pragma GCC unroll 4
  for (int v = 0; v < 2 * V; ++v) {
    sum[0][v] = _mm512_load_ps(sums + v * 16);
#pragma GCC unroll 4
    for (int c = 1; c < kChains; ++c) sum[c][v] = _mm512_setzero_ps();
  }
  for (const uint16_t* end = entry + count; entry < end; entry += kRun) {
    uint64_t offsets[2];  // four at a time: loads are what bounds this loop
    std::memcpy(offsets, entry + kOffsets, sizeof offsets);
    asm("" : "+r"(offsets[0]), "+r"(offsets[1]));
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      int32_t two;
      std::memcpy(&two, entry + 2 * c, sizeof(two));
      const __m512i w = _mm512_set1_epi32(two);
      const uint64_t both = offsets[c / 2] >> 32 * (c % 2);
      const char *first = x + static_cast<uint16_t>(both), *second = x + static_cast<uint16_t>(both >> 16);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const __m512i a = loaded(first + v * 64), b = loaded(second + v * 64);
        sum[c][2 * v] = add_products(sum[c][2 * v], w, _mm512_unpacklo_epi16(a, b));
        sum[c][2 * v + 1] = add_products(sum[c][2 * v + 1], w, _mm512_unpackhi_epi16(a, b));
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < 2 * V; ++v)
    _mm512_store_ps(sums + v * 16,
                    _mm512_add_ps(_mm512_add_ps(sum[0][v], sum[1][v]), _mm512_add_ps(sum[2][v], sum[3][v])));
}

// The rows of a row tile, whose sums are `width` apart.
inline void multiply_rows(const Lists& lists, const char* x, int64_t tokens, int64_t width, float* sums) {
  for (int64_t r = 0; r < sbt::kTileRows; ++r, sums += width) {
    if (tokens > kLanes) {
      multiply_row<2>(lists.value[r], lists.count[r], x, sums);
    } else {
      multiply_row<1>(lists.value[r], lists.count[r], x, sums);
    }
  }
}

// Where token t of a block stands in a column.
inline int64_t place_of(int64_t t) { return t / kLanes * kLanes + t % 16 / 4 * 8 + t % kLanes / 16 * 4 + t % 4; }

// What the zeros of a row tile would have added to the sums: NaN where an activation is not finite.
inline void meet_zeros(const sbt::View& weight, const Blocks& blocks, int64_t row_tile, int64_t tokens, const char* x,
                       float* sums) {
  for (int64_t k = 0; k < weight.cols; ++k) {
    const uint32_t* words = weight.mask + (row_tile * weight.col_tiles() + k / sbt::kTileCols) * sbt::kWords;
    const int64_t col = k % sbt::kTileCols;
    const auto* column = reinterpret_cast<const uint16_t*>(x + blocks.at(k));
    for (int64_t t = 0; t < tokens; ++t) {
      if ((column[place_of(t)] & 0x7f80u) != 0x7f80u) continue;
      for (int64_t r = 0; r < sbt::kTileRows; ++r)
        if (!(words[sbt::word_of(r, col)] >> sbt::bit_of(r, col) & 1))
          sums[r * blocks.width + t] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

inline void finish_block(const Product& p, const Blocks& blocks, int64_t b, int64_t row_tile, float* sums) {
  const char* block = static_cast<const char*>(p.x) + b * blocks.bytes(p.weight);
  const int64_t tokens = blocks.left(b);
  bool finite = true;
  for (int64_t i = 0; i < ceil_div(tokens, kTokenBlock); ++i) finite &= reinterpret_cast<const int64_t*>(block)[i];
  if (!finite) meet_zeros(p.weight, blocks, row_tile, tokens, block + blocks.header(), sums);
  for (int64_t t = 0; t < tokens; ++t) {
    alignas(64) float out[sbt::kTileRows];
    for (int64_t r = 0; r < sbt::kTileRows; ++r) out[r] = sums[r * blocks.width + t];
    store_sums(p, row_tile, b * blocks.width + t, _mm512_load_ps(out));
  }
}

// Lists of a few row tiles, and their sums with a few blocks of tokens, wait in the scratch while their columns pass
// by: the activations of a block stay in L1 while all these row tiles meet them, those of all the blocks in L2.
template <class Value>
inline void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  constexpr int64_t kMostBlocks = 4;
  auto* lists = new (scratch) Lists[kMostTiles];
  auto* sums = reinterpret_cast<float*>(lists + kMostTiles);
  const Blocks blocks(p.tokens);
  const Columns columns(blocks.column());
  const int64_t tiles = p.weight.col_tiles(), block_sums = sbt::kTileRows * blocks.width;
  static_assert(sizeof(Lists) % 64 == 0 && kMostTiles * (sizeof(Lists) + kMostBlocks * sbt::kTileRows * kMostVectors *
                                                                             kLanes * sizeof(float)) <=
                                               kScratchBytes,
                "lists and sums fit the scratch");
  for (int64_t b = 0; b < blocks.count; b += kMostBlocks) {
    const int64_t some = std::min(kMostBlocks, blocks.count - b);
    for (int64_t first = begin; first < end; first += kMostTiles) {
      const int64_t last = std::min(first + kMostTiles, end);
      std::fill(sums, sums + (last - first) * some * block_sums, 0.0f);
      for (int64_t c = 0; c < tiles; c += blocks.tiles) {
        for (int64_t r = first; r < last; ++r)
          gather<Value>(p.weight, r, c, std::min(blocks.tiles, tiles - c), blocks, columns, lists[r - first]);
        for (int64_t i = 0; i < some; ++i) {
          const char* x = static_cast<const char*>(p.x) + (b + i) * blocks.bytes(p.weight) + blocks.header();
          for (int64_t r = first; r < last; ++r)
            multiply_rows(lists[r - first], x + c / blocks.tiles * blocks.span(), blocks.left(b + i), blocks.width,
                          sums + ((r - first) * some + i) * block_sums);
        }
      }
      for (int64_t r = first; r < last; ++r)
        for (int64_t i = 0; i < some; ++i)
          finish_block(p, blocks, b + i, r, sums + ((r - first) * some + i) * block_sums);
    }
  }
}

}  // namespace pairs

}  // namespace
}  // namespace alphaprune
