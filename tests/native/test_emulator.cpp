// The emulator beside the hardware: each twin gives the bits of the instruction that it stands for, on random lanes.
// What this CPU cannot run is named and not compared.
#include <sys/syscall.h>
#include <unistd.h>

#include <random>

#include "emulator/avx512.h"
#include "emulator/avxvnni.h"
#include "tiles.h"

namespace {

int failures = 0, missing = 0;
std::mt19937 generator(1);

// Two vectors of operands, 64 bytes to be loaded by lanes, a mask.
struct Input {
  alignas(64) uint8_t a[64], b[64], c[64];
  uint64_t mask;
};
struct Output {
  alignas(64) uint8_t bytes[64];
};

template <class Vector>
inline void put(Output& out, const Vector& v) {
  std::memcpy(out.bytes, &v, sizeof(v));
}

// Random bits, or floats of moderate size so that sums are not all NaN.
void fill(uint8_t* to, bool floats) {
  for (int i = 0; i < 16; ++i) {
    const float moderate = std::normal_distribution<float>()(generator);
    uint32_t bits = generator();
    if (floats && generator() % 8) std::memcpy(&bits, &moderate, 4);
    std::memcpy(to + 4 * i, &bits, 4);
  }
}

// Equal bits, or NaN in both: which payload survives depends on the order of operands, which a compiler may change.
bool same(const Output& x, const Output& y, bool floats) {
  for (int i = 0; i < 16; ++i) {
    float a, b;
    std::memcpy(&a, x.bytes + 4 * i, 4);
    std::memcpy(&b, y.bytes + 4 * i, 4);
    if (std::memcmp(&a, &b, 4) && !(floats && std::isnan(a) && std::isnan(b))) return false;
  }
  return true;
}

void compare(const char* name, bool supported, bool floats, void (*twin)(const Input&, Output&),
             void (*hardware)(const Input&, Output&)) {
  if (!supported) {
    ++missing;
    std::printf("%s: not on this CPU\n", name);
    return;
  }
  for (int repeat = 0; repeat < 2000; ++repeat) {
    Input in;
    for (uint8_t* v : {in.a, in.b, in.c}) fill(v, floats);
    in.mask = static_cast<uint64_t>(generator()) << 32 | generator();
    Output x{}, y{};
    twin(in, x);
    hardware(in, y);
    if (same(x, y, floats)) continue;
    ++failures;
    std::printf("%s: the twin differs\n", name);
    return;
  }
}

}  // namespace

// The statements once inside namespace alphaprune, where names are twins, and once outside, where they are
// instructions.
#define OPERATION(name, isa, ...)                                                                               \
  namespace alphaprune {                                                                                        \
  namespace {                                                                                                   \
  void name([[maybe_unused]] const Input& in, Output& out) { __VA_ARGS__; }                                     \
  }                                                                                                             \
  }                                                                                                             \
  namespace hardware {                                                                                          \
  __attribute__((target(isa))) static void name([[maybe_unused]] const Input& in, Output& out) { __VA_ARGS__; } \
  }

#define F "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#define A _mm512_loadu_si512(in.a)
#define B _mm512_loadu_si512(in.b)
#define C _mm512_loadu_si512(in.c)
#define AF _mm512_loadu_ps(in.a)
#define BF _mm512_loadu_ps(in.b)
#define CF _mm512_loadu_ps(in.c)
#define HALF(v) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))
#define MASK16 static_cast<__mmask16>(in.mask)

OPERATION(loads, F, put(out, _mm512_maskz_loadu_ps(MASK16, in.a)))
OPERATION(loads16, F, put(out, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(in.mask), in.a)))
OPERATION(loads16_256, F, put(out, _mm256_maskz_loadu_epi16(MASK16, in.a)))
OPERATION(stores, F, put(out, B); _mm512_mask_storeu_ps(out.bytes, MASK16, AF))
OPERATION(stores16, F, put(out, B); _mm256_mask_storeu_epi16(out.bytes, MASK16, _mm512_castsi512_si256(A)))
OPERATION(gather, F, const __m512i index = _mm512_and_si512(A, _mm512_set1_epi32(15));
          put(out, _mm512_mask_i32gather_ps(BF, MASK16, index, in.c, 4)))
