// delta_spmv with a C name, run in the emulator by tests/test_cuda_delta.py.
#include "delta_spmv.cu"

using namespace alphaprune;

// What went wrong, or an empty text. counts: members (of which two are pairs where it is negative), rows of each of
// three, the sizes of DeltaView from the columns on, tokens, dtype, bias's dtype. weight: the tensors of DeltaView,
// then the norm's or null; its epsilon is 1e-5. bias: of all members, one after the other; y is, too.
extern "C" const char* delta_spmv_emulated(const void* const* weight, const int64_t* counts, const void* x,
                                           const void* bias, const void* residual, void* y, int order) {
  cuda::order() = static_cast<emulator::Order>(order);
  const auto words = [weight](int i) { return static_cast<const uint32_t*>(weight[i]); };
  const bool pairs = counts[0] < 0;
  const int64_t *sizes = counts + 4, tokens = counts[10];
  const auto dtype = static_cast<Dtype>(counts[11]), bias_dtype = static_cast<Dtype>(counts[12]);
  cuda::Call call{x, {}, static_cast<int>(pairs ? -counts[0] : counts[0]), residual, tokens, dtype, nullptr};
  int64_t rows = 0;
  for (int i = 0; i < call.members; ++i) {
    const int64_t size = bias_dtype == Dtype::float32 ? 4 : 2;
    call.out[i] = {static_cast<uint16_t*>(y) + tokens * rows, counts[1 + i],
                   bias ? static_cast<const char*>(bias) + rows * size : nullptr, bias_dtype};
    rows += counts[1 + i];
  }
  const cuda::DeltaView view{weight[0], words(1), words(2), words(3), words(4), words(5), words(6), words(7),
                             rows,      sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], pairs};
  cuda::delta_spmv(view, {90, 2, 232448}, call, {weight[8], 1e-5f});
  return cuda::last_failure().c_str();
}
