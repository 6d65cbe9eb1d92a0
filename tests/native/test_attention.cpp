// Attention of a decode step without Python: every array ends at a page that may not be touched, what must not be read
// is NaN, and each ISA's loops are compared with a softmax in float64. Runs plainly and under the sanitizers
// (sanitize.py).
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cpu/attention.h"
#include "cpu/convert.h"
#include "cpu/dispatch.h"
#include "cpu/norm.h"
#include "expect.h"

namespace {

using namespace alphaprune;

constexpr double kUnit = 0x1p-24;      // rounding of float32
constexpr int64_t kNowhere = 1 << 30;  // a page that faults
constexpr int64_t kGap = 3;            // elements between the rows of q, of k, of v and of the turns

struct Case {
  std::vector<int64_t> positions;
  int64_t key_heads, shared, dim, page, window;
  Dtype dtype;
  bool by_heads = false;  // heads outside positions, each with its own stretch of a page; else positions outside heads
  bool normed = false;
  bool one_turn = false;  // cosine and sine of the first for all
  float size = 1;         // of what is drawn
};

struct Problem {
  Problem(const Case& c, uint32_t seed) : c(c), random(seed) {
    const int64_t count = sequences(), heads = c.key_heads * c.shared;
    q = drawn(rows(count, heads * c.dim));
    k = drawn(rows(count, c.key_heads * c.dim));
    v = drawn(rows(count, c.key_heads * c.dim));
    q_weight = drawn(c.dim);
    k_weight = drawn(c.dim);
    const int64_t turns = rows(c.one_turn ? 1 : count, c.dim / 2);
    cos = std::make_unique<Guarded>(turns * size_of(c.dtype));
    sin = std::make_unique<Guarded>(turns * size_of(c.dtype));
    for (int64_t i = 0; i < turns; ++i) {
      const double angle = std::uniform_real_distribution<double>(0, 6.3)(random);
      store_float(cos->as<void>(), i, c.dtype, static_cast<float>(std::cos(angle)));
      store_float(sin->as<void>(), i, c.dtype, static_cast<float>(std::sin(angle)));
    }
    place_pages();
    fill_cache();
  }

  int64_t sequences() const { return static_cast<int64_t>(c.positions.size()); }
  int64_t first(int64_t s) const { return c.window ? std::max<int64_t>(0, c.positions[s] + 1 - c.window) : 0; }
  int64_t at(int64_t s, int64_t position, int64_t key_head) const {
    const int64_t page = table[slots[s] * table_stride + position / c.page] * c.page * c.key_heads * c.dim;
    const int64_t inside = position % c.page;
    return page + (c.by_heads ? key_head * c.page + inside : inside * c.key_heads + key_head) * c.dim;
  }
  float key(int64_t i) const { return load_float(keys->as<void>(), i, c.dtype); }
  float value(int64_t i) const { return load_float(values->as<void>(), i, c.dtype); }

  Attention attention(const Guarded& out) const {
    const int64_t heads = c.key_heads * c.shared, all = c.page * c.key_heads * c.dim;
    Attention p{};
    p.q = q->as<void>(), p.k = k->as<void>(), p.v = v->as<void>(), p.out = out.as<void>();
    p.q_stride = heads * c.dim + kGap, p.k_stride = p.v_stride = c.key_heads * c.dim + kGap;
    p.keys = keys->as<void>(), p.values = values->as<void>();
    p.page = c.page, p.page_stride = all;
    p.position_stride = c.by_heads ? c.dim : c.key_heads * c.dim;
    p.head_stride = c.by_heads ? c.page * c.dim : c.dim;
    p.table = table.data(), p.table_stride = table_stride, p.slots = slots.data(), p.positions = c.positions.data();
    p.cos = cos->as<void>(), p.sin = sin->as<void>(), p.turn_stride = c.one_turn ? 0 : c.dim / 2 + kGap;
    if (c.normed) p.q_weight = q_weight->as<void>(), p.k_weight = k_weight->as<void>();
    p.q_epsilon = 1e-6f, p.k_epsilon = 1e-2f;
    p.window = c.window, p.sequences = sequences(), p.heads = heads, p.key_heads = c.key_heads, p.dim = c.dim;
    p.dtype = c.dtype;
    return p;
  }
  std::unique_ptr<Guarded> run(const Isa& isa) const {
    auto out = std::make_unique<Guarded>(out_bytes());
    attend(isa, attention(*out));
    return out;
  }
  size_t out_bytes() const { return sequences() * c.key_heads * c.shared * c.dim * size_of(c.dtype); }

