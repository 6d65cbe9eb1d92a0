// The layer between the kernels and the machine: every primitive is a few lines of PTX for nvcc and a twin in
// csrc/emulator/simt.h for any C++ compiler, so that one source runs on both. Nothing here knows a packed format.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ALPHAPRUNE_DEVICE __device__ __forceinline__
#define ALPHAPRUNE_BOTH __host__ __device__
#define ALPHAPRUNE_KERNEL __global__ void
#define ALPHAPRUNE_UNROLL _Pragma("unroll")
#define ALPHAPRUNE_NO_UNROLL _Pragma("unroll 1")
#else
#include "../emulator/simt.h"
#define ALPHAPRUNE_DEVICE inline
#define ALPHAPRUNE_BOTH
#define ALPHAPRUNE_KERNEL inline void
#define ALPHAPRUNE_UNROLL
#define ALPHAPRUNE_NO_UNROLL
#define __launch_bounds__(...)
#define __restrict__
#endif

namespace alphaprune::cuda {

constexpr int kWarp = 32;

#ifndef __CUDACC__
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
#endif

ALPHAPRUNE_DEVICE uint32_t bits_of(float value) {
#ifdef __CUDACC__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}
ALPHAPRUNE_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

// The two 16-bit floats. `code` is the Dtype of csrc/layout.h.
struct Bfloat16 {
  static constexpr int code = 2;
  static ALPHAPRUNE_DEVICE float widen(uint32_t half) { return float_of(half << 16); }
  // To nearest, ties to even; a NaN stays one.
  static ALPHAPRUNE_DEVICE uint32_t narrow(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
};
struct Float16 {
  static constexpr int code = 1;
  static ALPHAPRUNE_DEVICE float widen(uint32_t half) {
#ifdef __CUDACC__
    float value;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(half));
    return value;
#else
    const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, fraction = half & 1023u;
    if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -small : small;
#endif
  }
  static ALPHAPRUNE_DEVICE uint32_t narrow(float value) {
#ifdef __CUDACC__
    uint32_t half;
    asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(half) : "f"(value));
    return half;
#else
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return sign | 0x7e00u | (size >> 13 & 0x1ffu);
    if (size >= 0x477ff000u) return sign | 0x7c00u;
    if (size >= 0x38800000u) return sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13);
    // Subnormal: adding 0.5 leaves the rounded count of 2^-24 in the low bits.
    return sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000u);
#endif
  }
};

// e^value and 1 / √value; of the last bits nothing is promised.
#ifdef __CUDACC__
ALPHAPRUNE_DEVICE float exponential(float value) { return __expf(value); }
ALPHAPRUNE_DEVICE float inverse_root(float value) { return rsqrtf(value); }
#else
inline float exponential(float value) { return std::exp(value); }
inline float inverse_root(float value) { return 1 / std::sqrt(value); }
#endif

// ---- where this thread is ----
#ifdef __CUDACC__
ALPHAPRUNE_DEVICE int thread_index() { return threadIdx.x; }
ALPHAPRUNE_DEVICE int block_x() { return blockIdx.x; }
ALPHAPRUNE_DEVICE void sync_warp() { __syncwarp(); }
ALPHAPRUNE_DEVICE void sync_block() { __syncthreads(); }
// The same, and whether it holds for any thread of the block.
ALPHAPRUNE_DEVICE bool sync_block_any(bool mine) { return __syncthreads_or(mine); }
// So many threads of the block, whole warps, meet at its barrier `number`, 1 to 15; what they wrote to shared memory is
// there for all of them.
ALPHAPRUNE_DEVICE void sync_warps(int number, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
ALPHAPRUNE_DEVICE int popcount(uint32_t v) { return __popc(v); }
#else
inline int thread_index() { return emulator::thread_index(); }
inline int block_x() { return static_cast<int>(emulator::block().index.x); }
inline void sync_warp() { emulator::sync_warp(); }
inline void sync_block() { emulator::sync_block(); }
inline bool sync_block_any(bool mine) { return emulator::sync_block_any(mine); }
inline void sync_warps(int number, int threads) { emulator::sync_warps(number, threads); }
inline int popcount(uint32_t v) { return __builtin_popcount(v); }
#endif
ALPHAPRUNE_DEVICE int lane_index() { return thread_index() % kWarp; }
// Lets a kernel that was started early (start_early in launch.cuh) begin while this one still runs. Nothing before
// compute capability 9.0, where none is.
ALPHAPRUNE_DEVICE void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the kernels before this one have ended and all that they wrote is there.
ALPHAPRUNE_DEVICE void wait_for_kernels_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The same for all lanes, and known to the compiler to be so: all of them have to ask.
ALPHAPRUNE_DEVICE int warp_index() {
#ifdef __CUDACC__
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0);
#else
  const uint32_t mine = static_cast<uint32_t>(thread_index()) / kWarp;
  return static_cast<int>(emulator::warp().slots[emulator::meet("warp_index", &mine, 1)][0][0]);
#endif
}

