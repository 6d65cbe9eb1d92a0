// SBT → dense rows: a warp writes a chunk of a row tile.
#pragma once

#include "chunk.cuh"

namespace alphaprune::cuda {

constexpr int kExpandWarps = 4;

struct ExpandProblem {
  const uint16_t* values;
  const uint32_t* mask;
  const uint32_t* offsets;
  uint16_t* out;  // of row 0, though rows before `first_row` are not there
  int64_t chunks_to_do;
  int rows, cols;
  int first_tile, col_tiles, chunks;
  uint32_t value_bytes;
  Opaque number;
};

ALPHAPRUNE_BOTH constexpr size_t expand_shared_bytes(uint32_t value_bytes) {
  return static_cast<size_t>(kExpandWarps) * (kMetaBytes + value_bytes);
}

// kFours: cols is a multiple of 4 and `out` aligned to 8 bytes.
template <bool kFours>
ALPHAPRUNE_DEVICE void write_four(const ExpandProblem& p, int64_t row, int col, uint32_t low, uint32_t high) {
  if (row >= p.rows || col >= p.cols) return;
  uint16_t* to = p.out + static_cast<size_t>(row) * p.cols + col;
  if (kFours) {
    *reinterpret_cast<uint2*>(to) = {low, high};
    return;
  }
  const uint32_t four[4] = {low & 0xffffu, low >> 16, high & 0xffffu, high >> 16};
  for (int i = 0; i < 4 && col + i < p.cols; ++i) to[i] = static_cast<uint16_t>(four[i]);
}

template <bool kFours>
ALPHAPRUNE_KERNEL __launch_bounds__(kExpandWarps* kWarp) sbt_expand(const ExpandProblem p) {
  const int lane = lane_index(), warp = warp_index();
  const int64_t index = static_cast<int64_t>(block_x()) * kExpandWarps + warp;
  if (index >= p.chunks_to_do) return;  // the whole warp
  const int64_t row_tile = p.first_tile + index / p.chunks;
  const int chunk = static_cast<int>(index % p.chunks);
  const uint32_t meta = shared_start() + warp * (kMetaBytes + p.value_bytes), values = meta + kMetaBytes;

  Row<false> row;
  row.start(p.mask, p.offsets, static_cast<size_t>(row_tile) * p.col_tiles + chunk * kChunk,
            p.col_tiles - chunk * kChunk, lane);
  Chunk here;
  row.offsets_of(here);
  copy_values<2>(p.values, here.first, here.last, values, lane);
  copy_commit();
  store_meta<2>(row.mask_of(), (here.middle - here.first) * kUnitBytes, values, meta, lane);
  copy_wait<0>();
  sync_warp();

  FloatLane mine(lane, p.number);
  const int64_t upper = row_tile * sbt::kTileRows + lane / 4;
  const int col = chunk * kChunkCols + 4 * (lane % 4);
  ALPHAPRUNE_UNROLL
  for (int step = 0; step < kChunkSteps; ++step) {
    uint32_t a[1][4];
    mine.decode(mine.words(meta, step), a);
    write_four<kFours>(p, upper, col + step * static_cast<int>(sbt::kStepCols), a[0][0], a[0][2]);
    write_four<kFours>(p, upper + 8, col + step * static_cast<int>(sbt::kStepCols), a[0][1], a[0][3]);
  }
}

}  // namespace alphaprune::cuda
