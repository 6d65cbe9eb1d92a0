// What the kernels that multiply share at their ends: pairs of 16-bit floats, and an output with bias and residual.
#pragma once

#include <climits>

#include "device.cuh"
#include "launch.h"

namespace alphaprune::cuda {

// The two floats of a word.
template <class Value>
ALPHAPRUNE_DEVICE void widen_pair(uint32_t pair, float& low, float& high) {
  if constexpr (Value::code == Bfloat16::code) {
    low = float_of(pair << 16);
    high = float_of(pair & 0xffff0000u);
  } else {
#ifdef __CUDACC__
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
#else
    low = Value::widen(pair & 0xffffu);
    high = Value::widen(pair >> 16);
#endif
  }
}

// The other way round, each rounded to nearest.
template <class Value>
ALPHAPRUNE_DEVICE uint32_t narrow_pair(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  if constexpr (Value::code == Bfloat16::code) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return Value::narrow(low) | Value::narrow(high) << 16;
#endif
}
// Rounded to 16 bits and back.
template <class Value>
ALPHAPRUNE_DEVICE float rounded(float value) {
  return Value::widen(Value::narrow(value));
}

ALPHAPRUNE_DEVICE uint32_t word_of(uint4 four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// 0 where the value is finite, NaN elsewhere.
ALPHAPRUNE_DEVICE float poison_of(float value) { return 0.0f * value; }
ALPHAPRUNE_DEVICE bool is_nan(float value) { return value != value; }

// Where the rows of a weight go. Rows are numbered over all weights that share x.
struct OutputRows {
  uint16_t* y;       // [tokens, rows]
  const void* bias;  // [rows] or null; bias_code is its Dtype
  int first, rows;   // the number of the first one, how many
  int bias_code;
};

struct Output {
  OutputRows of[kMostMembers];  // `first` of those that are not there: more than any row
  const uint16_t* residual;     // of a single one

  ALPHAPRUNE_DEVICE int member_of(int row) const {
    static_assert(kMostMembers == 3, "one comparison for each but the first");
    return (row >= of[1].first) + (row >= of[2].first);
  }
  ALPHAPRUNE_DEVICE const OutputRows& holder(int row) const { return of[member_of(row)]; }
  // Whether there is a row of that number; none has the padding behind the rows of a member.
  ALPHAPRUNE_DEVICE bool has(int row) const {
    const OutputRows& to = holder(row);
    return row - to.first < to.rows;
  }
};

ALPHAPRUNE_DEVICE float bias_of(const OutputRows& to, int row) {
  if (to.bias_code == 0) return static_cast<const float*>(to.bias)[row];
  const uint32_t half = static_cast<const uint16_t*>(to.bias)[row];
  return to.bias_code == Bfloat16::code ? Bfloat16::widen(half) : Float16::widen(half);
}

// y[token, row] = sum + bias + residual, rounded once.
template <class Value>
ALPHAPRUNE_DEVICE void store_output(const Output& out, int token, int row, float sum) {
  const OutputRows& to = out.holder(row);
  row -= to.first;
  if (to.bias) sum += bias_of(to, row);
  const size_t at = static_cast<size_t>(token) * to.rows + row;
  if (out.residual) sum += Value::widen(out.residual[at]);
  to.y[at] = static_cast<uint16_t>(Value::narrow(sum));
}

// The same of four neighbouring rows of one weight: its rows are a multiple of 4, y and the residual aligned to 8
// bytes.
template <class Value>
ALPHAPRUNE_DEVICE void store_four_outputs(const Output& out, int token, int row, float (&sum)[4]) {
  const OutputRows& to = out.holder(row);
  row -= to.first;
  if (to.bias) {
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] += bias_of(to, row + i);
  }
  const size_t at = static_cast<size_t>(token) * to.rows + row;
  if (out.residual) {
    const uint2 four = *reinterpret_cast<const uint2*>(out.residual + at);
    float more[4];
    widen_pair<Value>(four.x, more[0], more[1]);
    widen_pair<Value>(four.y, more[2], more[3]);
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] += more[i];
  }
  store_eight_bytes(to.y + at, {narrow_pair<Value>(sum[0], sum[1]), narrow_pair<Value>(sum[2], sum[3])});
}

// The same for many tokens of the same rows, of which there may be fewer than four: what does not depend on the token
// is read once.
template <class Value>
struct FourRows {
  uint16_t* y;               // of the first token
  const uint16_t* residual;  // the same, or null
  float bias[4];
  int rows, count;  // of the weight; from the row on that there are

  ALPHAPRUNE_DEVICE FourRows(const Output& out, int row) {
    const OutputRows& to = out.holder(row);
    row -= to.first;
    y = to.y + row;
    residual = out.residual ? out.residual + row : nullptr;
    rows = to.rows;
    count = to.rows - row;
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) bias[i] = to.bias && i < count ? bias_of(to, row + i) : 0;
  }
  // fours: whether four outputs can be stored at once (stores_fours).
  ALPHAPRUNE_DEVICE void store(int token, float (&sum)[4], bool fours) const {
    if (count <= 0) return;
    const size_t at = static_cast<size_t>(token) * rows;
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] += bias[i];
    if (residual) {
      ALPHAPRUNE_UNROLL
      for (int i = 0; i < 4; ++i)
        if (i < count) sum[i] += Value::widen(residual[at + i]);
    }
    if (fours) {
      store_eight_bytes(y + at, {narrow_pair<Value>(sum[0], sum[1]), narrow_pair<Value>(sum[2], sum[3])});
      return;
    }
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i)
      if (i < count) y[at + i] = static_cast<uint16_t>(Value::narrow(sum[i]));
  }
};

// y[token, row] = silu(gate) * up of the first two members' row, whose y is the first's (Shazeer, 2020); rounded where
// separate kernels would round.
template <class Value>
ALPHAPRUNE_DEVICE void store_swiglu(const Output& out, int token, int row, float gate, float up) {
  const OutputRows &to = out.of[0], &other = out.of[1];
  if (to.bias) gate += bias_of(to, row);
  if (other.bias) up += bias_of(other, row);
  gate = rounded<Value>(gate);
  const float active = rounded<Value>(gate / (1 + exponential(-gate)));
  to.y[static_cast<size_t>(token) * to.rows + row] = static_cast<uint16_t>(Value::narrow(active * rounded<Value>(up)));
}

// Of a call, whose members' rows are each padded to a multiple of `unit` where they are numbered.
inline Output output_of(const Call& call, int64_t unit = 1) {
  Output out{};
  out.residual = static_cast<const uint16_t*>(call.residual);
  int64_t first = 0;
  for (int i = 0; i < kMostMembers; ++i) {
    if (i >= call.members) {
      out.of[i].first = INT_MAX;
      continue;
    }
    const Outlet& from = call.out[i];
    out.of[i] = {static_cast<uint16_t*>(from.y), from.bias, static_cast<int>(first), static_cast<int>(from.rows),
                 static_cast<int>(from.bias_dtype)};
    first += ceil_div(from.rows, unit) * unit;
  }
  return out;
}

// Whether four neighbouring outputs of a member can be stored at once.
inline bool stores_fours(const Call& call) {
  uintptr_t address = reinterpret_cast<uintptr_t>(call.residual);
  int64_t rows = 0;
  for (int i = 0; i < call.members; ++i) {
    address |= reinterpret_cast<uintptr_t>(call.out[i].y);
    rows |= call.out[i].rows;
  }
  return address % 8 == 0 && rows % 4 == 0;
}

}  // namespace alphaprune::cuda
