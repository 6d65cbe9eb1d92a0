// nm_mma_sp with a C name, run in the emulator by tests/test_cuda_nm.py.
#include "nm_mma_sp.cu"

using namespace alphaprune;

// What went wrong, or an empty text. counts: rows, cols, tokens, dtype, bias's dtype.
extern "C" const char* nm_mma_sp_emulated(const void* const* weight, const int64_t* counts, const void* x,
                                          const void* bias, const void* residual, void* y, int order) {
  cuda::order() = static_cast<emulator::Order>(order);
  const cuda::NmView view{weight[0], counts[0], counts[1]};
  cuda::nm_mma_sp(
      view, {x, bias, residual, y, counts[2], static_cast<Dtype>(counts[3]), static_cast<Dtype>(counts[4]), nullptr});
  return cuda::last_failure().c_str();
}
