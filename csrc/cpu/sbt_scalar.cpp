// SBT in portable C++: the fall-back, and what the vector files are compared with.
#include "panel.h"

namespace alphaprune {
namespace {

template <class From, class To, class Convert>
inline void expand_tile(const sbt::View& weight, int64_t tile, To* to, Convert convert) {
  const From* value = tile_values<From>(weight, tile);
  const uint32_t* mask = weight.mask + tile * sbt::kWords;
  for (int64_t word = 0; word < sbt::kWords; ++word, to += 32) {
    for (int bit = 0; bit < 32; ++bit) to[bit] = 0;
    for (uint32_t bits = mask[word]; bits; bits &= bits - 1) to[__builtin_ctz(bits)] = convert(*value++);
  }
}

struct Words {
  template <class T>
  static void expand(const sbt::View& weight, int64_t tile, T* to) {
    expand_tile<T>(weight, tile, to, [](T v) { return v; });
  }
};

struct Float32 {
  using Element = float;
  struct Vector {
    float lane[16];
  };
  static constexpr int64_t kLanes = 16, kVectors = 16, kStep = 16, kPanelTiles = 4, kGroup = 2, kBlock = 3;

  static Vector load(const float* p) {
    Vector v;
    for (int i = 0; i < 16; ++i) v.lane[i] = p[i];
    return v;
  }
  static void store(float* p, const Vector& v) {
    for (int i = 0; i < 16; ++i) p[i] = v.lane[i];
  }
  static Vector weights(const float* p) { return load(p); }
  static Vector activations(const float* p) { return load(p); }
  static Vector multiply(const Vector& w, const Vector& x, Vector sum) {
    for (int i = 0; i < 16; ++i) sum.lane[i] += w.lane[i] * x.lane[i];
    return sum;
  }
  static void expand(const sbt::View& weight, int64_t tile, float* panel) {
    if (weight.dtype == Dtype::float32) return expand_tile<float>(weight, tile, panel, [](float v) { return v; });
    if (weight.dtype == Dtype::bfloat16) return expand_tile<uint16_t>(weight, tile, panel, bfloat16_to_float);
    if (weight.dtype == Dtype::int8)
      return expand_tile<int8_t>(weight, tile, panel, [](int8_t v) { return static_cast<float>(v); });
    expand_tile<uint16_t>(weight, tile, panel, float16_to_float);
  }
  static void finish(const Product& p, int64_t row_tile, int64_t token, const float* sums) {
    float out[sbt::kTileRows];
    for (int64_t r = 0; r < sbt::kTileRows; ++r) {
      float sum[16];
      for (int i = 0; i < 16; ++i) sum[i] = sums[r * 16 + i];
      for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
      out[r] = sum[0];
    }
    store_rows(p, row_tile, token, out);
  }
};

void convert(const void* from, Dtype dtype, int64_t count, int64_t padded, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = load_float(from, i, dtype);
  for (int64_t i = count; i < padded; ++i) to[i] = 0;
}

}  // namespace

const Isa kScalar = {"scalar",  Panel<Float32>::product, expand_any<Words>,
                     row_bytes, prepare_rows<convert>,   &kStepScalar};

}  // namespace alphaprune
