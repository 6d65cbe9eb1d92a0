// The loops of attention.h, and of norm.h, for any width of vectors, by the compiler's own vector types. An ISA's file
// replaces what the compiler does badly. Nothing that the C++ library defines inline is called: see convert.h.
#pragma once

#include <math.h>

#include <cstring>

#include "attention.h"
#include "convert.h"
#include "norm.h"

namespace alphaprune {
namespace {

constexpr float kNone = -HUGE_VALF;  // the largest score of no keys

struct Binary16 {  // a float16, where uint16_t is a bfloat16
  uint16_t bits;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Vectors of so many lanes; the attribute takes no template argument.
template <int kWidth>
struct Types;
#define ALPHAPRUNE_TYPES(width)                                 \
  template <>                                                   \
  struct Types<width> {                                         \
    typedef float V __attribute__((vector_size(width * 4)));    \
    typedef uint32_t U __attribute__((vector_size(width * 4))); \
    typedef int32_t I __attribute__((vector_size(width * 4)));  \
    typedef uint16_t H __attribute__((vector_size(width * 2))); \
  }
ALPHAPRUNE_TYPES(4);
ALPHAPRUNE_TYPES(8);
ALPHAPRUNE_TYPES(16);
#undef ALPHAPRUNE_TYPES

// kWidth floats, and kRegisters vectors of sums that fit beside what is multiplied.
template <int kWidth, int kRegisters>
struct Lanes : Types<kWidth> {
  static constexpr int kLanes = kWidth, kSums = kRegisters;
  using typename Types<kWidth>::V;
  using typename Types<kWidth>::U;
  using typename Types<kWidth>::I;
  using typename Types<kWidth>::H;

  static V splat(float value) { return V{} + value; }
  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static V load(const uint16_t* p) {
    H v;
    std::memcpy(&v, p, sizeof v);
    return reinterpret_cast<V>(__builtin_convertvector(v, U) << 16);
  }
  static V load(const Binary16* p) {
    H v;
    std::memcpy(&v, p, sizeof v);
    return widened(__builtin_convertvector(v, U));
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
  static void store(Binary16* p, V v) {
    const H bits = __builtin_convertvector(halves(v), H);
    std::memcpy(p, &bits, sizeof bits);
  }
  static void store(uint16_t* p, V v) {
    const H halves = __builtin_convertvector(reinterpret_cast<U>(v) >> 16, H);
    std::memcpy(p, &halves, sizeof halves);
  }
  // float_to_bfloat16, as a float; and what float32 keeps.
  static V round(V v, uint16_t) {
    const U bits = reinterpret_cast<U>(v), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const U kept = (v == v) ? rounded : (bits | 0x400000);
    return reinterpret_cast<V>(kept & 0xffff0000);
  }
  static V round(V v, Binary16) { return widened(halves(v)); }
  static V round(V v, float) { return v; }

  static float sum(V v) {
    return folded(v, [](float a, float b) { return a + b; });
  }
  static float largest(V v) {
    return folded(v, [](float a, float b) { return a > b ? a : b; });
  }
  // The sums of four vectors.
  static void sums(const V* v, float* to) {
    for (int i = 0; i < 4; ++i) to[i] = sum(v[i]);
  }

  // e^x for x <= 0, relative error below 2e-7, 0 from -87.7 on; NaN stays. A Taylor polynomial about 0 of
  // what is left of x after a multiple of ln 2.
  static V exp(V x) {
    const V least = splat(-88.0f);
    x = x < least ? least : x;
    const V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits
    const V n = shifted - 12582912.0f;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts (Cody and Waite, 1980)
    V y = splat(1.0f / 5040);
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = (y * r + 1.0f) * r + 1.0f;
    const I exponent = reinterpret_cast<I>(shifted) - 0x4b400000 + 127;
    return y * reinterpret_cast<V>(exponent << 23);
  }

 private:
  // float16_to_float and float_to_float16.
  static V widened(U half) {
    const U sign = (half & 0x8000) << 16, magnitude = (half & 0x7fff) << 13;
    const V finite = reinterpret_cast<V>(magnitude) * 0x1p112f;
    const U bits = magnitude >= (0x7c00 << 13) ? (magnitude | 0x7f800000) : reinterpret_cast<U>(finite);
    return reinterpret_cast<V>(sign | bits);
  }
  static U halves(V v) {
    const U bits = reinterpret_cast<U>(v), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const U normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const U small = reinterpret_cast<U>(reinterpret_cast<V>(magnitude) + 0.5f) - 0x3f000000;
    const U number = magnitude < 0x38800000 ? small : normal, none = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    const U finite = magnitude >= 0x477ff000 ? U{} + 0x7c00 : number;
    return sign | (magnitude > 0x7f800000 ? none : finite);
  }

  template <class Two>
  static float folded(V v, Two two) {
    float lanes[kWidth];
    std::memcpy(lanes, &v, sizeof v);
    for (int width = kWidth / 2; width; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] = two(lanes[i], lanes[i + width]);
    return lanes[0];
  }
};

template <class L, class T>
struct Loop {
  using V = typename L::V;
  static constexpr int64_t kLanes = L::kLanes;
  static constexpr int64_t kBlock = 32, kKeys = 4;  // keys whose scores are in memory, and in registers
  static_assert(kBlock % kLanes == 0 && kBlock % kKeys == 0 && 32 % kLanes == 0,
                "of scores and of heads, no vector is cut");