  Case c;
  std::mt19937 random;
  std::unique_ptr<Guarded> q, k, v, cos, sin, q_weight, k_weight, keys, values;
  std::vector<int64_t> table, slots;
  int64_t table_stride = 0, end = 0;  // elements of the cache: up to the last that is some sequence's

 private:
  // Elements of rows with gaps between them.
  static int64_t rows(int64_t count, int64_t each) { return count * (each + kGap) - kGap; }

  void draw(const Guarded& to, int64_t from, int64_t count) {
    std::normal_distribution<float> normal(0, c.size);
    for (int64_t i = from; i < from + count; ++i) store_float(to.as<void>(), i, c.dtype, normal(random));
  }
  std::unique_ptr<Guarded> drawn(int64_t count) {
    auto made = std::make_unique<Guarded>(count * size_of(c.dtype));
    draw(*made, 0, count);
    return made;
  }
  // Pages in any order but for the last one in memory, which is the last of a sequence: where it is not full, the cache
  // ends inside it. Pages that are not seen any more are nowhere.
  void place_pages() {
    std::vector<int64_t> needed;
    for (const int64_t position : c.positions) needed.push_back(position / c.page + 1);
    int64_t total = 0;
    for (int64_t s = 0; s < sequences(); ++s) total += needed[s] - first(s) / c.page;
    std::vector<int64_t> order;
    for (int64_t i = 0; i + 1 < total; ++i) order.push_back(i);
    std::shuffle(order.begin(), order.end(), random);
    table_stride = *std::max_element(needed.begin(), needed.end()) + 1;
    table.assign((sequences() + 1) * table_stride, kNowhere);
    for (int64_t s = 0; s < sequences(); ++s) slots.push_back(s + 1);  // nobody has slot 0
    std::shuffle(slots.begin(), slots.end(), random);
    const int64_t last = static_cast<int64_t>(random() % sequences());
    table[slots[last] * table_stride + needed[last] - 1] = total - 1;
    for (int64_t s = 0; s < sequences(); ++s)
      for (int64_t i = first(s) / c.page; i < needed[s]; ++i) {
        int64_t& page = table[slots[s] * table_stride + i];
        if (page != kNowhere) continue;
        page = order.back();
        order.pop_back();
      }
  }
  // Positions that are seen; NaN elsewhere, where the new tokens go, too.
  void fill_cache() {
    for (int64_t s = 0; s < sequences(); ++s)
      for (int64_t position = first(s); position <= c.positions[s]; ++position)
        end = std::max(end, at(s, position, c.key_heads - 1) + c.dim);
    keys = std::make_unique<Guarded>(end * size_of(c.dtype));
    values = std::make_unique<Guarded>(end * size_of(c.dtype));
    for (int64_t s = 0; s < sequences(); ++s)
      for (int64_t position = first(s); position < c.positions[s]; ++position)
        for (int64_t head = 0; head < c.key_heads; ++head)
          for (const auto& part : {&keys, &values}) draw(**part, at(s, position, head), c.dim);
  }
};

float rounded_to(Dtype dtype, float x) {
  if (dtype == Dtype::float32) return x;
  return dtype == Dtype::bfloat16 ? bfloat16_to_float(float_to_bfloat16(x)) : float16_to_float(float_to_float16(x));
}
// What one rounding to a half-precision dtype is off by at most; float16 has no smaller numbers than 2^-24.
double half_unit(Dtype dtype, double x) {
  if (dtype == Dtype::float32) return 0;
  return dtype == Dtype::bfloat16 ? 0x1p-8 * std::fabs(x) : 0x1p-11 * std::fabs(x) + 0x1p-25;
}

// Where a number lies that was rounded on the way.
struct Range {
  double low, high;

