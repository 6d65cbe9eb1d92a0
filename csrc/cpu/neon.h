// SBT on NEON: a byte of the mask picks the control of a TBL, which spreads the values over eight lanes and clears the
// others.
//
// A core of this kind is bound by how many instructions it can issue, so what is not arithmetic is done for many mask
// bytes at once: CNT counts the bits of 16 of them, a multiplication turns eight counts into eight places among the
// values, a widening shift turns eight bytes into eight places in the table. Each place then costs one instruction.
#pragma once

#include <arm_neon.h>

#include <new>
#include <utility>

#include "panel.h"

namespace alphaprune {
namespace {

// TBL writes zero for an index past its registers. The float tables put 16 bits into the upper half of a lane, which
// makes a bfloat16 a float32 without any further instruction, and 8 bits into its upper quarter. Each table is aligned
// to its size: BFXIL completes addresses in it.
struct alignas(8192) Tables {
  uint8_t upper_half[256][32];
  uint8_t upper_quarter[256][32];
  uint8_t words[256][32];  // the upper four lanes from a start of their own
  uint8_t halves[256][16];
  uint8_t rows[2][256][16];  // of bytes, the lower eight lanes and the upper eight
  uint8_t bytes[256][8];

  Tables() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0; lane < 8; ++lane) {
        const bool kept = mask >> lane & 1;
        const int before = __builtin_popcount(mask & ((1 << lane) - 1));
        const int upper = lane < 4 ? before : before - __builtin_popcount(mask & 15);
        // Bytes [from, from + size) of a lane take value `index` of `size` bytes.
        const auto put = [&](uint8_t* control, int bytes, int size, int from, int index) {
          for (int i = 0; i < bytes; ++i)
            control[bytes * lane + i] =
                static_cast<uint8_t>(kept && i >= from && i < from + size ? size * index + i - from : 0xff);
        };
        put(upper_half[mask], 4, 2, 2, before);
        put(upper_quarter[mask], 4, 1, 3, before);
        put(words[mask], 4, 4, 0, upper);
        put(halves[mask], 2, 2, 0, before);
        put(bytes[mask], 1, 1, 0, before);
        for (int upper_eight = 0; upper_eight < 2; ++upper_eight) {
          put(rows[upper_eight][mask] + 8 * upper_eight, 1, 1, 0, before);
          rows[upper_eight][mask][lane + 8 * !upper_eight] = 0xff;
        }
      }
    }
  }
};

// On the heap and never freed: loaders are known to ignore an alignment above a page's in a shared library.
__attribute__((noinline)) const Tables& tables() {
  static const Tables& made = *new Tables;
  return made;
}

// Calls work(0), ..., work(N - 1) with constants: registers and immediate operands cannot be picked by a variable.
template <class Work, int... I>
inline void each_of(Work work, std::integer_sequence<int, I...>) {
  (work(std::integral_constant<int, I>()), ...);
}
template <int N, class Work>
inline void each(Work work) {
  each_of(work, std::make_integer_sequence<int, N>());
}

// Where the values of a mask byte start, those of its upper four bits if they are float32, and the byte's control.
struct Place {
  const uint8_t *value, *upper, *control;
};

inline uint8x16_t spread(const uint8_t* value, const uint8_t* control) {
  return vqtbl1q_u8(vld1q_u8(value), vld1q_u8(control));
}