// ---- global memory ----
// Read once: past the first-level cache.
template <class T>
ALPHAPRUNE_DEVICE T load_once(const T* from) {
#ifdef __CUDACC__
  T value;
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
  } else {
    static_assert(sizeof(T) == 4, "words");
    uint32_t word;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(from));
    value = static_cast<T>(word);
  }
  return value;
#else
  return emulator::load_global<T>(from);
#endif
}
// Read by many: through the cache of read-only data.
template <class T>
ALPHAPRUNE_DEVICE T load_cached(const T* from) {
#ifdef __CUDACC__
  return __ldg(from);
#else
  return emulator::load_global<T>(from);
#endif
}

// Eight aligned bytes at once; by a pointer the compiler would store them as two words.
ALPHAPRUNE_DEVICE void store_eight_bytes(uint16_t* to, uint2 value) {
#ifdef __CUDACC__
  asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(to), "r"(value.x), "r"(value.y) : "memory");
#else
  *reinterpret_cast<uint2*>(to) = value;
#endif
}

// Has the second-level cache fetch what others will read: 16-byte aligned, a multiple of 16 bytes. From sm_90 on.
ALPHAPRUNE_DEVICE void fetch(const void* from, uint32_t bytes) {
#ifndef __CUDACC__
  emulator::fetch(from, bytes);
#elif __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// ---- shared memory, by 32-bit addresses ----
// The block's dynamic shared memory starts at this address, which is a multiple of 128.
ALPHAPRUNE_DEVICE uint32_t shared_start() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
#else
  return 0;
#endif
}

