// SBT on NEON with SDOT, as Arm's cores have it from the Cortex-A76 and Neoverse N1 on, Apple's from the A13: int8
// beside activations that are integers of 16 bits, or of 8 where that is allowed; everything else is computed as
// without SDOT. It multiplies sixteen bytes by sixteen, both signed, and adds four products to each sum.
#include "integer_panel.h"
#include "neon.h"
#include "over.h"

namespace alphaprune {
namespace {

template <int kBytes>
RoundedGroup round_group(const void* from, Dtype dtype, int64_t first, int64_t cols, int64_t, uint8_t* to) {
  alignas(16) float v[kGroupCols];
  const char* at = static_cast<const char*>(from) + first * size_of(dtype);
  convert(at, dtype, std::min(kGroupCols, cols - first), kGroupCols, v);
  uint32x4_t bits = vdupq_n_u32(0);  // of the largest: NaN and infinities are larger than numbers
  for (int64_t i = 0; i < kGroupCols; i += 4)
    bits = vmaxq_u32(bits, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(v + i))));
  const Unit unit(vmaxvq_u32(bits), kBytes == 2 ? kLargestOf2 : kLargestOf1);
  for (int64_t i = 0; i < kGroupCols; i += 8, to += 8) {
    int32x4_t q[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
    if (unit.usable())
      for (int h = 0; h < 2; ++h) q[h] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(v + i + 4 * h), unit.inverse));
    const int16x8_t words = vcombine_s16(vmovn_s32(q[0]), vmovn_s32(q[1]));  // 256 * high + low, both signed
    vst1_u8(to, vreinterpret_u8_s8(vmovn_s16(words)));
    if (kBytes == 2) vst1_u8(to + kGroupCols, vreinterpret_u8_s8(vrshrn_n_s16(words, 8)));
  }
  return {unit.unit, {}};  // signed bytes want no offsets
}

// A row of a step out of two mask bytes: TBX adds the upper eight weights and leaves the lower ones.
struct Row {
  using Stored = uint8_t;
  static constexpr int kShift = 4;
  static const uint8_t* table(int upper) { return tables().rows[upper][0]; }
  template <int kByte>
  static void eight(const Place& at, uint8x16_t& w) {
    const uint8x16_t values = vld1q_u8(at.value), control = vld1q_u8(at.control);
    w = kByte % 2 ? vqtbx1q_u8(w, values, control) : vqtbl1q_u8(values, control);
  }
};

template <int kBytes>
struct Dot {
  using Made = Rounded<kBytes>;
  static constexpr int kFew = kBytes == 1 ? 3 : 1;         // tokens whose sums are in registers beside the expansion
  static constexpr int kBlock = kBytes == 1 ? 5 : 2;       // and beside a panel
  static constexpr int64_t kRowSums = sbt::kTileRows * 4;  // floats of a token there, four lanes a row
  static constexpr int64_t kTilePanel = sbt::kTileRows * sbt::kTileCols;  // [four columns][16 rows][4]

  // The sum of products from those of each byte of the activations.
  static int32x4_t total(const int32x4_t* sum) {
    return kBytes == 1 ? sum[0] : vaddq_s32(vshlq_n_s32(sum[kBytes - 1], 8), sum[0]);
  }
  static void exact(const Product& p, int64_t row_tile, int64_t token) {
    exact_token<Words>(p, row_tile, token, convert);
  }

  // Few tokens, kRows rows at a time, as their sums stay in registers while a group passes.
  template <int T>
  struct Fused {
    static constexpr int kRows = T * kBytes == 1 ? 16 : 8;

    struct Registers {
      int32x4_t sum[kRows][T][kBytes];
      int8x16_t x[T][kBytes];
      uint8x16_t w;

      template <class, int kByte>
      void eight(const Place& at) {
        Row::eight<kByte>(at, w);
        if constexpr (kByte % 2)
          each<T * kBytes>([&](auto i) {
            int32x4_t& s = sum[kByte / 2][i / kBytes][i % kBytes];
            s = vdotq_s32(s, vreinterpretq_s8_u8(w), x[i / kBytes][i % kBytes]);
          });
      }
    };

