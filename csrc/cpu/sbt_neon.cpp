// SBT on NEON, which every aarch64 CPU has, in float32.
#include "neon.h"
#include "panel.h"

namespace alphaprune {
namespace {

// A step is 4 columns here, so the panel is [step of 4][16 rows][4]; an accumulator is a row.
struct Float32 {
  using Element = float;
  using Vector = float32x4_t;
  static constexpr int64_t kLanes = 4, kVectors = 16, kStep = 4, kPanelTiles = 4, kGroup = 4, kBlock = 6;
  static constexpr int64_t kStepElements = sbt::kTileRows * kStep;

  static Vector load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Vector v) { vst1q_f32(p, v); }
  static Vector weights(const float* p) { return vld1q_f32(p); }
  static Vector activations(const float* p) { return vld1q_f32(p); }
  static Vector multiply(Vector w, Vector x, Vector sum) { return vfmaq_f32(sum, w, x); }

  struct ToPanel {
    float* step;
    template <class Value, int kByte>
    void eight(const Place& at) const {
      float32x4_t w[2];
      Value::eight(at, w);
      for (int h = 0; h < 2; ++h) vst1q_f32(step + (kByte % 2 * 2 + h) * kStepElements + kByte / 2 * kStep, w[h]);
    }
  };
  template <class Value>
  static void expand_tile(const sbt::View& weight, int64_t tile, float* panel) {
    Controls<Value> controls;
    const uint8_t* mask = mask_bytes(weight, tile);
    const uint8_t* value = value_bytes<Value>(weight, tile);
    prefetch(mask);
    prefetch(mask + 64);
    for (ToPanel to{panel}; to.step < panel + sbt::kWords * 32; to.step += 4 * kStepElements, mask += 32) {
      value = sixteen<Value>(mask, value, controls, to);
      value = sixteen<Value, 1>(mask + 16, value, controls, to);
    }
  }
  static void expand(const sbt::View& weight, int64_t tile, float* panel) {
    by_value(weight.dtype, [&](auto value) { expand_tile<decltype(value)>(weight, tile, panel); });
  }
  static void finish(const Product& p, int64_t row_tile, int64_t token, const float* sums) {
    float out[sbt::kTileRows];
    for (int64_t r = 0; r < sbt::kTileRows; ++r) out[r] = vaddvq_f32(vld1q_f32(sums + r * kLanes));
    store_rows(p, row_tile, token, out);
  }
};

// The product with T tokens straight from the registers, kRows rows at a time: their sums stay in registers while the
// other rows are skipped, and the whole turns over every few tiles, which then are still in L1. The sums are those of
// the panel, bit for bit.
template <class Value, int T, int kRows>
struct Fused {
  static constexpr int64_t kTurn = kRows == sbt::kTileRows ? INT64_MAX : 4;  // tiles
  static constexpr int kLanes = 4;
  static constexpr int64_t kSums = T * sbt::kTileRows * kLanes;

  // The sums of some rows and a step of the activations.
  struct Registers {
    float32x4_t sum[kRows][T], x[4][T];

    template <class, int kByte>
    void eight(const Place& at) {
      float32x4_t w[2];
      Value::eight(at, w);
      for (int h = 0; h < 2; ++h)
        for (int t = 0; t < T; ++t) {
          float32x4_t& s = sum[kByte / 2][t];
          s = vfmaq_f32(s, w[h], x[kByte % 2 * 2 + h][t]);
        }
    }
  };

  __attribute__((flatten)) static void turn(const Product& p, int64_t tile, int64_t col_tile, int64_t count, int first,
                                            float* sums) {
    const auto at = [&](int r, int t) { return sums + (t * sbt::kTileRows + first + r) * kLanes; };
    Registers registers;
    each<kRows * T>([&](auto i) { registers.sum[i / T][i % T] = vld1q_f32(at(i / T, i % T)); });
    Controls<Value> controls;
    for (int64_t c = 0; c < count; ++c) {
      const uint8_t* mask = mask_bytes(p.weight, tile + c);
      const uint8_t* value = value_bytes<Value>(p.weight, tile + c);
      const float* x = p.rows() + (col_tile + c) * sbt::kTileCols;
      prefetch(mask);
      prefetch(mask + 64);
      for (int step = 0; step < sbt::kSteps; ++step, x += sbt::kStepCols, mask += 32) {
        for (int i = 0; i < 4; ++i)
          for (int t = 0; t < T; ++t) registers.x[i][t] = vld1q_f32(x + t * p.x_stride + i * kLanes);
        if constexpr (kRows == sbt::kTileRows) {
          value = sixteen<Value>(mask, value, controls, registers);
          value = sixteen<Value, 1>(mask + 16, value, controls, registers);
        } else {
          if (first) value += skipped(mask);
          value = sixteen<Value>(mask + 2 * first, value, controls, registers);
          if (!first) value += skipped(mask + 16);
        }
      }
    }
    each<kRows * T>([&](auto i) { vst1q_f32(at(i / T, i % T), registers.sum[i / T][i % T]); });
  }

  // The bytes of values of eight rows of a step.
  static int64_t skipped(const uint8_t* mask) {
    return vaddvq_u8(vcntq_u8(vld1q_u8(mask))) * static_cast<int64_t>(sizeof(typename Value::Stored));
  }

  // Every sum of a row tile; of int8 with scales along the rows, the scaled sums of its groups.
  static void row_tile(const Product& p, int64_t row_tile, float* sums, float* total) {
    const int64_t tiles = p.weight.col_tiles();
    const bool grouped = p.weight.grouped();
    const int64_t span = grouped ? sbt::kScaleCols / sbt::kTileCols : kTurn;
    std::memset(sums, 0, kSums * sizeof(float));
    if (grouped) std::memset(total, 0, kSums * sizeof(float));
    for (int64_t c = 0; c < tiles; c += span) {
      const int64_t count = tiles - c < span ? tiles - c : span;
      for (int first = 0; first < sbt::kTileRows; first += kRows) turn(p, row_tile * tiles + c, c, count, first, sums);
      if (!grouped) continue;
      float scales[sbt::kTileRows];
      tile_scales(p.weight, row_tile, c, scales);
      for (int64_t i = 0; i < kSums; ++i) total[i] += scales[i / kLanes % sbt::kTileRows] * sums[i];
      std::memset(sums, 0, kSums * sizeof(float));
    }
    if (grouped) std::memcpy(sums, total, kSums * sizeof(float));
  }

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    auto* sums = static_cast<float*>(scratch);
    for (int64_t r = begin; r < end; ++r) {
      row_tile(p, r, sums, sums + kSums);
      for (int t = 0; t < T; ++t) Float32::finish(p, r, t, sums + t * sbt::kTileRows * kLanes);
    }
  }
};

void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (p.tokens > 2) return Panel<Float32>::product(p, begin, end, scratch);
  by_value(p.weight.dtype, [&](auto value) {
    using Value = decltype(value);
    if (p.tokens == 1) return Fused<Value, 1, 16>::product(p, begin, end, scratch);
    Fused<Value, 2, 8>::product(p, begin, end, scratch);
  });
}

}  // namespace

const Isa kNeon = {"neon", product, expand_any<Words>, row_bytes, prepare_rows<convert>, &kStepNeon};

}  // namespace alphaprune
