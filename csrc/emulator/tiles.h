// The tile registers of a thread in the emulator; one copy for all files, so that a test sees what a kernel leaves
// behind.
#pragma once

#include <cstdint>

namespace alphaprune {

struct EmulatedTiles {
  bool configured;
  int rows[8], row_bytes[8];
  alignas(64) uint8_t data[8][16][64];
};
inline thread_local EmulatedTiles emulated_tiles;

}  // namespace alphaprune
