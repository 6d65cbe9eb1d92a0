// What an ISA file offers to dispatch.cpp, and what it is given.
#pragma once

#include <type_traits>

#include "../layout.h"

namespace alphaprune {

struct Activations {
  const void* data;  // [tokens, K]
  Dtype dtype;
  int64_t tokens;
  int64_t stride;  // elements between tokens
};

// y[tokens, N] = x Wᵀ + bias in x's dtype, with the activations already laid out for the ISA.
struct Product {
  sbt::View weight;
  Activations given;  // x as the caller has it
  const void* x;      // what `prepare` made of it; the caller's own rows where `prepared_bytes` is 0
  int64_t x_stride;   // floats between the rows of x where it is rows of float32, zeros past K
  int64_t tokens;
  const void* bias;  // [N] or null
  Dtype bias_dtype;
  void* y;  // [tokens, N]
  int64_t y_stride;
  Dtype y_dtype;

  const float* rows() const { return static_cast<const float*>(x); }
};

// Tokens that `prepare` may be called for on one thread: whole blocks, so that an ISA can interleave them.
constexpr int64_t kTokenBlock = 16;

// A panel of expanded weights and the sums of one pass over the tokens: small enough for a thread's stack.
constexpr int64_t kTokensPerPass = 64;
constexpr int64_t kScratchBytes = 176 * 1024;

// call(std::integral_constant of `tokens`), of T to Most.
template <int T, int Most, class Call>
inline void known(int64_t tokens, const Call& call) {
  if constexpr (T < Most) {
    if (tokens > T) return known<T + 1, Most>(tokens, call);
  }
  call(std::integral_constant<int, T>());
}

struct Attention;  // attention.h
struct Norm;       // norm.h
struct Swiglu;     // norm.h

// Of what stands between the products of a step. It needs no more of an ISA than the
// width of its vectors, so that ISAs share it.
struct StepLoops {
  // Rotates the queries of one key head of one sequence, after their norm, into floats [queries of the head][dim], each
  // over sqrt(dim), and the key, which goes to its place beside the value.
  void (*rotate)(const Attention&, int64_t sequence, int64_t key_head, float* q);
  // Of `count` queries q [count][dim] over positions [first, last): their sums [count][dim], not divided by the sum of
  // weights, then for each the largest score and the sum of weights.
  void (*chunk)(const Attention&, int64_t sequence, int64_t key_head, const float* q, int64_t count, int64_t first,
                int64_t last, float* sums);
  void (*norm)(const Norm&);
  void (*swiglu)(const Swiglu&);
};

// What a dense product wants of x: nothing, as it does not take the dtype; the caller's own rows; rows of float32.
enum class DenseRows { none, given, floats };

struct Isa {
  const char* name;
  // Computes row tiles [begin, end); `scratch` is kScratchBytes, 64-byte aligned.
  void (*product)(const Product&, int64_t begin, int64_t end, void* scratch);
  // Writes rows [16 * begin, min(16 * end, N)) densely from `out` on, K values per row: the packed bits, or, of int8,
  // value * scale in `out_dtype`.
  void (*expand)(const sbt::View&, int64_t begin, int64_t end, Dtype out_dtype, void* out);
  // Bytes that `prepare` fills for all tokens, a multiple of 64; 0 where the caller's float32 rows serve as they are.
  int64_t (*prepared_bytes)(const Activations&, const sbt::View&);
  // Lays out tokens [first, last); `first` is a multiple of kTokenBlock, `to` the start of the whole, 64-byte aligned.
  void (*prepare)(const Activations&, const sbt::View&, int64_t first, int64_t last, void* to);
  const StepLoops* loops;
  // Tells apart the layouts that `prepare` chooses between for weights of one dtype; null where there is one.
  int (*layout)(const Activations&, const sbt::View&) = nullptr;
  // The same product with a dense weight, [N, K] at `weight.values`, in the dtype of x; null, or for no dtype, where
  // the library's is as fast. `dense_rows` says which dtypes it takes, and how x comes: as floats, it is what `widen`
  // makes of a token's `count` numbers, with zeros up to `padded`.
  void (*dense)(const Product&, int64_t begin, int64_t end, void* scratch) = nullptr;
  DenseRows (*dense_rows)(Dtype) = nullptr;
  void (*widen)(const void* from, Dtype, int64_t count, int64_t padded, float* to) = nullptr;
};

inline bool takes_dense(const Isa& isa, Dtype dtype) { return isa.dense && isa.dense_rows(dtype) != DenseRows::none; }

// Whether this is a Zen 5 or later, which multiplies two vectors a cycle: a panel takes half of the cycles of a Zen 4,
// while what is rearranged in registers takes as many as there. False for other makers' CPUs.
bool multiplies_twice();

extern const Isa kScalar;
extern const Isa kAvx2;
extern const Isa kAvxvnni;
extern const Isa kAvx512bw;
extern const Isa kAvx512vnni;
extern const Isa kAvx512;
extern const Isa kAvx512bf16;
extern const Isa kAmx;
extern const Isa kNeon;
extern const Isa kNeondot;

extern const StepLoops kStepScalar;
extern const StepLoops kStepAvx2;
extern const StepLoops kStepAvx512bw;
extern const StepLoops kStepNeon;

}  // namespace alphaprune