#ifdef __CUDACC__
ALPHAPRUNE_DEVICE uint32_t load_shared_u32(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}
ALPHAPRUNE_DEVICE float load_shared_f32(uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
  return v;
}
ALPHAPRUNE_DEVICE uint2 load_shared_u64(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}
ALPHAPRUNE_DEVICE uint4 load_shared_u128(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}
ALPHAPRUNE_DEVICE void store_shared_u32(uint32_t at, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
ALPHAPRUNE_DEVICE void store_shared_f32(uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
ALPHAPRUNE_DEVICE void store_shared_u64(uint32_t at, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory");
}
ALPHAPRUNE_DEVICE void store_shared_u128(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
#else
inline uint32_t load_shared_u32(uint32_t at) { return emulator::load_shared<uint32_t>(at); }
inline float load_shared_f32(uint32_t at) { return emulator::load_shared<float>(at); }
inline uint2 load_shared_u64(uint32_t at) { return emulator::load_shared<uint2>(at); }
inline uint4 load_shared_u128(uint32_t at) { return emulator::load_shared<uint4>(at); }
inline void store_shared_u32(uint32_t at, uint32_t v) { emulator::store_shared(at, v); }
inline void store_shared_f32(uint32_t at, float v) { emulator::store_shared(at, v); }
inline void store_shared_u64(uint32_t at, uint2 v) { emulator::store_shared(at, v); }
inline void store_shared_u128(uint32_t at, uint4 v) { emulator::store_shared(at, v); }
#endif

// The bytes from `at` on, which need not be aligned: `count` of them, 0 to 4, lowest first, and above them anything.
// Two aligned words are loaded, which must lie in shared memory.
ALPHAPRUNE_DEVICE uint32_t load_shared_bytes(uint32_t at, int count) {
#ifdef __CUDACC__
  (void)count;
  uint32_t low, high;
  asm volatile("ld.shared.u32 %0, [%2]; ld.shared.u32 %1, [%2 + 4];" : "=&r"(low), "=r"(high) : "r"(at & ~3u));
  return __funnelshift_r(low, high, at * 8);
#else
  const uint32_t first = at % 4, wanted = ((1u << count) - 1) << first;
  const uint64_t low = emulator::load_shared_part(at - first, wanted & 15u);
  const uint64_t high = emulator::load_shared_part(at - first + 4, wanted >> 4);
  return static_cast<uint32_t>((high << 32 | low) >> 8 * first);
#endif
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r says where the 16 bytes of row r of matrix i are, and gets
// elements 2 * (lane % 4) and + 1 of row lane / 4 of each (ldmatrix).
ALPHAPRUNE_DEVICE uint4 load_matrices(uint32_t at) {
#ifdef __CUDACC__
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
#else
  const auto& lanes = emulator::warp().slots[emulator::meet("ldmatrix", &at, 1)];
  uint32_t v[4];
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = lanes[8 * i + lane_index() / 4][0];
    if (row % 16) emulator::fail("a row of ldmatrix is not aligned to 16 bytes");
    v[i] = emulator::load_shared<uint32_t>(row + 4 * (lane_index() % 4));
  }
  return {v[0], v[1], v[2], v[3]};
#endif
}

// ---- asynchronous copies from global to shared memory ----
// 16 bytes, both sides aligned to 16, kOffset bytes on, where left > kLeft; they belong to the group that the thread
// commits next.
template <int kOffset, int kLeft>
ALPHAPRUNE_DEVICE void copy_async(uint32_t to, const void* from, int left) {
#ifdef __CUDACC__
  asm volatile(
      "{.reg .pred p; setp.gt.s32 p, %2, %3; @p cp.async.cg.shared.global [%0 + %4], [%1 + %4], 16;}" ::"r"(to),
      "l"(from), "r"(left), "n"(kLeft), "n"(kOffset)
      : "memory");
#else
  emulator::copy_async(to + kOffset, static_cast<const char*>(from) + kOffset, 16, left > kLeft);
#endif
}
ALPHAPRUNE_DEVICE void copy_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::copy_commit();
#endif
}
// Until all but the youngest kPending groups of this thread have landed. Other threads see them after a barrier.
template <int kPending>
ALPHAPRUNE_DEVICE void copy_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulator::copy_wait(kPending);
#endif
}

// ---- exchanges inside a warp ----
// The sum over the lanes up to this one, of segments of kWidth lanes.
template <int kWidth>
ALPHAPRUNE_DEVICE uint32_t scan_inclusive(uint32_t v) {
#ifdef __CUDACC__
#pragma unroll
  for (int step = 1; step < kWidth; step <<= 1)
    asm volatile("{.reg .pred p; .reg .u32 other; shfl.sync.up.b32 other|p, %0, %1, %2, -1; @p add.u32 %0, %0, other;}"
                 : "+r"(v)
                 : "r"(step), "n"((kWarp - kWidth) << 8));
  return v;
#else
  const int lane = lane_index(), slot = emulator::meet("scan", &v, 1);
  uint32_t sum = 0;
  for (int i = lane / kWidth * kWidth; i <= lane; ++i) sum += emulator::warp().slots[slot][i][0];
  return sum;
#endif
}
// The value of lane `from`.
ALPHAPRUNE_DEVICE uint32_t shuffle(uint32_t v, int from) {
#ifdef __CUDACC__
  return __shfl_sync(~0u, v, from);
#else
  return emulator::warp().slots[emulator::meet("shuffle", &v, 1)][from % kWarp][0];
#endif
}
// The sum over all lanes, the same in each; a tree, so the order is fixed.
ALPHAPRUNE_DEVICE float sum_lanes(float v) {
#ifdef __CUDACC__
#pragma unroll
  for (int step = kWarp / 2; step; step >>= 1) v += __shfl_xor_sync(~0u, v, step);
  return v;
#else
  for (int step = kWarp / 2; step; step >>= 1) {
    const uint32_t bits = bits_of(v);
    v += float_of(emulator::warp().slots[emulator::meet("sum", &bits, 1)][lane_index() ^ step][0]);
  }
  return v;
#endif
}

// ---- arithmetic ----
// Four bytes picked from those of a (0-3) and b (4-7) by the four low digits of the selector, each 0 to 7.
ALPHAPRUNE_DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDACC__
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
#else
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
#endif
}
template <uint32_t kSelector>
ALPHAPRUNE_DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  return __byte_perm(a, b, kSelector);
#else
  return pick_bytes(a, b, kSelector);