  Range by(double x) const { return x < 0 ? Range{high * x, low * x} : Range{low * x, high * x}; }
  Range plus(const Range& other) const { return {low + other.low, high + other.high}; }
  // Of the dtype, after so many roundings to float32; a compiler may leave out those.
  Range rounded(Dtype dtype, double before = 0) const {
    const double relative = (before + (dtype == Dtype::float32)) * kUnit;
    const Range wide{low - relative * std::fabs(low), high + relative * std::fabs(high)};
    if (dtype == Dtype::float32) return wide;
    return {rounded_to(dtype, static_cast<float>(wide.low)), rounded_to(dtype, static_cast<float>(wide.high))};
  }
  double middle() const { return (low + high) / 2; }
  double slack() const { return (high - low) / 2; }
};

// A head after norm and rotation. Of 16 bits nearly always one number each: their products and sums are exact in
// float32, and the norm's scale rarely decides which neighbour a product is rounded to.
std::vector<Range> turned(const Problem& p, int64_t s, const Guarded& from, int64_t at, const Guarded& weight,
                          double epsilon) {
  const Case& c = p.c;
  const auto get = [&](const Guarded& g, int64_t i) -> double { return load_float(g.as<void>(), i, c.dtype); };
  double squares = 0;
  for (int64_t d = 0; d < c.dim; ++d) squares += get(from, at + d) * get(from, at + d);
  const double scale = 1 / std::sqrt(squares / c.dim + epsilon);
  // Half of the error of a sum of squares, and what comes between it and the product.
  const double roundings = static_cast<double>(c.dim / 2 + 6);
  std::vector<Range> x, found(c.dim);
  for (int64_t d = 0; d < c.dim; ++d) {
    const double given = get(from, at + d);
    x.push_back({given, given});
    if (c.normed) x[d] = x[d].by(scale).rounded(c.dtype, roundings).by(get(weight, d)).rounded(c.dtype);
  }
  const int64_t half = c.dim / 2, turn = c.one_turn ? 0 : s * (half + kGap);
  for (int64_t d = 0; d < half; ++d) {
    const double cosine = get(*p.cos, turn + d), sine = get(*p.sin, turn + d);
    const auto product = [&](const Range& a, double b) { return a.by(b).rounded(c.dtype); };
    found[d] = product(x[d], cosine).plus(product(x[half + d], -sine)).rounded(c.dtype);
    found[half + d] = product(x[half + d], cosine).plus(product(x[d], sine)).rounded(c.dtype);
  }
  return found;
}

// The new keys and values are at their places, and nothing else of the cache has changed.
void check_cache(const Isa& isa, const Problem& p, std::vector<char> keys, std::vector<char> values) {
  const int64_t dim = p.c.dim, size = size_of(p.c.dtype);
  for (int64_t s = 0; s < p.sequences(); ++s)
    for (int64_t head = 0; head < p.c.key_heads; ++head) {
      const int64_t from = s * (p.c.key_heads * dim + kGap) + head * dim, at = p.at(s, p.c.positions[s], head);
      const std::vector<Range> wanted = turned(p, s, *p.k, from, *p.k_weight, 1e-2f);
      for (int64_t d = 0; d < dim; ++d)
        EXPECT(p.key(at + d) >= wanted[d].low && p.key(at + d) <= wanted[d].high,
               "%s: new key %ld of head %ld of sequence %ld is %g, wanted from %g to %g", isa.name, d, head, s,
               p.key(at + d), wanted[d].low, wanted[d].high);
      std::memcpy(keys.data() + at * size, p.keys->as<char>() + at * size, dim * size);
      std::memcpy(values.data() + at * size, p.v->as<char>() + from * size, dim * size);
    }
  EXPECT(!std::memcmp(keys.data(), p.keys->as<char>(), keys.size()), "%s writes other keys", isa.name);
  EXPECT(!std::memcmp(values.data(), p.values->as<char>(), values.size()), "%s writes other values", isa.name);
}

// One head's output against float64, with the new key as it was stored.
void check_head(const Isa& isa, const Problem& p, int64_t s, int64_t head, const Guarded& out) {
  const Case& c = p.c;
  const int64_t heads = c.key_heads * c.shared, from = p.first(s), count = c.positions[s] + 1 - from;
  const std::vector<Range> q = turned(p, s, *p.q, s * (heads * c.dim + kGap) + head * c.dim, *p.q_weight, 1e-6f);
  std::vector<double> score(count, 0), off(count, 0);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t at = p.at(s, from + j, head / c.shared);
    for (int64_t d = 0; d < c.dim; ++d) {
      const double k = p.key(at + d);
      score[j] += k * q[d].middle() / std::sqrt(c.dim);
      // dim products and sums, and the query over a rounded square root
      const double most = std::fabs(q[d].middle()) + q[d].slack();
      off[j] += std::fabs(k) * (q[d].slack() + static_cast<double>(c.dim + 4) * kUnit * most) / std::sqrt(c.dim);
    }
  }
  const auto largest = std::max_element(score.begin(), score.end());
  const double most = *largest, worst = *std::max_element(off.begin(), off.end());
  double total = 0, loose = 0;
  std::vector<double> weight(count), error(count);
  for (int64_t j = 0; j < count; ++j) {
    weight[j] = std::exp(score[j] - most);
    // Two scores, their difference, and exp. Each key may make the largest score grow: then the sums take a factor, of
    // a difference of scores that add up to this one; the keys' sum itself.
    const double apart = most - score[j] + off[j] + worst;
    error[j] = weight[j] *
               (std::expm1(off[j] + worst + 2 * kUnit * apart + 2e-7) + static_cast<double>(4 * count + 8) * kUnit);
    total += weight[j], loose += error[j];
  }
  for (int64_t d = 0; d < c.dim; ++d) {
    double sum = 0, slack = 0;
    for (int64_t j = 0; j < count; ++j) {
      const double v = p.value(p.at(s, from + j, head / c.shared) + d);
      sum += weight[j] * v;
      slack += (error[j] + 1e-38) * std::fabs(v);  // exp makes zero of what is below
    }
    const double wanted = sum / total;
    EXPECT(loose < total / 8, "%s: the bound means nothing", isa.name);
    double bound = (slack + std::fabs(wanted) * loose) / (total - loose) + 2 * kUnit * std::fabs(wanted);
    bound += half_unit(c.dtype, std::fabs(wanted) + bound);
    const double got = load_float(out.as<void>(), (s * heads + head) * c.dim + d, c.dtype);
    EXPECT(
        std::fabs(got - wanted) <= bound,
        "%s: %ld x %ld heads of %ld, page %ld, window %ld, position %ld: out[%ld, %ld, %ld] = %g, wanted %g within %g",
        isa.name, c.key_heads, c.shared, c.dim, c.page, c.window, c.positions[s], s, head, d, got, wanted, bound);
  }
}

