// What the kernels that multiply share at their ends: pairs of 16-bit floats, and an output with bias and residual.
#pragma once

#include "device.cuh"

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

ALPHAPRUNE_DEVICE uint32_t word_of(uint4 four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// 0 where the value is finite, NaN elsewhere.
ALPHAPRUNE_DEVICE float poison_of(float value) { return 0.0f * value; }
ALPHAPRUNE_DEVICE bool is_nan(float value) { return value != value; }

struct Output {
  const void* bias;  // [rows] or null; bias_code is its Dtype
  const uint16_t* residual;
  uint16_t* y;  // [tokens, rows]
  int rows;
  int bias_code;
};

ALPHAPRUNE_DEVICE float bias_of(const Output& out, int row) {
  if (out.bias_code == 0) return static_cast<const float*>(out.bias)[row];
  const uint32_t half = static_cast<const uint16_t*>(out.bias)[row];
  return out.bias_code == Bfloat16::code ? Bfloat16::widen(half) : Float16::widen(half);
}

// y[token, row] = sum + bias + residual, rounded once.
template <class Value>
ALPHAPRUNE_DEVICE void store_output(const Output& out, int token, int row, float sum) {
  if (out.bias) sum += bias_of(out, row);
  const size_t to = static_cast<size_t>(token) * out.rows + row;
  if (out.residual) sum += Value::widen(out.residual[to]);
  out.y[to] = static_cast<uint16_t>(Value::narrow(sum));
}

// The same of four neighbouring rows: rows are a multiple of 4, y and the residual aligned to 8 bytes.
template <class Value>
ALPHAPRUNE_DEVICE void store_four_outputs(const Output& out, int token, int row, float (&sum)[4]) {
  if (out.bias) {
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] += bias_of(out, row + i);
  }
  const size_t to = static_cast<size_t>(token) * out.rows + row;
  if (out.residual) {
    const uint2 four = *reinterpret_cast<const uint2*>(out.residual + to);
    float more[4];
    widen_pair<Value>(four.x, more[0], more[1]);
    widen_pair<Value>(four.y, more[2], more[3]);
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] += more[i];
  }
  *reinterpret_cast<uint2*>(out.y + to) = {Value::narrow(sum[0]) | Value::narrow(sum[1]) << 16,
                                           Value::narrow(sum[2]) | Value::narrow(sum[3]) << 16};
}

}  // namespace alphaprune::cuda
