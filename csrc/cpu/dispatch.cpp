#include "dispatch.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <new>

#include "buffer.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace alphaprune {
namespace {

// Whether what the CPU lacks has a twin (csrc/emulator).
#if defined(ALPHAPRUNE_EMULATE)
constexpr bool kEmulated = true;
#else
[[maybe_unused]] constexpr bool kEmulated = false;
#endif

#if defined(__x86_64__)
struct Cpu {
  bool avx2 = false, avxvnni = false, avx512bw = false, avx512vnni = false, avx512 = false, avx512bf16 = false,
       amd = false;
  bool os_ymm = false, os_zmm = false;
  unsigned family = 0;
  std::string without_amx = "this CPU has no AMX with BF16 and INT8";

  Cpu() {
    unsigned a, b, c, d;
    amd = __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    family = (a >> 8 & 15) + (a >> 20 & 255);
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
    avx512bw = avx2 && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
    avx512vnni = avx512bw && (c >> 11 & 1);
    avx512 = avx512vnni && (c >> 6 & 1);
    const bool amx = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);  // BF16, tiles, INT8
    const bool picks = (c >> 1 & 1) && (c >> 12 & 1);                  // VBMI, BITALG
    const bool more = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d);
    avxvnni = avx2 && more && (a >> 4 & 1);
    avx512bf16 = avx512 && picks && more && (a >> 5 & 1);
    if (!avx512 || !amx) return;
    // Linux gives tile registers only to a process that asks: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
    without_amx = syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? "" : "the operating system does not grant AMX tiles";
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

// More parts than threads, so that a thread that is held up leaves its rest to others.
constexpr int64_t kPartsPerThread = 12;

// The activations as the items want them: the caller's memory where it serves, else one copy per layout.
class Forms {
 public:
  Forms(const Isa& isa, const Item* items, int64_t count, const Activations& x) : isa_(isa), x_(x) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (find(items[i].weight)) continue;
      Form& form = forms_[count_++];
      form = {key(items[i].weight), &items[i].weight, x.data, x.stride, isa.prepared_bytes(x, items[i].weight)};
      bytes += form.bytes;
    }
    if (!bytes) return;
    thread_local Buffer buffer;
    auto* to = static_cast<char*>(buffer.at_least(static_cast<size_t>(bytes)));
    for (Form* form = forms_; form < forms_ + count_; ++form) {
      if (!form->bytes) continue;
      const sbt::View& weight = *form->weight;
      const int64_t padded = weight.padded_cols();
      parallel_for(ceil_div(x.tokens, kTokenBlock), threads_for(x.tokens * padded), [&](int64_t block) {
        const int64_t first = block * kTokenBlock, end = first + kTokenBlock;
        isa.prepare(x, weight, first, end < x.tokens ? end : x.tokens, to);
      });
      form->x = to;
      form->stride = padded;
      to += form->bytes;
    }
  }

  void give(Product& p) const {
    const Form* form = find(p.weight);
    p.x = form->x;
    p.x_stride = form->stride;
  }

 private:
  static constexpr int kDtypes = 4, kMostLayouts = 6;  // per dtype

  struct Form {
    int key;
    const sbt::View* weight;
    const void* x;
    int64_t stride, bytes;
  };

  int key(const sbt::View& weight) const {
    return static_cast<int>(weight.dtype) + kDtypes * (isa_.layout ? isa_.layout(x_, weight) : 0);
  }
  const Form* find(const sbt::View& weight) const {
    for (const Form* form = forms_; form < forms_ + count_; ++form)
      if (form->key == key(weight)) return form;
    return nullptr;
  }

  const Isa& isa_;
  const Activations& x_;
  Form forms_[kDtypes * kMostLayouts];
  int64_t count_ = 0;
};

// Row tiles cut into parts of equal cost; heavy-tailed plans leave tiles of very different size.
class Parts {
 public:
  Parts(const sbt::View& weight, int64_t tokens)
      : weight_(weight), per_tile_(sbt::kWords * 4 + sbt::kTileRows * sbt::kTileCols * tokens / 16) {}

  int64_t total() const { return cost(weight_.row_tiles()); }