  // One head, normed and rotated, [dim].
  static void turn(const Attention& p, int64_t sequence, const T* from, const T* weight, float epsilon, float* to) {
    const int64_t half = p.dim / 2;
    const T* cos = static_cast<const T*>(p.cos) + sequence * p.turn_stride;
    const T* sin = static_cast<const T*>(p.sin) + sequence * p.turn_stride;
    V squares = V{};
    for (int64_t d = 0; d < p.dim; d += kLanes) {
      const V v = L::load(from + d);
      squares += v * v;
      L::store(to + d, v);
    }
    if (weight) {
      const V scale = L::splat(1.0f / sqrtf(L::sum(squares) / static_cast<float>(p.dim) + epsilon));
      for (int64_t d = 0; d < p.dim; d += kLanes)
        L::store(to + d, L::round(L::round(L::load(to + d) * scale, T{}) * L::load(weight + d), T{}));
    }
    for (int64_t d = 0; d < half; d += kLanes) {
      const V a = L::load(to + d), b = L::load(to + half + d), c = L::load(cos + d), s = L::load(sin + d);
      L::store(to + d, L::round(L::round(a * c, T{}) - L::round(b * s, T{}), T{}));
      L::store(to + half + d, L::round(L::round(b * c, T{}) + L::round(a * s, T{}), T{}));
    }
  }

  static int64_t place(const Attention& p, int64_t sequence, int64_t key_head, int64_t position) {
    const int64_t page = p.table[p.slots[sequence] * p.table_stride + position / p.page];
    return page * p.page_stride + position % p.page * p.position_stride + key_head * p.head_stride;
  }

  static void rotate(const Attention& p, int64_t sequence, int64_t key_head, float* q) {
    const int64_t shared = p.heads / p.key_heads;
    const float scale = 1.0f / sqrtf(static_cast<float>(p.dim));
    const T* query = static_cast<const T*>(p.q) + sequence * p.q_stride + key_head * shared * p.dim;
    for (int64_t i = 0; i < shared; ++i, q += p.dim) {
      turn(p, sequence, query + i * p.dim, static_cast<const T*>(p.q_weight), p.q_epsilon, q);
      for (int64_t d = 0; d < p.dim; d += kLanes) L::store(q + d, L::load(q + d) * scale);
    }
    const int64_t at = place(p, sequence, key_head, p.positions[sequence]);
    float key[kMostDim];
    turn(p, sequence, static_cast<const T*>(p.k) + sequence * p.k_stride + key_head * p.dim,
         static_cast<const T*>(p.k_weight), p.k_epsilon, key);
    for (int64_t d = 0; d < p.dim; d += kLanes) L::store(static_cast<T*>(p.keys) + at + d, L::load(key + d));
    std::memcpy(static_cast<T*>(p.values) + at, static_cast<const T*>(p.v) + sequence * p.v_stride + key_head * p.dim,
                static_cast<size_t>(p.dim) * sizeof(T));
  }