void check(const Isa& isa, const Problem& p) {
  const size_t bytes = p.end * size_of(p.c.dtype);
  const std::vector<char> keys(p.keys->as<char>(), p.keys->as<char>() + bytes);
  const std::vector<char> values(p.values->as<char>(), p.values->as<char>() + bytes);
  const auto out = p.run(isa);
  check_cache(isa, p, keys, values);
  for (int64_t s = 0; s < p.sequences(); ++s)
    for (int64_t head = 0; head < p.c.key_heads * p.c.shared; ++head) check_head(isa, p, s, head, *out);
}

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
constexpr int64_t kWindows[] = {0, 1, 40, 256, 300};

// Every shape around what is taken at once: chunks, blocks, pages, queries, vectors; on 1, 2, 3 and 7 threads.
void check_shapes(const Isa& isa, uint32_t& seed, bool quick) {
  const int before = omp_get_max_threads(), threads[] = {1, 2, 3, 7};
  for (const Dtype dtype : kDtypes)
    for (const bool by_heads : {false, true})
      for (const int64_t page : {1, 7, 32, 256})
        for (const int64_t dim : {32, 96, 128})
          for (const int64_t shared : {1, 2, 3, 4, 5, 6, 7, 8, 9}) {
            if (quick && (shared + dim / 32 + page) % 5) continue;
            omp_set_num_threads(threads[seed % 4]);
            Case c{{0, 31, 255, 256, 600}, 1 + seed % 2, shared, dim, page, kWindows[seed % 5], dtype, by_heads};
            c.normed = seed % 3 == 0;
            c.one_turn = seed % 7 == 0;
            c.size = seed % 11 == 0 ? 4 : 1;  // a few keys have all the weight
            if (quick) c.positions = {31, 270};
            check(isa, Problem(c, seed++));
          }
  omp_set_num_threads(before);
}

