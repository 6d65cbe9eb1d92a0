// What sm_90a adds to device.cuh: copies that the memory system does by itself and counts on a barrier in shared memory
// (mbarrier), tensor maps (TMA), products of a warpgroup whose operand b stays in shared memory (wgmma), and clusters.
// Twins are in csrc/emulator/sm90.h.
#pragma once

#include "device.cuh"

#ifndef __CUDACC__
#include "../emulator/sm90.h"
#define __grid_constant__
#endif

// Whether this pass compiles for a machine that has them; kernels are empty where not, and never started there.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ALPHAPRUNE_SM90 1
#else
#define ALPHAPRUNE_SM90 0
#endif

namespace alphaprune::cuda {

constexpr int kWarpgroup = 4 * kWarp;
constexpr uint32_t kSwizzleBytes = 128;   // of a row of a swizzled box
constexpr uint32_t kSwizzleAlign = 1024;  // eight such rows: where a box must start
constexpr uint32_t kMbarrierBytes = 8;

#ifdef __CUDACC__
// CUtensorMap, as the driver writes it.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};
#else
using TensorMap = emulator::TensorMap;
#endif

// ---- barriers that count copies ----
ALPHAPRUNE_DEVICE void mbarrier_init(uint32_t at, uint32_t arrivals) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
#else
  emulator::mbarrier_init(at, arrivals);
#endif
}
// Makes the barriers that this thread has made known to the copies; a barrier of the block must follow.
ALPHAPRUNE_DEVICE void mbarrier_fence_init() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emulator::mbarrier_fence_init();
#endif
}
ALPHAPRUNE_DEVICE void mbarrier_arrive(uint32_t at) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
#else
  emulator::mbarrier_arrive(at, 0);
#endif
}
// Arrives, and lets the phase wait for so many bytes of copies.
ALPHAPRUNE_DEVICE void mbarrier_arrive_expect(uint32_t at, uint32_t bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#else
  emulator::mbarrier_arrive(at, bytes);
#endif
}
// Until the phase of this parity is complete: the first one is that of 0.
ALPHAPRUNE_DEVICE void mbarrier_wait(uint32_t at, uint32_t parity) {
#ifdef __CUDACC__
  asm volatile(
      "{.reg .pred p;\n"
      "again_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again_%=;}" ::"r"(at),
      "r"(parity)  // cubins: trips 0: only while a copy is late
      : "memory");
#else
  emulator::mbarrier_wait(at, parity);
#endif
}

// A place in a ring, and how often it came round.
struct RingStage {
  int index;
  uint32_t parity = 0;
  ALPHAPRUNE_DEVICE void pass(int count, int stages) {
    index += count;
    if (index >= stages) {
      index -= stages;
      parity ^= 1;
    }
  }
};

// Between this thread's own accesses to shared memory and copies that others start after a barrier of the block.
ALPHAPRUNE_DEVICE void fence_for_copies() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- copies that complete on a barrier ----
// `bytes` from global to shared memory, a multiple of 16, both sides aligned to 16.
ALPHAPRUNE_DEVICE void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)  // cubins: trips 1: once for each lane that copies, mostly one
               : "memory");
#else
  emulator::copy_bulk(to, from, bytes, barrier);
#endif
}
// The box of a map whose first element is (column, row); zeros where there is none. All its bytes are counted.
ALPHAPRUNE_DEVICE void copy_box(uint32_t to, const TensorMap& map, int col, int row, uint32_t barrier) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(&map), "r"(col), "r"(row), "r"(barrier)
      : "memory");
#else
  emulator::copy_through(to, map, col, row, barrier);
#endif
}

// The same into the shared memory of every block of the cluster that has a bit in `ranks`, at the same address there,
// counted by the barrier at the same address of each.
ALPHAPRUNE_DEVICE void copy_box_to(uint32_t ranks, uint32_t to, const TensorMap& map, int col, int row,
                                   uint32_t barrier) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(col), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(ranks))
      : "memory");
#else
  emulator::copy_through(to, map, col, row, barrier, ranks);
#endif
}

