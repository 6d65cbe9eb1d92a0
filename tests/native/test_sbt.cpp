// SBT without Python: every array ends at a page that may not be touched, outputs start as NaN, and each ISA is
// compared with a float64 product of the dense weight. Runs plainly and under the sanitizers (sanitize.py).
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/convert.h"
#include "cpu/dispatch.h"
#include "cpu/pack.h"

namespace {

using namespace alphaprune;

int failures = 0;

#define EXPECT(condition, ...)                    \
  do {                                            \
    if (!(condition)) {                           \
      ++failures;                                 \
      std::printf("%s:%d: ", __FILE__, __LINE__); \
      std::printf(__VA_ARGS__);                   \
      std::printf("\n");                          \
    }                                             \
  } while (0)

// `bytes` of memory whose end is the end of a page; the next page faults. Filled with NaN patterns.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t body = (bytes + page - 1) / page * page;
    mapped_ = body + page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + body, page, PROT_NONE)) std::abort();
    start_ = base_ + body - bytes;
    std::memset(start_, 0xff, bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(start_);
  }

 private:
  char* base_;
  char* start_;
  size_t mapped_;
};

struct Case {
  int64_t rows, cols, tokens;
  double density;
  Dtype weight, x, bias;
};

struct Problem {
  explicit Problem(const Case& c, uint32_t seed) : c(c), random(seed) {
    const int64_t size = size_of(c.weight);
    dense = std::make_unique<Guarded>(c.rows * c.cols * size);
    keep = std::make_unique<Guarded>(c.rows * c.cols);
    x = std::make_unique<Guarded>(c.tokens * c.cols * size_of(c.x));
    bias = std::make_unique<Guarded>(c.rows * size_of(c.bias));
    fill(*dense, c.rows * c.cols, c.weight);
    fill(*x, c.tokens * c.cols, c.x);
    fill(*bias, c.rows, c.bias);
    std::bernoulli_distribution kept(c.density);
    for (int64_t i = 0; i < c.rows * c.cols; ++i) keep->as<uint8_t>()[i] = kept(random);
    const int64_t tiles = ceil_div(c.rows, sbt::kTileRows) * ceil_div(c.cols, sbt::kTileCols);
    mask = std::make_unique<Guarded>(tiles * sbt::kWords * 4);
    offsets = std::make_unique<Guarded>((tiles + 1) * 4);
    EXPECT(pack_mask(dense->as<void>(), keep->as<uint8_t>(), c.rows, c.cols, c.weight, mask->as<uint32_t>(),
                     offsets->as<uint32_t>()),
           "pack_mask");
    const int64_t units = offsets->as<uint32_t>()[tiles];
    values = std::make_unique<Guarded>(units * sbt::kUnit * size + sbt::kTailBytes);
    pack_values(dense->as<void>(), c.rows, c.cols, c.weight, mask->as<uint32_t>(), offsets->as<uint32_t>(),
                values->as<void>());
  }

  void fill(const Guarded& to, int64_t count, Dtype dtype) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) store_float(to.as<void>(), i, dtype, normal(random));
  }
  double weight(int64_t n, int64_t k) const {
    const int64_t at = n * c.cols + k;
    return keep->as<uint8_t>()[at] ? load_float(dense->as<void>(), at, c.weight) : 0.0f;
  }
  sbt::View view() const {
    return {values->as<void>(), mask->as<uint32_t>(), offsets->as<uint32_t>(), c.rows, c.cols, c.weight};
  }

  Case c;
  std::mt19937 random;
  std::unique_ptr<Guarded> dense, keep, x, bias, mask, offsets, values;
};

double ulp(double value, Dtype dtype) {
  const int bits = dtype == Dtype::float32 ? 23 : dtype == Dtype::float16 ? 10 : 7;
  const double least = dtype == Dtype::float32 ? 0x1p-149 : dtype == Dtype::float16 ? 0x1p-24 : 0x1p-133;
  return std::fmax(std::ldexp(1.0, std::ilogb(value == 0 ? least : value) - bits), least);
}

void check_product(const Isa& isa, const Problem& p, bool with_bias) {
  const Case& c = p.c;
  const Guarded y(c.tokens * c.rows * size_of(c.x));
  const Bias bias{with_bias ? p.bias->as<void>() : nullptr, c.bias};
  multiply(isa, p.view(), {p.x->as<void>(), c.x, c.tokens, c.cols}, bias, y.as<void>(), c.rows);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t n = 0; n < c.rows; ++n) {
      double sum = 0, terms = 0;
      for (int64_t k = 0; k < c.cols; ++k) {
        const double term = p.weight(n, k) * load_float(p.x->as<void>(), t * c.cols + k, c.x);
        sum += term;
        terms += std::fabs(term);
      }
      if (with_bias) {
        const double b = load_float(p.bias->as<void>(), n, c.bias);
        sum += b;
        terms += std::fabs(b);
      }
      const double got = load_float(y.as<void>(), t * c.rows + n, c.x);
      const double bound = static_cast<double>(c.cols + 1) * 0x1p-24 * terms + ulp(sum, c.x);
      EXPECT(std::fabs(got - sum) <= bound, "%s [%ld, %ld] x %ld: y[%ld, %ld] = %g, wanted %g within %g", isa.name,
             c.rows, c.cols, c.tokens, t, n, got, sum, bound);
    }
  }
}