#endif
}

// The bits moved down by `count`, 0 to 31, those that fall out coming back above.
ALPHAPRUNE_DEVICE uint32_t rotate_right(uint32_t bits, uint32_t count) {
#ifdef __CUDACC__
  return __funnelshift_r(bits, bits, count);
#else
  return count ? bits >> count | bits << (32 - count) : bits;
#endif
}

// a * b + c of both 16-bit floats of a word, subnormal ones included. Emulated it is rounded to a float in between,
// which matters only to sums that need more than 24 bits.
template <class Value>
ALPHAPRUNE_DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  uint32_t sum;
  if constexpr (Value::code == Bfloat16::code) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  }
  return sum;
#else
  uint32_t sum = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const double left = Value::widen(a >> shift & 0xffffu), right = Value::widen(b >> shift & 0xffffu);
    const double total = left * right + Value::widen(c >> shift & 0xffffu);
    sum |= Value::narrow(static_cast<float>(total)) << shift;
  }
  return sum;
#endif
}

// Two numbers that the compiler does not know, 1 and 2, from the kernel's arguments: with them an addition can be
// written as a multiply-add, which has a pipe to spare where the one of integer logic and additions is full.
struct Opaque {
  uint32_t one, two;
};

// The same value, which the compiler must have in a register here and cannot keep other values made of it for.
template <class T>
ALPHAPRUNE_DEVICE T opaque(T value) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
#endif
  return value;
}

// Twice four 16-bit weights from shared memory as the operand a of mma.m16n8k16, zero where mask[i] lacks a bit: the
// kept ones of words[i] lie one after another from at[i] on. A weight for the lower half of a register is loaded into
// it; one for the upper half is loaded into `spare` and added, so that one instruction clears two registers. `spare`
// is the caller's because a register that is written under a condition only would otherwise be kept for every call.
ALPHAPRUNE_DEVICE void expand(const uint32_t (&mask)[2], const uint32_t (&bits)[4], const uint32_t (&start)[2],
                              const Opaque& number, uint32_t (&spare)[4], uint32_t (&a)[4]) {
#ifdef __CUDACC__
  uint32_t at0 = start[0], at1 = start[1];
  asm volatile(
      "{.reg .pred p0, p1, p2, p3, q0, q1, q2, q3; .reg .u32 bit;\n"
      "and.b32 bit, %10, %12; setp.ne.u32 p0, bit, 0; and.b32 bit, %11, %12; setp.ne.u32 q0, bit, 0;\n"
      "and.b32 bit, %10, %13; setp.ne.u32 p1, bit, 0; and.b32 bit, %11, %13; setp.ne.u32 q1, bit, 0;\n"
      "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "@p0 ld.shared.u16 %0, [%4]; @p0 mad.lo.u32 %4, %16, %17, %4;\n"
      "@q0 ld.shared.u16 %1, [%5]; @q0 mad.lo.u32 %5, %16, %17, %5;\n"
      "@p1 ld.shared.u16 %6, [%4]; @p1 mad.lo.u32 %4, %16, %17, %4;\n"
      "@q1 ld.shared.u16 %7, [%5]; @q1 mad.lo.u32 %5, %16, %17, %5;\n"
      "and.b32 bit, %10, %14; setp.ne.u32 p2, bit, 0; and.b32 bit, %11, %14; setp.ne.u32 q2, bit, 0;\n"
      "and.b32 bit, %10, %15; setp.ne.u32 p3, bit, 0; and.b32 bit, %11, %15; setp.ne.u32 q3, bit, 0;\n"
      "@p2 ld.shared.u16 %2, [%4]; @p2 mad.lo.u32 %4, %16, %17, %4;\n"
      "@q2 ld.shared.u16 %3, [%5]; @q2 mad.lo.u32 %5, %16, %17, %5;\n"
      "@p3 ld.shared.u16 %8, [%4]; @q3 ld.shared.u16 %9, [%5];\n"
      "@p1 mad.lo.u32 %0, %6, 65536, %0; @q1 mad.lo.u32 %1, %7, 65536, %1;\n"
      "@p3 mad.lo.u32 %2, %8, 65536, %2; @q3 mad.lo.u32 %3, %9, 65536, %3;}"
      : "=&r"(a[0]), "=&r"(a[1]), "=&r"(a[2]), "=&r"(a[3]), "+r"(at0), "+r"(at1), "+r"(spare[0]), "+r"(spare[1]),
        "+r"(spare[2]), "+r"(spare[3])
      : "r"(mask[0]), "r"(mask[1]), "r"(bits[0]), "r"(bits[1]), "r"(bits[2]), "r"(bits[3]), "r"(number.one),
        "r"(number.two)
      : "memory");
#else
  (void)spare;
  uint32_t at[2] = {start[0], start[1]}, value[2][4];
  // In the order of the instructions above, so that a trace shows them as they are.
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      const bool kept = mask[half] & bits[i];
      value[half][i] = emulator::load_shared<uint16_t>(at[half], kept);
      at[half] += kept ? number.one * number.two : 0;
    }
  for (int half = 0; half < 2; ++half) {
    a[half] = value[half][0] | value[half][1] << 16;
    a[half + 2] = value[half][2] | value[half][3] << 16;
  }
