// What the CUDA half offers to its bindings: plain C++, no CUDA types, so that the emulated build has the same face.
// Pointers are device addresses (host addresses when emulated); nothing is allocated and nothing waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../layout.h"

namespace alphaprune::cuda {

// 0, or an error code of the CUDA runtime (1 when an emulated kernel did something wrong).
using Status = int;
std::string describe(Status status);

// What every product shares: y[tokens, rows] = x[tokens, cols] Wᵀ + bias + residual.
struct Call {
  const void* x;         // contiguous, in `dtype`
  const void* bias;      // [rows] or null
  const void* residual;  // [tokens, rows] in `dtype`, or null; may be y
  void* y;               // contiguous, in `dtype`
  int64_t tokens;
  Dtype dtype;       // float16 or bfloat16: of x, y, residual and, unless it is int8, the weight
  Dtype bias_dtype;  // float32, float16 or bfloat16
  void* stream;      // cudaStream_t; null: the default one
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

// ---- SBT straight from its packed tensors (layout.h) ----
// stage_units: the largest number of 8-value units that `chunk_tiles()` neighbouring macro tiles of a row tile have,
// counted from the first, the third, … tile of the row.
int chunk_tiles();
constexpr int64_t kMostTokens = 128;  // of one call of sbt_mma
// warps: at most so many, 1 to 8, share the columns of a row tile; fewer where their memory does not fit the device.
Status sbt_mma(const sbt::View& weight, uint32_t stage_units, int warps, const Device& device, const Call& call);
// The same of int8 values with their scales, where `call.dtype` is that of x, y and the residual only.
Status sbt_mma_int8(const sbt::View& weight, uint32_t stage_units, int warps, const Device& device, const Call& call);
// For sm_90a, of up to kMostWideTokens. tile_units: of the largest macro tile. splits: blocks that share the columns of
// 128 rows, 1, 2, 4 or 8; 0 for as many as fill the device. x has rows of x_stride elements, a multiple of 8, zeros
// past the weight's columns, and starts on 16 bytes; the mask does, too.
constexpr int64_t kMostWideTokens = 256;
Status sbt_wgmma(const sbt::View& weight, uint32_t tile_units, int splits, const Device& device, const Call& call,
                 int64_t x_stride);
// Rows [16 * begin, min(16 * end, rows)) dense from `out` on; 16-bit values only.
Status sbt_expand(const sbt::View& weight, uint32_t stage_units, int64_t begin, int64_t end, void* out, void* stream);

// For `prepare`: the kernels of each file.
Status allow_sbt_mma(int shared_bytes);
Status allow_sbt_mma_int8(int shared_bytes);
Status allow_sbt_wgmma(int shared_bytes);
Status allow_sbt_expand(int shared_bytes);

// ---- nibble-delta rows, made from SBT at load (kernels/delta_layout.py) ----
// Rows in falling order of length; columns in blocks of `block_cols`. What a row keeps in a block is a stream of packs
// of 8 values, each with its column: that of the value before plus 1 to 16, by zeros in between where a gap is wider.
// A power of two of lanes, 4 to 32, walk a row: lane l's run begins at column starts[l] of the block, its j-th pack is
// first + j * lanes + l. Pack 0 is empty, for lanes that have none.
struct DeltaView {
  const void* values;      // [packs, 8], 16-bit floats, aligned to 16 bytes
  const uint32_t* deltas;  // [packs], 4 bits per value: its distance - 1 from the value before (0 for a run's first)
  const uint32_t* first;   // [rows * blocks + 1], in order of the rows
  const uint16_t* starts;  // [slots, blocks, 32]; a slot is what one warp does: 32 / lanes rows
  const uint32_t* slots;   // [slot_count + 1], first row in order * 8 + log2(lanes)
  const uint32_t* row_of;  // [rows], the row of W
  int64_t rows;            // N
  int64_t cols;            // K
  int64_t slot_count;
  int64_t block_cols;  // a multiple of 8, at most kMostBlockCols
};
constexpr int64_t kMostDeltaTokens = 4;
constexpr int64_t kMostBlockCols = 12240;  // 48 KB of shared memory for up to 2 tokens, 96 KB for 4
Status allow_delta_spmv(int shared_bytes);
Status delta_spmv(const DeltaView& weight, const Call& call);

// ---- 2:4 for sparse tensor cores, made from SBT at load (kernels/nm_layout.py) ----
// Panels of 32 rows x 128 columns, ordered [row panel][column panel], padded with zeros. A panel is, 16 bytes per lane
// each, the A operands of mma.sp.m16n8k32 in the order [step of 32 columns][row tile of 16], then the metadata: word
// 2 * tile + half has the positions of rows g (low half) and g + 8 (high half) of the tile in the 16 columns from
// 64 * half + 16 * (lane % 4) on, g = lane / 4: 2 bits each, the lower position first.
struct NmView {
  const void* panels;  // [row panels, column panels, 9, 32, 16 bytes], aligned to 16 bytes
  int64_t rows;        // N
  int64_t cols;        // K
};
constexpr int64_t kMostNmTokens = 64;  // of one call of nm_mma_sp
Status allow_nm_mma_sp(int shared_bytes);
Status nm_mma_sp(const NmView& weight, const Call& call);

}  // namespace alphaprune::cuda
