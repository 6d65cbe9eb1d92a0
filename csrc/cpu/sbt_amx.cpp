// SBT on AMX: macro tiles are expanded into tile images in L1 while the tiles before them are multiplied. bfloat16
// beside bfloat16 as TDPBF16PS, which treats subnormal numbers as zero; int8 beside activations of 16 bits as two
// integer products, one per byte of the rounded activations. Few tokens and everything else are computed as on AVX-512.
//
// C[16 rows, 16 tokens] += A[16 rows, 64 bytes] B[64 bytes, 16 tokens]: weights are A, row by row as they are expanded;
// activations are B, laid out once: groups of 4 bytes along K, 16 tokens beside each other, zeros for tokens and
// columns that do not exist.
#include "integer.h"
#include "vbmi2.h"

namespace alphaprune {
namespace {

// What a new machine should be asked about first.
constexpr int64_t kLeastTokens = 3;     // with fewer the AVX-512 code runs
constexpr int64_t kPanelTiles = 4;      // macro tiles along K per panel: with its activations it stays in L1
constexpr int64_t kPassTiles = 16;      // tiles of 16 tokens for which a weight is expanded once
constexpr int64_t kGroupRows = 8;       // row tiles that share a sweep over activations,
constexpr int64_t kResident = 1 << 20;  // or 2, where the activations of a pass are no more bytes than stay in L2

constexpr int64_t kTokens = 16;                  // of a tile
constexpr int64_t kTileBytes = 1024;             // 16 rows x 64 bytes
constexpr int64_t kMacroBytes = 2 * kTileBytes;  // activations of 64 columns: bfloat16, or low and high bytes
constexpr int64_t kPairRows = 2;                 // row tiles that are multiplied together
static_assert(kTokens == kTokenBlock && kPanelTiles * sbt::kTileCols % kGroupCols == 0, "panels hold whole groups");

// What LDTILECFG reads: eight tiles of 16 rows x 64 bytes.
struct alignas(64) Palette {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Palette) == 64, "LDTILECFG reads 64 bytes");
constexpr Palette kPalette;

// Tiles are the thread's while one of these lives: in between, the system need not save them.
struct Tiles {
  Tiles() { _tile_loadconfig(&kPalette); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// GCC's tile loads do not tell the compiler that they read memory.
inline void written() { __asm__ volatile("" ::: "memory"); }

inline void transpose(__m512i* v) {
  __m512i a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  // v[4 r + j] holds column 4 q + j of rows 4 r ... 4 r + 3 in its quarter q.
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88), high = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    a[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
    a[4 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
    a[8 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    a[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = a[i];
}

// Expands a panel macro tile by macro tile, in between the products of the panel before it.
template <class Kind>
class Feed {
 public:
  Feed() = default;
  Feed(const sbt::View& weight, int64_t row_tile, int64_t rows, int64_t col_tile, int64_t width, uint8_t* panel)
      : weight_(&weight),
        first_(row_tile * weight.col_tiles() + col_tile),
        width_(width),
        left_(rows * width),
        panel_(panel) {}

  // Spreads the macro tiles over so many offers.
  void pace(int64_t offers) { halves_ = ceil_div(2 * left_, offers); }
  void offer() {
    if (left_ == 0) return;
    for (credit_ += halves_; credit_ >= 2 && left_; credit_ -= 2) step();
  }
  void finish() {
    while (left_) step();
    written();
  }

 private:
  void step() {
    --left_;
    Kind::expand(*weight_, first_ + at_, panel_ + at_ * Kind::kPanelBytes);
    if (++at_ < width_) return;
    at_ = 0;
    first_ += weight_->col_tiles();
    panel_ += Kind::kRowBytes;
  }

  const sbt::View* weight_ = nullptr;
  int64_t first_ = 0, width_ = 0, at_ = 0, left_ = 0, halves_ = 0, credit_ = 0;
  uint8_t* panel_ = nullptr;
};

// The activations of 16 tokens: macro tiles of 64 columns, then, for Integer, the units [group][token] and [token]
// whether it must be computed exactly.
struct Layout {
  explicit Layout(const sbt::View& weight)
      : tiles(weight.col_tiles()),
        macro_bytes(weight.to_bytes ? kTileBytes : kMacroBytes),
        groups(weight.dtype == Dtype::int8 ? ceil_div(weight.padded_cols(), kGroupCols) : 0),
        stride(tiles * macro_bytes + (weight.dtype == Dtype::int8 ? (groups + 1) * 64 : 0)) {}

  uint8_t* block(const void* base, int64_t token) const {
    return const_cast<uint8_t*>(static_cast<const uint8_t*>(base)) + token / kTokens * stride;
  }
  float* units(uint8_t* block) const { return reinterpret_cast<float*>(block + tiles * macro_bytes); }

  int64_t tiles, macro_bytes, groups, stride;
};

// One panel and the tokens of a pass.
struct Turn {
  const Product& p;
  const Layout& layout;
  int64_t row_tile, col_tile, width;  // macro tiles along K
  int64_t token, blocks;              // tiles of 16 tokens
  const uint8_t* panel;
  uint8_t *sums, *stages;  // sums: [row tile][kPassTiles][16 rows][16 tokens], as the kind has them
};
constexpr int64_t kSumsRow = kPassTiles * kTileBytes;
constexpr int64_t kSpread = 4;  // tiles or pairs of tiles of tokens over which the next panel is spread

// bfloat16: a word is half of a tile's row, twice.
struct Bfloat16Tiles {
  static constexpr int64_t kPanelBytes = 2 * kTileBytes, kRowBytes = kPanelTiles * kPanelBytes;

  static void expand(const sbt::View& weight, int64_t tile, uint8_t* panel) {
    const uint16_t* value = tile_values<uint16_t>(weight, tile);
    const uint32_t* mask = weight.mask + tile * sbt::kWords;
    prefetch(mask);
    prefetch(mask + 16);
    for (int64_t s = 0; s < sbt::kSteps; ++s) {
      uint8_t* to = panel + s / 2 * kTileBytes + s % 2 * 32;
#pragma GCC unroll 8
      for (int64_t q = 0; q < sbt::kPairs; ++q) {
        if (q % 2 == 0) prefetch(value);
        const __m512i w = expand16(value, mask[s * sbt::kPairs + q]);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 2 * q * 64), _mm512_castsi512_si256(w));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + (2 * q + 1) * 64), _mm512_extracti64x4_epi64(w, 1));
      }
    }
  }

  // Sums of kRows row tiles and kBlocks token tiles over `width` macro tiles; `sums` and `x` of the first token tile.
  template <int kRows, int kBlocks>
  static void block(const uint8_t* panel, int64_t width, const uint8_t* x, int64_t x_stride, uint8_t* sums,
                    Feed<Bfloat16Tiles>& feed) {
    _tile_loadd(0, sums, 64);
    if constexpr (kBlocks > 1) _tile_loadd(1, sums + kTileBytes, 64);
    if constexpr (kRows > 1) _tile_loadd(2, sums + kSumsRow, 64);
    if constexpr (kRows > 1 && kBlocks > 1) _tile_loadd(3, sums + kSumsRow + kTileBytes, 64);
    for (int64_t k = 0; k < 2 * width; ++k, panel += kTileBytes, x += kTileBytes) {
      _tile_loadd(6, x, 64);
      _tile_loadd(4, panel, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kBlocks > 1) {
        _tile_loadd(7, x + x_stride, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kRows > 1) {
        _tile_loadd(5, panel + kRowBytes, 64);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kBlocks > 1) _tile_dpbf16ps(3, 5, 7);
      }
      feed.offer();
    }
    _tile_stored(0, sums, 64);
    if constexpr (kBlocks > 1) _tile_stored(1, sums + kTileBytes, 64);
    if constexpr (kRows > 1) _tile_stored(2, sums + kSumsRow, 64);
    if constexpr (kRows > 1 && kBlocks > 1) _tile_stored(3, sums + kSumsRow + kTileBytes, 64);
  }

  template <int kRows>
  static void multiply(const Turn& turn, Feed<Bfloat16Tiles>& feed) {
    const int64_t stride = turn.layout.stride, pairs = ceil_div(turn.blocks, 2);
    const uint8_t* x = turn.layout.block(turn.p.x, turn.token) + turn.col_tile * kMacroBytes;
    feed.pace(2 * turn.width * (pairs < kSpread ? pairs : kSpread));
    int64_t b = 0;
    for (; b + 2 <= turn.blocks; b += 2)
      block<kRows, 2>(turn.panel, turn.width, x + b * stride, stride, turn.sums + b * kTileBytes, feed);
    if (b < turn.blocks)
      block<kRows, 1>(turn.panel, turn.width, x + b * stride, stride, turn.sums + b * kTileBytes, feed);
  }

  static void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* base) {
    const Layout layout(weight);
    uint8_t* to = layout.block(base, first);
    const auto* rows = static_cast<const uint16_t*>(x.data);
    for (int64_t col = 0; col < weight.padded_cols(); col += 32, to += kTileBytes) {
      const int64_t count = weight.cols - col;
      const auto mask = static_cast<__mmask32>(count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1);
      __m512i v[16];
      for (int64_t t = 0; t < kTokens; ++t)
        v[t] = first + t < last ? _mm512_maskz_loadu_epi16(mask, rows + (first + t) * x.stride + col)
                                : _mm512_setzero_si512();
      transpose(v);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, v[i]);
    }
  }
};

