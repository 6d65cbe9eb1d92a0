// How whoever reads a packed weight asks for what the next tiles hold.
#pragma once

#include "avx512.h"

namespace alphaprune {
namespace {

template <int kLines, int kWords, int64_t kBy>
struct AsksFar;

// Both ways have start(tile's mask, values, their bytes) and then word(q, values) at the mask words, where q is known
// to the compiler. Near: into L1, from where the words lie; kEach: not only for every other word.
template <bool kEach = false>
struct AsksNear {
  using There = AsksFar<16, sbt::kWords, 0>;
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
// Not ahead, by 0: what `start` is given is then not read yet.
constexpr int64_t kFarBytes = 8192;
template <int64_t kBy>
struct AsksBy {
  const char* next = nullptr;
  int64_t step = 0;

  static void line(const void* p) { _mm_prefetch(static_cast<const char*>(p) + kBy, _MM_HINT_T1); }
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

using Far = AsksBy<kFarBytes>;

// kLines of a tile, kWords of it that `word` is called at.
template <int kLines, int kWords = sbt::kWords, int64_t kBy = kFarBytes>
struct AsksFar : AsksBy<kBy> {
  static_assert(kLines * 4 == kWords * 3 || kWords % kLines == 0, "at three of four words, or at one of several");
  static constexpr bool kAgain = false;
  using There = AsksFar<kLines, kWords, 0>;  // the same of tiles that do not follow one another
  void start(const uint32_t* mask, const void* value, int64_t bytes) { AsksBy<kBy>::start(mask, value, bytes, kLines); }
  void word(int q, const void*) {
    if (kLines * 4 == kWords * 3 ? q % 4 != 3 : q % (kWords / kLines) == 0) this->more();
  }
};

// Densities below which a tile's values hardly take more than 16 lines, or 8 of int8; and below which three tokens and
// more do not wait for memory.
constexpr double kFewLines = 0.45, kHardlyWaits = 0.25;

}  // namespace
}  // namespace alphaprune
