#include "bandwidth.h"

#include <atomic>
#include <vector>

#include "dispatch.h"
#include "read_loop.h"

namespace alphaprune {
namespace {

// 16 bytes: SSE2, NEON or whatever the compiler's baseline has.
struct Wide {
  typedef uint64_t Vector __attribute__((vector_size(16)));
  static constexpr int kBytes = 16;
  static Vector zero() { return Vector{0, 0}; }
  static Vector add(Vector sum, const char* p) { return sum + *reinterpret_cast<const Vector*>(p); }
  static uint64_t total(Vector sum) { return sum[0] + sum[1]; }
};

const ReadLoop kPlain = {"16-byte loads", read<Wide, Prefetch::none>};
const ReadLoop kNear = {"16-byte loads, prefetch into L1", read<Wide, Prefetch::near>};
const ReadLoop kFar = {"16-byte loads, prefetch into L2", read<Wide, Prefetch::far>};

// A thread takes so much at a time: small beside the whole, large beside a page.
constexpr int64_t kPartLines = (int64_t{4} << 20) / kLine;

[[maybe_unused]] bool usable(const std::string& name) {
  for (const Isa* const* isa = isas(); *isa; ++isa)
    if (name == (*isa)->name) return unavailable(**isa).empty();
  return false;
}

std::vector<const ReadLoop*> find_loops() {
  std::vector<const ReadLoop*> found;
  const auto append = [&](const ReadLoop* const* table) {
    for (; *table; ++table) found.push_back(*table);
  };
#if defined(ALPHAPRUNE_AVX512BW)
  if (usable("avx512bw") || usable("avx512")) append(kReadAvx512bw);
#endif
#if defined(ALPHAPRUNE_AVX2)
  if (usable("avx2")) append(kReadAvx2);
#endif
  append(kReadBaseline);
  found.push_back(nullptr);
  return found;
}

}  // namespace

const ReadLoop* const kReadBaseline[] = {&kPlain, &kNear, &kFar, nullptr};

const ReadLoop* const* read_loops() {
  static const std::vector<const ReadLoop*> found = find_loops();
  return found.data();
}

uint64_t read_all(const ReadLoop& loop, const void* begin, int64_t bytes, int streams) {
  const int64_t lines = bytes / kLine;
  std::atomic<uint64_t> sum{0};
  parallel_for(ceil_div(lines, kPartLines), threads_for(bytes), [&](int64_t part) {
    const int64_t first = part * kPartLines, left = lines - first;
    const char* at = static_cast<const char*>(begin) + first * kLine;
    sum.fetch_add(loop.read(at, left < kPartLines ? left : kPartLines, streams), std::memory_order_relaxed);
  });
  return sum;
}

}  // namespace alphaprune
