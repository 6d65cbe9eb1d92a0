// Has the second-level cache fetch the beginning of what the next product reads, as memory has nothing to do while a
// kernel ends, others stand between the products, and the next one begins. In a kernel of its own, which finds room
// when the first blocks of the product before it have ended: inside of the products it cost their loops instructions.
#include "launch.cuh"

namespace alphaprune::cuda {
namespace {

constexpr int kThreads = 32;

// Block b of as many as there are multiprocessors fetches the beginning of share b, which the next product's block b
// reads first, about.
ALPHAPRUNE_KERNEL __launch_bounds__(kThreads) fetch_shares(const Ahead ahead, const int blocks) {
  constexpr uint64_t kUnit = 16;
  let_next_begin();
  if (thread_index() == 0) {
    for (const Ahead::Kind& kind : ahead.kinds) {
      uint64_t units = 0;
      for (const uint32_t bytes : kind.bytes) units += bytes / kUnit;
      uint64_t begin = units * block_x() / blocks;
      uint64_t left = (units * (block_x() + 1) / blocks - begin) * ahead.part / 256;
      for (int i = 0; i < kMostMembers && left; ++i) {
        const uint64_t there = kind.bytes[i] / kUnit;
        if (begin >= there) {
          begin -= there;
          continue;
        }
        const uint64_t count = left < there - begin ? left : there - begin;
        fetch(static_cast<const char*>(kind.from[i]) + begin * kUnit, static_cast<uint32_t>(count * kUnit));
        left -= count;
        begin = 0;
      }
    }
  }
  wait_for_kernels_before();  // who waits for this one waits for them
}

}  // namespace

Status fetch_ahead(const Ahead& ahead, const Device& device, void* stream) {
  if (!ahead.part || device.capability < 90) return 0;
  return start_early(fetch_shares, device.multiprocessors, kThreads, 0, stream, ahead, device.multiprocessors);
}

}  // namespace alphaprune::cuda