  // First row tile of part i of `count`.
  int64_t begin(int64_t i, int64_t count) const {
    const int64_t tiles = weight_.row_tiles();
    if (i >= count) return tiles;
    const int64_t target = cost(tiles) / count * i;
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
};

// A product but for the activations as the ISA wants them.
Product product_of(const Item& item, const Activations& x) {
  Product p{};
  p.weight = item.weight;
  p.given = x;
  p.tokens = x.tokens;
  p.bias = item.bias.data;
  p.bias_dtype = item.bias.dtype;
  p.y = item.y;
  p.y_stride = item.y_stride;
  p.y_dtype = x.dtype;
  return p;
}

}  // namespace

const Isa* const* isas() {
  static const Isa* const all[] = {
#if defined(ALPHAPRUNE_AMX)
      &kAmx,
#endif
#if defined(ALPHAPRUNE_AVX512BF16)
      &kAvx512bf16,
#endif
#if defined(ALPHAPRUNE_AVX512)
      &kAvx512,
#endif
#if defined(ALPHAPRUNE_AVX512VNNI)
      &kAvx512vnni,
#endif
#if defined(ALPHAPRUNE_AVX512BW)
      &kAvx512bw,
#endif
#if defined(ALPHAPRUNE_AVXVNNI)
      &kAvxvnni,
#endif
#if defined(ALPHAPRUNE_AVX2)
      &kAvx2,
#endif
#if defined(ALPHAPRUNE_NEONDOT)
      &kNeondot,
#endif
#if defined(ALPHAPRUNE_NEON)
      &kNeon,
#endif
      &kScalar,     nullptr};
  return all;
}

std::string unavailable(const Isa& isa) {
#if defined(__x86_64__)
  if (kEmulated) return {};
  const std::string name = isa.name;
  if (name == "amx") return cpu().without_amx;
  if (name.rfind("avx512", 0) == 0) {
    if (!cpu().os_zmm) return "the operating system does not save AVX-512 registers";
    if (name == "avx512bf16" && !cpu().avx512bf16) return "this CPU has no AVX-512 with VBMI, VBMI2, BITALG and BF16";
    if (name == "avx512bf16" && !cpu().amd) return "on Intel's CPUs VDPBF16PS is slower than what avx512 does";
    if (name == "avx512" && !cpu().avx512) return "this CPU has no AVX-512 with VBMI2 and VNNI";
    if (name == "avx512vnni" && !cpu().avx512vnni) return "this CPU has no AVX-512 with BW, DQ, VL and VNNI";
    if (!cpu().avx512bw) return "this CPU has no AVX-512 with BW, DQ and VL";
  }
  if (name == "avx2" || name == "avxvnni") {
    if (!cpu().avx2) return "this CPU has no AVX2 with FMA and F16C";
    if (!cpu().os_ymm) return "the operating system does not save AVX registers";
    if (name == "avxvnni" && !cpu().avxvnni) return "this CPU has no AVX-VNNI";
  }
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kAsimddp = 1ul << 20;  // HWCAP_ASIMDDP of Linux, which old headers lack
  if (std::string(isa.name) == "neondot" && !(getauxval(AT_HWCAP) & kAsimddp)) return "this CPU has no SDOT (asimddp)";
#elif defined(__aarch64__) && !defined(__APPLE__)
  if (std::string(isa.name) == "neondot") return "whether this CPU has SDOT is not known on this system";
#else
  static_cast<void>(isa);
#endif
  return {};
}

bool multiplies_twice() {
#if defined(__x86_64__)
  return kEmulated || (cpu().amd && cpu().family >= 26);
#else
  return false;
#endif
}

int64_t threads_for(int64_t operations) {
  if (operations < 1 << 18 || forked || omp_in_parallel()) return 1;
  return omp_get_max_threads();
}

