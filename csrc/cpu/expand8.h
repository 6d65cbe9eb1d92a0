// Eight mask bits at a time through tables, for CPUs without vpexpandw and vpexpandb: a byte of the mask picks the
// control of one vpshufb, which spreads the values over eight lanes and clears the others. Needs AVX2 and F16C.
#pragma once

#include <immintrin.h>

#include "panel.h"

namespace alphaprune {
namespace {

// vpshufb writes zero for an index with the top bit set. The float tables put 16 bits into the upper half of a lane,
// which makes a bfloat16 a float32 without any further instruction, and 8 bits into its upper quarter.
struct Tables {
  alignas(32) uint8_t upper_half[256][32];
  alignas(32) uint8_t upper_quarter[256][32];
  alignas(32) uint8_t halves[256][16];
  alignas(32) uint8_t bytes[256][16];  // of which the first eight count
  alignas(32) int8_t lanes[256][8];
  constexpr Tables() : upper_half(), upper_quarter(), halves(), bytes(), lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool kept = mask >> lane & 1;
        for (int i = 0; i < 4; ++i) upper_half[mask][4 * lane + i] = upper_quarter[mask][4 * lane + i] = 0x80;
        for (int i = 0; i < 2; ++i) {
          const auto index = static_cast<uint8_t>(kept ? 2 * next + i : 0x80);
          upper_half[mask][4 * lane + 2 + i] = index;
          halves[mask][2 * lane + i] = index;
        }
        const auto index = static_cast<uint8_t>(kept ? next : 0x80);
        upper_quarter[mask][4 * lane + 3] = index;
        bytes[mask][lane] = index;
        lanes[mask][lane] = static_cast<int8_t>(kept ? next : -128);
        next += kept;
      }
    }
  }
};
constexpr Tables kTables;

inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline __m256i load32(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

// A mask byte as what is added to the address of a table of 32-byte or of 16-byte rows; it has as many bits as the
// mask.
constexpr int kRowShift = 5, kHalfRowShift = 4;
inline __m256i control(const uint8_t (&table)[256][32], uint64_t shifted) { return load32(table[0] + shifted); }
inline __m128i control(const uint8_t (&table)[256][16], uint64_t shifted) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(table[0] + shifted));
}

// The shifted mask bytes of `kBytes` (8 or a multiple of 16) from `mask` on: two instructions where each byte would
// need a shift. Of a whole macro tile at a time: a load of two bytes that soon follows the store of 32 is slow on a
// Zen 5, where one token took 1.2 times as long when each step was stored just before it was read.
template <int kShift = kRowShift, int kBytes>
inline void shift_bytes(const void* mask, uint16_t (&to)[kBytes]) {
  const auto* from = static_cast<const uint8_t*>(mask);
  if constexpr (kBytes == 8) {
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_slli_epi16(_mm_cvtepu8_epi16(load8(from)), kShift));
  } else {
    for (int i = 0; i < kBytes; i += 16)
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + i),
                         _mm256_slli_epi16(_mm256_cvtepu8_epi16(load16(from + i)), kShift));
  }
  // Through memory, where reading one back is a load; a compiler that sees through takes vpextrw, which is two
  // instructions for the ports that are short.
  __asm__("" : "+m"(to));
}

// What is stored, and the eight weights of a mask byte as float32; `expand` gives them as they are stored. A load takes
// up to 32 bytes from the value pointer on: the values end in a readable tail of 64 bytes.
struct Bfloat16 {
  using Stored = uint16_t;
  static __m256 eight(const uint16_t* value, uint64_t shifted) {
    const __m256i both = _mm256_broadcastsi128_si256(load16(value));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, control(kTables.upper_half, shifted)));
  }
  static __m256 widen(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
};
struct Float16 {
  using Stored = uint16_t;
  static __m128i expand(const uint16_t* value, uint32_t mask) {
    return _mm_shuffle_epi8(load16(value), control(kTables.halves, mask << kHalfRowShift));
  }
  static __m256 widen(__m128i v) { return _mm256_cvtph_ps(v); }
  static __m256 eight(const uint16_t* value, uint64_t shifted) { return widen(expand(value, shifted >> kRowShift)); }
};
struct Float32Value {
  using Stored = uint32_t;
  static __m256i expand(const uint32_t* value, uint32_t mask) {
    const __m256i lanes = _mm256_cvtepi8_epi32(load8(kTables.lanes[mask]));
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value));
    return _mm256_andnot_si256(_mm256_srai_epi32(lanes, 31), _mm256_permutevar8x32_epi32(packed, lanes));
  }
  static __m256 eight(const uint32_t* value, uint64_t shifted) {
    return _mm256_castsi256_ps(expand(value, shifted >> kRowShift));
  }
};
struct Integer {
  using Stored = uint8_t;
  static __m256 eight(const uint8_t* value, uint64_t shifted) {
    const __m256i spread =
        _mm256_shuffle_epi8(_mm256_broadcastq_epi64(load8(value)), control(kTables.upper_quarter, shifted));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(spread, 24));
  }
};

