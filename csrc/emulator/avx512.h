// Twins of the AVX-512 intrinsics that the kernels use, so that their code runs on any CPU with AVX2, FMA and F16C.
// Included in front of a kernel file (-include): a twin in namespace alphaprune hides the intrinsic of the same name,
// and an intrinsic without a twin does not compile, because the file is built without AVX-512. A twin does what Intel's
// Software Developer's Manual, volume 2, says under "Operation"; test_emulator compares each with the hardware's where
// the CPU has it. Lanes that a mask excludes are not touched; an aligned access to an unaligned address ends the
// program.
#pragma once

#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Macros where the compiler does not optimise.
#undef _mm512_cmp_ps_mask
#undef _mm512_cmpge_epu8_mask
#undef _mm512_cmplt_epu8_mask
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#undef _mm512_extracti32x4_epi32
#undef _mm512_extracti64x4_epi64
#undef _mm512_inserti64x4
#undef _mm512_mask_i32gather_ps
#undef _mm512_setr_epi32
#undef _mm512_shuffle_i32x4
#undef _mm512_slli_epi32
#undef _mm512_slli_epi64
#undef _mm512_srai_epi32
#undef _mm512_srli_epi32

namespace alphaprune {
namespace {
namespace emulator {

[[noreturn]] inline void fault(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

inline void require_aligned(const void* p, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fault("an aligned access to an unaligned address");
}

template <class T, class Vector>
using Lanes = std::array<T, sizeof(Vector) / sizeof(T)>;

template <class T, class Vector>
inline Lanes<T, Vector> lanes(Vector v) {
  Lanes<T, Vector> a;
  std::memcpy(a.data(), &v, sizeof(v));
  return a;
}

template <class Vector, class T, size_t n>
inline Vector vector(const std::array<T, n>& a) {
  static_assert(sizeof(Vector) == sizeof(a));
  Vector v;
  std::memcpy(&v, a.data(), sizeof(v));
  return v;
}

template <class T, class Vector, class Work>
inline Vector each(Vector x, Vector y, Work work) {
  const auto a = lanes<T>(x), b = lanes<T>(y);
  Lanes<T, Vector> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<T>(work(a[i], b[i]));
  return vector<Vector>(out);
}

template <class Out, class To, class From, class Vector, class Work>
inline Out convert(Vector x, Work work) {
  const auto a = lanes<From>(x);
  static_assert(sizeof(Out) / sizeof(To) == a.size());
  Lanes<To, Out> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<To>(work(a[i]));
  return vector<Out>(out);
}

template <class T, class Vector>
inline Vector filled(T value) {
  Lanes<T, Vector> out;
  out.fill(value);
  return vector<Vector>(out);
}

template <class Vector>
inline Vector load(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class Vector, class T, class Mask>
inline Vector load_lanes(Mask mask, const void* p) {
  Lanes<T, Vector> out{};
  for (size_t i = 0; i < out.size(); ++i)
    if (mask >> i & 1) std::memcpy(&out[i], static_cast<const T*>(p) + i, sizeof(T));
  return vector<Vector>(out);
}

template <class T, class Vector, class Mask>
inline void store_lanes(void* p, Mask mask, Vector v) {
  const auto a = lanes<T>(v);
  for (size_t i = 0; i < a.size(); ++i)
    if (mask >> i & 1) std::memcpy(static_cast<T*>(p) + i, &a[i], sizeof(T));
}

template <class T, class Mask>
inline __m512i expand(__m512i other, Mask mask, __m512i packed) {
  const auto from = lanes<T>(packed);
  auto out = lanes<T>(other);
  for (size_t i = 0, next = 0; i < out.size(); ++i)
    if (mask >> i & 1) out[i] = from[next++];
  return vector<__m512i>(out);
}

template <class T, class Vector, class Mask>
inline Vector compress(Vector other, Mask mask, Vector v) {
  const auto from = lanes<T>(v);
  auto out = lanes<T>(other);
  for (size_t i = 0, next = 0; i < from.size(); ++i)
    if (mask >> i & 1) out[next++] = from[i];
  return vector<Vector>(out);
}

// Of the lanes of two, which the lower bits of the index name.
template <class T, class Vector>
inline Vector permute_two(Vector a, Vector index, Vector b) {
  const auto low = lanes<T>(a), high = lanes<T>(b);
  auto out = lanes<T>(index);
  for (T& lane : out) {
    const size_t from = lane % (2 * out.size());
    lane = from < out.size() ? low[from] : high[from - out.size()];
  }
  return vector<Vector>(out);
}

// The lanes of one, and of another where the mask has a bit.
template <class T, class Vector, class Mask>
inline Vector blend(Mask mask, Vector a, Vector b) {
  auto out = lanes<T>(a);
  const auto other = lanes<T>(b);
  for (size_t i = 0; i < out.size(); ++i)
    if (mask >> i & 1) out[i] = other[i];
  return vector<Vector>(out);
}

// A bit for each lane of two vectors that `holds` of.
template <class T, class Vector, class Holds>
inline uint64_t mask_of(Vector x, Vector y, Holds holds) {
  const auto a = lanes<T>(x), b = lanes<T>(y);
  uint64_t out = 0;
  for (size_t i = 0; i < a.size(); ++i) out |= static_cast<uint64_t>(holds(a[i], b[i])) << i;
  return out;
}

// Subnormals count as zero, in and out.
inline float flushed(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }

inline float bfloat16(const void* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return flushed(v);
}

// Of every 16 bytes the lower (0) or the upper (1) half of the lanes, x's and y's in turn.
template <class T, class Vector>
inline Vector unpack(Vector x, Vector y, size_t half) {
  constexpr size_t kBlock = 16 / sizeof(T);
  const auto a = lanes<T>(x), b = lanes<T>(y);
  Lanes<T, Vector> out;
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t from = i / kBlock * kBlock + half * kBlock / 2 + i % kBlock / 2;
    out[i] = i % 2 ? b[from] : a[from];
  }
  return vector<Vector>(out);
}

template <class Part, class Vector>
inline Part part(Vector v, size_t which) {
  Part out;
  std::memcpy(&out, reinterpret_cast<const char*>(&v) + which * sizeof(out), sizeof(out));
  return out;
}

template <class Vector, class Part>
inline Vector repeated(Part p) {
  Vector out;
  for (size_t i = 0; i < sizeof(out); i += sizeof(p)) std::memcpy(reinterpret_cast<char*>(&out) + i, &p, sizeof(p));
  return out;
}

}  // namespace emulator

namespace twin = emulator;

inline __m512 _mm512_load_ps(const void* p) { return twin::require_aligned(p, 64), twin::load<__m512>(p); }
inline __m512 _mm512_loadu_ps(const void* p) { return twin::load<__m512>(p); }
inline __m512i _mm512_load_si512(const void* p) { return twin::require_aligned(p, 64), twin::load<__m512i>(p); }
inline __m512i _mm512_loadu_si512(const void* p) { return twin::load<__m512i>(p); }
inline void _mm512_storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, 64); }
inline void _mm512_store_ps(void* p, __m512 v) { twin::require_aligned(p, 64), std::memcpy(p, &v, 64); }
inline void _mm512_store_si512(void* p, __m512i v) { twin::require_aligned(p, 64), std::memcpy(p, &v, 64); }
inline void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, 64); }
inline __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* p) { return twin::load_lanes<__m512, float>(m, p); }
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 m, const void* p) { return twin::load_lanes<__m512i, int16_t>(m, p); }
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* p) { return twin::load_lanes<__m256i, int16_t>(m, p); }
inline __m512 _mm512_mask_i32gather_ps(__m512 other, __mmask16 m, __m512i index, const void* base, int scale) {
  auto out = twin::lanes<float>(other);
  const auto at = twin::lanes<int>(index);
  for (int i = 0; i < 16; ++i)
    if (m >> i & 1) std::memcpy(&out[i], static_cast<const char*>(base) + static_cast<int64_t>(at[i]) * scale, 4);
  return twin::vector<__m512>(out);
}
inline void _mm512_mask_storeu_ps(void* p, __mmask16 m, __m512 v) { twin::store_lanes<float>(p, m, v); }
inline void _mm256_mask_storeu_epi16(void* p, __mmask16 m, __m256i v) { twin::store_lanes<int16_t>(p, m, v); }

