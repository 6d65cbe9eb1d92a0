// nm_mma_sp with a C name, run in the emulator by tests/test_cuda_nm.py.
#include "nm_mma_sp.cu"
#include "nm_mma_sp_sm90.cu"

using namespace alphaprune;

// What went wrong, or an empty text. counts: rows, cols, compute capability, multiprocessors, bytes of shared memory,
// an NmShare, tokens, dtype, bias's dtype.
extern "C" const char* nm_mma_sp_emulated(const void* const* weight, const int64_t* counts, const void* x,
                                          const void* bias, const void* residual, void* y, int order) {
  cuda::order() = static_cast<emulator::Order>(order);
  const cuda::NmView view{weight[0], counts[0], counts[1]};
  const auto count = [&](int i) { return static_cast<int>(counts[i]); };
  const cuda::Device device{count(2), count(3), count(4)};
  const cuda::Call call{x,         {{y, view.rows, bias, static_cast<Dtype>(count(9))}},
                        1,         residual,
                        counts[7], static_cast<Dtype>(count(8)),
                        nullptr};
  const cuda::NmShare share{count(5), count(6)};
  // What runs on sm_90a, however few rows there are.
  const bool sm90 = device.capability == 90 && view.cols % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const int status = sm90 ? cuda::nm_mma_sp_sm90(view, share, device, call) : cuda::nm_mma_sp(view, device, call);
  if (status && cuda::last_failure().empty()) cuda::last_failure() = "no way to share the work";
  return cuda::last_failure().c_str();
}
