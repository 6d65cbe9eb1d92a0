#include "norm.h"

#include <cmath>

#include "convert.h"

namespace alphaprune {
namespace {

struct Bfloat16Row {
  using Element = uint16_t;
  static float load(uint16_t v) { return bfloat16_to_float(v); }
  static uint16_t store(float v) { return float_to_bfloat16(v); }
};
struct Float32Row {
  using Element = float;
  static float load(float v) { return v; }
  static float store(float v) { return v; }
};

constexpr int64_t kLanes = 16;  // sums side by side, for vectors of any width: the order is the same everywhere

template <class Row>
void norm_row(const Norm& p, int64_t row) {
  using Element = typename Row::Element;
  auto* h = static_cast<Element*>(p.h) + row * p.cols;
  const auto* delta = p.delta ? static_cast<const Element*>(p.delta) + row * p.cols : nullptr;
  const auto* weight = static_cast<const Element*>(p.weight);
  auto* out = static_cast<Element*>(p.out) + row * p.cols;
  if (delta)
    for (int64_t k = 0; k < p.cols; ++k) h[k] = Row::store(Row::load(h[k]) + Row::load(delta[k]));
  float sums[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= p.cols; k += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) sums[i] += Row::load(h[k + i]) * Row::load(h[k + i]);
  for (; k < p.cols; ++k) sums[k % kLanes] += Row::load(h[k]) * Row::load(h[k]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
  const float scale = 1.0f / std::sqrt(sums[0] / static_cast<float>(p.cols) + p.epsilon);
  for (k = 0; k < p.cols; ++k)
    out[k] = Row::store(Row::load(Row::store(Row::load(h[k]) * scale)) * Row::load(weight[k]));
}

}  // namespace

void rms_norm(const Norm& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.dtype == Dtype::float32) {
      norm_row<Float32Row>(p, row);
    } else {
      norm_row<Bfloat16Row>(p, row);
    }
  }
}

}  // namespace alphaprune
