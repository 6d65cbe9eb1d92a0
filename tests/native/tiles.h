// A product of tiles that runs on the hardware and on its twin (tiles.cpp), for test_emulator.
#pragma once

#include <cstdint>

namespace alphaprune {

enum class TileProduct { bfloat16, signed_signed, signed_unsigned };

// C[rows, columns] += A[rows, groups] B[groups, columns], in groups of 4 bytes along K; 64 bytes per row in memory.
struct TileCase {
  TileProduct product;
  uint8_t rows, columns, groups;
  alignas(64) uint8_t a[1024], b[1024], c[1024];
};

void multiply_on_twin(const TileCase& given, uint8_t* out);
void multiply_on_hardware(const TileCase& given, uint8_t* out);

}  // namespace alphaprune