inline __m512 _mm512_setzero_ps() { return twin::filled<float, __m512>(0); }
inline __m512i _mm512_setzero_si512() { return twin::filled<int, __m512i>(0); }
inline __m512 _mm512_set1_ps(float v) { return twin::filled<float, __m512>(v); }
inline __m512i _mm512_set1_epi32(int v) { return twin::filled<int, __m512i>(v); }
inline __m512i _mm512_set1_epi8(char v) { return twin::filled<char, __m512i>(v); }
template <class... Int>
inline __m512i _mm512_setr_epi32(Int... v) {
  static_assert(sizeof...(v) == 16);
  return twin::vector<__m512i>(std::array<int, 16>{v...});
}
inline __m512 _mm512_broadcast_f32x8(__m256 v) { return twin::repeated<__m512>(v); }
inline __m512i _mm512_broadcast_i32x4(__m128i v) { return twin::repeated<__m512i>(v); }
inline __m512i _mm512_broadcast_i64x4(__m256i v) { return twin::repeated<__m512i>(v); }

inline __m512 _mm512_castsi512_ps(__m512i v) { return twin::load<__m512>(&v); }
inline __m512i _mm512_castps_si512(__m512 v) { return twin::load<__m512i>(&v); }
inline __m512d _mm512_castps_pd(__m512 v) { return twin::load<__m512d>(&v); }
inline __m512 _mm512_castpd_ps(__m512d v) { return twin::load<__m512>(&v); }
inline __m128i _mm512_castsi512_si128(__m512i v) { return twin::part<__m128i>(v, 0); }
inline __m256i _mm512_castsi512_si256(__m512i v) { return twin::part<__m256i>(v, 0); }
inline __m256 _mm512_castps512_ps256(__m512 v) { return twin::part<__m256>(v, 0); }
inline __m128i _mm512_extracti32x4_epi32(__m512i v, int which) { return twin::part<__m128i>(v, which & 3); }
inline __m256i _mm512_extracti64x4_epi64(__m512i v, int which) { return twin::part<__m256i>(v, which & 1); }
inline __m512i _mm512_inserti64x4(__m512i v, __m256i half, int which) {
  std::array<__m256i, 2> out = {twin::part<__m256i>(v, 0), twin::part<__m256i>(v, 1)};
  out[which & 1] = half;
  return twin::vector<__m512i>(out);
}
inline __m512i _mm512_castsi256_si512(__m256i v) { return twin::vector<__m512i>(std::array<__m256i, 2>{v, v}); }
inline __m256 _mm512_extractf32x8_ps(__m512 v, int which) { return twin::part<__m256>(v, which & 1); }