// int8: two words are a quarter of four rows. The sums of a group, exact integers per byte of the activations, are
// folded into those of the token tile while the next group is multiplied.
template <int kBytes>
struct IntegerTiles {
  static constexpr int64_t kPanelBytes = kTileBytes, kRowBytes = kPanelTiles * kPanelBytes;
  static constexpr int64_t kStageBytes = kBytes * kPairRows * kTileBytes;  // [row tile][low, high]
  static constexpr int64_t kFoldRows = 8 / kBytes;                         // between two products
  static constexpr int64_t kXBytes = kBytes * kTileBytes;                  // activations of 64 columns

  static void expand(const sbt::View& weight, int64_t tile, uint8_t* panel) {
    const uint8_t* value = tile_values<uint8_t>(weight, tile);
    const uint32_t* mask = weight.mask + tile * sbt::kWords;
    prefetch(mask);
    prefetch(mask + 16);
    for (int64_t s = 0; s < sbt::kSteps; ++s) {
      auto* to = reinterpret_cast<__m128i*>(panel + s * sbt::kStepCols);
#pragma GCC unroll 4
      for (int64_t v = 0; v < 4; ++v, to += 16) {
        if (v % 2 == 0) prefetch(value);
        const __m512i w = expand8(value, mask + s * sbt::kPairs + 2 * v);
        _mm_store_si128(to, _mm512_castsi512_si128(w));
        _mm_store_si128(to + 4, _mm512_extracti32x4_epi32(w, 1));
        _mm_store_si128(to + 8, _mm512_extracti32x4_epi32(w, 2));
        _mm_store_si128(to + 12, _mm512_extracti32x4_epi32(w, 3));
      }
    }
  }