OPERATION(multiply_integers, F, put(out, _mm512_mullo_epi32(A, B)))
OPERATION(set_float, F, put(out, _mm512_set1_ps(1.5f)))
OPERATION(set_byte, F, put(out, _mm512_add_epi32(_mm512_set1_epi8(-3), _mm512_set1_epi32(70000))))
OPERATION(broadcast8, F, put(out, _mm512_broadcast_f32x8(_mm512_castps512_ps256(AF))))
OPERATION(broadcast_half, F, put(out, _mm512_broadcast_i64x4(_mm512_castsi512_si256(A))))
OPERATION(broadcast4, F, put(out, _mm512_broadcast_i32x4(_mm512_castsi512_si128(A))))
OPERATION(extract1, F, put(out, _mm512_extracti32x4_epi32(A, 1)))
OPERATION(extract3, F, put(out, _mm512_extracti32x4_epi32(A, 3)))
OPERATION(extract_half, F, put(out, _mm512_extracti64x4_epi64(A, 1)))
OPERATION(extract_floats, F, put(out, _mm512_extractf32x8_ps(AF, 1)))
OPERATION(expand32, F, put(out, _mm512_mask_expand_epi32(B, MASK16, A)))
OPERATION(expand16, F ",avx512vbmi2", put(out, _mm512_mask_expand_epi16(B, static_cast<__mmask32>(in.mask), A)))
OPERATION(expand8, F ",avx512vbmi2", put(out, _mm512_mask_expand_epi8(B, in.mask, A)))
OPERATION(compress16, F ",avx512vbmi2", put(out, _mm512_mask_compress_epi16(B, static_cast<__mmask32>(in.mask), A)))
OPERATION(compress32, F, put(out, _mm512_maskz_compress_epi32(MASK16, A)))
OPERATION(permute_two, F, put(out, _mm512_permutex2var_epi16(A, B, C)))
OPERATION(permute_bytes, F ",avx512vbmi", put(out, _mm512_permutexvar_epi8(A, B)))
OPERATION(permute_two_bytes, F ",avx512vbmi", put(out, _mm512_permutex2var_epi8(A, B, C)))
OPERATION(permute_some_bytes, F ",avx512vbmi", put(out, _mm512_mask2_permutex2var_epi8(A, B, in.mask, C)))
OPERATION(compress8, F ",avx512vbmi2", put(out, _mm512_mask_compress_epi8(B, in.mask, A)))
OPERATION(count16, F ",avx512bitalg", put(out, _mm512_popcnt_epi16(A)))
OPERATION(mix_bytes, F, put(out, _mm512_mask_mov_epi8(A, in.mask, B)))
OPERATION(some_bytes, F, put(out, _mm512_maskz_mov_epi8(in.mask, A)))
OPERATION(add_bytes, F, put(out, _mm512_add_epi8(A, B)))
OPERATION(subtract_bytes, F, put(out, _mm512_sub_epi8(A, B)))
OPERATION(add_halves, F, put(out, _mm512_add_epi16(A, B)))
OPERATION(subtract_halves, F, put(out, _mm512_sub_epi16(A, B)))
OPERATION(larger_halves, F, put(out, _mm512_max_epi16(A, B)))
OPERATION(greater_halves, F, put(out, _mm512_maskz_mov_epi8(_mm512_cmpgt_epi16_mask(A, B), C)))
OPERATION(turn, F, put(out, _mm512_rol_epi32(A, 16)))
OPERATION(distances, F, put(out, _mm512_sad_epu8(A, B)))
OPERATION(shift_left64, F, put(out, _mm512_slli_epi64(A, 16)))
OPERATION(insert_half, F,
          put(out, _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_castsi512_si256(A)), _mm512_castsi512_si256(B), 1)))
