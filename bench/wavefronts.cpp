// Prints which addresses of shared memory the warps of one emulated launch touch, one line per access in the format of
// wavefronts.py, after a line with the rows of a block. Usage: wavefronts COLS DENSITY TOKENS SEED bfloat16|int8
// ROW_TILES
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/launch.h"

namespace {

using namespace alphaprune;

constexpr cuda::Device kDevice{90, 1, 227 << 10};

// A packed weight with random places; its values are of no matter.
struct Packed {
  std::vector<uint8_t> values;
  std::vector<uint32_t> mask, offsets{0};
  std::vector<float> scale;
  uint32_t stage_units = 0;
  int64_t rows, cols;
  Dtype dtype;

  Packed(int64_t n, int64_t k, double density, int seed, Dtype of) : scale(n, 1.0f), rows(n), cols(k), dtype(of) {
    std::mt19937 random(seed);
    std::bernoulli_distribution keep(density);
    const int64_t tiles = sbt::View{nullptr, nullptr, nullptr, n, k, dtype}.col_tiles();
    const int64_t pad = sbt::pad_of(dtype);
    const int chunk = cuda::chunk_tiles();
    for (int64_t tile = 0; tile < ceil_div(n, sbt::kTileRows) * tiles; ++tile) {
      int64_t kept = 0;
      for (int word = 0; word < sbt::kWords; ++word) {
        uint32_t bits = 0;
        for (int bit = 0; bit < 32; ++bit) bits |= static_cast<uint32_t>(keep(random)) << bit;
        mask.push_back(bits);
        kept += __builtin_popcount(bits);
      }
      offsets.push_back(offsets.back() + static_cast<uint32_t>(ceil_div(kept, pad) * pad / sbt::kUnit));
      const int64_t first = tile / tiles * tiles + std::max<int64_t>(tile % tiles - chunk + 1, 0);
      stage_units = std::max(stage_units, offsets.back() - offsets[first]);
    }
    values.assign(offsets.back() * sbt::kUnit * size_of(dtype) + sbt::kTailBytes, 1);
  }

  sbt::View view() const {
    const bool integers = dtype == Dtype::int8;
    return {start(), mask.data(), offsets.data(), rows, cols, dtype, integers ? scale.data() : nullptr, integers};
  }
  // The first value on 16 bytes, as asynchronous copies want it.
  const void* start() const {
    const auto address = reinterpret_cast<uintptr_t>(values.data());
    return reinterpret_cast<const void*>(ceil_div(static_cast<int64_t>(address), 16) * 16);
  }
};

// Blocks of the launch; 0 with the reason on stderr if it failed.
int64_t run(const Packed& weight, int64_t tokens, int row_tiles) {
  std::vector<uint16_t> x(tokens * weight.cols + 64, 0x3f80), y(tokens * weight.rows + 64);
  const auto aligned = [](std::vector<uint16_t>& of) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(of.data()) + 63) / 64 * 64);
  };
  const cuda::Call call{
      aligned(x), {{aligned(y), weight.rows, nullptr, Dtype::float32}}, 1, nullptr, tokens, Dtype::bfloat16, nullptr};
  const sbt::View view = weight.view();
  const cuda::Status status = weight.dtype == Dtype::int8
                                  ? cuda::sbt_mma_int8(&view, weight.stage_units, kDevice, call)
                                  : cuda::sbt_mma(&view, weight.stage_units, kDevice, call, row_tiles);
  if (status) std::fprintf(stderr, "%s\n", cuda::last_failure().c_str());
  const emulator::Size grid = emulator::machine().grid;
  return status ? 0 : static_cast<int64_t>(grid.x) * grid.y * grid.z;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 7) return 2;
  const int64_t cols = std::atoll(arguments[1]), tokens = std::atoll(arguments[3]);
  const double density = std::atof(arguments[2]);
  const int seed = std::atoi(arguments[4]);
  const Dtype dtype = std::strcmp(arguments[5], "int8") ? Dtype::bfloat16 : Dtype::int8;
  const int64_t rows = 14 * sbt::kTileRows;  // of a block, where an H100 multiplies with 28672 rows
  cuda::tracing() = true;
  if (run(Packed(rows, cols, density, seed, dtype), tokens, std::atoi(arguments[6])) != 1) return 1;
  std::printf("rows %lld\n", static_cast<long long>(rows));
  for (const auto& warp : emulator::machine().blocks[0].warps) {
    for (const auto& access : warp.accesses) {
      std::printf("%s,%u", access.kind, access.bytes);
      for (const int64_t address : access.address) {
        if (address < 0) {
          std::printf(",-");
        } else {
          std::printf(",%lld", static_cast<long long>(address));
        }
      }
      std::printf("\n");
    }
  }
  return 0;
}