  // The sums of one group on their way from the tiles to the float sums, a few rows at a time.
  struct Fold {
    const int32_t* stage = nullptr;
    float* sums = nullptr;
    __m512 unit = _mm512_setzero_ps();
    const float* scales = nullptr;  // [row], or null
    int64_t row = 0, rows = 0;

    void step(int64_t count) {
      for (const int64_t end = row + count < rows ? row + count : rows; row < end; ++row) {
        const int64_t r = row % 16;
        const int32_t* from = stage + row / 16 * (kXBytes / 4) + r * 16;
        float* to = sums + row / 16 * (kSumsRow / 4) + r * 16;
        __m512i sum = _mm512_load_si512(from);
        if (kBytes == 2) sum = _mm512_add_epi32(sum, _mm512_slli_epi32(_mm512_load_si512(from + 256), 8));
        __m512 total = _mm512_cvtepi32_ps(sum);
        if (scales) total = _mm512_mul_ps(total, _mm512_set1_ps(scales[row]));
        _mm512_store_ps(to, _mm512_fmadd_ps(total, unit, _mm512_load_ps(to)));
      }
    }
  };

  // One group of one token tile into `stage`.
  template <int kRows>
  static void group(const uint8_t* panel, int64_t width, const uint8_t* x, uint8_t* stage, Fold& fold,
                    Feed<IntegerTiles>& feed) {
    _tile_zero(0);
    if constexpr (kBytes > 1) _tile_zero(1);
    if constexpr (kRows > 1) _tile_zero(2);
    if constexpr (kRows > 1 && kBytes > 1) _tile_zero(3);
    for (int64_t i = 0; i < width; ++i, panel += kPanelBytes, x += kXBytes) {
      _tile_loadd(4, panel, 64);
      _tile_loadd(6, x, 64);
      _tile_dpbssd(0, 4, 6);
      fold.step(kFoldRows);
      if constexpr (kBytes > 1) {
        _tile_loadd(7, x + kTileBytes, 64);
        _tile_dpbssd(1, 4, 7);
        fold.step(kFoldRows);
      }
      if constexpr (kRows > 1) {
        _tile_loadd(5, panel + kRowBytes, 64);
        _tile_dpbssd(2, 5, 6);
        fold.step(kFoldRows);
      }
      if constexpr (kRows > 1 && kBytes > 1) {
        _tile_dpbssd(3, 5, 7);
        fold.step(kFoldRows);
      }
      feed.offer();
    }
    fold.step(fold.rows);
    _tile_stored(0, stage, 64);
    if constexpr (kBytes > 1) _tile_stored(1, stage + kTileBytes, 64);
    if constexpr (kRows > 1) _tile_stored(2, stage + kXBytes, 64);
    if constexpr (kRows > 1 && kBytes > 1) _tile_stored(3, stage + 3 * kTileBytes, 64);
  }