inline __m512i _mm512_mask_expand_epi8(__m512i other, __mmask64 m, __m512i v) {
  return twin::expand<uint8_t>(other, m, v);
}
inline __m512i _mm512_mask_expand_epi16(__m512i other, __mmask32 m, __m512i v) {
  return twin::expand<uint16_t>(other, m, v);
}
inline __m512i _mm512_mask_expand_epi32(__m512i other, __mmask16 m, __m512i v) {
  return twin::expand<uint32_t>(other, m, v);
}
inline __m512i _mm512_mask_compress_epi16(__m512i other, __mmask32 m, __m512i v) {
  return twin::compress<uint16_t>(other, m, v);
}
inline __m512i _mm512_mask_compress_epi8(__m512i other, __mmask64 m, __m512i v) {
  return twin::compress<uint8_t>(other, m, v);
}
inline __m512i _mm512_maskz_compress_epi32(__mmask16 m, __m512i v) { return twin::compress<uint32_t>(__m512i{}, m, v); }
inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
  return twin::permute_two<uint16_t>(a, index, b);
}
inline __m512i _mm512_permutex2var_epi8(__m512i a, __m512i index, __m512i b) {
  return twin::permute_two<uint8_t>(a, index, b);
}
inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return twin::unpack<int16_t>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return twin::unpack<int16_t>(a, b, 1); }
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) { return twin::unpack<float>(a, b, 0); }
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) { return twin::unpack<float>(a, b, 1); }
inline __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) { return twin::unpack<double>(a, b, 0); }
inline __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) { return twin::unpack<double>(a, b, 1); }
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return twin::unpack<int>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return twin::unpack<int>(a, b, 1); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return twin::unpack<int64_t>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return twin::unpack<int64_t>(a, b, 1); }
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int control) {
  std::array<__m128i, 4> out;
  for (int i = 0; i < 4; ++i) out[i] = twin::part<__m128i>(i < 2 ? a : b, control >> 2 * i & 3);
  return twin::vector<__m512i>(out);
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 v) {
  const auto from = twin::lanes<float>(v);
  return twin::convert<__m512, float, uint32_t>(index, [&](uint32_t i) { return from[i % 16]; });
}
inline __m512i _mm512_permutexvar_epi8(__m512i index, __m512i v) {
  const auto from = twin::lanes<uint8_t>(v);
  return twin::convert<__m512i, uint8_t, uint8_t>(index, [&](uint8_t i) { return from[i % 64]; });
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 m, __m512i a, __m512i b) { return twin::blend<int>(m, a, b); }
inline __m512i _mm512_mask_mov_epi8(__m512i a, __mmask64 m, __m512i b) { return twin::blend<uint8_t>(m, a, b); }
inline __m512i _mm512_maskz_mov_epi8(__mmask64 m, __m512i v) { return twin::blend<uint8_t>(m, __m512i{}, v); }
inline __m512i _mm512_mask2_permutex2var_epi8(__m512i a, __m512i index, __mmask64 m, __m512i b) {
  return twin::blend<uint8_t>(m, index, _mm512_permutex2var_epi8(a, index, b));
}
inline __mmask64 _mm512_cmpge_epu8_mask(__m512i a, __m512i b) {
  return twin::mask_of<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x >= y; });
}
inline __mmask64 _mm512_cmplt_epu8_mask(__m512i a, __m512i b) {
  return twin::mask_of<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x < y; });
}
inline __mmask64 _mm512_movepi8_mask(__m512i v) {
  return twin::mask_of<int8_t>(v, v, [](int8_t x, int8_t) { return x < 0; });
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  if (predicate != _CMP_UNORD_Q) twin::fault("a comparison without a twin");
  const auto x = twin::lanes<float>(a), y = twin::lanes<float>(b);
  unsigned out = 0;
  for (int i = 0; i < 16; ++i) out |= (std::isnan(x[i]) || std::isnan(y[i]) ? 1u : 0u) << i;
  return static_cast<__mmask16>(out);
}

inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_add_epi8(__m512i a, __m512i b) {
  return twin::each<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x + y; });
}
inline __m512i _mm512_sub_epi8(__m512i a, __m512i b) {
  return twin::each<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x - y; });
}
inline __m512i _mm512_add_epi16(__m512i a, __m512i b) {
  return twin::each<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x + y; });
}
inline __m512i _mm512_sub_epi16(__m512i a, __m512i b) {
  return twin::each<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x - y; });
}
inline __m512i _mm512_popcnt_epi16(__m512i v) {
  return twin::convert<__m512i, uint16_t, uint16_t>(v, [](uint16_t x) { return __builtin_popcount(x); });
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return twin::each<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
inline __m512i _mm512_add_epi64(__m512i a, __m512i b) {
  return twin::each<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x + y; });
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  return twin::each<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}
inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) {
  return twin::each<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x * y; });
}
inline __m512i _mm512_max_epi16(__m512i a, __m512i b) {
  return twin::each<int16_t>(a, b, [](int16_t x, int16_t y) { return x > y ? x : y; });
}
inline __mmask32 _mm512_cmpgt_epi16_mask(__m512i a, __m512i b) {
  return static_cast<__mmask32>(twin::mask_of<int16_t>(a, b, [](int16_t x, int16_t y) { return x > y; }));
}
inline __m512i _mm512_rol_epi32(__m512i v, int by) {
  return twin::convert<__m512i, uint32_t, uint32_t>(v, [by](uint32_t x) { return x << by | x >> (32 - by); });
}
inline __m512i _mm512_sad_epu8(__m512i a, __m512i b) {
  const auto x = twin::lanes<uint8_t>(a), y = twin::lanes<uint8_t>(b);
  uint64_t out[8] = {};
  for (size_t i = 0; i < 64; ++i) out[i / 8] += static_cast<uint64_t>(x[i] > y[i] ? x[i] - y[i] : y[i] - x[i]);
  return _mm512_loadu_si512(out);
}
inline __m512i _mm512_max_epi32(__m512i a, __m512i b) {
  return twin::each<int>(a, b, [](int x, int y) { return x > y ? x : y; });
}
inline int _mm512_reduce_max_epi32(__m512i v) {
  int out = INT32_MIN;
  for (const int lane : twin::lanes<int>(v)) out = lane > out ? lane : out;
  return out;
}
inline long long _mm512_reduce_add_epi64(__m512i v) {
  uint64_t out = 0;
  for (const uint64_t lane : twin::lanes<uint64_t>(v)) out += lane;
  return static_cast<long long>(out);
}
inline __m512i _mm512_slli_epi32(__m512i v, unsigned n) {
  return twin::convert<__m512i, uint32_t, uint32_t>(v, [n](uint32_t x) { return n > 31 ? 0 : x << n; });
}
inline __m512i _mm512_slli_epi64(__m512i v, unsigned n) {
  return twin::convert<__m512i, uint64_t, uint64_t>(v, [n](uint64_t x) { return n > 63 ? 0 : x << n; });
}
inline __m512i _mm512_srli_epi32(__m512i v, unsigned n) {
  return twin::convert<__m512i, uint32_t, uint32_t>(v, [n](uint32_t x) { return n > 31 ? 0 : x >> n; });
}
inline __m512i _mm512_srai_epi32(__m512i v, unsigned n) {
  return twin::convert<__m512i, int, int>(v, [n](int x) { return x >> (n > 31 ? 31 : n); });
}
// Four products of an unsigned and a signed byte per lane, added without saturation.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  auto out = twin::lanes<uint32_t>(sum);
  const auto x = twin::lanes<uint8_t>(a);
  const auto y = twin::lanes<int8_t>(b);
  for (int i = 0; i < 16; ++i)
    for (int j = 4 * i; j < 4 * i + 4; ++j) out[i] += static_cast<uint32_t>(x[j] * y[j]);
  return twin::vector<__m512i>(out);
}

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  std::array<__m256, 2> out;
  for (int i = 0; i < 2; ++i)
    out[i] = _mm256_fmadd_ps(twin::part<__m256>(a, i), twin::part<__m256>(b, i), twin::part<__m256>(c, i));
  return twin::vector<__m512>(out);
}