// ---- clusters ----
ALPHAPRUNE_DEVICE uint32_t cluster_rank() {
#ifdef __CUDACC__
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return emulator::cluster_rank();
#endif
}
// All threads of all blocks of the cluster meet; what they wrote to shared memory before is there for all.
ALPHAPRUNE_DEVICE void sync_cluster() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  emulator::sync_cluster();
#endif
}
// Arrives at the barrier at this address of a block of the cluster. For reads by copies and products only, which have
// ended: what the thread itself wrote is not ordered for the other block, as a fence for that would wait for its loads.
ALPHAPRUNE_DEVICE void mbarrier_arrive_in(uint32_t rank, uint32_t at) {
#ifdef __CUDACC__
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(at),
      "r"(rank)
      : "memory");
#else
  emulator::mbarrier_arrive(at, 0, rank);
#endif
}
// 16 bytes at this address of the shared memory of a block of the cluster.
ALPHAPRUNE_DEVICE uint4 load_cluster_u128(uint32_t at, uint32_t rank) {
#ifdef __CUDACC__
  uint4 v;
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [there];}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(at), "r"(rank));
  return v;
#else
  return emulator::load_cluster<uint4>(at, rank);
#endif
}

// ---- registers ----
// The warpgroup gives registers back until each thread has kCount, or takes them, once others gave.
template <int kCount>
ALPHAPRUNE_DEVICE void give_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
ALPHAPRUNE_DEVICE void take_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// ---- products of a warpgroup ----
// The operand b in shared memory: rows of 128 bytes along k, swizzled by 128 bytes, eight rows after another.
ALPHAPRUNE_DEVICE uint64_t operand_at(uint32_t at) {
  return static_cast<uint64_t>((at & 0x3ffffu) >> 4) | 1ull << 16 | static_cast<uint64_t>(kSwizzleAlign >> 4) << 32 |
         1ull << 62;
}
ALPHAPRUNE_DEVICE uint64_t with_low(uint64_t operand, uint32_t low) { return (operand & ~0xffffffffull) | low; }
// Further along by `bytes`, a multiple of 16; the lower half has room for it.
ALPHAPRUNE_DEVICE uint64_t operand_further(uint64_t operand, uint32_t bytes) {
  return with_low(operand, static_cast<uint32_t>(operand) + (bytes >> 4));
}

// Before products whose registers were written by anything but products.
ALPHAPRUNE_DEVICE void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_fence();
#endif
}
ALPHAPRUNE_DEVICE void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_commit();
#endif
}
// Until all but the youngest kPending groups of products are complete.
template <int kPending>
ALPHAPRUNE_DEVICE void wgmma_wait() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#else
  emulator::wgmma_wait(kPending);
#endif
}

#ifdef __CUDACC__
#define ALPHAPRUNE_F(i) "+f"(c[i])
#define ALPHAPRUNE_F4(i) ALPHAPRUNE_F(i), ALPHAPRUNE_F(i + 1), ALPHAPRUNE_F(i + 2), ALPHAPRUNE_F(i + 3)
#define ALPHAPRUNE_F16(i) ALPHAPRUNE_F4(i), ALPHAPRUNE_F4(i + 4), ALPHAPRUNE_F4(i + 8), ALPHAPRUNE_F4(i + 12)
#define ALPHAPRUNE_F32(i) ALPHAPRUNE_F16(i), ALPHAPRUNE_F16(i + 16)
#define ALPHAPRUNE_F64(i) ALPHAPRUNE_F32(i), ALPHAPRUNE_F32(i + 32)
#define ALPHAPRUNE_F128(i) ALPHAPRUNE_F64(i), ALPHAPRUNE_F64(i + 64)
#define ALPHAPRUNE_P16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define ALPHAPRUNE_P32 ALPHAPRUNE_P16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define ALPHAPRUNE_P64                                                                                             \
  ALPHAPRUNE_P32                                                                                                   \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%" \
  "59,%60,%61,%62,%63"
#define ALPHAPRUNE_P128                                                                                            \
  ALPHAPRUNE_P64                                                                                                   \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%" \
  "91,%92,%93,%94,%95"                                                                                             \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%"   \
  "118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// n: tokens; p: the places of c; a0 … a3, d: those of the operands; m, s: of metadata and selector.
