#include "dispatch.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace alphaprune {
namespace {

#if defined(__x86_64__)
struct Cpu {
  bool avx2 = false, avx512 = false;
  bool os_ymm = false, os_zmm = false;

  Cpu() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, f16c = c >> 29 & 1, popcnt = c >> 23 & 1;
    if (osxsave) {
      unsigned low, high;
      __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
      os_ymm = (low & 0x06) == 0x06;  // SSE and AVX state
      os_zmm = (low & 0xe6) == 0xe6;  // and opmask, upper ZMM, ZMM16-31
    }
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const bool has_avx2 = b >> 5 & 1, bmi = (b >> 3 & 1) && (b >> 8 & 1);
    avx2 = has_avx2 && bmi && fma && f16c && popcnt;
    avx512 = avx2 && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (c >> 6 & 1);
  }
};

const Cpu& cpu() {
  static const Cpu found;
  return found;
}
#endif

// libgomp's pool does not survive fork: its threads are gone, and a parallel region in the child would wait for them.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Memory that a thread keeps between calls, so that the hot path never allocates.
class Buffer {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      data_.reset(std::aligned_alloc(64, static_cast<size_t>(ceil_div(static_cast<int64_t>(bytes), 64)) * 64));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

// Activations as Product wants them: the caller's memory where it serves, else a copy.
void prepare(const Isa& isa, const Activations& x, Product& p) {
  const int64_t cols = p.weight.cols, padded = p.weight.padded_cols();
  if (padded == cols && x.dtype == Dtype::float32 && isa.as_they_are(p.weight.dtype)) {
    p.x = static_cast<const float*>(x.data);
    p.x_stride = x.stride;
    return;
  }
  thread_local Buffer buffer;
  auto* to = static_cast<float*>(buffer.at_least(static_cast<size_t>(x.tokens * padded) * sizeof(float)));
  p.x = to;
  p.x_stride = padded;
  for (int64_t t = 0; t < x.tokens; ++t) {
    const char* from = static_cast<const char*>(x.data) + t * x.stride * size_of(x.dtype);
    isa.prepare(from, x.dtype, cols, padded, p.weight.dtype, to + t * padded);
  }
}

// Row tiles cut into parts of equal cost; heavy-tailed plans leave tiles of very different size.
class Parts {
 public:
  Parts(const sbt::View& weight, int64_t tokens, int64_t threads)
      : weight_(weight),
        per_tile_(sbt::kWords * 4 + sbt::kTileRows * sbt::kTileCols * tokens / 16),
        count_(threads > 1 ? threads * 12 : 1) {}

  int64_t count() const { return count_; }

  // First row tile of part i.
  int64_t begin(int64_t i) const {
    const int64_t tiles = weight_.row_tiles();
    const int64_t target = cost(tiles) / count_ * i;
    if (i >= count_) return tiles;
    int64_t low = 0, high = tiles;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

 private:
  int64_t cost(int64_t row_tile) const {
    const int64_t tile = row_tile * weight_.col_tiles();
    return static_cast<int64_t>(weight_.offsets[tile]) * sbt::kUnit * size_of(weight_.dtype) + tile * per_tile_;
  }

  const sbt::View& weight_;
  int64_t per_tile_;
  int64_t count_;
};

}  // namespace

const Isa* const* isas() {
  static const Isa* const all[] = {
#if defined(ALPHAPRUNE_AVX512)
      &kAvx512,
#endif
#if defined(ALPHAPRUNE_AVX2)
      &kAvx2,
#endif
      &kScalar, nullptr};
  return all;
}

std::string unavailable(const Isa& isa) {
#if defined(__x86_64__)
  const std::string name = isa.name;
  if (name == "avx512") {
    if (!cpu().avx512) return "this CPU has no AVX-512 with VBMI2";
    if (!cpu().os_zmm) return "the operating system does not save AVX-512 registers";
  }
  if (name == "avx2") {
    if (!cpu().avx2) return "this CPU has no AVX2 with FMA and F16C";
    if (!cpu().os_ymm) return "the operating system does not save AVX registers";
  }
#else
  static_cast<void>(isa);
#endif
  return {};
}

int64_t threads_for(int64_t operations) {
  if (operations < 1 << 18 || forked || omp_in_parallel()) return 1;
  return omp_get_max_threads();
}

void parallel(int64_t count, int64_t threads, void (*work)(void* context, int64_t i), void* context) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) work(context, i);
    return;
  }
  // Whoever is free takes the next part: a thread that the system has put aside holds up one part, not a half.
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(threads < count ? threads : count))
  {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(context, i);
  }
}

void multiply(const Isa& isa, const sbt::View& weight, const Activations& x, const Bias& bias, void* y,
              int64_t y_stride) {
  if (x.tokens == 0) return;
  Product p{};
  p.weight = weight;
  p.tokens = x.tokens;
  p.bias = bias.data;
  p.bias_dtype = bias.dtype;
  p.y = y;
  p.y_stride = y_stride;
  p.y_dtype = x.dtype;
  prepare(isa, x, p);
  const int64_t threads = threads_for(weight.rows * weight.cols * x.tokens);
  const Parts parts(weight, x.tokens, threads);
  parallel_for(parts.count(), threads, [&](int64_t i) {
    alignas(64) unsigned char scratch[kScratchBytes];
    isa.product(p, parts.begin(i), parts.begin(i + 1), scratch);
  });
}

void expand(const Isa& isa, const sbt::View& weight, int64_t first, int64_t last, void* out) {
  const int64_t begin = first / sbt::kTileRows, end = ceil_div(last, sbt::kTileRows);
  const int64_t threads = threads_for((last - first) * weight.cols);
  parallel_for(end - begin, threads, [&](int64_t i) {
    auto* to = static_cast<char*>(out) + i * sbt::kTileRows * weight.cols * size_of(weight.dtype);
    isa.expand(weight, begin + i, begin + i + 1, to);
  });
}

}  // namespace alphaprune
