// sbt_wgmma with a C name, run in the emulator by tests/test_cuda_wgmma.py.
#include "sbt_wgmma.cu"

using namespace alphaprune;

// What went wrong, or an empty text. counts: rows, cols, units of the largest macro tile, blocks of a cluster, bytes of
// shared memory, elements of a row of x, tokens, dtype, bias's dtype.
extern "C" const char* sbt_wgmma_emulated(const void* const* weight, const int64_t* counts, const void* x,
                                          const void* bias, const void* residual, void* y, int order) {
  cuda::order() = static_cast<emulator::Order>(order);
  const auto dtype = static_cast<Dtype>(counts[7]);
  const sbt::View view{
      weight[0], static_cast<const uint32_t*>(weight[1]), static_cast<const uint32_t*>(weight[2]), counts[0], counts[1],
      dtype};
  const cuda::Device device{90, 132, static_cast<int>(counts[4])};
  cuda::sbt_wgmma(view, static_cast<uint32_t>(counts[2]), static_cast<int>(counts[3]), device,
                  {x, {{y, view.rows, bias, static_cast<Dtype>(counts[8])}}, 1, residual, counts[6], dtype, nullptr},
                  counts[5]);
  return cuda::last_failure().c_str();
}
