// delta_spmv with a C name, run in the emulator by tests/test_cuda_delta.py.
#include "delta_spmv.cu"

using namespace alphaprune;

// What went wrong, or an empty text. counts: rows, cols, slots, columns of a block, tokens, dtype, bias's dtype.
extern "C" const char* delta_spmv_emulated(const void* const* weight, const int64_t* counts, const void* x,
                                           const void* bias, const void* residual, void* y, int order) {
  cuda::order() = static_cast<emulator::Order>(order);
  const cuda::DeltaView view{weight[0],
                             static_cast<const uint32_t*>(weight[1]),
                             static_cast<const uint32_t*>(weight[2]),
                             static_cast<const uint16_t*>(weight[3]),
                             static_cast<const uint32_t*>(weight[4]),
                             static_cast<const uint32_t*>(weight[5]),
                             counts[0],
                             counts[1],
                             counts[2],
                             counts[3]};
  cuda::delta_spmv(
      view, {x, bias, residual, y, counts[4], static_cast<Dtype>(counts[5]), static_cast<Dtype>(counts[6]), nullptr});
  return cuda::last_failure().c_str();
}
