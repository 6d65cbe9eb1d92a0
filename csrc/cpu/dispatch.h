// Chooses the ISA by what CPU and operating system allow, shares row tiles between threads, prepares activations.
#pragma once

#include <string>

#include "kernel.h"

namespace alphaprune {

// Compiled-in ISAs, best first; null at the end.
const Isa* const* isas();

// Empty if `isa` runs on this machine, else the sentence that says why not.
std::string unavailable(const Isa& isa);

struct Activations {
  const void* data;  // [tokens, K]
  Dtype dtype;
  int64_t tokens;
  int64_t stride;  // elements between tokens
};

struct Bias {
  const void* data;  // [N] or null
  Dtype dtype;
};

// y[tokens, N] = x Wᵀ + bias in x's dtype, accumulated in float32. The same bits for any number of threads and tokens.
void multiply(const Isa& isa, const sbt::View& weight, const Activations& x, const Bias& bias, void* y,
              int64_t y_stride);

// Rows [first, last) of W, dense, K values per row, bits as packed; `first` is a multiple of 16.
void expand(const Isa& isa, const sbt::View& weight, int64_t first, int64_t last, void* out);

// Runs work(context, i) for every i in [0, count), in any order, on the threads that torch was given.
void parallel(int64_t count, int64_t threads, void (*work)(void* context, int64_t i), void* context);

// Threads for `operations` multiply-adds or bytes: one where waking others costs more than it brings.
int64_t threads_for(int64_t operations);

template <class Work>
void parallel_for(int64_t count, int64_t threads, Work work) {
  parallel(count, threads, [](void* context, int64_t i) { (*static_cast<Work*>(context))(i); }, &work);
}

}  // namespace alphaprune
