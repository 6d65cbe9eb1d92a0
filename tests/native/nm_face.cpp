// nm_mma_sp and nm_wgmma with C names, run in the emulator by tests/test_cuda_nm.py and test_cuda_nm_wgmma.py.
#include "nm_mma_sp.cu"
#include "nm_mma_sp_sm90.cu"
#include "nm_wgmma.cu"

using namespace alphaprune;

namespace {

// What a call is of: counts as of nm_mma_sp_emulated.
struct Given {
  cuda::NmView view;
  cuda::Call call;
  cuda::Device device;
};
Given given(const void* const* weight, const int64_t* counts, const void* x, const void* bias, const void* residual,
            void* y) {
  const auto count = [&](int i) { return static_cast<int>(counts[i]); };
  const int64_t tokens = counts[10];
  const auto dtype = static_cast<Dtype>(count(11)), bias_dtype = static_cast<Dtype>(count(12));
  Given made{{{}, counts[4]}, {x, {}, count(0), residual, tokens, dtype, nullptr}, {count(5), count(6), count(7)}};
  int64_t rows = 0;
  for (int i = 0; i < made.call.members; ++i) {
    const int64_t size = bias_dtype == Dtype::float32 ? 4 : 2;
    made.view.panels[i] = weight[i];
    made.call.out[i] = {static_cast<uint16_t*>(y) + tokens * rows, counts[1 + i],
                        bias ? static_cast<const char*>(bias) + rows * size : nullptr, bias_dtype};
    rows += counts[1 + i];
  }
  return made;
}
const char* said(int status) {
  if (status && cuda::last_failure().empty()) cuda::last_failure() = "no way to share the work";
  return cuda::last_failure().c_str();
}

}  // namespace

// What went wrong, or an empty text. weight: the panels of each member. counts: members, rows of each of three, cols,
// compute capability, multiprocessors, bytes of shared memory, an NmShare, tokens, dtype, bias's dtype. bias: of all
// members, one after the other; y is, too.
extern "C" const char* nm_mma_sp_emulated(const void* const* weight, const int64_t* counts, const void* x,
                                          const void* bias, const void* residual, void* y, int order) {
  cuda::order() = static_cast<emulator::Order>(order);
  const Given made = given(weight, counts, x, bias, residual, y);
  const cuda::NmShare share{static_cast<int>(counts[8]), static_cast<int>(counts[9])};
  // What runs on sm_90a, however few rows there are.
  const bool sm90 = made.device.capability == 90 && made.view.cols % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  return said(sm90 ? cuda::nm_mma_sp_sm90(made.view, share, made.device, made.call)
                   : cuda::nm_mma_sp(made.view, made.device, made.call));
}

// The same of nm_wgmma; in the place of an NmShare NmWays.
extern "C" const char* nm_wgmma_emulated(const void* const* weight, const int64_t* counts, const void* x,
                                         const void* bias, const void* residual, void* y, int order) {
  cuda::order() = static_cast<emulator::Order>(order);
  const Given made = given(weight, counts, x, bias, residual, y);
  const cuda::NmWays ways{static_cast<int>(counts[8]), static_cast<int>(counts[9])};
  return said(cuda::nm_wgmma(made.view, ways, made.device, made.call));
}