void parallel(int64_t count, int64_t threads, void (*work)(void* context, int64_t i), void* context) {
  if (threads > count) threads = count;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) work(context, i);
    return;
  }
  // Every thread goes through its own stretch, the same one in every call, so that what it reads lies in one stream and
  // near its own core; whoever is done first helps the others, so that a thread that the system has put aside holds up
  // one part, not its whole share.
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  thread_local Buffer buffer;
  auto* stretches = static_cast<Stretch*>(buffer.at_least(static_cast<size_t>(threads) * sizeof(Stretch)));
  for (int64_t t = 0; t < threads; ++t) new (stretches + t) Stretch{{count * t / threads}, count * (t + 1) / threads};
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t mine = omp_get_thread_num();
    for (int64_t other = 0; other < threads; ++other) {
      Stretch& stretch = stretches[(mine + other) % threads];
      for (int64_t i; (i = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) work(context, i);
    }
  }
}

void multiply(const Isa& isa, const Item* items, int64_t count, const Activations& x) {
  if (x.tokens == 0 || count == 0) return;
  const Forms forms(isa, items, count, x);
  int64_t operations = 0, cost = 0;
  for (int64_t i = 0; i < count; ++i) {
    operations += items[i].weight.rows * items[i].weight.cols * x.tokens;
    cost += Parts(items[i].weight, x.tokens).total();
  }
  const int64_t threads = threads_for(operations), wanted = threads > 1 ? threads * kPartsPerThread : 1;
  // Each item is cut into its share of the parts, one at least.
  const auto parts_of = [&](const Item& item) {
    const int64_t share = wanted * Parts(item.weight, x.tokens).total() / (cost + 1);
    return share < 1 ? 1 : share;
  };
  int64_t parts = 0;
  for (int64_t i = 0; i < count; ++i) parts += parts_of(items[i]);
  parallel_for(parts, threads, [&](int64_t part) {
    const Item* item = items;
    int64_t mine = parts_of(*item);
    for (; part >= mine; mine = parts_of(*item)) {
      part -= mine;
      ++item;
    }
    Product p = product_of(*item, x);
    forms.give(p);
    const Parts cut(item->weight, x.tokens);
    alignas(64) unsigned char scratch[kScratchBytes];
    isa.product(p, cut.begin(part, mine), cut.begin(part + 1, mine), scratch);
  });
}

void multiply_dense(const Isa& isa, const void* weight, int64_t rows, int64_t cols, const Bias& bias, void* y,
                    const Activations& x) {
  const sbt::View view{weight, nullptr, nullptr, rows, cols, x.dtype};
  Product p = product_of({view, bias, y, rows}, x);
  p.x = x.data;
  p.x_stride = x.stride;
  if (isa.dense_rows(x.dtype) == DenseRows::floats) {
    const int64_t padded = view.padded_cols();
    thread_local Buffer buffer;
    auto* to = static_cast<float*>(buffer.at_least(static_cast<size_t>(x.tokens * padded) * sizeof(float)));
    parallel_for(x.tokens, threads_for(x.tokens * padded), [&](int64_t t) {
      const auto* from = static_cast<const char*>(x.data) + t * x.stride * size_of(x.dtype);
      isa.widen(from, x.dtype, cols, padded, to + t * padded);
    });
    p.x = to;
    p.x_stride = padded;
  }
  const int64_t tiles = view.row_tiles(), threads = threads_for(rows * cols * x.tokens);
  const int64_t wanted = threads > 1 ? threads * kPartsPerThread : 1, parts = wanted < tiles ? wanted : tiles;
  parallel_for(parts, threads, [&](int64_t i) {
    alignas(64) unsigned char scratch[kScratchBytes];
    isa.dense(p, tiles * i / parts, tiles * (i + 1) / parts, scratch);
  });
}

void expand(const Isa& isa, const sbt::View& weight, int64_t first, int64_t last, Dtype out_dtype, void* out) {
  const int64_t begin = first / sbt::kTileRows, end = ceil_div(last, sbt::kTileRows);
  const int64_t threads = threads_for((last - first) * weight.cols);
  parallel_for(end - begin, threads, [&](int64_t i) {
    auto* to = static_cast<char*>(out) + i * sbt::kTileRows * weight.cols * size_of(out_dtype);
    isa.expand(weight, begin + i, begin + i + 1, out_dtype, to);
  });
}

}  // namespace alphaprune