#endif
}

// Twice four 32-bit words from shared memory, zero where mask[i] lacks a bit: of word j of mask[i] a[j / 2] has it at
// i + 2 * (j % 2). The kept ones of mask[i] lie one after another from start[i] on.
ALPHAPRUNE_DEVICE void expand_words(const uint32_t (&mask)[2], const uint32_t (&bits)[4], const uint32_t (&start)[2],
                                    const Opaque& number, uint32_t (&a)[2][4]) {
#ifdef __CUDACC__
  uint32_t at0 = start[0], at1 = start[1];
  asm volatile(
      "{.reg .pred p0, p1, p2, p3, q0, q1, q2, q3; .reg .u32 bit;\n"
      "and.b32 bit, %10, %12; setp.ne.u32 p0, bit, 0; and.b32 bit, %11, %12; setp.ne.u32 q0, bit, 0;\n"
      "and.b32 bit, %10, %13; setp.ne.u32 p1, bit, 0; and.b32 bit, %11, %13; setp.ne.u32 q1, bit, 0;\n"
      "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "mov.u32 %4, 0; mov.u32 %5, 0; mov.u32 %6, 0; mov.u32 %7, 0;\n"
      "@p0 ld.shared.u32 %0, [%8]; @p0 mad.lo.u32 %8, %16, %16, %8;\n"
      "@q0 ld.shared.u32 %1, [%9]; @q0 mad.lo.u32 %9, %16, %16, %9;\n"
      "@p1 ld.shared.u32 %2, [%8]; @p1 mad.lo.u32 %8, %16, %16, %8;\n"
      "@q1 ld.shared.u32 %3, [%9]; @q1 mad.lo.u32 %9, %16, %16, %9;\n"
      "and.b32 bit, %10, %14; setp.ne.u32 p2, bit, 0; and.b32 bit, %11, %14; setp.ne.u32 q2, bit, 0;\n"
      "and.b32 bit, %10, %15; setp.ne.u32 p3, bit, 0; and.b32 bit, %11, %15; setp.ne.u32 q3, bit, 0;\n"
      "@p2 ld.shared.u32 %4, [%8]; @p2 mad.lo.u32 %8, %16, %16, %8;\n"
      "@q2 ld.shared.u32 %5, [%9]; @q2 mad.lo.u32 %9, %16, %16, %9;\n"
      "@p3 ld.shared.u32 %6, [%8]; @q3 ld.shared.u32 %7, [%9];}"
      : "=&r"(a[0][0]), "=&r"(a[0][1]), "=&r"(a[0][2]), "=&r"(a[0][3]), "=&r"(a[1][0]), "=&r"(a[1][1]), "=&r"(a[1][2]),
        "=&r"(a[1][3]), "+r"(at0), "+r"(at1)
      : "r"(mask[0]), "r"(mask[1]), "r"(bits[0]), "r"(bits[1]), "r"(bits[2]), "r"(bits[3]), "r"(number.two)
      : "memory");
#else
  uint32_t at[2] = {start[0], start[1]};
  // In the order of the instructions above, so that a trace shows them as they are.
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 2; ++i) {
      const bool kept = mask[i] & bits[j];
      a[j / 2][i + j % 2 * 2] = emulator::load_shared<uint32_t>(at[i], kept);
      at[i] += kept ? number.two * number.two : 0;
    }
