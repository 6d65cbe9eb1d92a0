// SBT without Python: every array ends at a page that may not be touched, outputs start as NaN, and each ISA is
// compared with a float64 product of the dense weight. Runs plainly and under the sanitizers (sanitize.py).
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/convert.h"
#include "cpu/dispatch.h"
#include "cpu/pack.h"
#include "emulator/tiles.h"
#include "expect.h"

namespace {

using namespace alphaprune;

bool quick = false;  // every shape, but one density and few random cases: for valgrind

struct Case {
  int64_t rows, cols, tokens;
  double density;
  Dtype weight, x, bias;
  bool grouped = false;  // int8: a scale per 128 columns instead of one per row
  bool special = false;  // infinities, NaN and very small numbers among weights and activations
  bool bytes = false;    // int8: activations may be rounded to 8 bits
  bool uneven = false;   // a few rows of every other macro tile are kept wholly
  int in_word = 0;       // instead of `density`: so many of each mask word, and in one of many words one more
};

struct Problem {
  explicit Problem(const Case& c, uint32_t seed) : c(c), random(seed) {
    const int64_t size = size_of(c.weight);
    dense = std::make_unique<Guarded>(c.rows * c.cols * size);
    keep = std::make_unique<Guarded>(c.rows * c.cols);
    x = std::make_unique<Guarded>(c.tokens * c.cols * size_of(c.x));
    bias = std::make_unique<Guarded>(c.rows * size_of(c.bias));
    if (c.weight == Dtype::int8) {
      groups = c.grouped ? ceil_div(c.cols, sbt::kScaleCols) : 1;
      scale = std::make_unique<Guarded>(c.rows * groups * 4);
      for (int64_t i = 0; i < c.rows * groups; ++i)
        scale->as<float>()[i] = std::uniform_real_distribution<float>(0.001f, 0.02f)(random);
      for (int64_t i = 0; i < c.rows * c.cols; ++i)
        dense->as<int8_t>()[i] = static_cast<int8_t>(std::uniform_int_distribution<int>(-127, 127)(random));
    } else {
      fill(*dense, c.rows * c.cols, c.weight);
    }
    fill(*x, c.tokens * c.cols, c.x);
    fill(*bias, c.rows, c.bias);
    if (c.special) plant();
    std::bernoulli_distribution kept(c.density);
    for (int64_t i = 0; i < c.rows * c.cols; ++i)
      keep->as<uint8_t>()[i] = kept(random) || (c.uneven && i / c.cols % 16 < 3 && i % c.cols % 128 >= 64);
    if (c.in_word > 0) keep_in_words();
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
  void keep_in_words() {
    std::memset(keep->as<void>(), 0, static_cast<size_t>(c.rows * c.cols));
    int64_t word = 0;
    for (int64_t row = 0; row < c.rows; row += 2)
      for (int64_t col = 0; col < c.cols; col += sbt::kStepCols, ++word) {
        std::vector<int64_t> there;
        for (int64_t r = row; r < std::min(row + 2, c.rows); ++r)
          for (int64_t k = col; k < std::min(col + sbt::kStepCols, c.cols); ++k) there.push_back(r * c.cols + k);
        std::shuffle(there.begin(), there.end(), random);
        const size_t wanted = static_cast<size_t>(c.in_word) + (word % 97 == 5);
        for (size_t i = 0; i < std::min(wanted, there.size()); ++i) keep->as<uint8_t>()[there[i]] = 1;
      }
  }
  // Tokens 0, 5, 10 ... stay as they are, 1, 6 ... become tiny, the others get an infinity, two, a NaN; so does a
  // weight.
  void plant() {
    const float inf = std::numeric_limits<float>::infinity();
    for (int64_t t = 0; t < c.tokens; ++t) {
      const int64_t row = t * c.cols, at = row + t * 37 % c.cols;
      if (t % 5 == 1 && c.x != Dtype::float16)
        for (int64_t k = 0; k < c.cols; ++k)
          store_float(x->as<void>(), row + k, c.x, std::ldexp(load_float(x->as<void>(), row + k, c.x), -116));
      if (t % 5 == 2 || t % 5 == 3) store_float(x->as<void>(), at, c.x, inf);
      if (t % 5 == 3) store_float(x->as<void>(), row + c.cols - 1, c.x, -inf);
      if (t % 5 == 4) store_float(x->as<void>(), at, c.x, std::nanf(""));
    }
    store_float(bias->as<void>(), 0, c.bias, bits_to_float(0x7fffffff));  // a NaN that rounding would carry over
    if (c.weight == Dtype::int8) return;
    store_float(dense->as<void>(), c.rows / 2 * c.cols, c.weight, inf);
    store_float(dense->as<void>(), (c.rows - 1) * c.cols, c.weight, std::nanf(""));
  }
  double weight(int64_t n, int64_t k) const {
    const int64_t at = n * c.cols + k;
    if (!keep->as<uint8_t>()[at]) return 0;
    return c.weight == Dtype::int8 ? scaled(n, k) : load_float(dense->as<void>(), at, c.weight);
  }
  // value * scale as float32 rounds it
  float scaled(int64_t n, int64_t k) const {
    const float value = dense->as<int8_t>()[n * c.cols + k];
    return value * scale->as<float>()[n * groups + (groups > 1 ? k / sbt::kScaleCols : 0)];
  }
  sbt::View view() const {
    return {values->as<void>(),
            mask->as<uint32_t>(),
            offsets->as<uint32_t>(),
            c.rows,
            c.cols,
            c.weight,
            scale ? scale->as<float>() : nullptr,
            groups,
            c.bytes};
  }
  Item item(void* y, bool with_bias) const {
    return {view(), {with_bias ? bias->as<void>() : nullptr, c.bias}, y, c.rows};
  }
  Activations activations() const { return {x->as<void>(), c.x, c.tokens, c.cols}; }

  Case c;
  std::mt19937 random;
  std::unique_ptr<Guarded> dense, keep, x, bias, mask, offsets, values, scale;
  int64_t groups = 0;
};

double ulp(double value, Dtype dtype) {
  const int bits = dtype == Dtype::float32 ? 23 : dtype == Dtype::float16 ? 10 : 7;
  const double least = dtype == Dtype::float32 ? 0x1p-149 : dtype == Dtype::float16 ? 0x1p-24 : 0x1p-133;
  return std::fmax(std::ldexp(1.0, std::ilogb(value == 0 ? least : value) - bits), least);
}

// What an ISA may round the activations of int8 weights by, in the largest of 128 columns: half a unit of 1 / 32639 or
// 1 / 127, and what the quotient is rounded by.
double rounding_of(const Isa& isa, const Case& c) {
  if (c.weight != Dtype::int8) return 0;
  for (const char* name : {"avxvnni", "avx512vnni", "avx512", "avx512bf16", "amx", "neondot"})
    if (c.bytes && !std::strcmp(isa.name, name)) return 0x1.03p-8;
  return c.x == Dtype::float32 ? 0 : 0x1.04p-16;
}

// Every output, or of many every `step`-th.
void check_outputs(const Isa& isa, const Problem& p, const Guarded& y, bool with_bias, int64_t step) {
  const Case& c = p.c;
  const double by = rounding_of(isa, c);
  // VDPBF16PS and AMX make zero of what is subnormal: of products, of a sum that comes near zero, and of what they are
  // given, which beside an infinity is NaN.
  const bool flushes = !std::strcmp(isa.name, "avx512bf16") || !std::strcmp(isa.name, "amx");
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t n = 0; n < c.rows; ++n) {
      if ((t * c.rows + n) % step) continue;
      double sum = 0, terms = 0, rounding = 0, flushed = 0;
      for (int64_t first = 0; first < c.cols; first += sbt::kScaleCols) {
        double weights = 0, largest = 0;
        for (int64_t k = first; k < first + sbt::kScaleCols && k < c.cols; ++k) {
          const double w = p.weight(n, k);
          double a = load_float(p.x->as<void>(), t * c.cols + k, c.x);
          if (flushes && std::isinf(w) && std::fabs(a) < 0x1p-126) a = 0;
          sum += w * a;
          terms += std::fabs(w * a);
          if (std::fabs(w * a) < 0x1p-126) flushed += std::fabs(w * a);
          weights += std::fabs(w);
          largest = std::fmax(largest, std::fabs(a));
        }
        rounding += weights * largest * by;
      }
      if (with_bias) {
        const double b = load_float(p.bias->as<void>(), n, c.bias);
        sum += b;
        terms += std::fabs(b);
      }
      const double got = load_float(y.as<void>(), t * c.rows + n, c.x);
      if (!std::isfinite(sum)) {
        EXPECT(std::isnan(sum) ? std::isnan(got) : got == sum, "%s [%ld, %ld] x %ld: y[%ld, %ld] = %g, wanted %g",
               isa.name, c.rows, c.cols, c.tokens, t, n, got, sum);
        continue;
      }
      if (flushes && terms < 0x1p-100) rounding += flushed + 0x1p-126;
      const double bound = static_cast<double>(c.cols + 2) * 0x1p-24 * terms + rounding + ulp(sum, c.x);
      EXPECT(std::fabs(got - sum) <= bound, "%s [%ld, %ld] x %ld: y[%ld, %ld] = %g, wanted %g within %g", isa.name,
             c.rows, c.cols, c.tokens, t, n, got, sum, bound);
    }
  }
}

