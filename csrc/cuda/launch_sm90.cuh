// What kernels of sm_90a are started with: maps of matrices that the driver makes. The driver is asked for at run time
// and not linked, so that the module loads where there is none.
#pragma once

#include "device_sm90.cuh"
#include "launch.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace alphaprune::cuda {

// Rows of 16-bit elements; x and the bytes of a row are multiples of 16.
struct Matrix {
  const void* x;
  int64_t rows, cols, row_bytes;
};

#ifdef __CUDACC__
// The map of boxes of box_rows x box_cols elements, swizzled by 128 bytes, zeros outside of the matrix.
inline Status map_matrix(const Matrix& matrix, int box_rows, int box_cols, Dtype dtype, TensorMap* out) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "the driver's map");
  static void* found = nullptr;
  if (!found) {
    cudaDriverEntryPointQueryResult result;
    void* entry = nullptr;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess) return static_cast<Status>(status);
    if (result != cudaDriverEntryPointSuccess || !entry) return static_cast<Status>(cudaErrorInsufficientDriver);
    found = entry;
  }
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.cols), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(matrix.row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const auto type = dtype == Dtype::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult made =
      reinterpret_cast<Encode>(found)(reinterpret_cast<CUtensorMap*>(out), type, 2, const_cast<void*>(matrix.x), sizes,
                                      strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? 0 : static_cast<Status>(cudaErrorInvalidValue);
}
#else
inline Status map_matrix(const Matrix& matrix, int box_rows, int box_cols, Dtype, TensorMap* out) {
  last_failure() = "a matrix does not start, or its rows do not, on 16 bytes";
  if (reinterpret_cast<uintptr_t>(matrix.x) % 16 || matrix.row_bytes % 16) return 1;
  last_failure().clear();
  *out = {static_cast<const uint8_t*>(matrix.x),
          matrix.rows,
          matrix.cols,
          matrix.row_bytes,
          static_cast<uint32_t>(box_rows),
          static_cast<uint32_t>(box_cols),
          true};
  return 0;
}
#endif

}  // namespace alphaprune::cuda
