// What an ISA file offers to dispatch.cpp, and what it is given.
#pragma once

#include "../layout.h"

namespace alphaprune {

// y[tokens, N] = x Wᵀ + bias with the activations already laid out for the ISA.
struct Product {
  sbt::View weight;
  const float* x;    // [tokens, padded K], zeros past K, in the order that the ISA's `prepare` gives
  int64_t x_stride;  // elements between tokens
  int64_t tokens;
  const void* bias;  // [N] or null
  Dtype bias_dtype;
  void* y;  // [tokens, N]
  int64_t y_stride;
  Dtype y_dtype;
};

// A panel of expanded weights and the sums of one pass over the tokens: small enough for a thread's stack.
constexpr int64_t kTokensPerPass = 64;
constexpr int64_t kScratchBytes = (16 + kTokensPerPass) * 1024;

struct Isa {
  const char* name;
  // Computes row tiles [begin, end); `scratch` is kScratchBytes, 64-byte aligned.
  void (*product)(const Product&, int64_t begin, int64_t end, void* scratch);
  // Writes rows [16 * begin, min(16 * end, N)) densely from `out` on, K values per row, exact bits.
  void (*expand)(const sbt::View&, int64_t begin, int64_t end, void* out);
  // One token's `count` activations as `padded` float32 for weights of dtype `weight`, zeros past `count`.
  void (*prepare)(const void* from, Dtype dtype, int64_t count, int64_t padded, Dtype weight, float* to);
  // Whether float32 activations serve as they are, so that no copy is needed where K fits the tiles.
  bool (*as_they_are)(Dtype weight);
};

extern const Isa kScalar;
extern const Isa kAvx2;
extern const Isa kAvx512;

}  // namespace alphaprune