#endif
}

// Four pairs of 16-bit weights: a[i] has those of bits[i / 2 * 2] and the one after it of mask[i % 2], zeros where it
// lacks them; the kept ones lie one after another from start[i] on. Halves and `spare` as in
// `expand`; one: a number that the compiler does not know, 1.
ALPHAPRUNE_DEVICE void expand_pairs(const uint32_t (&mask)[2], const uint32_t (&bits)[4], const uint32_t (&start)[4],
                                    uint32_t one, uint32_t (&spare)[4], uint32_t (&a)[4]) {
#ifdef __CUDACC__
  uint32_t at0 = start[0], at1 = start[1], at2 = start[2], at3 = start[3];
  asm volatile(
      "{.reg .pred p0, p1, p2, p3, q0, q1, q2, q3; .reg .u32 bit;\n"
      "and.b32 bit, %12, %14; setp.ne.u32 p0, bit, 0; and.b32 bit, %13, %14; setp.ne.u32 p1, bit, 0;\n"
      "and.b32 bit, %12, %15; setp.ne.u32 q0, bit, 0; and.b32 bit, %13, %15; setp.ne.u32 q1, bit, 0;\n"
      "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "@p0 ld.shared.u16 %0, [%4]; @p0 mad.lo.u32 %4, %18, 2, %4;\n"
      "@p1 ld.shared.u16 %1, [%5]; @p1 mad.lo.u32 %5, %18, 2, %5;\n"
      "@q0 ld.shared.u16 %8, [%4]; @q1 ld.shared.u16 %9, [%5];\n"
      "and.b32 bit, %12, %16; setp.ne.u32 p2, bit, 0; and.b32 bit, %13, %16; setp.ne.u32 p3, bit, 0;\n"
      "and.b32 bit, %12, %17; setp.ne.u32 q2, bit, 0; and.b32 bit, %13, %17; setp.ne.u32 q3, bit, 0;\n"
      "@p2 ld.shared.u16 %2, [%6]; @p2 mad.lo.u32 %6, %18, 2, %6;\n"
      "@p3 ld.shared.u16 %3, [%7]; @p3 mad.lo.u32 %7, %18, 2, %7;\n"
      "@q2 ld.shared.u16 %10, [%6]; @q3 ld.shared.u16 %11, [%7];\n"
      "@q0 mad.lo.u32 %0, %8, 65536, %0; @q1 mad.lo.u32 %1, %9, 65536, %1;\n"
      "@q2 mad.lo.u32 %2, %10, 65536, %2; @q3 mad.lo.u32 %3, %11, 65536, %3;}"
      : "=&r"(a[0]), "=&r"(a[1]), "=&r"(a[2]), "=&r"(a[3]), "+r"(at0), "+r"(at1), "+r"(at2), "+r"(at3), "+r"(spare[0]),
        "+r"(spare[1]), "+r"(spare[2]), "+r"(spare[3])
      : "r"(mask[0]), "r"(mask[1]), "r"(bits[0]), "r"(bits[1]), "r"(bits[2]), "r"(bits[3]), "r"(one)
      : "memory");
#else
  (void)spare;
  for (int i = 0; i < 4; ++i) {
    const bool low = mask[i % 2] & bits[i / 2 * 2], high = mask[i % 2] & bits[i / 2 * 2 + 1];
    const uint32_t first = emulator::load_shared<uint16_t>(start[i], low);
    const uint32_t at = start[i] + (low ? one * 2 : 0);
    a[i] = first | static_cast<uint32_t>(emulator::load_shared<uint16_t>(at, high)) << 16;
  }
#endif
}

