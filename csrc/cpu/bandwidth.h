// How fast this machine's memory can be read: loops that do nothing else, the ceiling that kernels are measured by.
#pragma once

#include <cstdint>
#include <string>

namespace alphaprune {

constexpr int64_t kLine = 64;
constexpr int kMostStreams = 4;

// One way to read: the width of its loads and what it prefetches.
struct ReadLoop {
  const char* name;
  // The sum, modulo 2^64, of the 64-bit words in `lines` 64-byte lines from `begin` on, 64-byte aligned. Reads from
  // `streams` places at the same time, 1 to kMostStreams.
  uint64_t (*read)(const void* begin, int64_t lines, int streams);
};

// Loops that were compiled in and run on this CPU, widest loads first; null at the end.
const ReadLoop* const* read_loops();

// The sum of all 64-bit words of `bytes`, a multiple of 64 from an aligned `begin`, read by the threads of the kernels.
uint64_t read_all(const ReadLoop& loop, const void* begin, int64_t bytes, int streams);

// Tables of three loops each, ended by null: without prefetch, into L1, and into L2.
extern const ReadLoop* const kReadBaseline[];
extern const ReadLoop* const kReadAvx2[];
extern const ReadLoop* const kReadAvx512bw[];

}  // namespace alphaprune
