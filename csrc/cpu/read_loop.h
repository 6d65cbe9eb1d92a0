// The read loop as a template over the vector of an ISA and the prefetch; internal linkage, so that each ISA file has
// its own copy under its own flags.
#pragma once

#include "bandwidth.h"

namespace alphaprune {
namespace {

enum class Prefetch { none, near, far };

// Lines between what is read and what is asked for: into L1, and into L2.
constexpr int64_t kNearLines = 64, kFarLines = 256;

// `Wide`: Vector, kBytes, zero(), add(sum, pointer), total(sum).
template <class Wide, Prefetch P, int Streams>
uint64_t read_streams(const char* begin, int64_t lines) {
  constexpr int kPerLine = kLine / Wide::kBytes;
  const int64_t each = lines / Streams;
  typename Wide::Vector sum[Streams][kPerLine];
  for (auto& stream : sum)
    for (auto& vector : stream) vector = Wide::zero();
  for (int64_t line = 0; line < each; ++line) {
    for (int s = 0; s < Streams; ++s) {
      const char* at = begin + (s * each + line) * kLine;
      if (P == Prefetch::near) __builtin_prefetch(at + kNearLines * kLine, 0, 3);
      if (P == Prefetch::far) __builtin_prefetch(at + kFarLines * kLine, 0, 2);
      for (int v = 0; v < kPerLine; ++v) sum[s][v] = Wide::add(sum[s][v], at + v * Wide::kBytes);
    }
  }
  for (int64_t line = Streams * each; line < lines; ++line)
    for (int v = 0; v < kPerLine; ++v) sum[0][v] = Wide::add(sum[0][v], begin + line * kLine + v * Wide::kBytes);
  uint64_t total = 0;
  for (auto& stream : sum)
    for (auto& vector : stream) total += Wide::total(vector);
  return total;
}

template <class Wide, Prefetch P>
uint64_t read(const void* begin, int64_t lines, int streams) {
  const char* at = static_cast<const char*>(begin);
  switch (streams) {
    case 1:
      return read_streams<Wide, P, 1>(at, lines);
    case 2:
      return read_streams<Wide, P, 2>(at, lines);
    case 3:
      return read_streams<Wide, P, 3>(at, lines);
    default:
      return read_streams<Wide, P, kMostStreams>(at, lines);
  }
}

}  // namespace
}  // namespace alphaprune