OPERATION(not_less, F, put(out, _mm512_maskz_mov_epi8(_mm512_cmpge_epu8_mask(A, B), C)))
OPERATION(less, F, put(out, _mm512_maskz_mov_epi8(_mm512_cmplt_epu8_mask(A, B), C)))
OPERATION(signs, F, put(out, _mm512_maskz_mov_epi8(_mm512_movepi8_mask(A), C)))
OPERATION(unpack_low16, F, put(out, _mm512_unpacklo_epi16(A, B)))
OPERATION(unpack_high16, F, put(out, _mm512_unpackhi_epi16(A, B)))
OPERATION(unpack_low, F, put(out, _mm512_unpacklo_epi32(A, B)))
OPERATION(unpack_high, F, put(out, _mm512_unpackhi_epi32(A, B)))
OPERATION(unpack_low64, F, put(out, _mm512_unpacklo_epi64(A, B)))
OPERATION(unpack_high64, F, put(out, _mm512_unpackhi_epi64(A, B)))
OPERATION(unpack_low_float, F, put(out, _mm512_unpacklo_ps(AF, BF)))
OPERATION(unpack_high_float, F, put(out, _mm512_unpackhi_ps(AF, BF)))
OPERATION(unpack_low_double, F, put(out, _mm512_unpacklo_pd(_mm512_castps_pd(AF), _mm512_castps_pd(BF))))
OPERATION(unpack_high_double, F, put(out, _mm512_unpackhi_pd(_mm512_castps_pd(AF), _mm512_castps_pd(BF))))
OPERATION(shuffle_even, F, put(out, _mm512_shuffle_i32x4(A, B, 0x88)))
OPERATION(shuffle_odd, F, put(out, _mm512_shuffle_i32x4(A, B, 0xdd)))
OPERATION(permute, F, put(out, _mm512_permutexvar_ps(A, BF)))
OPERATION(blend, F, put(out, _mm512_mask_blend_epi32(MASK16, A, B)))
OPERATION(unordered, F, put(out, _mm512_cmp_ps_mask(AF, BF, _CMP_UNORD_Q)))
OPERATION(logic, F, put(out, _mm512_or_si512(_mm512_and_si512(A, B), _mm512_xor_si512(B, C))))
OPERATION(integers, F, put(out, _mm512_sub_epi32(_mm512_add_epi32(A, B), _mm512_max_epi32(B, C))))
OPERATION(add64, F, put(out, _mm512_add_epi64(A, B)))
OPERATION(reduce64, F, put(out, _mm512_reduce_add_epi64(A)))
OPERATION(reduce, F, put(out, _mm512_set1_epi32(_mm512_reduce_max_epi32(A))))
OPERATION(shift_left, F, put(out, _mm512_slli_epi32(A, 8)))
OPERATION(shift_right, F, put(out, _mm512_srli_epi32(A, 16)))
OPERATION(shift_signed, F, put(out, _mm512_srai_epi32(A, 8)))
OPERATION(products8, F ",avx512vnni", put(out, _mm512_dpbusd_epi32(A, B, C)))
OPERATION(half_products8, "avxvnni", put(out, _mm256_dpbusd_avx_epi32(HALF(in.a), HALF(in.b), HALF(in.c))))
OPERATION(float_add, F, put(out, _mm512_add_ps(AF, BF)))
OPERATION(float_multiply, F, put(out, _mm512_mul_ps(AF, BF)))
OPERATION(float_fma, F, put(out, _mm512_fmadd_ps(AF, BF, CF)))
OPERATION(pairs, F ",avx512bf16",
          put(out, _mm512_dpbf16_ps(CF, reinterpret_cast<__m512bh>(A), reinterpret_cast<__m512bh>(B))))
OPERATION(narrow_pairs, F ",avx512bf16", const __m512bh both = _mm512_cvtne2ps_pbh(AF, BF);
          put(out, reinterpret_cast<const __m512i&>(both)))
OPERATION(from_half, F, put(out, _mm512_cvtph_ps(_mm512_castsi512_si256(A))))
OPERATION(to_half, F, put(out, _mm512_cvtps_ph(AF, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)))
OPERATION(from_int, F, put(out, _mm512_cvtepi32_ps(A)))
OPERATION(to_int, F, put(out, _mm512_cvtps_epi32(_mm512_mul_ps(AF, _mm512_set1_ps(1000.0f)))))
OPERATION(widen16, F, put(out, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(A))))
OPERATION(widen8, F, put(out, _mm512_cvtepi8_epi32(_mm512_castsi512_si128(A))))
OPERATION(narrow16, F, put(out, _mm512_cvtepi32_epi16(A)))
OPERATION(narrow8, F, put(out, _mm512_cvtepi32_epi8(A)))