// What is stored, its table with rows of 2^kShift bytes, and the eight weights of a mask byte as float32; `copy` writes
// them as they are stored. A load takes 16 bytes: the values end in a readable tail of 64.
struct Bfloat16 {
  using Stored = uint16_t;
  static constexpr int kShift = 5;
  static const uint8_t* table(int) { return tables().upper_half[0]; }
  static void eight(const Place& at, float32x4_t* w) {
    for (int h = 0; h < 2; ++h) w[h] = vreinterpretq_f32_u8(spread(at.value, at.control + 16 * h));
  }
};
struct Float16 {
  using Stored = uint16_t;
  static constexpr int kShift = 4;
  static const uint8_t* table(int) { return tables().halves[0]; }
  static void eight(const Place& at, float32x4_t* w) {
    const float16x8_t halves = vreinterpretq_f16_u8(spread(at.value, at.control));
    w[0] = vcvt_f32_f16(vget_low_f16(halves));
    w[1] = vcvt_high_f32_f16(halves);
  }
  static void copy(const Place& at, uint8_t* to) { vst1q_u8(to, spread(at.value, at.control)); }
};
struct Float32Value {
  using Stored = uint32_t;
  static constexpr int kShift = 5;
  static const uint8_t* table(int) { return tables().words[0]; }
  static void eight(const Place& at, float32x4_t* w) {
    w[0] = vreinterpretq_f32_u8(spread(at.value, at.control));
    w[1] = vreinterpretq_f32_u8(spread(at.upper, at.control + 16));
  }
  static void copy(const Place& at, uint8_t* to) {
    vst1q_u8(to, spread(at.value, at.control));
    vst1q_u8(to + 16, spread(at.upper, at.control + 16));
  }
};
struct Integer {
  using Stored = uint8_t;
  static constexpr int kShift = 5;
  static const uint8_t* table(int) { return tables().upper_quarter[0]; }
  static void eight(const Place& at, float32x4_t* w) {
    // As fixed point with 24 binary places the upper quarter of a lane is the integer.
    for (int h = 0; h < 2; ++h) w[h] = vcvtq_n_f32_s32(vreinterpretq_s32_u8(spread(at.value, at.control + 16 * h)), 24);
  }
};
struct Byte {
  using Stored = uint8_t;
  static constexpr int kShift = 3;
  static const uint8_t* table(int) { return tables().bytes[0]; }
  static void copy(const Place& at, uint8_t* to) { vst1_u8(to, vtbl1_u8(vld1_u8(at.value), vld1_u8(at.control))); }
};

// Asks for what lies `kAhead` bytes on.
constexpr int64_t kAhead = 4096;
inline void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kAhead); }

// Addresses in the table of a Value, two taking turns so that one instruction need not wait for the other; it may have
// one for bytes in even places and one for the others.
template <class Value>
class Controls {
 public:
  Controls() {
    for (int i = 0; i < 2; ++i) at_[i] = Value::table(i);
  }
  // The control at the place that 16 bits of `places` say; BFXIL writes them over the low bits of an address. A
  // compiler would do it in two or three instructions.
  template <int Lane>
  const uint8_t* at(uint64_t places) {
    const uint8_t*& at = at_[Lane % 2];
    __asm__ volatile("bfxil %0, %1, %2, %3" : "+r"(at) : "r"(places), "i"(16 * Lane), "i"(8 + Value::kShift));
    return at;
  }

 private:
  const uint8_t* at_[2];
};

// Calls to.eight<Value, 16 * kPart + i>(place of byte i) for the 16 mask bytes of four words; returns where the values
// end.
template <class Value, int kPart = 0, class To>
inline const uint8_t* sixteen(const uint8_t* mask, const uint8_t* value, Controls<Value>& controls, To& to) {
  constexpr uint64_t kSize = sizeof(typename Value::Stored);
  const uint8x16_t bytes = vld1q_u8(mask);
  const uint64x2_t counts = vreinterpretq_u64_u8(vcntq_u8(bytes));
  const uint64x2_t lower = vreinterpretq_u64_u8(vcntq_u8(vandq_u8(bytes, vdupq_n_u8(0x0f))));
  const uint64x2_t low = vreinterpretq_u64_u16(vshll_n_u8(vget_low_u8(bytes), Value::kShift));
  const uint64x2_t high = vreinterpretq_u64_u16(vshll_high_n_u8(bytes, Value::kShift));
  const uint64_t places[4] = {vgetq_lane_u64(low, 0), vgetq_lane_u64(low, 1), vgetq_lane_u64(high, 0),
                              vgetq_lane_u64(high, 1)};
  const uint64_t count[2] = {vgetq_lane_u64(counts, 0), vgetq_lane_u64(counts, 1)};
  // In byte i the bytes of values up to the end of mask byte i, at most 4 * 56 where they are read.
  const uint64_t ends[2] = {count[0] * (0x0101010101010101u * kSize), count[1] * (0x0101010101010101u * kSize)};
  // In byte i the bytes of values before the upper four bits of mask byte i, at most 4 * 60.
  const uint64_t middles[2] = {(ends[0] << 8) + vgetq_lane_u64(lower, 0) * kSize,
                               (ends[1] << 8) + vgetq_lane_u64(lower, 1) * kSize};
  const auto all = [&](int half) {
    return kSize < 4 ? ends[half] >> 56 : (ends[half] >> 48 & 0xff) + (count[half] >> 56) * kSize;
  };
  const uint8_t* const second = value + all(0);
  each<16>([&](auto i) {
    constexpr int kHalf = i / 8, kByte = i % 8;
    const uint8_t* const first = kHalf ? second : value;
    const uint8_t* at = first;
    if constexpr (kByte > 0) at += ends[kHalf] >> (8 * kByte - 8) & 0xff;
    if constexpr (kByte % (kSize < 4 ? 8 : 4) == 0) prefetch(at);
    const uint8_t* upper = kSize < 4 ? nullptr : first + (middles[kHalf] >> 8 * kByte & 0xff);
    to.template eight<Value, 16 * kPart + i>(Place{at, upper, controls.template at<i % 4>(places[i / 4])});
  });
  return second + all(1);
}