// The longest heads, many queries, so many sequences that threads share the rotation, too.
void check_large(const Isa& isa, uint32_t& seed) {
  for (const Dtype dtype : kDtypes) {
    check(isa, Problem({{40, 300}, 1, 17, kMostDim, 16, 0, dtype}, seed++));
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < 70; ++i) positions.push_back(i * 7 % 40);
    Case many{positions, 2, 4, 128, 16, 0, dtype};
    many.normed = true;
    check(isa, Problem(many, seed++));
  }
}

// RMSNorm of rows of any length: h is the exact sum, rounded once, and out within the roundings of its own steps.
void check_norm(const Isa& isa, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 1);
  for (const Dtype dtype : kDtypes)
    for (const int64_t cols : {1, 3, 15, 16, 17, 40, 4096})
      for (const bool added : {false, true}) {
        const int64_t rows = 1 + cols % 3, all = rows * cols;
        const Guarded h(all * size_of(dtype)), delta(all * size_of(dtype)), out(all * size_of(dtype));
        const Guarded weight(cols * size_of(dtype));
        std::vector<double> wanted(all);
        for (int64_t i = 0; i < cols; ++i) store_float(weight.as<void>(), i, dtype, normal(random));
        for (int64_t i = 0; i < all; ++i) {
          store_float(h.as<void>(), i, dtype, normal(random));
          store_float(delta.as<void>(), i, dtype, normal(random));
          const float before = load_float(h.as<void>(), i, dtype), more = load_float(delta.as<void>(), i, dtype);
          wanted[i] = rounded_to(dtype, before + (added ? more : 0.0f));
        }
        const Norm p{
            h.as<void>(), added ? delta.as<void>() : nullptr, weight.as<void>(), out.as<void>(), rows, cols, dtype,
            1e-5f};
        norm(isa, p);
        for (int64_t row = 0; row < rows; ++row) {
          double squares = 0;
          for (int64_t i = 0; i < cols; ++i) squares += wanted[row * cols + i] * wanted[row * cols + i];
          const double scale = 1 / std::sqrt(squares / static_cast<double>(cols) + 1e-5);
          for (int64_t i = 0; i < cols; ++i) {
            const int64_t at = row * cols + i;
            EXPECT(load_float(h.as<void>(), at, dtype) == static_cast<float>(wanted[at]), "%s: h[%ld]", isa.name, at);
            const double y = wanted[at] * scale * load_float(weight.as<void>(), i, dtype);
            const double got = load_float(out.as<void>(), at, dtype);
            // The sum of squares of one sign, its root and quotient, two products; of 16 bits two roundings more.
            const double bound = std::fabs(y) * (static_cast<double>(cols) / 16 + 12) * kUnit;
            const double weighed = std::fabs(static_cast<double>(load_float(weight.as<void>(), i, dtype)));
            const double rounding = 1.02 * half_unit(dtype, y) + weighed * half_unit(dtype, y / weighed);
            EXPECT(std::fabs(got - y) <= bound + rounding, "%s: norm of %ld: %g, wanted %g", isa.name, cols, got, y);
          }
        }
      }
}

