// Twins of the AMX intrinsics beside those of AVX-512: the tile registers of a thread, with every check that makes the
// hardware raise #GP or #UD (Intel's Software Developer's Manual, volume 2, LDTILECFG to TILEZERO).
#pragma once

#include "avx512.h"
#include "tiles.h"

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud

namespace alphaprune {

namespace {
namespace emulator {

inline EmulatedTiles& tiles() {
  if (!emulated_tiles.configured) fault("#UD: tiles are not configured");
  return emulated_tiles;
}

inline int shaped(int tile) {
  if (tile < 0 || tile > 7) fault("#UD: there are eight tiles");
  if (!tiles().rows[tile]) fault("#UD: the tile has no shape");
  return tile;
}

// C[m, n] += A[m, 4 k] B[4 k, n]
inline void check_product(int c, int a, int b) {
  if (a == b || a == c || b == c) fault("#UD: a tile twice in one product");
  const EmulatedTiles& t = tiles();
  shaped(c), shaped(a), shaped(b);
  if (t.row_bytes[c] % 4 || t.row_bytes[a] % 4 || t.row_bytes[b] % 4) fault("#UD: part of a number in a row");
  if (t.rows[c] != t.rows[a] || t.row_bytes[c] != t.row_bytes[b] || t.row_bytes[a] / 4 != t.rows[b])
    fault("#UD: shapes do not match");
}

inline void clear_above(int tile) {
  EmulatedTiles& t = tiles();
  for (int r = 0; r < 16; ++r)
    for (int i = 0; i < 64; ++i)
      if (r >= t.rows[tile] || i >= t.row_bytes[tile]) t.data[tile][r][i] = 0;
}

template <class A, class B>
inline void integer_product(int c, int a, int b) {
  check_product(c, a, b);
  EmulatedTiles& t = tiles();
  for (int m = 0; m < t.rows[c]; ++m) {
    uint32_t sum[16];
    std::memcpy(sum, t.data[c][m], 64);
    for (int k = 0; k < t.row_bytes[a]; ++k)
      for (int n = 0; n < t.row_bytes[c] / 4; ++n)
        sum[n] +=
            static_cast<uint32_t>(static_cast<A>(t.data[a][m][k]) * static_cast<B>(t.data[b][k / 4][4 * n + k % 4]));
    std::memcpy(t.data[c][m], sum, 64);
  }
  clear_above(c);
}

}  // namespace emulator

inline void _tile_loadconfig(const void* config) {
  uint8_t bytes[64];
  uint16_t row_bytes[16];
  std::memcpy(bytes, config, 64);
  std::memcpy(row_bytes, bytes + 16, 32);
  if (bytes[0] > 1) twin::fault("#GP: there is no such palette");
  for (int i = 1; i < 16; ++i)
    if (bytes[i]) twin::fault("#GP: a reserved byte, or a restart, in the tile configuration");
  EmulatedTiles& t = emulated_tiles;
  for (int i = 0; i < 16; ++i) {
    const int rows = bytes[48 + i];
    if (!rows != !row_bytes[i]) twin::fault("#GP: a tile with rows but no columns, or the reverse");
    if (rows > 16 || row_bytes[i] > 64 || (i > 7 && rows)) twin::fault("#GP: a tile that palette 1 does not have");
    if (i > 7) continue;
    t.rows[i] = rows;
    t.row_bytes[i] = row_bytes[i];
  }
  t.configured = bytes[0] == 1;
  std::memset(t.data, 0, sizeof(t.data));
}
inline void _tile_release() { emulated_tiles = {}; }

inline void _tile_zero(int tile) {
  std::memset(twin::tiles().data[twin::shaped(tile)], 0, sizeof(EmulatedTiles::data[0]));
}
inline void _tile_loadd(int tile, const void* base, int64_t stride) {
  EmulatedTiles& t = twin::tiles();
  twin::shaped(tile);
  std::memset(t.data[tile], 0, sizeof(t.data[tile]));
  for (int r = 0; r < t.rows[tile]; ++r)
    std::memcpy(t.data[tile][r], static_cast<const char*>(base) + r * stride, static_cast<size_t>(t.row_bytes[tile]));
}
inline void _tile_stored(int tile, void* base, int64_t stride) {
  const EmulatedTiles& t = twin::tiles();
  twin::shaped(tile);
  for (int r = 0; r < t.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, t.data[tile][r], static_cast<size_t>(t.row_bytes[tile]));
}

// The even and the odd ones of the pairs are summed apart, then together, then onto the tile.
inline void _tile_dpbf16ps(int c, int a, int b) {
  twin::check_product(c, a, b);
  EmulatedTiles& t = twin::tiles();
  const int columns = t.row_bytes[c] / 4;
  float x[16][32];
  for (int k = 0; k < t.rows[b]; ++k)
    for (int n = 0; n < 2 * columns; ++n) x[k][n] = twin::bfloat16(t.data[b][k] + 2 * n);
  for (int m = 0; m < t.rows[c]; ++m) {
    float sum[32] = {}, out[16];
    for (int k = 0; k < t.rows[b]; ++k) {
      const float w[2] = {twin::bfloat16(t.data[a][m] + 4 * k), twin::bfloat16(t.data[a][m] + 4 * k + 2)};
      for (int n = 0; n < 2 * columns; ++n) sum[n] = twin::flushed(__builtin_fmaf(w[n % 2], x[k][n], sum[n]));
    }
    std::memcpy(out, t.data[c][m], 64);
    for (int n = 0; n < columns; ++n)
      out[n] = twin::flushed(twin::flushed(out[n]) + twin::flushed(sum[2 * n] + sum[2 * n + 1]));
    std::memcpy(t.data[c][m], out, 64);
  }
  twin::clear_above(c);
}
inline void _tile_dpbssd(int c, int a, int b) { twin::integer_product<int8_t, int8_t>(c, a, b); }
inline void _tile_dpbsud(int c, int a, int b) { twin::integer_product<int8_t, uint8_t>(c, a, b); }

}  // namespace
}  // namespace alphaprune
