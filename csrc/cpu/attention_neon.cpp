// Attention of a decode step on NEON: half of its 32 registers are sums.
#include <arm_neon.h>

#include "attention_loop.h"

namespace alphaprune {
namespace {

// GCC makes scalars of a conversion of 4 halves, and of sums.
struct Neon : Lanes<4, 16> {
  using Lanes::load;
  using Lanes::round;
  using Lanes::store;
  static V load(const uint16_t* p) { return reinterpret_cast<V>(vshll_n_u16(vld1_u16(p), 16)); }
  static void store(uint16_t* p, V v) { vst1_u16(p, vshrn_n_u32(reinterpret_cast<uint32x4_t>(v), 16)); }
  static V load(const Binary16* p) {
    return reinterpret_cast<V>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)))));
  }
  static void store(Binary16* p, V v) { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(halves(v))); }
  static V round(V v, Binary16) { return reinterpret_cast<V>(vcvt_f32_f16(halves(v))); }
  static float16x4_t halves(V v) { return vcvt_f16_f32(reinterpret_cast<float32x4_t>(v)); }
  static void sums(const V* v, float* to) {
    const auto pairs = [&](int i) {
      return vpaddq_f32(reinterpret_cast<float32x4_t>(v[i]), reinterpret_cast<float32x4_t>(v[i + 1]));
    };
    vst1q_f32(to, vpaddq_f32(pairs(0), pairs(2)));
  }
};

}  // namespace

const StepLoops kStepNeon = {AnyLoop<Neon>::rotate, AnyLoop<Neon>::chunk, AnyLoop<Neon>::norm, AnyLoop<Neon>::swiglu};

}  // namespace alphaprune
