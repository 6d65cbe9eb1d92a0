// SBT on AVX-512 with VBMI2 and BF16 where VDPBF16PS is fast: bfloat16 weights and activations are multiplied as they
// are, two columns an instruction, which treats subnormal numbers as zero. So are, with many tokens of bfloat16, int8
// weights with one scale per row, each of which is a bfloat16: widening them hides behind the arithmetic, and the
// activations are not rounded. Everything else is computed as on AVX-512.
#include "dense.h"
#include "halves.h"
#include "integer.h"
#include "pairs.h"
#include "pipeline.h"
#include "slots.h"

namespace alphaprune {
namespace {

// A number in all 16-bit lanes, which the compiler does not keep in a vector: loops have none to spare.
inline __m512i made_of(int16_t number) {
  int two = number * 0x10001;
  asm volatile("" : "+r"(two));
  return _mm512_set1_epi32(two);
}

// Whether no word of a tile keeps more than 16 weights.
inline bool narrow_words(const uint32_t* mask) {
  const auto kept = [&](int first) {
    const __m512i halves = _mm512_popcnt_epi16(_mm512_loadu_si512(mask + first));
    return _mm512_add_epi16(halves, _mm512_rol_epi32(halves, 16));
  };
  return !_mm512_cmpgt_epi16_mask(_mm512_max_epi16(kept(0), kept(16)), made_of(16));
}

// Whether no two words of a tile keep more than 32.
struct NarrowBytes {
  static bool narrow(const uint32_t* mask) {
    const auto kept = [&](int first) {
      return _mm512_sad_epu8(_mm512_popcnt_epi16(_mm512_loadu_si512(mask + first)), _mm512_setzero_si512());
    };
    return !_mm512_cmpgt_epi16_mask(_mm512_max_epi16(kept(0), kept(16)), made_of(32));
  }
};

// An accumulator is a word, 8 lanes of the even row and 8 of the odd one.
struct PairsOfBfloat16 {
  using Element = uint16_t;
  using Vector = __m512;
  static constexpr int64_t kLanes = 16, kVectors = 8, kStep = 16, kGroup = 4, kBlock = 6;
  static constexpr int kMostFused = 3;

