// delta_spmv with a C name, run in the emulator by tests/test_cuda_delta.py.
#include "delta_spmv.cu"

using namespace alphaprune;

// What went wrong, or an empty text. counts: the sizes of DeltaView in their order, tokens, dtype, bias's dtype.
extern "C" const char* delta_spmv_emulated(const void* const* weight, const int64_t* counts, const void* x,
                                           const void* bias, const void* residual, void* y, int order) {
  cuda::order() = static_cast<emulator::Order>(order);
  const auto words = [weight](int i) { return static_cast<const uint32_t*>(weight[i]); };
  const cuda::DeltaView view{weight[0], words(1),  words(2),  words(3),  words(4),  words(5),  words(6), words(7),
                             counts[0], counts[1], counts[2], counts[3], counts[4], counts[5], counts[6]};
  cuda::delta_spmv(
      view, {90, 2, 232448},
      {x, bias, residual, y, counts[7], static_cast<Dtype>(counts[8]), static_cast<Dtype>(counts[9]), nullptr});
  return cuda::last_failure().c_str();
}