void check_product(const Isa& isa, const Problem& p, bool with_bias, int64_t step = 1) {
  const Guarded y(p.c.tokens * p.c.rows * size_of(p.c.x));
  const Item item = p.item(y.as<void>(), with_bias);
  multiply(isa, &item, 1, p.activations());
#if defined(ALPHAPRUNE_EMULATE)
  EXPECT(!emulated_tiles.configured, "%s leaves its tiles configured", isa.name);
#endif
  check_outputs(isa, p, y, with_bias, step);
}

// Dense weights: rows, columns and tokens around what is taken at once, infinities and NaN, any number of threads.
void check_dense(const Isa& isa, uint32_t& seed) {
  if (!takes_dense(isa, Dtype::bfloat16)) return;
  for (const int64_t rows : {1, 15, 16, 33, 150})
    for (const int64_t cols : {1, 31, 32, 33, 127, 128, 129, 300, 2100})
      for (const int64_t tokens : {1, 2, 3, 4, 5, 9, 70}) {
        const Dtype dtype = seed / 2 % 2 ? Dtype::bfloat16 : Dtype::float16;
        if (tokens == 70 && rows * cols > 10000) continue;
        EXPECT(takes_dense(isa, dtype), "%s has no dense product", isa.name);
        const Problem p({rows, cols, tokens, 1, dtype, dtype, Dtype::float32, false, seed % 3 == 0}, seed);
        const Guarded y(tokens * rows * 2);
        const Item item = p.item(y.as<void>(), seed++ % 2);
        multiply_dense(isa, p.dense->as<void>(), rows, cols, item.bias, y.as<void>(), p.activations());
        check_outputs(isa, p, y, item.bias.data, 1);
      }
}

