#include "norm.h"

#include <algorithm>

#include "dispatch.h"

namespace alphaprune {
namespace {

constexpr int64_t kRows = 4;           // of a norm that a thread takes at once
constexpr int64_t kNumbers = 1 << 12;  // of a SwiGLU
constexpr int64_t kSteps = 16;         // that one of these takes beside a multiply-add

// The same `index` numbers further on.
template <class P>
P* moved(P* p, int64_t index, Dtype dtype) {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  return p ? static_cast<Byte*>(p) + index * static_cast<int64_t>(size_of(dtype)) : nullptr;
}

}  // namespace

void norm(const Isa& isa, const Norm& p) {
  parallel_for(ceil_div(p.rows, kRows), threads_for(p.rows * p.cols), [&](int64_t i) {
    const int64_t first = i * kRows, at = first * p.cols;
    Norm part = p;
    part.h = moved(p.h, at, p.dtype);
    part.delta = moved(p.delta, at, p.dtype);
    part.out = moved(p.out, at, p.dtype);
    part.rows = std::min(kRows, p.rows - first);
    isa.loops->norm(part);
  });
}

void swiglu(const Isa& isa, const Swiglu& p) {
  parallel_for(ceil_div(p.count, kNumbers), threads_for(p.count * kSteps), [&](int64_t i) {
    const int64_t first = i * kNumbers;
    isa.loops->swiglu({moved(p.gate, first, p.dtype), moved(p.up, first, p.dtype), moved(p.out, first, p.dtype),
                       std::min(kNumbers, p.count - first), p.dtype});
  });
}

}  // namespace alphaprune