  // Rows of one block of keys, and those of the block after it, if it is known.
  struct Rows {
    const T *now, *next;
    int64_t stride;

    const T* at(int64_t j) const { return now + j * stride; }
    // Asks for a row of the next block: into L2, because L1 waits for few lines at a time. That block may have fewer
    // rows, even end where the cache does: what is asked for does not fault.
    __attribute__((always_inline)) inline void ask(int64_t j, int64_t dim) const {
      if (!next) return;
      const T* row = next + j * stride;
      for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
    }
  };

  // Scores [Q][kBlock] of `count` keys; past them up to a multiple of kKeys those of the last again.
  template <int Q>
  static void scores(const Attention& p, const float* q, const Rows& keys, int64_t count, float* score) {
    for (int64_t j = 0; j < count; j += kKeys) {
      const T* key[kKeys];
      for (int64_t i = 0; i < kKeys; ++i) {
        key[i] = keys.at(j + i < count ? j + i : count - 1);
        keys.ask(j + i, p.dim);
      }
      V sum[Q][kKeys] = {};
      for (int64_t d = 0; d < p.dim; d += kLanes) {
        V k[kKeys];
        for (int64_t i = 0; i < kKeys; ++i) k[i] = L::load(key[i] + d);
        for (int g = 0; g < Q; ++g) {
          const V a = L::load(q + g * p.dim + d);
          for (int64_t i = 0; i < kKeys; ++i) sum[g][i] += a * k[i];
        }
      }
      for (int g = 0; g < Q; ++g) L::sums(sum[g], score + g * kBlock + j);
    }
  }

  // sums [Q][dim], columns from `d` on, kVectors vectors of them: times `factor`, plus weighted values.
  template <int Q, int kVectors>
  static void columns(const Attention& p, const Rows& values, int64_t count, const float* weight, const float* factor,
                      int64_t d, float* sums) {
    V sum[Q][kVectors];
    for (int g = 0; g < Q; ++g)
      for (int i = 0; i < kVectors; ++i) sum[g][i] = L::load(sums + g * p.dim + d + i * kLanes) * factor[g];
    for (int64_t j = 0; j < count; ++j) {
      V v[kVectors];
      for (int i = 0; i < kVectors; ++i) v[i] = L::load(values.at(j) + d + i * kLanes);
      if (d == 0) values.ask(j, p.dim);
      for (int g = 0; g < Q; ++g)
        for (int i = 0; i < kVectors; ++i) sum[g][i] += weight[g * kBlock + j] * v[i];
    }
    for (int g = 0; g < Q; ++g)
      for (int i = 0; i < kVectors; ++i) L::store(sums + g * p.dim + d + i * kLanes, sum[g][i]);
  }

  template <int Q, int kVectors>
  static void all_columns(const Attention& p, const Rows& values, int64_t count, const float* weight,
                          const float* factor, int64_t d, float* sums) {
    for (; d + kVectors * kLanes <= p.dim; d += kVectors * kLanes)
      columns<Q, kVectors>(p, values, count, weight, factor, d, sums);
    if constexpr (kVectors > 1) all_columns<Q, kVectors / 2>(p, values, count, weight, factor, d, sums);
  }