// The odd one of a pair is added first.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  auto out = twin::lanes<float>(sum);
  const auto x = twin::lanes<uint16_t>(a), y = twin::lanes<uint16_t>(b);
  for (size_t i = 0; i < out.size(); ++i)
    for (const size_t j : {2 * i + 1, 2 * i})
      out[i] = twin::flushed(__builtin_fmaf(twin::bfloat16(&x[j]), twin::bfloat16(&y[j]), twin::flushed(out[i])));
  return twin::vector<__m512>(out);
}

// The numbers of the second vector come first; subnormal ones become zero.
inline __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  const std::array<__m512, 2> both = {b, a};
  std::array<uint16_t, 32> out;
  for (size_t i = 0; i < out.size(); ++i) {
    const float v = twin::flushed(twin::lanes<float>(both[i / 16])[i % 16]);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    out[i] = static_cast<uint16_t>(v != v ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return twin::vector<__m512bh>(out);
}

inline __m512 _mm512_cvtph_ps(__m256i v) {
  const std::array<__m256, 2> out = {_mm256_cvtph_ps(twin::part<__m128i>(v, 0)),
                                     _mm256_cvtph_ps(twin::part<__m128i>(v, 1))};
  return twin::vector<__m512>(out);
}
inline __m256i _mm512_cvtps_ph(__m512 v, int rounding) {
  if (rounding != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) twin::fault("a rounding without a twin");
  const std::array<__m128i, 2> out = {_mm256_cvtps_ph(twin::part<__m256>(v, 0), _MM_FROUND_TO_NEAREST_INT),
                                      _mm256_cvtps_ph(twin::part<__m256>(v, 1), _MM_FROUND_TO_NEAREST_INT)};
  return twin::vector<__m256i>(out);
}
inline __m512 _mm512_cvtepi32_ps(__m512i v) {
  return twin::convert<__m512, float, int>(v, [](int x) { return static_cast<float>(x); });
}
// Numbers that no int32 holds, NaN among them, become INT32_MIN.
inline __m512i _mm512_cvtps_epi32(__m512 v) {
  return twin::convert<__m512i, int, float>(
      v, [](float x) { return x >= -0x1p31f && x < 0x1p31f ? static_cast<int>(std::nearbyintf(x)) : INT32_MIN; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i v) {
  return twin::convert<__m512i, uint32_t, uint16_t>(v, [](uint16_t x) { return x; });
}
inline __m512i _mm512_cvtepi8_epi32(__m128i v) {
  return twin::convert<__m512i, int, int8_t>(v, [](int8_t x) { return x; });
}
inline __m256i _mm512_cvtepi32_epi16(__m512i v) {
  return twin::convert<__m256i, uint16_t, uint32_t>(v, [](uint32_t x) { return x; });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i v) {
  return twin::convert<__m128i, uint8_t, uint32_t>(v, [](uint32_t x) { return x; });
}

}  // namespace
}  // namespace alphaprune