#define ALPHAPRUNE_WGMMA(n, type, p, f, a0, a1, a2, a3, d)                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" p "}, {" a0 "," a1 "," a2 "," a3 \
               "}, " d ", 1, 1, 1, 0;"                                                                              \
               : f(0)                                                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define ALPHAPRUNE_WGMMA_SP(n, type, p, f, a0, a1, a2, a3, d, m, s)                                                    \
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" n "k32.f32." type "." type " {" p "}, {" a0 "," a1 "," a2 "," a3 \
               "}, " d ", " m ", " s ", 1, 1, 1, 0;"                                                                   \
               : f(0)                                                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(meta), "n"(kSelector))
#define ALPHAPRUNE_WGMMA_SP_OF(type)                                                                                   \
  if constexpr (kTokens == 128) {                                                                                      \
    ALPHAPRUNE_WGMMA_SP("128", type, ALPHAPRUNE_P64, ALPHAPRUNE_F64, "%64", "%65", "%66", "%67", "%68", "%69", "%70"); \
  } else {                                                                                                             \
    ALPHAPRUNE_WGMMA_SP("256", type, ALPHAPRUNE_P128, ALPHAPRUNE_F128, "%128", "%129", "%130", "%131", "%132", "%133", \
                        "%134");                                                                                       \
  }
#define ALPHAPRUNE_WGMMA_OF(type)                                                                            \
  if constexpr (kTokens == 32) {                                                                             \
    ALPHAPRUNE_WGMMA("32", type, ALPHAPRUNE_P16, ALPHAPRUNE_F16, "%16", "%17", "%18", "%19", "%20");         \
  } else if constexpr (kTokens == 64) {                                                                      \
    ALPHAPRUNE_WGMMA("64", type, ALPHAPRUNE_P32, ALPHAPRUNE_F32, "%32", "%33", "%34", "%35", "%36");         \
  } else if constexpr (kTokens == 128) {                                                                     \
    ALPHAPRUNE_WGMMA("128", type, ALPHAPRUNE_P64, ALPHAPRUNE_F64, "%64", "%65", "%66", "%67", "%68");        \
  } else {                                                                                                   \
    ALPHAPRUNE_WGMMA("256", type, ALPHAPRUNE_P128, ALPHAPRUNE_F128, "%128", "%129", "%130", "%131", "%132"); \
  }
#endif

// c[64, kTokens] += a[64, 16] b[16, kTokens], begun: until wgmma_wait, c and a must not be touched. Warp w of the
// warpgroup has the rows from 16 w on; of these, and of 8 columns each, a and c[4 j …] as mma.m16n8k16 has them.
template <class Value, int kTokens>
ALPHAPRUNE_DEVICE void wgmma(float (&c)[kTokens / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kTokens == 32 || kTokens == 64 || kTokens == 128 || kTokens == 256, "tokens of one product");
#ifdef __CUDACC__
  if constexpr (Value::code == Bfloat16::code) {
    ALPHAPRUNE_WGMMA_OF("bf16")
  } else {
    ALPHAPRUNE_WGMMA_OF("f16")
  }
#else
  emulator::wgmma(c, kTokens, a, nullptr, 0, b, [](uint32_t half) { return Value::widen(half); });
#endif
}

// c[64, kTokens] += a[64, 32] b[32, kTokens] with 2 of 4 neighbouring columns of a, begun as above; meta must not be
// touched either. a has the kept values as mma_sparse has them, meta their places: of a warp's rows, in the lanes that
// kSelector names there.
template <int kSelector, class Value, int kTokens>
ALPHAPRUNE_DEVICE void wgmma_sparse(float (&c)[kTokens / 2], const uint32_t (&a)[4], const uint32_t& meta, uint64_t b) {
  static_assert(kTokens == 128 || kTokens == 256, "tokens of one product");
#ifdef __CUDACC__
  if constexpr (Value::code == Bfloat16::code) {
    ALPHAPRUNE_WGMMA_SP_OF("bf16")
  } else {
    ALPHAPRUNE_WGMMA_SP_OF("f16")
  }
#else
  emulator::wgmma(c, kTokens, a, &meta, kSelector, b, [](uint32_t half) { return Value::widen(half); });
#endif
}

}  // namespace alphaprune::cuda
