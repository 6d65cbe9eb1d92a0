// What the CUDA half offers to its bindings: plain C++, no CUDA types, so that the emulated build has the same face.
// Pointers are device addresses (host addresses when emulated); nothing is allocated and nothing waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../layout.h"

namespace alphaprune::cuda {

// 0, or an error code of the CUDA runtime (1 when an emulated kernel did something wrong).
using Status = int;
std::string describe(Status status);

// Weights that share x, the members of a product: so many at most.
constexpr int kMostMembers = 3;
// Where the rows of a member go: y[tokens, rows] = x[tokens, cols] Wᵀ + bias, each contiguous.
struct Outlet {
  void* y;           // in the dtype of the call
  int64_t rows;      // of this weight
  const void* bias;  // [rows] or null
  Dtype bias_dtype;  // float32, float16 or bfloat16
};

// What a product reads of its weights, in the order in which it does: of each kind of bytes those of the members one
// after the other, each from a multiple of 16 on and a multiple of 16 long.
constexpr int kMostKinds = 2;
struct Ahead {
  struct Kind {
    const void* from[kMostMembers];
    uint32_t bytes[kMostMembers];
  };
  Kind kinds[kMostKinds];
  uint32_t part;  // of each block's share, in 256ths
};

// What every product shares.
struct Call {
  const void* x;             // contiguous, in `dtype`
  Outlet out[kMostMembers];  // of the members, in their order
  int members;
  const void* residual;  // [tokens, rows] in `dtype`, added to the y of a single member, which it may be; or null
  int64_t tokens;
  Dtype dtype;   // float16 or bfloat16: of x, y, residual and, unless it is int8, the weight
  void* stream;  // cudaStream_t; null: the default one
};

struct Device {
  int capability;       // major * 10 + minor
  int multiprocessors;  // SMs
  int shared_bytes;     // that one block may have
};

// The devices that the driver shows; with a status other than 0, `*count` is 0.
Status device_count(int* count);
Status query(int device, Device* out);
// Lets every kernel have as much shared memory as the device allows; once per device, before the first launch.
Status prepare(int device);
// Makes `device` current for this thread and tells which one was.
Status set_device(int device, int* before);
// Emulated only: 0 forwards, 1 backwards, 2 warps apart.
void emulate_in_order(int order_of_threads);
// Emulated only: what `query` tells from now on.
void emulate_device(const Device& device);
// Emulated only: addresses and bytes of what was fetched ahead since the last call.
std::vector<std::pair<const void*, uint32_t>> emulate_fetched();

// How sbt_wgmma shares the work; 0: chosen.
struct WideWays {
  int groups;  // warpgroups of a block with different rows, 1 to 6
  int slices;  // warpgroups with the same ones
  int splits;  // blocks of a cluster that share the columns: 1, 2, 4 or 8
};

// ---- SBT straight from its packed tensors (layout.h) ----
// weights: as many as the call has members, with the same columns, dtype and groups of scales. stage_units: the largest
// number of 8-value units that `chunk_tiles()` neighbouring macro tiles of a row tile have, counted from the first, the
// third, … tile of the row; of `weights` the largest among all.
int chunk_tiles();
constexpr int64_t kMostTokens = 64;  // of one call of sbt_mma
// row_tiles: of a warp at a time, for measurements; 0 for as many as are thought the fastest. There are kernels with 2
// for more than 8 tokens.
Status sbt_mma(const sbt::View* weights, uint32_t stage_units, const Device& device, const Call& call,
               int row_tiles = 0);
// The same of int8 values with their scales, where `call.dtype` is that of x, y and the residual only.
Status sbt_mma_int8(const sbt::View* weights, uint32_t stage_units, const Device& device, const Call& call);
// The same of pairs of neighbouring columns of which at least one is kept (kernels/pair_layout.py): weights have half
// of the columns of x, rounded up, and values of 32 bits, two of the call's dtype. cols: of x. stage_units: of one
// macro tile.
Status pair_mma(const sbt::View* weights, int64_t cols, uint32_t stage_units, const Device& device, const Call& call);
// The same for sm_90a; x as sbt_wgmma has it.
Status pair_wgmma(const sbt::View* weights, uint32_t stage_units, const Device& device, const Call& call,
                  int64_t x_stride);
// For sm_90a, of up to kMostWideTokens. weights: as many as the call has members, with the same columns and dtype;
// stage_units as above. x has rows of x_stride elements, a multiple of 8, zeros past the weights' columns, and starts
// on 16 bytes; masks do, too.
constexpr int64_t kMostWideTokens = 256;
Status sbt_wgmma(const sbt::View* weights, uint32_t stage_units, WideWays wanted, const Device& device,
                 const Call& call, int64_t x_stride);
// Rows [16 * begin, min(16 * end, rows)) dense from `out` on; 16-bit values only.
Status sbt_expand(const sbt::View& weight, uint32_t stage_units, int64_t begin, int64_t end, void* out, void* stream);

// Has the second-level cache fetch that part of what the next product reads; nothing before compute capability 9.0.
Status fetch_ahead(const Ahead& ahead, const Device& device, void* stream);

// For `prepare`: the kernels of each file.
Status allow_sbt_mma(int shared_bytes);
Status allow_sbt_mma_int8(int shared_bytes);
Status allow_pair_mma(int shared_bytes);
Status allow_pair_wgmma(int shared_bytes);
Status allow_sbt_wgmma(int shared_bytes);
Status allow_sbt_expand(int shared_bytes);

// ---- nibble-delta rows, made from SBT at load (kernels/delta_layout.py) ----
// Rows are dealt to shares, each done by one block of kDeltaWarps = 12 warps; columns are in blocks of `block_cols`.
// What a row keeps in a block is a stream of packs of 8 values, each with its column: that of the value before plus 1
// to 16, or to 32 with a fifth bit, by zeros in between where a gap is wider; before a row's first is column -1. The
// packs of a share in a block of columns, a part, lie in the order of its rows in runs, one per thread; those of the
// first warps are a pack longer where they are not equal: line j * kDeltaWarps + w has the j-th packs of warp w's
// lanes. The last runs end with up to 31 empty packs, each a row of nobody's. Parts are ordered [share][block of
// columns].
struct DeltaView {
  const void* values;      // [parts, lines, 32, 8], 16-bit floats, aligned to 16 bytes
  const uint32_t* deltas;  // [parts, lines, 32], the low 4 bits per value of its distance - 1 from the value before
  // [parts, (steps + 3) / 4, threads], a byte for each of 4 packs: the fifth bits of values 0, 2, 4, 6, 1, 3, 5, 7;
  // steps = lines / kDeltaWarps, rounded up. Null: 4 bits are all.
  const uint32_t* fifths;
  const uint32_t* begins;  // [parts, words, threads], a bit per pack of a run but the first: a row begins with it
  const uint32_t* starts;  // [parts, threads], the column past that before the run + 2^16 * the number of its first sum
  const uint32_t* counts;  // [parts], lines that are in use
  // [parts, share_rows], the first of a row's sums + 2^16 * the one past its last. A thread makes a sum of each row,
  // and they are numbered in order of the packs.
  const uint32_t* sums;
  // [shares, share_rows], the row, numbered over all members, ~0 past a share's last. With `pairs` every second one is
  // that of the second member which belongs to the first's before it.
  const uint32_t* rows_of;
  int64_t rows;  // of all members
  int64_t cols;  // K
  int64_t shares;
  int64_t share_rows;  // at most one per thread
  int64_t lines;       // of each part in memory
  int64_t words;       // (steps + 31) / 32
  int64_t block_cols;  // a multiple of 8, at most kMostBlockCols
  bool pairs;
};
// x is RMSNorm(call.x) * weight: both rounded to 16 bits (Zhang and Sennrich, 2019, as transformers rounds it).
struct Norm {
  const void* weight;  // [cols] in the dtype of x; null: x is as it is
  float epsilon;
};
constexpr int64_t kMostDeltaTokens = 4;
int delta_threads();                       // of a share's block
constexpr int64_t kMostBlockCols = 20480;  // 80 KB of shared memory for up to 2 tokens, 160 KB for 4
// As many tokens as one call may have: fewer than kMostDeltaTokens where shared memory does not hold more.
int64_t delta_most_tokens(const DeltaView& weight, const Device& device);
Status allow_delta_spmv(int shared_bytes);
// Whether the weight takes a norm: all columns are in one block.
bool delta_takes_norm(const DeltaView& weight);
// With `pairs` the call has two members, of which only the first has a y: silu(its product) * the second's.
Status delta_spmv(const DeltaView& weight, const Device& device, const Call& call, const Norm& norm);

// ---- 2:4 for sparse tensor cores, made from SBT at load (kernels/nm_layout.py) ----
// Panels of 32 rows x 128 columns, ordered [row panel][column panel], padded with zeros. A panel is, 16 bytes per lane
// each, the A operands of mma.sp.m16n8k32 in the order [step of 32 columns][row tile of 16], then the metadata: word
// 2 * tile + half has the positions of rows g (low half) and g + 8 (high half) of the tile in the 16 columns from
// 64 * half + 16 * (lane % 4) on, g = lane / 4: 2 bits each, the lower position first.
struct NmView {
  // Of each member [row panels, column panels, 9, 32, 16 bytes], aligned to 16 bytes; its rows are in the call.
  const void* panels[kMostMembers];
  int64_t cols;  // K
};
constexpr int64_t kMostNmTokens = 64;  // of one call of nm_mma_sp
Status allow_nm_mma_sp(int shared_bytes);
Status allow_nm_mma_sp_sm90(int shared_bytes);
Status nm_mma_sp(const NmView& weight, const Device& device, const Call& call);
// How nm_mma_sp_sm90 shares the work; 0: chosen.
struct NmShare {
  int group;   // panels of rows that a block has at a time, 1 to 8
  int splits;  // blocks of a cluster that share the columns: 1, 2, 4 or 8
};
// The same on compute capability 9.0, where x starts on 16 bytes and has a multiple of 8 columns.
Status nm_mma_sp_sm90(const NmView& weight, NmShare wanted, const Device& device, const Call& call);
// The same for many tokens on compute capability 9.0, of prompts. x as above.
struct NmWays {  // how it shares the work; 0: chosen
  int tokens;    // of a unit, 128 or 256
  int groups;    // warpgroups of a block with different rows, 2, or 4 where tokens are 128
};
constexpr int64_t kMostNmWideTokens = 1 << 20;
Status allow_nm_wgmma(int shared_bytes);
Status nm_wgmma(const NmView& weight, NmWays wanted, const Device& device, const Call& call);

}  // namespace alphaprune::cuda
