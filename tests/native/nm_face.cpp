// nm_mma_sp with a C name, run in the emulator by tests/test_cuda_nm.py.
#include "nm_mma_sp.cu"
#include "nm_mma_sp_sm90.cu"

using namespace alphaprune;

// What went wrong, or an empty text. weight: the panels of each member. counts: members, rows of each of three, cols,
// compute capability, multiprocessors, bytes of shared memory, an NmShare, tokens, dtype, bias's dtype. bias: of all
// members, one after the other; y is, too.
extern "C" const char* nm_mma_sp_emulated(const void* const* weight, const int64_t* counts, const void* x,
                                          const void* bias, const void* residual, void* y, int order) {
  cuda::order() = static_cast<emulator::Order>(order);
  const auto count = [&](int i) { return static_cast<int>(counts[i]); };
  const cuda::Device device{count(5), count(6), count(7)};
  const cuda::NmShare share{count(8), count(9)};
  const int64_t tokens = counts[10];
  const auto dtype = static_cast<Dtype>(count(11)), bias_dtype = static_cast<Dtype>(count(12));
  cuda::NmView view{{}, counts[4]};
  cuda::Call call{x, {}, count(0), residual, tokens, dtype, nullptr};
  int64_t rows = 0;
  for (int i = 0; i < call.members; ++i) {
    const int64_t size = bias_dtype == Dtype::float32 ? 4 : 2;
    view.panels[i] = weight[i];
    call.out[i] = {static_cast<uint16_t*>(y) + tokens * rows, counts[1 + i],
                   bias ? static_cast<const char*>(bias) + rows * size : nullptr, bias_dtype};
    rows += counts[1 + i];
  }
  // What runs on sm_90a, however few rows there are.
  const bool sm90 = device.capability == 90 && view.cols % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const int status = sm90 ? cuda::nm_mma_sp_sm90(view, share, device, call) : cuda::nm_mma_sp(view, device, call);
  if (status && cuda::last_failure().empty()) cuda::last_failure() = "no way to share the work";
  return cuda::last_failure().c_str();
}
