// Activations of int8 weights as integers, whatever instructions round and multiply them: to 16 bits, as any
// half-precision ones are, or to 8 bits where whoever loaded the weight allows it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "rounding.h"

namespace alphaprune {
namespace {

// An integer of 16 bits is 256 * high + low, signed bytes that multiply weights as they come out of the expansion: two
// instructions of as many products as a register has bytes, where weights widened to 16 bits cost shuffles on top.
// vpdpbusd wants one side unsigned: 128 is added to the weights, zeros among them, and each lane of a sum begins with
// -128 times the sum of its activations, which is of x alone. As the sum of 128 products fits 32 bits, it does not
// matter what its parts overflow to.
struct RoundedGroup {
  float unit;          // NaN where the group cannot be rounded
  int32_t offsets[4];  // -128 * sum(integers), of each four columns of 16: of a lane of the product
};

inline bool is_nan(float v) { return v != v; }

// Rounded activations, [group of 128 columns][token][byte][column]: what a panel meets lies together. After them
// [group][token] units, per token whether it must be computed exactly, [group][token] four offsets, and their sums.
template <int kBytes>
struct Rounded {
  using Bytes = std::integral_constant<int, kBytes>;
  static constexpr int64_t kTokenBytes = kBytes * kGroupCols;

  Rounded(const sbt::View& weight, int64_t tokens)
      : tokens(tokens), padded(weight.padded_cols()), groups(ceil_div(padded, kGroupCols)) {}

  int64_t bytes() const { return groups * tokens * kTokenBytes + ceil_div((6 * groups + 1) * tokens * 4, 64) * 64; }
  const uint8_t* columns(const void* base, int64_t group, int64_t token) const {
    return static_cast<const uint8_t*>(base) + (group * tokens + token) * kTokenBytes;
  }
  const float* units(const void* base, int64_t group, int64_t token) const {
    return reinterpret_cast<const float*>(columns(base, groups, 0)) + group * tokens + token;
  }
  bool exact(const void* base, int64_t token) const { return *units(base, groups, token) != 0; }
  const int32_t* offsets(const void* base, int64_t group, int64_t token) const {
    return reinterpret_cast<const int32_t*>(units(base, groups + 1, 0)) + (group * tokens + token) * 4;
  }
  const int32_t* offset(const void* base, int64_t group, int64_t token) const {
    return offsets(base, groups, 0) + group * tokens + token;
  }

  // round(from, dtype, first column, columns, padded, to) rounds a group to `to` and gives a RoundedGroup.
  template <class Round>
  void prepare(const Activations& x, int64_t cols, int64_t token, void* base, const Round& round) const {
    const char* from = static_cast<const char*>(x.data) + token * x.stride * size_of(x.dtype);
    const auto writable = [](auto* p) {
      return const_cast<std::remove_const_t<std::remove_pointer_t<decltype(p)>>*>(p);
    };
    float exact = 0;
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* to = writable(columns(base, g, token));
      const RoundedGroup made = round(from, x.dtype, g * kGroupCols, cols, padded, to);
      if (is_nan(made.unit)) exact = 1;
      *writable(units(base, g, token)) = is_nan(made.unit) ? 0 : made.unit;
      int32_t* each = writable(offsets(base, g, token));
      std::copy(made.offsets, made.offsets + 4, each);
      *writable(offset(base, g, token)) = each[0] + each[1] + each[2] + each[3];
    }
    *writable(units(base, groups, token)) = exact;
  }

  int64_t tokens, padded, groups;
};

// Whether the product is taken from rounded activations.
inline bool rounds(const Activations& x, const sbt::View& weight) {
  return weight.dtype == Dtype::int8 && (x.dtype != Dtype::float32 || weight.to_bytes);
}

// use(the layout of the activations).
template <class Use>
auto with_rounded(const sbt::View& weight, int64_t tokens, const Use& use) {
  return weight.to_bytes ? use(Rounded<1>(weight, tokens)) : use(Rounded<2>(weight, tokens));
}
inline int64_t integer_bytes(const Activations& x, const sbt::View& weight) {
  return with_rounded(weight, x.tokens, [](const auto& rounded) { return rounded.bytes(); });
}
// Isa::prepare of these: of(std::integral_constant of 1 or 2) is what rounds a group to so many bytes.
template <class Of>
void prepare_rounded(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to,
                     const Of& of) {
  with_rounded(weight, x.tokens, [&](const auto& rounded) {
    const auto round = of(typename std::decay_t<decltype(rounded)>::Bytes());
    for (int64_t t = first; t < last; ++t) rounded.prepare(x, weight.cols, t, to, round);
  });
}

}  // namespace
}  // namespace alphaprune