  template <int kRows>
  static void multiply(const Turn& turn, Feed<IntegerTiles>& feed) {
    const Product& p = turn.p;
    alignas(64) float scales[kPanelTiles / 2][16 * kRows];
    if (p.weight.grouped())
      for (int64_t c = 0; c < turn.width; c += 2)
        for (int64_t r = 0; r < kRows; ++r)
          _mm512_store_ps(scales[c / 2] + 16 * r, row_scales(p.weight, turn.row_tile + r, turn.col_tile + c));
    feed.pace(turn.width * (turn.blocks < kSpread ? turn.blocks : kSpread));
    Fold fold;
    int64_t stage = 0;
    for (int64_t b = 0; b < turn.blocks; ++b) {
      uint8_t* block = turn.layout.block(p.x, turn.token + b * kTokens);
      for (int64_t c = 0; c < turn.width; c += 2, stage ^= kStageBytes) {
        const int64_t col_tile = turn.col_tile + c;
        group<kRows>(turn.panel + c * kPanelBytes, turn.width - c < 2 ? 1 : 2, block + col_tile * kXBytes,
                     turn.stages + stage, fold, feed);
        fold.stage = reinterpret_cast<const int32_t*>(turn.stages + stage);
        fold.sums = reinterpret_cast<float*>(turn.sums + b * kTileBytes);
        fold.unit = _mm512_load_ps(turn.layout.units(block) + col_tile / 2 * kTokens);
        fold.scales = p.weight.grouped() ? scales[c / 2] : nullptr;
        fold.row = 0;
        fold.rows = 16 * kRows;
      }
    }
    fold.step(fold.rows);
  }

