// SBT on AVX-512 with VNNI but without VBMI2, as Cascade Lake servers have it: int8 beside activations of 16 bits as
// integers; everything else is computed as without VNNI.
//
// vpexpandb is put together from shuffles. Of each nibble of the mask a byte is made, for half a macro tile at once:
// the nibble in its upper half, in the lower how many kept values stand before it among the 16 weights of its row.
// vpshufb repeats the byte for the nibble's four weights; a table of 16 entries in one register gives how many stand
// before each weight in the nibble, or 128 where it is pruned, and takes the upper half off again (vpermd); and the sum
// of both is the control of a vpshufb, which takes the values from 16 bytes of the row and writes zeros for 128 and
// more.
#include <utility>

#include "integer.h"
#include "over.h"

namespace alphaprune {
namespace {

struct Tables {
  alignas(64) uint8_t inside[16][4];   // by nibble: kept values before each weight in it, or 128, less 16 * nibble
  alignas(64) uint8_t four_times[64];  // 0 0 0 0 1 1 1 1 ...
  alignas(16) uint8_t ones[16];        // bits of a nibble,
  alignas(16) uint8_t shifted[16];     // and 16 * nibble less that
  constexpr Tables() : inside(), four_times(), ones(), shifted() {
    for (int i = 0; i < 64; ++i) four_times[i] = static_cast<uint8_t>(i / 4);
    for (int nibble = 0; nibble < 16; ++nibble) {
      for (int weight = 0; weight < 4; ++weight) {
        const bool kept = nibble >> weight & 1;
        inside[nibble][weight] = static_cast<uint8_t>((kept ? ones[nibble] : 128) - 16 * nibble);
        ones[nibble] = static_cast<uint8_t>(ones[nibble] + kept);
      }
      shifted[nibble] = static_cast<uint8_t>(16 * nibble - ones[nibble]);
    }
  }
};
constexpr Tables kTables;

class ShuffledBytes {
 public:
  // What is known of the masks of eight vectors before their values are looked at.
  struct alignas(64) Half {
    uint8_t nibble[8][16];  // of the mask, and what is kept before it
    uint64_t even[8][2];    // kept values of rows 0 and 2 of a vector,
    uint64_t odd[8][2];     // of rows 1 and 3
  };
  struct Notes {
    Half first, second;
  };

  using There = ShuffledBytes;

  ShuffledBytes(const sbt::View& weight, int64_t begin, int64_t end, Notes& notes)
      : weight_(weight),
        mask_(weight.mask + begin * sbt::kWords),
        last_(weight.mask + end * sbt::kWords - kHalfWords),
        now_(&notes.first),
        then_(&notes.second) {
    take();
  }

  void start(int64_t tile, int64_t = 0) {
    value_ = tile_values<uint8_t>(weight_, tile);
    prefetch(weight_.mask + tile * sbt::kWords);
    prefetch(weight_.mask + tile * sbt::kWords + kHalfWords);
  }

  static constexpr bool narrow() { return false; }
  void apart() {}
  template <bool kNarrow = false>
  __m512i next(int vector) {
    // One half ahead, so that nothing waits for the way through memory.
    if (vector == 0) take();
    if (vector % 2 == 0) prefetch(value_);
    const int at = vector % 2 * 4 + vector / 2;  // unpacking leaves the even vectors before the odd ones
    const __m512i nibbles =
        _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load(now_->nibble[at])), _mm512_load_si512(kTables.four_times));
    const __m512i inside = _mm512_permutexvar_epi32(_mm512_srli_epi32(nibbles, 4), _mm512_load_si512(kTables.inside));
    __m512i values = _mm512_broadcast_i32x4(loadu(value_));
    value_ += now_->even[at][0];
    values = _mm512_mask_broadcast_i32x4(values, 0x00f0, loadu(value_));
    value_ += now_->odd[at][0];
    values = _mm512_mask_broadcast_i32x4(values, 0x0f00, loadu(value_));
    value_ += now_->even[at][1];
    values = _mm512_mask_broadcast_i32x4(values, 0xf000, loadu(value_));
    value_ += now_->odd[at][1];
    return _mm512_shuffle_epi8(values, _mm512_add_epi8(inside, nibbles));
  }

 private:
  static constexpr int64_t kHalfWords = sbt::kWords / 2;

  static __m128i load(const uint8_t* p) { return _mm_load_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m128i loadu(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

  // Hidden from the compiler, which would take four shifts and additions for one multiplication.
  static __m512i each_byte() {
    __m512i ones = _mm512_set1_epi32(0x01010101);
    __asm__("" : "+v"(ones));
    return ones;
  }
  // Notes of the next words, of the last ones again when there are no more.
  void take() {
    const __m512i words = _mm512_loadu_si512(mask_), upper = _mm512_srli_epi16(words, 4);
    if (mask_ != last_) mask_ += kHalfWords;
    std::swap(now_, then_);
    count(_mm512_unpacklo_epi8(words, upper), 0);
    count(_mm512_unpackhi_epi8(words, upper), 4);
    // Through memory, where a part of a vector is a load; a compiler that sees through takes shuffles.
    __asm__("" : "+m"(*then_));
  }
  // 64 nibbles, the upper halves of the bytes anything.
  void count(__m512i nibbles, int first) {
    const __m512i ones = _mm512_broadcast_i32x4(load(kTables.ones));
    const __m512i shifted = _mm512_broadcast_i32x4(load(kTables.shifted));
    const __m512i low = _mm512_and_si512(nibbles, _mm512_set1_epi8(15)), kept = _mm512_shuffle_epi8(ones, low);
    const __m512i sums = _mm512_mullo_epi32(kept, each_byte());  // up to each nibble of a row
    _mm512_store_si512(then_->nibble[first], _mm512_add_epi8(sums, _mm512_shuffle_epi8(shifted, low)));
    _mm512_store_si512(then_->even[first], _mm512_maskz_srli_epi32(0x5555, sums, 24));
    _mm512_store_si512(then_->odd[first], _mm512_srli_epi64(sums, 56));
  }

  const sbt::View& weight_;
  const uint8_t* value_ = nullptr;
  const uint32_t* mask_;
  const uint32_t* last_;
  Half* now_;
  Half* then_;
};

struct Shuffled {
  static const Isa& lesser() { return kAvx512bw; }
  static bool takes(const Activations& x, const sbt::View& weight) { return rounds(x, weight); }
  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    integer_product<ShuffledBytes>(p, begin, end, scratch);
  }
  static void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
    prepare_integers(x, weight, first, last, to);
  }
};

}  // namespace

const Isa kAvx512vnni = Over<Shuffled>::isa("avx512vnni", &kStepAvx512bw);

}  // namespace alphaprune