// The weights of eight mask bytes, one after the other. Where the next eight begin is known at once: from byte to byte
// alone each address would wait for the one before, two cycles on AMD's CPUs, which is as long as all the rest takes.
template <class Value>
struct Eight {
  const typename Value::Stored* at;

  Eight(const typename Value::Stored*& value, const void* mask) : at(value) {
    uint64_t bits;
    std::memcpy(&bits, mask, 8);
    value += __builtin_popcountll(bits);
  }
  __m256 next(uint64_t shifted) {
    const __m256 w = Value::eight(at, shifted);
    at += __builtin_popcountll(shifted);
    return w;
  }
};

// Asks for what lies `kAhead` bytes on.
constexpr int64_t kAhead = 4096;
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + kAhead, _MM_HINT_T0); }

// Calls to(bytes of the mask so far, eight weights) for every mask byte of a macro tile, in order.
template <class Value, class To>
inline void each_eight(const sbt::View& weight, int64_t tile, To to) {
  const auto* value = tile_values<typename Value::Stored>(weight, tile);
  const auto* mask = reinterpret_cast<const uint8_t*>(weight.mask + tile * sbt::kWords);
  prefetch(mask);
  prefetch(mask + 64);
  alignas(32) uint16_t shifted[4 * sbt::kWords];
  shift_bytes(mask, shifted);
#pragma GCC unroll 4
  for (int64_t b = 0; b < 4 * sbt::kWords; b += 8) {
    Eight<Value> eight(value, mask + b);
#pragma GCC unroll 8
    for (int64_t i = b; i < b + 8; ++i) {
      if (i % (sizeof(*value) == 4 ? 4 : 8) == 0) prefetch(eight.at);
      to(i, eight.next(shifted[i]));
    }
  }
}

// The product with T tokens straight from the registers. Sums that find no register are in memory, which costs less
// than to go through the mask once for each part of them.
template <class Value, int T>
struct Fused {
  static constexpr int64_t kLanes = 8;