void check_expand(const Isa& isa, const Problem& p) {
  const Case& c = p.c;
  for (int64_t first = 0; first < c.rows; first += 32) {
    const int64_t size = size_of(c.weight);
    const Guarded out((c.rows - first) * c.cols * size);
    expand(isa, p.view(), first, c.rows, out.as<void>());
    for (int64_t i = first * c.cols; i < c.rows * c.cols; ++i) {
      uint32_t wanted = 0, got = 0;
      if (p.keep->as<uint8_t>()[i]) std::memcpy(&wanted, p.dense->as<char>() + i * size, size);
      std::memcpy(&got, out.as<char>() + (i - first * c.cols) * size, size);
      EXPECT(got == wanted, "%s expand of weight %ld: %x, wanted %x", isa.name, i, got, wanted);
    }
  }
}

void check_unpacked_mask(const Problem& p) {
  const Guarded keep(p.c.rows * p.c.cols);
  unpack_mask(p.mask->as<uint32_t>(), p.c.rows, p.c.cols, keep.as<uint8_t>());
  EXPECT(!std::memcmp(keep.as<uint8_t>(), p.keep->as<uint8_t>(), p.c.rows * p.c.cols), "the mask does not come back");
}

void check_damage(const Problem& p) {
  const Case& c = p.c;
  uint32_t* mask = p.mask->as<uint32_t>();
  uint32_t* offsets = p.offsets->as<uint32_t>();
  EXPECT(check(mask, offsets, c.rows, c.cols).fault == Fault::none, "a good weight is refused");
  offsets[1] += 1;
  EXPECT(check(mask, offsets, c.rows, c.cols).fault == Fault::count, "a wrong offset passes");
  offsets[1] -= 1;
  offsets[0] = 1;
  EXPECT(check(mask, offsets, c.rows, c.cols).fault == Fault::start, "a wrong start passes");
  offsets[0] = 0;
  if (c.cols % sbt::kTileCols) {
    const int64_t tile = ceil_div(c.cols, sbt::kTileCols) - 1, col = c.cols % sbt::kTileCols;
    uint32_t& word = mask[tile * sbt::kWords + sbt::word_of(0, col)];
    word ^= 1u << sbt::bit_of(0, col);
    EXPECT(check(mask, offsets, c.rows, c.cols).fault != Fault::none, "a weight outside the shape passes");
    word ^= 1u << sbt::bit_of(0, col);
  }
}

// Every 16-bit float comes back from float32; a value half-way to the next goes to the even one, past it to the next.
void check_conversions(const char* name, float (*widen)(uint16_t), uint16_t (*round)(float), uint32_t largest) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float wide = widen(static_cast<uint16_t>(bits));
    if (std::isnan(wide)) {
      EXPECT(std::isnan(widen(round(wide))), "%s NaN %x is lost", name, bits);
      continue;
    }
    EXPECT(round(wide) == bits, "%s %x does not come back", name, bits);
    if ((bits & 0x7fff) >= largest) continue;
    const float next = widen(static_cast<uint16_t>(bits + 1));
    const float middle = wide + (next - wide) / 2;
    EXPECT(round(middle) == bits + (bits & 1), "%s %x and the next: the tie is not to even", name, bits);
    EXPECT(round(std::nextafterf(middle, next)) == bits + 1, "%s %x: past the tie", name, bits);
  }
  EXPECT(std::isinf(widen(round(3.4e38f * 2))), "%s: infinity is lost", name);
}

// The same bits from several threads at once, and in a child that has only one.
void check_threads_and_fork(const Isa& isa) {
  const Problem p({512, 300, 2, 0.5, Dtype::bfloat16, Dtype::bfloat16, Dtype::float32}, 7);
  const auto product = [&] {
    std::vector<uint16_t> y(2 * 512, 0xffff);
    multiply(isa, p.view(), {p.x->as<void>(), Dtype::bfloat16, 2, 300}, {nullptr, Dtype::float32}, y.data(), 512);
    return y;
  };
  const auto wanted = product();
  std::vector<std::thread> threads;
  std::vector<char> same(4, 0);
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      same[i] = 1;
      for (int repeat = 0; repeat < 20; ++repeat) same[i] &= product() == wanted;
    });
  for (auto& thread : threads) thread.join();
  for (const char each : same) EXPECT(each, "%s: threads disturb each other", isa.name);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(product() == wanted ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT(status == 0, "%s: a forked child ended with %d", isa.name, status);
}

}  // namespace

int main() {
  const Dtype dtypes[] = {Dtype::float32, Dtype::float16, Dtype::bfloat16};
  check_conversions("bfloat16", bfloat16_to_float, float_to_bfloat16, 0x7f7f);
  check_conversions("float16", float16_to_float, float_to_float16, 0x7bff);
  for (const Isa* const* isa = isas(); *isa; ++isa) {
    if (const std::string reason = unavailable(**isa); !reason.empty()) {
      std::printf("%s is not tested: %s\n", (*isa)->name, reason.c_str());
      continue;
    }
    uint32_t seed = 0;
    for (const Dtype weight : dtypes)
      for (const Dtype x : dtypes)
        for (const double density : {0.0, 0.45, 1.0})
          for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {16, 64}, {19, 70}, {40, 333}})
            for (const int64_t tokens : {1, 2, 3, 4, 5, 67}) {
              const Problem p({rows, cols, tokens, density, weight, x, dtypes[seed % 3]}, seed);
              check_product(**isa, p, seed++ % 2);
              if (tokens == 1) check_expand(**isa, p);
              if (tokens == 2) check_damage(p);
              if (tokens == 3) check_unpacked_mask(p);
            }
    check_threads_and_fork(**isa);
    std::printf("%s: %u products\n", (*isa)->name, seed);
  }
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
