// Chooses the ISA by what CPU and operating system allow, shares row tiles between threads, prepares activations.
#pragma once

#include <string>

#include "kernel.h"

namespace alphaprune {

// Compiled-in ISAs, best first; null at the end.
const Isa* const* isas();

// Empty if `isa` runs on this machine, else the sentence that says why not.
std::string unavailable(const Isa& isa);

struct Bias {
  const void* data;  // [N] or null
  Dtype dtype;
};

// One of several weights that share the activations, and where its part of the result goes.
struct Item {
  sbt::View weight;
  Bias bias;
  void* y;  // [tokens, N] in x's dtype
  int64_t y_stride;
};

// y[tokens, N] = x Wᵀ + bias in x's dtype for each item, accumulated in float32, in one parallel region. The same bits
// for any number of threads, whatever shares the call and wherever a token stands; another number of tokens may be
// summed in another order.
void multiply(const Isa& isa, const Item* items, int64_t count, const Activations& x);

// The same of a dense weight [rows, cols] in x's dtype, by an ISA that has such a product for it.
void multiply_dense(const Isa& isa, const void* weight, int64_t rows, int64_t cols, const Bias& bias, void* y,
                    const Activations& x);

// Rows [first, last) of W, dense, K values per row, `first` a multiple of 16: bits as packed, or, of int8, value *
// scale in the float that `out_dtype` names.
void expand(const Isa& isa, const sbt::View& weight, int64_t first, int64_t last, Dtype out_dtype, void* out);

// Runs work(context, i) for every i in [0, count), in any order, on the threads that torch was given.
void parallel(int64_t count, int64_t threads, void (*work)(void* context, int64_t i), void* context);

// Threads for `operations` multiply-adds or bytes: one where waking others costs more than it brings.
int64_t threads_for(int64_t operations);

template <class Work>
void parallel_for(int64_t count, int64_t threads, Work work) {
  parallel(count, threads, [](void* context, int64_t i) { (*static_cast<Work*>(context))(i); }, &work);
}

}  // namespace alphaprune