  static void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* base) {
    const Layout layout(weight);
    const int64_t padded = weight.padded_cols();
    uint8_t* block = layout.block(base, first);
    float *units = layout.units(block), *exact = units + layout.groups * kTokens;
    for (int64_t t = 0; t < kTokens; ++t) exact[t] = 0;
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t col = g * kGroupCols;
      alignas(64) uint8_t bytes[kTokens][kBytes][kGroupCols] = {};
      for (int64_t t = 0; t < kTokens; ++t) {
        float unit = 0;
        if (first + t < last) {
          const char* from = static_cast<const char*>(x.data) + (first + t) * x.stride * size_of(x.dtype);
          unit = round_group<kBytes>(from, x.dtype, col, weight.cols, padded, bytes[t][0]).unit;
        }
        if (is_nan(unit)) exact[t] = 1;
        units[g * kTokens + t] = is_nan(unit) ? 0 : unit;
      }
      for (int64_t c = 0; c < 2 && col + c * sbt::kTileCols < padded; ++c)
        for (int64_t b = 0; b < kBytes; ++b) {
          __m512i v[16];
          for (int64_t t = 0; t < kTokens; ++t) v[t] = _mm512_load_si512(bytes[t][b] + c * sbt::kTileCols);
          transpose(v);
          uint8_t* to = block + (2 * g + c) * kXBytes + b * kTileBytes;
          for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, v[i]);
        }
    }
  }
};

// The order of the work on row tiles [begin, end): groups of row tiles, passes of tokens, panels along K, pairs of row
// tiles. A weight is expanded once per pass.
struct Job {
  int64_t group, token, col_tile, row_tile;
};

template <class Kind>
class Sweep {
 public:
  static constexpr int64_t kSumsBytes = kGroupRows * kSumsRow;
  static constexpr int64_t kPanelBytes = kPairRows * Kind::kRowBytes;
  static_assert(kSumsBytes + 2 * kPanelBytes + 2 * IntegerTiles<2>::kStageBytes <= kScratchBytes,
                "all fits the scratch");

  Sweep(const Product& p, int64_t begin, int64_t end, void* scratch)
      : p_(p), layout_(p.weight), end_(end), job_{begin, 0, 0, begin}, sums_(static_cast<uint8_t*>(scratch)) {
    panels_[0] = sums_ + kSumsBytes;
    panels_[1] = panels_[0] + kPanelBytes;
    stages_ = panels_[1] + kPanelBytes;
    const int64_t tokens = p.tokens < kPassTiles * kTokens ? p.tokens : kPassTiles * kTokens;
    group_rows_ = ceil_div(tokens, kTokens) * layout_.stride <= kResident ? kPairRows : kGroupRows;
  }

  void run() {
    if (job_.row_tile >= end_) return;
    const Tiles tiles;
    feed(job_, panels_[0]).finish();
    for (int64_t turn = 0; job_.row_tile < end_; ++turn) {
      const Job next = after(job_);
      Feed<Kind> ahead;
      if (next.row_tile < end_) ahead = feed(next, panels_[1 - turn % 2]);
      uint8_t* sums = sums_ + (job_.row_tile - job_.group) * kSumsRow;
      const int64_t rows = rows_of(job_), blocks = blocks_of(job_);
      for (int64_t r = 0; r < rows && job_.col_tile == 0; ++r)
        std::memset(sums + r * kSumsRow, 0, static_cast<size_t>(blocks * kTileBytes));
      written();
      const Turn now = {p_,         layout_, job_.row_tile,     job_.col_tile, width_of(job_),
                        job_.token, blocks,  panels_[turn % 2], sums,          stages_};
      if (rows > 1) {
        Kind::template multiply<2>(now, ahead);
      } else {
        Kind::template multiply<1>(now, ahead);
      }
      ahead.finish();
      if (job_.col_tile + kPanelTiles >= layout_.tiles) store(job_, sums);
      job_ = next;
    }
  }

 private:
  int64_t rows_of(const Job& job) const {
    const int64_t left = group_end(job) - job.row_tile;
    return left < kPairRows ? left : kPairRows;
  }
  int64_t width_of(const Job& job) const {
    const int64_t left = layout_.tiles - job.col_tile;
    return left < kPanelTiles ? left : kPanelTiles;
  }
  int64_t blocks_of(const Job& job) const {
    const int64_t left = ceil_div(p_.tokens - job.token, kTokens);
    return left < kPassTiles ? left : kPassTiles;
  }
  int64_t group_end(const Job& job) const { return job.group + group_rows_ < end_ ? job.group + group_rows_ : end_; }

