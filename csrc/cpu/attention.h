// Attention of a decode step on a CPU: one new token for each sequence over all its keys, in one call, which rotates
// and stores the new keys and values, too.
#pragma once

#include <string>

#include "kernel.h"
#include "norm.h"

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
  Dtype dtype;  // of everything that is not an index: bfloat16 or float32
};

constexpr int64_t kMostDim = 512;     // and a multiple of 32
constexpr int64_t kMostQueries = 8;   // that share keys and are computed together
constexpr int64_t kChunkKeys = 256;   // of a sequence that are computed together; chunks lie at multiples of it
constexpr int64_t kPartialExtra = 2;  // beside the sum over a chunk its largest score and the sum of weights

// What an ISA file offers: two parts of the work, in `dtype`, and the norm before the products.
struct AttentionLoop {
  const char* name;
  // Rotates the queries of one key head of one sequence, after their norm, into floats [queries of the head][dim], each
  // over sqrt(dim), and the key, which goes to its place beside the value.
  void (*rotate)(const Attention&, int64_t sequence, int64_t key_head, float* q);
  // Of `count` queries q [count][dim] over positions [first, last): their sums [count][dim], not divided by the sum of
  // weights, then for each the largest score and the sum of weights.
  void (*chunk)(const Attention&, int64_t sequence, int64_t key_head, const float* q, int64_t count, int64_t first,
                int64_t last, float* sums);
  void (*norm)(const Norm&);
};

// Softmax(q·k / sqrt(dim)) v into `out` (Vaswani et al., 2017), with rotated q and k (Su et al., 2021: halves of a head
// are the pairs, each product rounded as transformers does), accumulated in float32. A sequence has the same bits for
// any number of threads and whatever is beside it. The loop is the widest that runs here, or that of the name.
void attend(const Attention& p, const std::string& loop = {});

// The widest loop that runs here, or that of the name. std::invalid_argument if it does not run here.
const AttentionLoop& attention_loop(const std::string& name = {});

// Compiled-in loops, best first; null at the end.
const AttentionLoop* const* attention_loops();

// Empty if a loop runs on this machine, else the sentence that says why not.
std::string unavailable(const AttentionLoop& loop);

extern const AttentionLoop kAttendAvx512bw;
extern const AttentionLoop kAttendAvx2;
extern const AttentionLoop kAttendNeon;

}  // namespace alphaprune