inline const uint8_t* mask_bytes(const sbt::View& weight, int64_t tile) {
  return reinterpret_cast<const uint8_t*>(weight.mask + tile * sbt::kWords);
}

template <class Value>
inline const uint8_t* value_bytes(const sbt::View& weight, int64_t tile) {
  return reinterpret_cast<const uint8_t*>(tile_values<typename Value::Stored>(weight, tile));
}

// Calls work(Value()) with the value type of `dtype`.
template <class Work>
inline void by_value(Dtype dtype, Work work) {
  if (dtype == Dtype::float32) return work(Float32Value());
  if (dtype == Dtype::bfloat16) return work(Bfloat16());
  if (dtype == Dtype::float16) return work(Float16());
  work(Integer());
}

// The weights of a macro tile as they are stored.
struct Words {
  static void expand(const sbt::View& weight, int64_t tile, uint8_t* to) { raw<Byte>(weight, tile, to); }
  static void expand(const sbt::View& weight, int64_t tile, uint16_t* to) { raw<Float16>(weight, tile, to); }
  static void expand(const sbt::View& weight, int64_t tile, uint32_t* to) { raw<Float32Value>(weight, tile, to); }

 private:
  struct ToMemory {
    uint8_t* to;
    template <class Value, int kByte>
    void eight(const Place& at) const {
      Value::copy(at, to + 8 * kByte * sizeof(typename Value::Stored));
    }
  };
  template <class Value, class T>
  static void raw(const sbt::View& weight, int64_t tile, T* to) {
    Controls<Value> controls;
    const uint8_t* mask = mask_bytes(weight, tile);
    const uint8_t* value = value_bytes<Value>(weight, tile);
    for (int64_t byte = 0; byte < 4 * sbt::kWords; byte += 16) {
      ToMemory memory{reinterpret_cast<uint8_t*>(to + 8 * byte)};
      value = sixteen<Value>(mask + byte, value, controls, memory);
    }
  }
};

// One token's activations as float32, zeros past `count`.
inline void convert(const void* from, Dtype dtype, int64_t count, int64_t padded, float* to) {
  int64_t i = 0;
  if (dtype != Dtype::float32) {
    const auto* halves = static_cast<const uint16_t*>(from);
    for (; i + 4 <= count; i += 4) {
      const uint16x4_t v = vld1_u16(halves + i);
      vst1q_f32(to + i, dtype == Dtype::bfloat16 ? vreinterpretq_f32_u32(vshll_n_u16(v, 16))
                                                 : vcvt_f32_f16(vreinterpret_f16_u16(v)));
    }
  }
  for (; i < count; ++i) to[i] = load_float(from, i, dtype);
  for (; i < padded; ++i) to[i] = 0;
}

}  // namespace
}  // namespace alphaprune
