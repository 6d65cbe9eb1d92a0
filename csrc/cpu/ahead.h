// How whoever reads a packed weight asks for what the next tiles hold.
#pragma once

#include "avx512.h"

namespace alphaprune {
namespace {

// Which cache what is asked for comes into, besides those behind it.
enum class Into { l1, l2 };

template <int kLines, Into kInto, int64_t kBy>
struct AsksFar;

// Both ways have start(tile's mask, values, their bytes) and then word(q, values) at the mask words, where q is known
// to the compiler; apart() hides from it what it could do before a branch, and would keep in memory. Near: into L1,
// from where the words lie; kEach: not only for every other word.
template <bool kEach = false>
struct AsksNear {
  using There = AsksFar<16, Into::l2, 0>;
  static constexpr bool kAgain = true;  // whether it helps those who read the same once more
  void start(const uint32_t* mask, const void*, int64_t) {
    prefetch(mask);
    prefetch(mask + 16);
  }
  void apart() {}
  void word(int q, const void* value) {
    if (kEach || q % 2 == 0) prefetch(value);
  }
};

// Far: at even distances over what the values of a tile take, so that no line is left out where more than one lies
// between two words. On a Zen 4, whose L1 waits for few lines at a time, into L2: one token took 1.2 to 1.3 times as
// long with Near at 50 and 70 %; 4 KB ahead was slower, 12 and 16 as fast, and so were 32 lines a tile instead of 24.
// On a Zen 5 into L1: many tokens took 0.8 to 0.97 of the time. Not ahead, by 0: what `start` is given is then not read
// yet.
constexpr int64_t kFarBytes = 8192;
template <int64_t kBy, Into kInto = Into::l2>
struct AsksBy {
  const char* next = nullptr;
  int64_t step = 0;

  static void line(const void* p) {
    const char* at = static_cast<const char*>(p) + kBy;
    if (kInto == Into::l1) {
      _mm_prefetch(at, _MM_HINT_T0);
    } else {
      _mm_prefetch(at, _MM_HINT_T1);
    }
  }
  void start(const uint32_t* mask, const void* value, int64_t bytes, int64_t lines) {
    line(mask);
    line(mask + 16);
    next = static_cast<const char*>(value);
    step = (bytes + lines - 1) / lines;
  }
  void apart() { asm volatile("" : "+r"(next)); }
  void more() {
    line(next);
    next += step;
  }
};

// kLines of a tile, at as many of its words.
template <int kLines, Into kInto = Into::l2, int64_t kBy = kFarBytes>
struct AsksFar : AsksBy<kBy, kInto> {
  static_assert(kLines * 4 == sbt::kWords * 3 || sbt::kWords % kLines == 0,
                "at three of four words, or at one of some");
  static constexpr bool kAgain = false;
  using There = AsksFar<kLines, kInto, 0>;  // the same of tiles that do not follow one another
  // second: half of the lines were asked for before.
  void start(const uint32_t* mask, const void* value, int64_t bytes, bool second = false) {
    AsksBy<kBy, kInto>::start(mask, value, bytes, kLines);
    if (second) this->next += kLines / 2 * this->step;
  }
  void word(int q, const void*) {
    if (kLines * 4 == sbt::kWords * 3 ? q % 4 != 3 : q % (sbt::kWords / kLines) == 0) this->more();
  }
};

// Densities below which a tile's values hardly take more than 16 lines, or 8 of int8.
constexpr double kFewLines = 0.45;

// use(an AsksFar) of kFew lines or of kMany, by the density, into the cache that suits this CPU.
template <int kFew, int kMany, int64_t kBy = kFarBytes, class Use>
void asking_far(const sbt::View& weight, const Use& use) {
  const bool few = density_of(weight) < kFewLines;
  if (multiplies_twice()) {
    if (few) return use(AsksFar<kFew, Into::l1, kBy>());
    return use(AsksFar<kMany, Into::l1, kBy>());
  }
  if (few) return use(AsksFar<kFew, Into::l2, kBy>());
  use(AsksFar<kMany, Into::l2, kBy>());
}

}  // namespace
}  // namespace alphaprune
