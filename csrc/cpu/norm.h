// RMSNorm of a few rows: one call, where a library takes a dozen small ones.
#pragma once

#include "../layout.h"

namespace alphaprune {

// h += delta, in place and rounded; out = h / sqrt(mean(h^2) + epsilon) * weight, in half precision rounded before the
// weight, too (Zhang and Sennrich, NeurIPS 2019, as transformers rounds it). h, delta and out are [rows, cols] in
// `dtype`, a float, as weight [cols] is; delta may be null.
struct Norm {
  void* h;
  const void* delta;
  const void* weight;
  void* out;
  int64_t rows, cols;
  Dtype dtype;
  float epsilon;
};

}  // namespace alphaprune