// SwiGLU of any count, on threads and not, in place and not: within the roundings of its own steps.
void check_swiglu(const Isa& isa, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 6);
  for (const Dtype dtype : kDtypes)
    for (const int64_t count : {1, 3, 15, 16, 17, 40, 4096, 4097, 20001}) {
      const Guarded gate(count * size_of(dtype)), up(count * size_of(dtype)), apart(count * size_of(dtype));
      std::vector<double> g(count), wanted(count);
      for (int64_t i = 0; i < count; ++i) {
        store_float(gate.as<void>(), i, dtype, normal(random));
        store_float(up.as<void>(), i, dtype, normal(random));
        g[i] = load_float(gate.as<void>(), i, dtype);
        wanted[i] = g[i] / (1 + std::exp(-g[i])) * load_float(up.as<void>(), i, dtype);
      }
      swiglu(isa, {gate.as<void>(), up.as<void>(), apart.as<void>(), count, dtype});
      swiglu(isa, {gate.as<void>(), up.as<void>(), gate.as<void>(), count, dtype});
      for (int64_t i = 0; i < count; ++i) {
        const double got = load_float(apart.as<void>(), i, dtype), y = wanted[i];
        EXPECT(got == load_float(gate.as<void>(), i, dtype), "%s: swiglu in place: %ld", isa.name, i);
        const double other = std::fabs(static_cast<double>(load_float(up.as<void>(), i, dtype)));
        // exp is off by 2e-7; a sum, a quotient, a product, a product; of 16 bits two roundings more.
        const double bound = std::fabs(y) * 8 * kUnit + 1e-36;
        const double rounding = 1.02 * half_unit(dtype, y) + 1.02 * other * half_unit(dtype, y / other);
        EXPECT(std::fabs(got - y) <= bound + rounding, "%s: swiglu(%g) %g, wanted %g", isa.name, g[i], got, y);
      }
    }
}

// What attention_loop.h says of exp: scores that are exact numbers, and values that keep the weights apart.
void check_exp(const Isa& isa) {
  constexpr int64_t kDim = 64, kSteps = 200;  // 1 / sqrt(64) is exact; a key for each dimension
  const std::vector<float> none(kDim, 0), ones(kDim / 2, 1);
  const int64_t table = 0, slot = 0, position = kDim - 1;
  for (int64_t step = 0; step < kSteps; ++step) {
    std::vector<float> q = none, k = none, v = none, keys, values, x, out(kDim, std::nanf(""));
    q[0] = 8;
    for (int64_t j = 0; j < kDim; ++j) {
      x.push_back(j ? -80.0f * static_cast<float>(step * kDim + j) / (kSteps * kDim) : 0.0f);
      keys.insert(keys.end(), none.begin(), none.end()), values.insert(values.end(), none.begin(), none.end());
      keys[j * kDim] = x[j], values[j * kDim + j] = 1;
    }
    k[0] = x[kDim - 1], v[kDim - 1] = 1;
    Attention p{};
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data();
    p.keys = keys.data(), p.values = values.data(), p.cos = ones.data(), p.sin = none.data();
    p.page = kDim, p.position_stride = p.head_stride = kDim;
    p.table = &table, p.slots = &slot, p.positions = &position;
    p.sequences = p.heads = p.key_heads = 1, p.dim = kDim, p.dtype = Dtype::float32;
    attend(isa, p);
    for (int64_t j = 1; j < kDim; ++j) {
      const double wanted = std::exp(static_cast<double>(x[j])), got = static_cast<double>(out[j]) / out[0];
      EXPECT(std::fabs(got - wanted) <= (2e-7 + 4 * kUnit) * wanted, "%s: exp(%.9g) = %.9g, wanted %.9g", isa.name,
             x[j], got, wanted);
    }
  }
}