  // The job after `job`; at the end of all, one that begins at `end_`.
  Job after(Job job) const {
    job.row_tile += kPairRows;
    if (job.row_tile < group_end(job)) return job;
    job.row_tile = job.group;
    job.col_tile += kPanelTiles;
    if (job.col_tile < layout_.tiles) return job;
    job.col_tile = 0;
    job.token += kPassTiles * kTokens;
    if (job.token < p_.tokens) return job;
    const int64_t next = group_end(job);
    return {next, 0, 0, next};
  }

  Feed<Kind> feed(const Job& job, uint8_t* panel) const {
    return {p_.weight, job.row_tile, rows_of(job), job.col_tile, width_of(job), panel};
  }

  void store(const Job& job, const uint8_t* sums) const {
    for (int64_t r = 0; r < rows_of(job); ++r)
      for (int64_t b = 0; b < blocks_of(job); ++b) {
        __m512i v[16];
        for (int64_t i = 0; i < 16; ++i) v[i] = _mm512_load_si512(sums + r * kSumsRow + b * kTileBytes + i * 64);
        transpose(v);
        const int64_t first = job.token + b * kTokens, left = p_.tokens - first;
        for (int64_t t = 0; t < kTokens && t < left; ++t)
          store_sums(p_, job.row_tile + r, first + t, _mm512_castsi512_ps(v[t]));
      }
  }

  const Product& p_;
  Layout layout_;
  int64_t end_;
  Job job_;
  uint8_t *sums_, *panels_[2], *stages_;
  int64_t group_rows_;
};

// Whether the tiles compute this product.
bool tiled(const Activations& x, const sbt::View& weight) {
  if (x.tokens < kLeastTokens) return false;
  if (weight.dtype == Dtype::int8) return rounds(x, weight);
  return weight.dtype == Dtype::bfloat16 && x.dtype == Dtype::bfloat16;
}

void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (!tiled(p.given, p.weight)) return kAvx512.product(p, begin, end, scratch);
  if (p.weight.dtype != Dtype::int8) return Sweep<Bfloat16Tiles>(p, begin, end, scratch).run();
  if (p.weight.to_bytes) {
    Sweep<IntegerTiles<1>>(p, begin, end, scratch).run();
  } else {
    Sweep<IntegerTiles<2>>(p, begin, end, scratch).run();
  }
  const Layout layout(p.weight);
  for (int64_t t = 0; t < p.tokens; ++t)
    if (layout.units(layout.block(p.x, t))[layout.groups * kTokens + t % kTokens] != 0)
      exact_integers<NearBytes>(p, begin, end, t);
}

void expand(const sbt::View& weight, int64_t begin, int64_t end, Dtype out_dtype, void* out) {
  kAvx512.expand(weight, begin, end, out_dtype, out);
}

int64_t prepared_bytes(const Activations& x, const sbt::View& weight) {
  if (!tiled(x, weight)) return kAvx512.prepared_bytes(x, weight);
  return ceil_div(x.tokens, kTokens) * Layout(weight).stride;
}

void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  if (!tiled(x, weight)) return kAvx512.prepare(x, weight, first, last, to);
  if (weight.to_bytes) return IntegerTiles<1>::prepare(x, weight, first, last, to);
  if (weight.dtype == Dtype::int8) return IntegerTiles<2>::prepare(x, weight, first, last, to);
  Bfloat16Tiles::prepare(x, weight, first, last, to);
}

int layout(const Activations& x, const sbt::View& weight) {
  return tiled(x, weight) && !weight.to_bytes ? 2 : kAvx512.layout(x, weight);
}

}  // namespace

const Isa kAmx = {"amx", product, expand, prepared_bytes, prepare, &kStepAvx512bw, layout};

}  // namespace alphaprune
