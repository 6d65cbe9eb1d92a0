#include "launch.cuh"
#include "sbt_expand.cuh"

namespace alphaprune::cuda {

Status allow_sbt_expand(int bytes) {
  if (const Status status = allow_shared(sbt_expand<true>, bytes)) return status;
  return allow_shared(sbt_expand<false>, bytes);
}

Status sbt_expand(const sbt::View& weight, uint32_t stage_units, int64_t begin, int64_t end, void* out, void* stream) {
  const int64_t chunks = ceil_div(weight.col_tiles(), kChunk), work = (end - begin) * chunks;
  if (work == 0) return 0;
  auto* row_0 = static_cast<uint16_t*>(out) - begin * sbt::kTileRows * weight.cols;
  const ExpandProblem p{static_cast<const uint16_t*>(weight.values),
                        weight.mask,
                        weight.offsets,
                        row_0,
                        work,
                        static_cast<int>(weight.rows),
                        static_cast<int>(weight.cols),
                        static_cast<int>(begin),
                        static_cast<int>(weight.col_tiles()),
                        static_cast<int>(chunks),
                        stage_units * kUnitBytes,
                        {1, 2}};
  const bool fours = reinterpret_cast<uintptr_t>(out) % 8 == 0 && weight.cols % 4 == 0;
  return start(fours ? sbt_expand<true> : sbt_expand<false>, ceil_div(work, kExpandWarps), kExpandWarps * kWarp,
               expand_shared_bytes(p.value_bytes), stream, p);
}

}  // namespace alphaprune::cuda