// c plus the products of the four unsigned bytes of a and of b.
ALPHAPRUNE_DEVICE uint32_t dot_bytes(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  return __dp4a(a, b, c);
#else
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
#endif
}

// c[16, 8] += a[16, 16] b[16, 8], fragments as the PTX ISA lays out mma.m16n8k16.
template <class Value>
ALPHAPRUNE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
#ifdef __CUDACC__
  if constexpr (Value::code == Bfloat16::code) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  }
#else
  const uint32_t given[6] = {a[0], a[1], a[2], a[3], b.x, b.y};
  const auto& lanes = emulator::warp().slots[emulator::meet("mma", given, 6)];
  const int group = lane_index() / 4, pair = lane_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, col = 2 * pair + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, shift = 16 * (k % 2);
      const uint32_t left = lanes[row % 8 * 4 + holder][row / 8 + 2 * (k / 8)] >> shift & 0xffffu;
      const uint32_t right = lanes[col * 4 + holder][4 + k / 8] >> shift & 0xffffu;
      c[i] += Value::widen(left) * Value::widen(right);
    }
  }
#endif
}

// c[16, 8] += a[16, 32] b[32, 8] with 2 of every 4 columns of a kept: a holds the kept ones, `meta` where they were, 2
// bits each, the lower position first (ordered metadata). Fragments as the PTX ISA lays out mma.sp.m16n8k32. Lanes
// 4 * group + 2 * kSelector and + 1 hold the metadata of the rows `group` (low half) and `group` + 8 (high half): the
// first that of columns 0-15, the second that of 16-31.
template <int kSelector, class Value>
ALPHAPRUNE_DEVICE void mma_sparse(float (&c)[4], uint4 a, uint4 b, uint32_t meta) {
#ifdef __CUDACC__
#define ALPHAPRUNE_MMA_SPARSE(type)                                                                         \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type                  \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"               \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(meta), \
                 "n"(kSelector))
  if constexpr (Value::code == Bfloat16::code) {
    ALPHAPRUNE_MMA_SPARSE("bf16");
  } else {
    ALPHAPRUNE_MMA_SPARSE("f16");
  }
#undef ALPHAPRUNE_MMA_SPARSE
#else
  // The metadata is taken down before the lanes meet again: its slot is the next one's but one. lanes[l] = a0..a3
  // (a[row, kept column] as in mma.m16n8k16), b0..b3 (b[k, col]: register k / 8 of lane 4 * col + k % 8 / 2).
  const uint32_t given[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  const auto& metas = emulator::warp().slots[emulator::meet("mma.sp metadata", &meta, 1)];
  const int holder = lane_index() / 4 * 4 + 2 * kSelector;
  const uint32_t words[2] = {metas[holder][0], metas[holder + 1][0]};
  const auto& lanes = emulator::warp().slots[emulator::meet("mma.sp", given, 8)];
  const int group = lane_index() / 4, pair = lane_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, col = 2 * pair + i % 2;
    for (int kept = 0; kept < 16; ++kept) {
      const int position = static_cast<int>(words[kept / 8] >> (16 * (row / 8) + 2 * (kept % 8)) & 3u);
      const int k = kept / 2 * 4 + position;
      const uint32_t left = lanes[row % 8 * 4 + kept % 8 / 2][row / 8 + 2 * (kept / 8)] >> 16 * (kept % 2) & 0xffffu;
      const uint32_t right = lanes[col * 4 + k % 8 / 2][4 + k / 8] >> 16 * (k % 2) & 0xffffu;
      c[i] += Value::widen(left) * Value::widen(right);
    }
  }
#endif
}

}  // namespace alphaprune::cuda