void check_expand(const Isa& isa, const Problem& p) {
  const Case& c = p.c;
  for (int64_t first = 0; first < c.rows; first += 32) {
    const int64_t size = size_of(c.weight);
    const Guarded out((c.rows - first) * c.cols * size);
    expand(isa, p.view(), first, c.rows, c.weight, out.as<void>());
    for (int64_t i = first * c.cols; i < c.rows * c.cols; ++i) {
      uint32_t wanted = 0, got = 0;
      if (p.keep->as<uint8_t>()[i]) std::memcpy(&wanted, p.dense->as<char>() + i * size, size);
      std::memcpy(&got, out.as<char>() + (i - first * c.cols) * size, size);
      EXPECT(got == wanted, "%s expand of weight %ld: %x, wanted %x", isa.name, i, got, wanted);
    }
    if (c.weight != Dtype::int8) continue;
    for (const Dtype to : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
      const Guarded floats((c.rows - first) * c.cols * size_of(to)), rounded(size_of(to));
      expand(isa, p.view(), first, c.rows, to, floats.as<void>());
      for (int64_t i = first * c.cols; i < c.rows * c.cols; ++i) {
        const bool kept = p.keep->as<uint8_t>()[i];
        store_float(rounded.as<void>(), 0, to, kept ? p.scaled(i / c.cols, i % c.cols) : 0.0f);
        const float wanted = load_float(rounded.as<void>(), 0, to);
        const float got = load_float(floats.as<void>(), i - first * c.cols, to);
        EXPECT(got == wanted, "%s expand of integer %ld: %g, wanted %g", isa.name, i, got, wanted);
      }
    }
  }
}

