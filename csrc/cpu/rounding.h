// What integers the activations of int8 weights are rounded to, whatever instructions multiply them: in units of
// 1 / 32639, or 1 / 127, of the largest among 128 columns of a token. The error is at most half a unit each (0.504 with
// what the quotient is rounded by), and sums of 128 products are exact: 127 * 32639 * 128 < 2^30.
#pragma once

#include <limits>

#include "convert.h"
#include "kernel.h"

namespace alphaprune {
namespace {

constexpr int64_t kGroupCols = sbt::kScaleCols;
// The largest integer of two bytes, 127 * 256 + 127, as it is 256 * high + low of two signed ones; and of one byte.
constexpr float kLargestOf2 = 32639.0f, kLargestOf1 = 127.0f;
constexpr uint32_t kLeastLargest = 0x0d800000;  // 2^-100: below it the unit or its inverse leaves the normal floats

// How a group is rounded, by the bits of its largest magnitude. A group with a number that is not finite, or all of
// whose numbers are too small, is not: its unit is NaN and its integers are zeros.
struct Unit {
  float unit, inverse;

  Unit(uint32_t largest, float most) : unit(std::numeric_limits<float>::quiet_NaN()), inverse(0) {
    if (largest != 0 && (largest < kLeastLargest || largest >= 0x7f800000)) return;
    unit = bits_to_float(largest) / most;
    if (largest) inverse = most / bits_to_float(largest);
  }
  bool usable() const { return unit == unit; }
};

}  // namespace
}  // namespace alphaprune