// The same bits on any number of threads, from several at once, in a child that has only one, and alone.
void check_same_bits(const Isa& isa) {
  const Case c{{700, 3, 256, 520}, 2, 5, 64, 32, 0, Dtype::bfloat16};
  const int before = omp_get_max_threads();
  const Problem first(c, 7);
  omp_set_num_threads(1);
  const auto wanted = first.run(isa);
  const auto same = [&](const Problem& p) {
    return !std::memcmp(p.run(isa)->as<char>(), wanted->as<char>(), p.out_bytes());
  };
  for (const int count : {2, 3, 7}) {
    omp_set_num_threads(count);
    for (int repeat = 0; repeat < 20; ++repeat) EXPECT(same(first), "%s: %d threads give other bits", isa.name, count);
  }
  omp_set_num_threads(before);
  std::vector<std::thread> threads;
  std::vector<char> found(4, 0);
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      const Problem mine(c, 7);
      found[i] = 1;
      for (int repeat = 0; repeat < 10; ++repeat) found[i] &= same(mine);
    });
  for (auto& thread : threads) thread.join();
  for (const char each : found) EXPECT(each, "%s: threads disturb each other", isa.name);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(same(first) ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT(status == 0, "%s: a forked child ended with %d", isa.name, status);
  for (int64_t s = 0; s < first.sequences(); ++s) {
    const size_t bytes = first.out_bytes() / first.sequences();
    const Guarded out(bytes);
    Attention p = first.attention(out);
    const auto row = [&](const void* of, int64_t stride) { return static_cast<const uint16_t*>(of) + s * stride; };
    p.q = row(p.q, p.q_stride), p.k = row(p.k, p.k_stride), p.v = row(p.v, p.v_stride);
    p.cos = row(p.cos, p.turn_stride), p.sin = row(p.sin, p.turn_stride);
    p.slots += s, p.positions += s, p.sequences = 1;
    attend(isa, p);
    EXPECT(!std::memcmp(out.as<char>(), wanted->as<char>() + s * bytes, bytes), "%s: other bits alone", isa.name);
  }
}

}  // namespace

// Names of ISAs as arguments: those only. `quick` before them: fewer cases, for valgrind and emulators.
int main(int count, char** names) {
  const bool quick = count > 1 && !std::strcmp(names[1], "quick");
  std::set<const StepLoops*> tested;
  for (const Isa* const* at = isas(); *at; ++at) {
    const Isa& isa = **at;
    if (!chosen(count, names, quick, isa.name)) continue;
    if (const std::string reason = unavailable(isa); !reason.empty()) {
      std::printf("%s is not tested: %s\n", isa.name, reason.c_str());
      continue;
    }
    if (!tested.insert(isa.loops).second) {
      std::printf("%s: tested above\n", isa.name);
      continue;
    }
    uint32_t seed = 0;
    check_shapes(isa, seed, quick);
    check_large(isa, seed);
    check_exp(isa);
    check_norm(isa, seed++);
    check_swiglu(isa, seed++);
    check_same_bits(isa);
    std::printf("%s: %u steps\n", isa.name, seed);
  }
  attend(*isas()[0], Attention{});  // no sequences: nothing is touched
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
