// sbt_wgmma with a C name, run in the emulator by tests/test_cuda_wgmma.py.
#include "sbt_wgmma.cu"

using namespace alphaprune;

// What went wrong, or an empty text. weight: values, mask and offsets of each member. counts: members, rows of each (of
// three), cols, units of the largest chunk, groups, slices, splits, multiprocessors, bytes of shared memory, elements
// of a row of x, tokens, dtype, bias's dtype. y: of the members one after the other; bias: of the first.
extern "C" const char* sbt_wgmma_emulated(const void* const* weight, const int64_t* counts, const void* x,
                                          const void* bias, const void* residual, void* y, int order) {
  cuda::order() = static_cast<emulator::Order>(order);
  const int members = static_cast<int>(counts[0]);
  const int64_t cols = counts[4], tokens = counts[12];
  const auto dtype = static_cast<Dtype>(counts[13]), bias_dtype = static_cast<Dtype>(counts[14]);
  sbt::View views[cuda::kMostMembers];
  cuda::Call call{x, {}, members, residual, tokens, dtype, nullptr};
  auto* to = static_cast<uint16_t*>(y);
  for (int i = 0; i < members; ++i) {
    const int64_t rows = counts[1 + i];
    views[i] = {weight[3 * i],
                static_cast<const uint32_t*>(weight[3 * i + 1]),
                static_cast<const uint32_t*>(weight[3 * i + 2]),
                rows,
                cols,
                dtype};
    call.out[i] = {to, rows, i ? nullptr : bias, bias_dtype};
    to += tokens * rows;
  }
  const cuda::Device device{90, static_cast<int>(counts[9]), static_cast<int>(counts[10])};
  const cuda::WideWays ways{static_cast<int>(counts[6]), static_cast<int>(counts[7]), static_cast<int>(counts[8])};
  if (cuda::sbt_wgmma(views, static_cast<uint32_t>(counts[5]), ways, device, call, counts[11]) &&
      cuda::last_failure().empty())
    return "it does not fit";
  return cuda::last_failure().c_str();
}

// How the work of a layer would be shared: counts: rows, cols, units of the largest chunk, tokens, multiprocessors,
// bytes of shared memory; way: groups, slices, splits, or zeros where nothing fits.
extern "C" void sbt_wgmma_way(const int64_t* counts, int64_t* way) {
  cuda::WideProblem p{};
  p.row_tiles = static_cast<int>(ceil_div(counts[0], sbt::kTileRows));
  p.col_tiles = static_cast<int>(ceil_div(counts[1], sbt::kTileCols));
  p.value_bytes = static_cast<uint32_t>(counts[2]) * 16;
  p.mask_bytes = cuda::kChunk * cuda::kWideTileMask;
  const cuda::Device device{90, static_cast<int>(counts[4]), static_cast<int>(counts[5])};
  const bool fits =
      cuda::by_tokens<32, 256>(counts[3], [&](auto box) {
        return cuda::share(&p, box(), static_cast<int>(ceil_div(p.col_tiles, cuda::kChunk)), device, {}) ? 0 : 1;
      }) == 0;
  way[0] = fits ? p.groups : 0;
  way[1] = fits ? p.slices : 0;
  way[2] = fits ? p.splits : 0;
}
