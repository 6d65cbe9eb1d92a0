// What stands between the products of a block, a call each, where a library takes a dozen small ones: RMSNorm, SwiGLU.
#pragma once

#include "../layout.h"

namespace alphaprune {

struct Isa;  // kernel.h

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

// out = silu(gate) * up, `count` numbers of `dtype`, a float; silu(g) = g / (1 + exp(-g)) is rounded to it before the
// product (Shazeer, 2020, as transformers rounds it). out may be gate.
struct Swiglu {
  const void *gate, *up;
  void* out;
  int64_t count;
  Dtype dtype;
};

// On as many threads as pay; a row, or a number, has the same bits whatever is beside it.
void norm(const Isa& isa, const Norm& p);
void swiglu(const Isa& isa, const Swiglu& p);

}  // namespace alphaprune