  static Vector load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Vector v) { _mm512_store_ps(p, v); }
  static __m512i dense(__m512i w) { return w; }
  static __m512i weights(const uint16_t* p) { return _mm512_load_si512(p); }
  static __m512i activations(const uint16_t* p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vector multiply(__m512i w, __m512i x, Vector sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  using Value = uint16_t;
  static bool narrow(const uint32_t* mask) { return narrow_words(mask); }
  template <bool kNarrow>
  static void two(const uint16_t*& value, const uint32_t* mask, __m512i* w) {
    const Kept kept(mask);
    const TwoMasks masks(mask);
    w[0] = expanded16<kNarrow>(value, masks.of[0]);
    w[1] = expanded16<kNarrow>(value + kept.of[0], masks.of[1]);
    value += kept.of[0] + kept.of[1];
  }
  static void finish(const Product& p, int64_t row_tile, int64_t token, const float* sums) {
    finish(p, row_tile, token, sum_eights(Vectors<kVectors>(sums).v));
  }
  static void finish(const Product& p, int64_t row_tile, int64_t token, Vector sums) {
    store_sums(p, row_tile, token, sums);
  }
};

struct PairsOfIntegers : PairsOfBfloat16 {
  using Value = uint8_t;
  static bool narrow(const uint32_t* mask) { return NarrowBytes::narrow(mask); }
  template <bool kNarrow>
  static void two(const uint8_t*& value, const uint32_t* mask, __m512i* w) {
    const __m512i bytes = expand8<kNarrow>(value, mask);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512bh half = _mm512_cvtne2ps_pbh(quarter(bytes, 2 * i + 1), quarter(bytes, 2 * i));
      w[i] = reinterpret_cast<const __m512i&>(half);
    }
  }
};

// Tokens whose sums of half of the rows fit into the registers.
constexpr int kMostInHalves = 6;

// With as many of int8, activations are rounded and the bytes multiplied as they are: two products of 64 weights, where
// widened ones take two of 32 and need no rounding, but are widened first. Measured on a Zen 5 and on a Zen 4.
int64_t few_tokens() { return multiplies_twice() ? 8 : 12; }

bool both_bfloat16(const Activations& x, const sbt::View& weight) {
  return weight.dtype == Dtype::bfloat16 && x.dtype == Dtype::bfloat16;
}

// What can be multiplied as bfloat16 though it is int8: with activations of 8 bits where that is faster, too.
bool may_widen(const Activations& x, const sbt::View& weight) {
  return weight.dtype == Dtype::int8 && weight.groups == 1 && x.dtype == Dtype::bfloat16;
}

// Integers times rounded activations, most zeros left out.
bool in_slots(const Activations& x, const sbt::View& weight) {
  return rounds(x, weight) && slots::pays(weight, x.tokens, may_widen(x, weight));
}

bool skips_zeros(const Activations& x, const sbt::View& weight) {
  if (x.tokens <= kTokenBlock || !pairs::pays(weight, x.tokens)) return false;
  return both_bfloat16(x, weight) || (may_widen(x, weight) && !in_slots(x, weight));
}

bool widened(const Activations& x, const sbt::View& weight) {
  if (!may_widen(x, weight) || in_slots(x, weight)) return false;
  return weight.to_bytes ? skips_zeros(x, weight) : x.tokens > few_tokens();
}

bool in_pairs(const Activations& x, const sbt::View& weight) { return both_bfloat16(x, weight) || widened(x, weight); }

// As on AVX-512, asking for memory as a Zen 4 likes it.
void rounded(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (in_slots(p.given, p.weight)) return slots::product(p, begin, end, scratch);
  asking_far<8, 16>(p.weight, [&](auto asks) {
    integer_product<ExpandedBytes<decltype(asks), NarrowBytes>>(p, begin, end, scratch);
  });
}

template <class Math>
void pipelined(const Product& p, int64_t begin, int64_t end, void* scratch) {
  asking_far<16, 32>(p.weight, [&](auto asks) { Pipeline<Math, decltype(asks)>::product(p, begin, end, scratch); });
}

// bfloat16, of which no zeros are skipped.
void multiplied(const Product& p, int64_t begin, int64_t end, void* scratch) {
  using Math = PairsOfBfloat16;
  if (p.tokens > kMostInHalves) return pipelined<Math>(p, begin, end, scratch);
  if (p.tokens > Math::kMostFused) {
    asking_far<16, 32, 2 * kFarBytes>(p.weight, [&](auto asks) {
      Halves<Math, decltype(asks)>::template product<Math::kMostFused + 1, kMostInHalves>(p, begin, end, scratch);
    });
  } else {
    asking_far<16, 24>(
        p.weight, [&](auto asks) { fused_few<Math, decltype(asks), 1, Math::kMostFused>(p, begin, end, scratch); });
  }
}

void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (!in_pairs(p.given, p.weight)) {
    if (rounds(p.given, p.weight)) return rounded(p, begin, end, scratch);
    return kAvx512.product(p, begin, end, scratch);
  }
  if (skips_zeros(p.given, p.weight)) {
    if (p.weight.dtype == Dtype::int8) return pairs::product<uint8_t>(p, begin, end, scratch);
    return pairs::product<uint16_t>(p, begin, end, scratch);
  }
  if (p.weight.dtype == Dtype::int8) return pipelined<PairsOfIntegers>(p, begin, end, scratch);
  multiplied(p, begin, end, scratch);
}

void expand(const sbt::View& weight, int64_t begin, int64_t end, Dtype out_dtype, void* out) {
  kAvx512.expand(weight, begin, end, out_dtype, out);
}

// Rows of bfloat16, the caller's own where no columns are missing.
int64_t prepared_bytes(const Activations& x, const sbt::View& weight) {
  if (!in_pairs(x, weight)) return kAvx512.prepared_bytes(x, weight);
  if (skips_zeros(x, weight)) return pairs::prepared_bytes(x, weight);
  const int64_t padded = weight.padded_cols();
  return padded == weight.cols ? 0 : x.tokens * padded * static_cast<int64_t>(sizeof(uint16_t));
}

void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  if (in_slots(x, weight)) return prepare_integers<true>(x, weight, first, last, to);
  if (!in_pairs(x, weight)) return kAvx512.prepare(x, weight, first, last, to);
  if (skips_zeros(x, weight)) return pairs::prepare_tokens(x, weight, first, to);
  const int64_t padded = weight.padded_cols();
  const auto* from = static_cast<const uint16_t*>(x.data);
  for (int64_t t = first; t < last; ++t) {
    uint16_t* row = static_cast<uint16_t*>(to) + t * padded;
    std::memcpy(row, from + t * x.stride, static_cast<size_t>(weight.cols) * sizeof(uint16_t));
    std::memset(row + weight.cols, 0, static_cast<size_t>(padded - weight.cols) * sizeof(uint16_t));
  }
}

struct DenseBfloat16 {
  using Element = uint16_t;
  static constexpr int64_t kStep = 32;
  static __m512i vector(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static __m512 multiply(__m512i w, __m512i x, __m512 sum) { return PairsOfBfloat16::multiply(w, x, sum); }
};

void dense(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (p.weight.dtype != Dtype::bfloat16) return kAvx512.dense(p, begin, end, scratch);
  dense_product<DenseBfloat16>(p, begin, end, scratch);
}
DenseRows dense_rows(Dtype dtype) { return dtype == Dtype::bfloat16 ? DenseRows::given : kAvx512.dense_rows(dtype); }
void widen(const void* from, Dtype dtype, int64_t count, int64_t padded, float* to) {
  kAvx512.widen(from, dtype, count, padded, to);
}

int layout(const Activations& x, const sbt::View& weight) {
  if (in_slots(x, weight)) return kSlotsLayout + weight.to_bytes;
  if (!in_pairs(x, weight)) return kAvx512.layout(x, weight);
  return skips_zeros(x, weight) ? 2 : static_cast<int>(widened(x, weight));
}

}  // namespace

const Isa kAvx512bf16 = {"avx512bf16",   product, expand, prepared_bytes, prepare,
                         &kStepAvx512bw, layout,  dense,  dense_rows,     widen};

}  // namespace alphaprune