  // Q queries over one block of keys, whose scores are added to what is known of the blocks before (Milakov and
  // Gimelshein, 2018: the softmax of a stream).
  template <int Q>
  static void block(const Attention& p, const float* q, const Rows& keys, const Rows& values, int64_t count,
                    float* sums, float* most, float* total) {
    alignas(64) float weight[Q * kBlock], factor[Q];
    scores<Q>(p, q, keys, count, weight);
    for (int g = 0; g < Q; ++g) {
      float* mine = weight + g * kBlock;
      for (int64_t j = count; j < kBlock; ++j) mine[j] = kNone;
      V all = L::splat(most[g]);
      for (int64_t j = 0; j < kBlock; j += kLanes) {
        const V some = L::load(mine + j);
        all = some > all ? some : all;
      }
      const float now = L::largest(all);
      const float origin = now == kNone ? 0.0f : now;  // a difference of -inf and -inf would be NaN
      V sum = V{};
      for (int64_t j = 0; j < kBlock; j += kLanes) {
        const V e = L::exp(L::load(mine + j) - origin);
        L::store(mine + j, e);
        sum += e;
      }
      factor[g] = now == most[g] ? 1.0f : expf(most[g] - now);
      most[g] = now;
      total[g] = total[g] * factor[g] + L::sum(sum);
    }
    constexpr int kVectors = Q >= L::kSums ? 1 : L::kSums / Q > 8 ? 8 : L::kSums / Q;
    all_columns<Q, kVectors>(p, values, count, weight, factor, 0, sums);
  }

  static void chunk(const Attention& p, int64_t sequence, int64_t key_head, const float* q, int64_t queries,
                    int64_t first, int64_t last, float* sums) {
    float* most = sums + queries * p.dim;
    float* total = most + queries;
    std::memset(sums, 0, static_cast<size_t>(queries * p.dim) * sizeof(float));
    for (int64_t g = 0; g < queries; ++g) {
      most[g] = kNone;
      total[g] = 0;
    }
    const auto size_at = [&](int64_t at) { return smaller(smaller(last - at, p.page - at % p.page), kBlock); };
    int64_t from = place(p, sequence, key_head, first), count;
    for (int64_t at = first; at < last; at += count) {
      count = size_at(at);
      const bool more = at + count < last;
      const int64_t next = more ? place(p, sequence, key_head, at + count) : 0;
      const auto rows = [&](const void* all) {
        const T* base = static_cast<const T*>(all);
        return Rows{base + from, more ? base + next : nullptr, p.position_stride};
      };
      Rows keys = rows(p.keys), values = rows(p.values);
      for (int64_t g = 0, width; g < queries; g += width) {
        width = queries - g >= 4 ? 4 : queries - g >= 2 ? 2 : 1;
        const auto run = width == 4 ? block<4> : width == 2 ? block<2> : block<1>;
        run(p, q + g * p.dim, keys, values, count, sums + g * p.dim, most + g, total + g);
        keys.next = values.next = nullptr;  // asked for once
      }
      from = next;
    }
  }
};

// One number beside the vectors, as they have it.
inline float one_of(float value) { return value; }
inline float one_of(uint16_t half) { return bfloat16_to_float(half); }
inline float one_of(Binary16 half) { return float16_to_float(half.bits); }
inline float rounded_one(float value, float) { return value; }
inline float rounded_one(float value, uint16_t) { return bfloat16_to_float(float_to_bfloat16(value)); }
inline float rounded_one(float value, Binary16) { return float16_to_float(float_to_float16(value)); }
inline void store_one(float* to, float value) { *to = value; }
inline void store_one(Binary16* to, float value) { to->bits = float_to_float16(value); }
inline void store_one(uint16_t* to, float value) { *to = float_to_bfloat16(value); }

// RMSNorm of a row. There are 16 sums side by side for vectors of any width, so that they are added in one order.
template <class L, class T>
struct NormLoop {
  using V = typename L::V;
  static constexpr int64_t kLanes = L::kLanes, kStep = 16, kVectors = kStep / kLanes;