// Weights that share their activations give what each gives alone, whatever their dtypes and sizes.
void check_group(const Isa& isa, Dtype x, int64_t tokens) {
  std::vector<std::unique_ptr<Problem>> problems;
  const int64_t rows[] = {300, 17, 1, 640, 50, 33, 90, 16};
  const Dtype weights[] = {Dtype::bfloat16, Dtype::float32, Dtype::int8, Dtype::bfloat16,
                           Dtype::int8,     Dtype::int8,    Dtype::int8, Dtype::float16};
  const double densities[] = {0.2, 0.4, 0.6, 0.8, 1, 0.15, 0.15, 0.2};  // of what is skipped and what is not
  for (uint32_t i = 0; i < std::size(rows); ++i)
    problems.push_back(std::make_unique<Problem>(
        Case{rows[i], 200, tokens, densities[i], weights[i], x, x, false, false, i == 4 || i == 6}, i));
  std::vector<Item> items;
  std::vector<std::unique_ptr<Guarded>> together;
  for (const auto& p : problems) {
    together.push_back(std::make_unique<Guarded>(tokens * p->c.rows * size_of(x)));
    items.push_back(p->item(together.back()->as<void>(), true));
  }
  const Activations shared = problems[0]->activations();
  multiply(isa, items.data(), static_cast<int64_t>(items.size()), shared);
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t bytes = tokens * rows[i] * size_of(x);
    const Guarded alone(bytes);
    Item item = items[i];
    item.y = alone.as<void>();
    multiply(isa, &item, 1, shared);
    EXPECT(!std::memcmp(alone.as<char>(), together[i]->as<char>(), bytes), "%s: weight %zu of a group differs",
           isa.name, i);
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
  EXPECT(check(mask, offsets, c.rows, c.cols, c.weight).fault == Fault::none, "a good weight is refused");
  offsets[1] += 1;
  EXPECT(check(mask, offsets, c.rows, c.cols, c.weight).fault == Fault::count, "a wrong offset passes");
  offsets[1] -= 1;
  offsets[0] = 1;
  EXPECT(check(mask, offsets, c.rows, c.cols, c.weight).fault == Fault::start, "a wrong start passes");
  offsets[0] = 0;
  if (c.cols % sbt::kTileCols) {
    const int64_t tile = ceil_div(c.cols, sbt::kTileCols) - 1, col = c.cols % sbt::kTileCols;
    uint32_t& word = mask[tile * sbt::kWords + sbt::word_of(0, col)];
    word ^= 1u << sbt::bit_of(0, col);
    EXPECT(check(mask, offsets, c.rows, c.cols, c.weight).fault != Fault::none, "a weight outside the shape passes");
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
    const Item item = p.item(y.data(), false);
    multiply(isa, &item, 1, p.activations());
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

constexpr Dtype kFloats[] = {Dtype::float32, Dtype::float16, Dtype::bfloat16};
// Weights, and whether activations beside them may be rounded to 8 bits.
constexpr std::pair<Dtype, bool> kKinds[] = {{Dtype::float32, false},
                                             {Dtype::float16, false},
                                             {Dtype::bfloat16, false},
                                             {Dtype::int8, false},
                                             {Dtype::int8, true}};

void check_shapes(const Isa& isa, uint32_t& seed) {
  for (const auto& [weight, bytes] : kKinds)
    for (const Dtype x : kFloats)
      for (const double density : {0.0, 0.45, 1.0})
        for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {16, 64}, {19, 70}, {40, 333}})
          for (const int64_t tokens : {1, 2, 3, 4, 5, 7, 17, 67}) {
            if (density != 0.45 && (quick || (tokens > 16 && density == 0))) continue;
            const Problem p({rows, cols, tokens, density, weight, x, kFloats[seed % 3], seed % 4 > 1, false, bytes},
                            seed);
            check_product(isa, p, seed++ % 2);
            if (tokens == 1) check_expand(isa, p);
            if (tokens == 2) check_damage(p);
            if (tokens == 3) check_unpacked_mask(p);
          }
}

// Any size from 1 to 300, any number of tokens, any density, on 1, 2, 3 and 7 threads.
void check_random(const Isa& isa, uint32_t& seed, int count) {
  std::mt19937 random(count);
  const auto up_to = [&](int64_t most) { return std::uniform_int_distribution<int64_t>(1, most)(random); };
  const int threads[] = {1, 2, 3, 7}, before = omp_get_max_threads();
  for (int i = 0; i < count; ++i) {
    omp_set_num_threads(threads[i % 4]);
    const double density = std::uniform_real_distribution<double>()(random);
    const auto& [weight, bytes] = kKinds[up_to(5) - 1];
    const Problem p({up_to(300), up_to(300), up_to(i % 3 ? 9 : 40), density, weight, kFloats[up_to(3) - 1],
                     kFloats[up_to(3) - 1], i % 2 == 0, false, bytes},
                    seed);
    check_product(isa, p, seed++ % 2);
  }
  omp_set_num_threads(before);
}