  static void add_tiles(const Product& p, int64_t tile, int64_t col_tile, int64_t count, float* sums) {
    __m256 sum[sbt::kTileRows][T];
#pragma GCC unroll 16
    for (int r = 0; r < sbt::kTileRows; ++r)
      for (int t = 0; t < T; ++t) sum[r][t] = _mm256_load_ps(sums + (t * sbt::kTileRows + r) * kLanes);
    for (int64_t c = 0; c < count; ++c) {
      const auto* value = tile_values<typename Value::Stored>(p.weight, tile + c);
      const auto* mask = reinterpret_cast<const uint8_t*>(p.weight.mask + (tile + c) * sbt::kWords);
      const float* x = p.rows() + (col_tile + c) * sbt::kTileCols;
      prefetch(mask);
      prefetch(mask + 64);
      alignas(32) uint16_t all[4 * sbt::kWords];
      shift_bytes(mask, all);
      const uint16_t* shifted = all;
      for (int step = 0; step < sbt::kSteps; ++step, mask += 32, shifted += 32, x += sbt::kStepCols) {
        __m256 a[2][T];
        for (int t = 0; t < T; ++t)
          for (int h = 0; h < 2; ++h) a[h][t] = _mm256_loadu_ps(x + t * p.x_stride + h * kLanes);
#pragma GCC unroll 4
        for (int b = 0; b < 32; b += 8) {
          Eight<Value> eight(value, mask + b);
#pragma GCC unroll 8
          for (int i = b; i < b + 8; ++i) {
            if (sizeof(*value) == 4 || i % 8 == 0) prefetch(eight.at);
            const __m256 w = eight.next(shifted[i]);
            for (int t = 0; t < T; ++t) sum[i / 2][t] = _mm256_fmadd_ps(w, a[i % 2][t], sum[i / 2][t]);
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < sbt::kTileRows; ++r)
      for (int t = 0; t < T; ++t) _mm256_store_ps(sums + (t * sbt::kTileRows + r) * kLanes, sum[r][t]);
  }

  // Every sum of a row tile; of int8 with scales along the rows, the scaled sums of its groups.
  static void row_tile(const Product& p, int64_t row_tile, float* sums, float* total) {
    constexpr int64_t kSums = T * sbt::kTileRows * kLanes;
    const int64_t tiles = p.weight.col_tiles();
    const int64_t span = p.weight.grouped() ? sbt::kScaleCols / sbt::kTileCols : tiles;
    std::memset(sums, 0, kSums * sizeof(float));
    if (p.weight.grouped()) std::memset(total, 0, kSums * sizeof(float));
    for (int64_t c = 0; c < tiles; c += span) {
      const int64_t count = tiles - c < span ? tiles - c : span;
      add_tiles(p, row_tile * tiles + c, c, count, sums);
      if (!p.weight.grouped()) continue;
      float scales[sbt::kTileRows];
      tile_scales(p.weight, row_tile, c, scales);
      for (int64_t i = 0; i < kSums; ++i) total[i] += scales[i / kLanes % sbt::kTileRows] * sums[i];
      std::memset(sums, 0, kSums * sizeof(float));
    }
    if (p.weight.grouped()) std::memcpy(sums, total, kSums * sizeof(float));
  }

  // `finish(p, row_tile, token, sums of the 16 rows, 8 lanes each)` stores a token.
  template <class Finish>
  static void product(const Product& p, int64_t begin, int64_t end, void* scratch, Finish finish) {
    auto* sums = static_cast<float*>(scratch);
    for (int64_t r = begin; r < end; ++r) {
      row_tile(p, r, sums, sums + T * sbt::kTileRows * kLanes);
      for (int t = 0; t < T; ++t) finish(p, r, t, sums + t * sbt::kTileRows * kLanes);
    }
  }
};

inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// The weights of a macro tile as they are stored.
struct Words8 {
  static void expand(const sbt::View& weight, int64_t tile, uint8_t* to) {
    raw(weight, tile, to, [](const uint8_t* value, uint32_t bits, uint8_t* at) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(at),
                       _mm_shuffle_epi8(load8(value), control(kTables.bytes, bits << kHalfRowShift)));
    });
  }
  static void expand(const sbt::View& weight, int64_t tile, uint16_t* to) {
    raw(weight, tile, to, [](const uint16_t* value, uint32_t bits, uint16_t* at) {
      _mm_store_si128(reinterpret_cast<__m128i*>(at), Float16::expand(value, bits));
    });
  }
  static void expand(const sbt::View& weight, int64_t tile, uint32_t* to) {
    raw(weight, tile, to, [](const uint32_t* value, uint32_t bits, uint32_t* at) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(at), Float32Value::expand(value, bits));
    });
  }

 private:
  template <class T, class Store>
  static void raw(const sbt::View& weight, int64_t tile, T* to, Store store) {
    const T* value = tile_values<T>(weight, tile);
    const auto* mask = reinterpret_cast<const uint8_t*>(weight.mask + tile * sbt::kWords);
    for (int64_t byte = 0; byte < 4 * sbt::kWords; ++byte, to += 8) {
      store(value, mask[byte], to);
      value += __builtin_popcount(mask[byte]);
    }
  }
};

// Calls work(Value()) with the value type of `dtype`.
template <class Work>
inline void by_value(Dtype dtype, Work work) {
  if (dtype == Dtype::float32) return work(Float32Value());
  if (dtype == Dtype::bfloat16) return work(Bfloat16());
  if (dtype == Dtype::float16) return work(Float16());
  work(Integer());
}

// The product of up to Most tokens by Fused. finish: as of its product.
template <int Most, class Finish>
inline void product_fused(const Product& p, int64_t begin, int64_t end, void* scratch, Finish finish) {
  by_value(p.weight.dtype, [&](auto value) {
    known<1, Most>(p.tokens, [&](auto tokens) {
      Fused<decltype(value), decltype(tokens)::value>::product(p, begin, end, scratch, finish);
    });
  });
}

// One token's activations as float32, zeros past `count`.
inline void convert(const void* from, Dtype dtype, int64_t count, int64_t padded, float* to) {
  int64_t i = 0;
  if (dtype != Dtype::float32) {
    const auto* halves = static_cast<const uint16_t*>(from);
    for (; i + 8 <= count; i += 8) {
      const __m128i v = load16(halves + i);
      _mm256_storeu_ps(to + i, dtype == Dtype::bfloat16 ? Bfloat16::widen(v) : Float16::widen(v));
    }
  }
  for (; i < count; ++i) to[i] = load_float(from, i, dtype);
  for (; i < padded; ++i) to[i] = 0;
}

}  // namespace
}  // namespace alphaprune