namespace {

#define COMPARE(name, floats, ...) compare(#name, __VA_ARGS__, floats, alphaprune::name, hardware::name)

void compare_vectors() {
  const bool f = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool vbmi2 = f && __builtin_cpu_supports("avx512vbmi2"), vnni = f && __builtin_cpu_supports("avx512vnni");
  const bool vbmi = f && __builtin_cpu_supports("avx512vbmi"), bitalg = f && __builtin_cpu_supports("avx512bitalg");
  COMPARE(loads, false, f);
  COMPARE(loads16, false, f);
  COMPARE(loads16_256, false, f);
  COMPARE(stores, false, f);
  COMPARE(stores16, false, f);
  COMPARE(gather, false, f);
  COMPARE(multiply_integers, false, f);
  COMPARE(set_float, false, f);
  COMPARE(set_byte, false, f);
  COMPARE(broadcast8, false, f);
  COMPARE(broadcast_half, false, f);
  COMPARE(broadcast4, false, f);
  COMPARE(extract1, false, f);
  COMPARE(extract3, false, f);
  COMPARE(extract_half, false, f);
  COMPARE(extract_floats, false, f);
  COMPARE(expand32, false, f);
  COMPARE(expand16, false, vbmi2);
  COMPARE(expand8, false, vbmi2);
  COMPARE(compress16, false, vbmi2);
  COMPARE(compress32, false, f);
  COMPARE(permute_two, false, f);
  COMPARE(permute_bytes, false, f);
  COMPARE(permute_two_bytes, false, f);
  COMPARE(permute_some_bytes, false, f);
  COMPARE(compress8, false, f);
  COMPARE(count16, false, f);
  COMPARE(mix_bytes, false, f);
  COMPARE(some_bytes, false, f);
  COMPARE(add_bytes, false, f);
  COMPARE(subtract_bytes, false, f);
  COMPARE(add_halves, false, f);
  COMPARE(subtract_halves, false, f);
  COMPARE(shift_left64, false, f);
  COMPARE(insert_half, false, f);
  COMPARE(not_less, false, f);
  COMPARE(less, false, f);
  COMPARE(signs, false, f);
  COMPARE(unpack_low16, false, f);
  COMPARE(unpack_high16, false, f);
  COMPARE(unpack_low, false, f);
  COMPARE(unpack_high, false, f);
  COMPARE(unpack_low64, false, f);
  COMPARE(unpack_high64, false, f);
  COMPARE(unpack_low_float, false, f);
  COMPARE(unpack_high_float, false, f);
  COMPARE(unpack_low_double, false, f);
  COMPARE(unpack_high_double, false, f);
  COMPARE(shuffle_even, false, f);
  COMPARE(shuffle_odd, false, f);
  COMPARE(permute, false, f);
  COMPARE(blend, false, f);
  COMPARE(unordered, true, f);
  COMPARE(logic, false, f);
  COMPARE(integers, false, f);
  COMPARE(add64, false, f);
  COMPARE(reduce64, false, f);
  COMPARE(reduce, false, f);
  COMPARE(shift_left, false, f);
  COMPARE(shift_right, false, f);
  COMPARE(shift_signed, false, f);
  COMPARE(products8, false, vnni);
  COMPARE(half_products8, false, __builtin_cpu_supports("avxvnni"));
  COMPARE(float_add, true, f);
  COMPARE(float_multiply, true, f);
  COMPARE(float_fma, true, f);
  COMPARE(pairs, true, f && __builtin_cpu_supports("avx512bf16"));
  COMPARE(narrow_pairs, true, f && __builtin_cpu_supports("avx512bf16"));
  COMPARE(from_half, false, f);
  COMPARE(to_half, false, f);
  COMPARE(from_int, false, f);
  COMPARE(to_int, true, f);
  COMPARE(widen16, false, f);
  COMPARE(widen8, false, f);
  COMPARE(narrow16, false, f);
  COMPARE(narrow8, false, f);
}

void compare_tiles() {
  using namespace alphaprune;
  if (!__builtin_cpu_supports("amx-bf16") || !__builtin_cpu_supports("amx-int8") ||
      syscall(SYS_arch_prctl, 0x1023, 18) != 0) {
    ++missing;
    std::printf("tiles: not on this CPU\n");
    return;
  }
  for (const TileProduct product : {TileProduct::bfloat16, TileProduct::signed_signed, TileProduct::signed_unsigned})
    for (int repeat = 0; repeat < 300; ++repeat) {
      const auto up_to_16 = [] { return static_cast<uint8_t>(1 + generator() % 16); };
      TileCase given = {product, up_to_16(), up_to_16(), up_to_16(), {}, {}, {}};
      // Random pairs of bytes are bfloat16 of every kind; the upper half of a moderate float is one, too.
      for (uint8_t* tile : {given.a, given.b, given.c})
        for (int row = 0; row < 16; ++row) fill(tile + 64 * row, product == TileProduct::bfloat16 && repeat % 4);
      alignas(64) Output twin[16] = {}, hardware[16] = {};
      multiply_on_twin(given, twin[0].bytes);
      multiply_on_hardware(given, hardware[0].bytes);
      for (int row = 0; row < 16; ++row) {
        if (same(twin[row], hardware[row], product == TileProduct::bfloat16)) continue;
        ++failures;
        std::printf("product %d of tiles: the twin differs in row %d\n", static_cast<int>(product), row);
        return;
      }
    }
}

}  // namespace

int main() {
  compare_vectors();
  compare_tiles();
  std::printf("%d failures, %d not compared\n", failures, missing);
  return failures != 0;
}
