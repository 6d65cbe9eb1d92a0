// Compiled twice: with the emulator in front and without.
#include "tiles.h"

#include <immintrin.h>

namespace alphaprune {

void ALPHAPRUNE_MULTIPLY(const TileCase& given, uint8_t* out) {
  alignas(64) static thread_local uint8_t config[64];
  const uint8_t shapes[3][2] = {{given.rows, given.columns}, {given.rows, given.groups}, {given.groups, given.columns}};
  config[0] = 1;
  for (int tile = 0; tile < 3; ++tile) {
    config[16 + 2 * tile] = static_cast<uint8_t>(4 * shapes[tile][1]);
    config[48 + tile] = shapes[tile][0];
  }
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(config);
  _tile_loadd(0, given.c, 64);
  _tile_loadd(1, given.a, 64);
  _tile_loadd(2, given.b, 64);
  if (given.product == TileProduct::bfloat16) _tile_dpbf16ps(0, 1, 2);
  if (given.product == TileProduct::signed_signed) _tile_dpbssd(0, 1, 2);
  if (given.product == TileProduct::signed_unsigned) _tile_dpbsud(0, 1, 2);
  _tile_stored(0, out, 64);
  _tile_release();
}

}  // namespace alphaprune
