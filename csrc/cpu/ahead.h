// How whoever reads a packed weight asks for what the next tiles hold.
#pragma once

#include "avx512.h"

namespace alphaprune {
namespace {

// Both ways have start(tile's mask, values, their bytes) and then word(q, values) at the mask words, where q is known
// to the compiler. Near: into L1, from where the words lie; kEach: not only for every other word.
template <bool kEach = false>
struct AsksNear {
  static constexpr bool kAgain = true;  // whether it helps those who read the same once more
  void start(const uint32_t* mask, const void*, int64_t) {
    prefetch(mask);
    prefetch(mask + 16);
  }
  void word(int q, const void* value) {
    if (kEach || q % 2 == 0) prefetch(value);
  }
};

// Far: into L2, at even distances over what the values of a tile take, so that no line is left out where more than one
// lies between two words. On a Zen 4, whose L1 waits for few lines at a time, one token took 1.2 to 1.3 times as long
// with Near at 50 and 70 %; 4 KB ahead was slower, 12 and 16 as fast, and so were 32 lines a tile instead of 24.
struct Far {
  static constexpr int64_t kFar = 8192;
  const char* next = nullptr;
  int64_t step = 0;

  static void line(const void* p) { _mm_prefetch(static_cast<const char*>(p) + kFar, _MM_HINT_T1); }
  void start(const uint32_t* mask, const void* value, int64_t bytes, int64_t lines) {
    line(mask);
    line(mask + 16);
    next = static_cast<const char*>(value);
    step = (bytes + lines - 1) / lines;
  }
  void more() {
    line(next);
    next += step;
  }
};

// kLines of a tile, kWords of it that `word` is called at.
template <int kLines, int kWords = sbt::kWords>
struct AsksFar : Far {
  static_assert(kLines * 4 == kWords * 3 || kWords % kLines == 0, "at three of four words, or at one of several");
  static constexpr bool kAgain = false;
  void start(const uint32_t* mask, const void* value, int64_t bytes) { Far::start(mask, value, bytes, kLines); }
  void word(int q, const void*) {
    if (kLines * 4 == kWords * 3 ? q % 4 != 3 : q % (kWords / kLines) == 0) more();
  }
};

// Densities below which a tile's values hardly take more than 16 lines, or 8 of int8; and below which three tokens and
// more do not wait for memory.
constexpr double kFewLines = 0.45, kHardlyWaits = 0.25;

}  // namespace
}  // namespace alphaprune