  static void row(const Norm& p, int64_t row) {
    T* h = static_cast<T*>(p.h) + row * p.cols;
    const T* delta = p.delta ? static_cast<const T*>(p.delta) + row * p.cols : nullptr;
    const T* weight = static_cast<const T*>(p.weight);
    T* out = static_cast<T*>(p.out) + row * p.cols;
    V squares[kVectors] = {};
    const int64_t whole = p.cols / kStep * kStep;
    for (int64_t k = 0; k < whole; k += kStep)
      for (int64_t i = 0; i < kVectors; ++i) {
        V v = L::load(h + k + i * kLanes);
        if (delta) {
          v = L::round(v + L::load(delta + k + i * kLanes), T{});
          L::store(h + k + i * kLanes, v);
        }
        squares[i] += v * v;
      }
    float sums[kStep];
    for (int64_t i = 0; i < kVectors; ++i) L::store(sums + i * kLanes, squares[i]);
    for (int64_t k = whole; k < p.cols; ++k) {
      float one = one_of(h[k]);
      if (delta) {
        one = rounded_one(one + one_of(delta[k]), T{});
        store_one(h + k, one);
      }
      sums[k % kStep] += one * one;
    }
    for (int64_t width = kStep / 2; width > 0; width /= 2)
      for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
    const float scale = 1.0f / sqrtf(sums[0] / static_cast<float>(p.cols) + p.epsilon);
    const V factor = L::splat(scale);
    for (int64_t k = 0; k < whole; k += kLanes)
      L::store(out + k, L::round(L::round(L::load(h + k) * factor, T{}) * L::load(weight + k), T{}));
    for (int64_t k = whole; k < p.cols; ++k)
      store_one(out + k, rounded_one(one_of(h[k]) * scale, T{}) * one_of(weight[k]));
  }
};

template <class L, class T>
struct SwigluLoop {
  using V = typename L::V;
  using U = typename L::U;
  static constexpr int64_t kLanes = L::kLanes;

  // By e^-|g|, which does not overflow: g / (1 + e^-g), or g e^g / (1 + e^g) where g is negative.
  static V gated(V gate, V up) {
    const V e = L::exp(reinterpret_cast<V>(reinterpret_cast<U>(gate) | 0x80000000u)), one = L::splat(1.0f);
    const V upper = gate < V{} ? e : one;
    return L::round(L::round(gate * (upper / (one + e)), T{}) * up, T{});
  }
  static void run(const Swiglu& p) {
    const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up);
    T* out = static_cast<T*>(p.out);
    const int64_t whole = p.count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) L::store(out + i, gated(L::load(gate + i), L::load(up + i)));
    if (whole == p.count) return;
    T some[2][kLanes] = {};
    const size_t left = static_cast<size_t>(p.count - whole) * sizeof(T);
    std::memcpy(some[0], gate + whole, left);
    std::memcpy(some[1], up + whole, left);
    L::store(some[0], gated(L::load(some[0]), L::load(some[1])));
    std::memcpy(out + whole, some[0], left);
  }
};

// call(a number of the dtype).
template <class Call>
void by_dtype(Dtype dtype, const Call& call) {
  if (dtype == Dtype::float32) return call(float{});
  if (dtype == Dtype::float16) return call(Binary16{});
  call(uint16_t{});
}

// The loops of an ISA, whatever the dtype is.
template <class L>
struct AnyLoop {
  static void norm(const Norm& p) {
    by_dtype(p.dtype, [&](auto number) {
      for (int64_t row = 0; row < p.rows; ++row) NormLoop<L, decltype(number)>::row(p, row);
    });
  }
  static void swiglu(const Swiglu& p) {
    by_dtype(p.dtype, [&](auto number) { SwigluLoop<L, decltype(number)>::run(p); });
  }
  static void rotate(const Attention& p, int64_t sequence, int64_t key_head, float* q) {
    by_dtype(p.dtype, [&](auto number) { Loop<L, decltype(number)>::rotate(p, sequence, key_head, q); });
  }
  static void chunk(const Attention& p, int64_t sequence, int64_t key_head, const float* q, int64_t count,
                    int64_t first, int64_t last, float* sums) {
    by_dtype(p.dtype, [&](auto number) {
      Loop<L, decltype(number)>::chunk(p, sequence, key_head, q, count, first, last, sums);
    });
  }
};

}  // namespace
}  // namespace alphaprune