// Infinities and NaN come out where the dense product, zeros included, has them; tokens beside them are not touched.
void check_special(const Isa& isa, uint32_t& seed) {
  for (const auto& [weight, bytes] : kKinds)
    for (const Dtype x : kFloats)
      for (const int64_t tokens : {1, 2, 5, 8, 21}) {
        const Problem p({40, 333, tokens, 0.5, weight, x, kFloats[seed % 3], seed % 2 == 0, true, bytes}, seed);
        check_product(isa, p, seed++ % 4 < 2);
      }
}

// Many tokens of weights of which few are kept, where zeros are skipped; once with infinities and NaN, once with a few
// rows that are fuller than the others.
void check_sparse(const Isa& isa, uint32_t& seed) {
  for (const auto& [weight, bytes] : {kKinds[2], kKinds[3], kKinds[4]})
    for (const Dtype x : {Dtype::bfloat16, Dtype::float16})
      for (const double density : {0.0, 0.1, 0.3})
        for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {19, 70}, {40, 333}})
          for (const int64_t tokens : {12, 17, 24, 33, 64, 81}) {
            if (quick && (density != 0.1 || tokens == 64)) continue;
            if (x == Dtype::float16 && (weight != Dtype::int8 || tokens > 33)) continue;
            const Problem p({rows, cols, tokens, density, weight, x, kFloats[seed % 3], seed % 2 == 0, density == 0.3,
                             bytes, density == 0.1},
                            seed);
            check_product(isa, p, seed++ % 4 < 2);
          }
}

// Words that keep just as many weights as half of a vector has, and some that keep one more: N:M patterns have such.
void check_words(const Isa& isa, uint32_t& seed) {
  for (const auto& [weight, bytes] : {kKinds[2], kKinds[3], kKinds[4]})
    for (const int in_word : {1, 8, 16})
      for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{19, 70}, {40, 333}, {35, 1100}})
        for (const int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 9, 14}) {
          if (quick && (in_word != 16 || tokens > 4)) continue;
          Case c{rows, cols, tokens, 0, weight, Dtype::bfloat16, kFloats[seed % 3], seed % 2 == 0, false, bytes};
          c.in_word = in_word;
          check_product(isa, Problem(c, seed), seed % 4 < 2);
          ++seed;
        }
}

// More rows, columns and tokens than any kernel takes at once.
void check_large(const Isa& isa, uint32_t& seed) {
  for (const auto& [weight, bytes] : {kKinds[2], kKinds[3], kKinds[4]}) {
    const Problem p({150, 2100, 300, 0.3, weight, Dtype::bfloat16, Dtype::float32, true, false, bytes}, seed);
    check_product(isa, p, seed++ % 2, 23);
  }
}

}  // namespace

// Names of ISAs as arguments: those only. `quick` before them: fewer cases.
int main(int count, char** names) {
  quick = count > 1 && !std::strcmp(names[1], "quick");
  check_conversions("bfloat16", bfloat16_to_float, float_to_bfloat16, 0x7f7f);
  check_conversions("float16", float16_to_float, float_to_float16, 0x7bff);
  for (const Isa* const* isa = isas(); *isa; ++isa) {
    if (!chosen(count, names, quick, (*isa)->name)) continue;
    if (const std::string reason = unavailable(**isa); !reason.empty()) {
      std::printf("%s is not tested: %s\n", (*isa)->name, reason.c_str());
      continue;
    }
    uint32_t seed = 0;
    check_shapes(**isa, seed);
    check_random(**isa, seed, quick ? 20 : 120);
    check_special(**isa, seed);
    check_sparse(**isa, seed);
    check_words(**isa, seed);
    check_large(**isa, seed);
    check_dense(**isa, seed);
    for (const Dtype x : kFloats)
      for (const int64_t tokens : {1, 3, 20, 70}) check_group(**isa, x, tokens);
    check_threads_and_fork(**isa);
    std::printf("%s: %u products\n", (*isa)->name, seed);
  }
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