    // A group of `count` tiles; `x` points to the tokens' bytes of its columns.
    __attribute__((flatten)) static void turn(const sbt::View& weight, int64_t tile, int64_t count, int first,
                                              const uint8_t* x, const float* units, const float* scales, float* sums) {
      Registers registers;
      each<kRows * T * kBytes>(
          [&](auto i) { registers.sum[i / (T * kBytes)][i / kBytes % T][i % kBytes] = vdupq_n_s32(0); });
      Controls<Row> controls;
      for (int64_t c = 0; c < count; ++c) {
        const uint8_t* mask = mask_bytes(weight, tile + c);
        const uint8_t* value = value_bytes<Row>(weight, tile + c);
        prefetch(mask);
        prefetch(mask + 64);
        for (int64_t step = 0; step < sbt::kSteps; ++step, x += sbt::kStepCols, mask += 32) {
          each<T * kBytes>([&](auto i) {
            const uint8_t* at = x + i / kBytes * Made::kTokenBytes + i % kBytes * kGroupCols;
            registers.x[i / kBytes][i % kBytes] = vreinterpretq_s8_u8(vld1q_u8(at));
          });
          if constexpr (kRows == sbt::kTileRows) {
            value = sixteen<Row>(mask, value, controls, registers);
            value = sixteen<Row, 1>(mask + 16, value, controls, registers);
          } else {
            if (first) value += vaddvq_u8(vcntq_u8(vld1q_u8(mask)));
            value = sixteen<Row>(mask + 2 * first, value, controls, registers);
            if (!first) value += vaddvq_u8(vcntq_u8(vld1q_u8(mask + 16)));
          }
        }
      }
      each<kRows * T>([&](auto i) {
        float* to = sums + i % T * kRowSums + (first + i / T) * 4;
        const float32x4_t sum = vcvtq_f32_s32(total(registers.sum[i / T][i % T]));
        vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), sum, units[i % T] * scales[first + i / T]));
      });
    }

    __attribute__((noinline)) static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
      const Made rounded(p.weight, p.tokens);
      const int64_t tiles = p.weight.col_tiles();
      auto* sums = static_cast<float*>(scratch);
      float scales[sbt::kTileRows];
      std::fill(scales, scales + sbt::kTileRows, 1.0f);
      for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
        std::memset(sums, 0, T * kRowSums * sizeof(float));
        for (int64_t c = 0; c < tiles; c += 2) {
          if (p.weight.grouped()) tile_scales(p.weight, row_tile, c, scales);
          for (int first = 0; first < sbt::kTileRows; first += kRows)
            turn(p.weight, row_tile * tiles + c, std::min(tiles - c, int64_t{2}), first, rounded.columns(p.x, c / 2, 0),
                 rounded.units(p.x, c / 2, 0), scales, sums);
        }
        for (int t = 0; t < T; ++t) {
          float out[sbt::kTileRows];
          for (int64_t r = 0; r < sbt::kTileRows; ++r) out[r] = vaddvq_f32(vld1q_f32(sums + t * kRowSums + r * 4));
          store_rows(p, row_tile, t, out);
          if (rounded.exact(p.x, t)) exact(p, row_tile, t);
        }
      }
    }
  };

  // Eight rows of a step, four of which become four columns of a panel.
  struct ToPanel {
    uint8_t* to;
    uint32x4_t row[8];
    uint8x16_t w;

    template <class, int kByte>
    void eight(const Place& at) {
      Row::eight<kByte>(at, w);
      if constexpr (kByte % 2) row[kByte / 2 % 8] = vreinterpretq_u32_u8(w);
      if constexpr (kByte % 8 == 7) {
        const uint32x4_t* four = row + kByte / 8 % 2 * 4;
        const uint64x2_t a = wide(vtrn1q_u32(four[0], four[1])), b = wide(vtrn2q_u32(four[0], four[1]));
        const uint64x2_t c = wide(vtrn1q_u32(four[2], four[3])), d = wide(vtrn2q_u32(four[2], four[3]));
        uint8_t* at = to + kByte / 8 * 16;
        vst1q_u8(at, vreinterpretq_u8_u64(vtrn1q_u64(a, c)));
        vst1q_u8(at + 64, vreinterpretq_u8_u64(vtrn1q_u64(b, d)));
        vst1q_u8(at + 128, vreinterpretq_u8_u64(vtrn2q_u64(a, c)));
        vst1q_u8(at + 192, vreinterpretq_u8_u64(vtrn2q_u64(b, d)));
      }
    }
    static uint64x2_t wide(uint32x4_t v) { return vreinterpretq_u64_u32(v); }
  };
  __attribute__((flatten)) static void expand_tile(const sbt::View& weight, int64_t tile, uint8_t* panel) {
    Controls<Row> controls;
    const uint8_t* mask = mask_bytes(weight, tile);
    const uint8_t* value = value_bytes<Row>(weight, tile);
    prefetch(mask);
    prefetch(mask + 64);
    ToPanel to;
    for (int64_t step = 0; step < sbt::kSteps; ++step, mask += 32) {
      to.to = panel + step * 256;
      value = sixteen<Row>(mask, value, controls, to);
      value = sixteen<Row, 1>(mask + 16, value, controls, to);
    }
  }

  template <int T>
  __attribute__((noinline)) static void block(const uint8_t* panel, int64_t cols, const Made& rounded, const void* x,
                                              int64_t group, int64_t token, const float* scales, float* sums) {
    constexpr int kSums = T * kBytes;
    int32x4_t sum[4][T][kBytes];
    each<4 * kSums>([&](auto i) { sum[i / kSums][i / kBytes % T][i % kBytes] = vdupq_n_s32(0); });
    const uint8_t* at = rounded.columns(x, group, token);
    for (int64_t col = 0; col < cols; col += 16, at += 16) {
      int8x16_t a[T][kBytes];
      each<kSums>([&](auto i) {
        a[i / kBytes][i % kBytes] =
            vreinterpretq_s8_u8(vld1q_u8(at + i / kBytes * Made::kTokenBytes + i % kBytes * kGroupCols));
      });
      each<4>([&](auto four) {
        int8x16_t w[4];
        each<4>([&](auto g) { w[g] = vreinterpretq_s8_u8(vld1q_u8(panel + 16 * g)); });
        panel += 64;
        each<4 * kSums>([&](auto i) {
          constexpr int t = i % kSums / kBytes, b = i % kBytes;
          int32x4_t& s = sum[i / kSums][t][b];
          s = vdotq_laneq_s32(s, w[i / kSums], a[t][b], four);
        });
      });
    }
    const float* units = rounded.units(x, group, token);
    each<4 * T>([&](auto i) {
      constexpr int g = i / T, t = i % T;
      float32x4_t factor = vdupq_n_f32(units[t]);
      if (scales) factor = vmulq_f32(factor, vld1q_f32(scales + 4 * g));
      float* to = sums + t * sbt::kTileRows + 4 * g;
      vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(total(sum[g][t])), factor));
    });
  }

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    if (p.tokens > kFew) return IntegerPanel<Dot>::product(p, begin, end, scratch);
    known<1, kFew>(p.tokens, [&](auto tokens) { Fused<decltype(tokens)::value>::product(p, begin, end, scratch); });
  }
};

struct Signed {
  static const Isa& lesser() { return kNeon; }
  static bool takes(const Activations& x, const sbt::View& weight) { return rounds(x, weight); }
  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    if (p.weight.to_bytes) return Dot<1>::product(p, begin, end, scratch);
    Dot<2>::product(p, begin, end, scratch);
  }
  static void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
    prepare_rounded(x, weight, first, last, to, [](auto bytes) { return round_group<decltype(bytes)::value>; });
  }
};

}  // namespace

const Isa kNeondot = Over<Signed>::isa("neondot", &kStepNeon);

}  // namespace alphaprune
