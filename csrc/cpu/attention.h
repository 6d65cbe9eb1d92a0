// Attention of a decode step on a CPU: one new token for each sequence over all its keys, in one call, which rotates
// and stores the new keys and values, too.
#pragma once

#include "kernel.h"

namespace alphaprune {

// Keys and values lie in pages of `page` positions. Element d of head h at position p of sequence s is, from `keys` or
// `values` on, at table[slots[s]][p / page] * page_stride + p % page * position_stride + h * head_stride + d.
struct Attention {
  const void *q, *k, *v;                 // [sequences, heads * dim] and twice [sequences, key_heads * dim]
  int64_t q_stride, k_stride, v_stride;  // elements between sequences
  void* out;                             // [sequences, heads * dim]
  void *keys, *values;
  int64_t page, page_stride, position_stride, head_stride;
  const int64_t* table;
  int64_t table_stride;
  const int64_t* slots;             // [sequences]
  const int64_t* positions;         // [sequences], 0 and up, of the new token, which is the last that it sees
  const void *cos, *sin;            // [sequences, dim / 2]
  int64_t turn_stride;              // elements between sequences; 0 where all are at one position
  const void *q_weight, *k_weight;  // [dim] each, of an RMSNorm of each head before it is rotated; or null
  float q_epsilon, k_epsilon;
  int64_t window;  // sees the last so many positions; 0 for all
  int64_t sequences, heads, key_heads, dim;
  Dtype dtype;  // of everything that is not an index: a float
};

constexpr int64_t kMostDim = 512;     // and a multiple of 32
constexpr int64_t kMostQueries = 8;   // that share keys and are computed together
constexpr int64_t kChunkKeys = 256;   // of a sequence that are computed together; chunks lie at multiples of it
constexpr int64_t kPartialExtra = 2;  // beside the sum over a chunk its largest score and the sum of weights

// Softmax(q·k / sqrt(dim)) v into `out` (Vaswani et al., 2017), with rotated q and k (Su et al., 2021: halves of a head
// are the pairs, each product rounded as transformers does), accumulated in float32. A sequence has the same bits for
// any number of threads and whatever is beside it.
void attend(const Isa& isa, const Attention& p);

}  // namespace alphaprune
