// An ISA that multiplies int8 weights by rounded activations in a way of its own, and does everything else as a lesser
// one does. `Way` has
//   lesser(): that Isa; takes(x, weight): whether the product is its own, of those that `rounds` allows;
//   product and prepare: as in Isa, for what it takes.
#pragma once

#include "rounded.h"

namespace alphaprune {
namespace {

template <class Way>
struct Over {
  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    if (!Way::takes(p.given, p.weight)) return Way::lesser().product(p, begin, end, scratch);
    Way::product(p, begin, end, scratch);
  }
  static void expand(const sbt::View& weight, int64_t begin, int64_t end, Dtype out_dtype, void* out) {
    Way::lesser().expand(weight, begin, end, out_dtype, out);
  }
  static int64_t prepared_bytes(const Activations& x, const sbt::View& weight) {
    return Way::takes(x, weight) ? integer_bytes(x, weight) : Way::lesser().prepared_bytes(x, weight);
  }
  static void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
    if (!Way::takes(x, weight)) return Way::lesser().prepare(x, weight, first, last, to);
    Way::prepare(x, weight, first, last, to);
  }
  static int layout(const Activations& x, const sbt::View& weight) {
    constexpr int kWords = 8, kBytes = 9;  // no lesser ISA has so many
    if (Way::takes(x, weight)) return weight.to_bytes ? kBytes : kWords;
    return Way::lesser().layout ? Way::lesser().layout(x, weight) : 0;
  }

  static void dense(const Product& p, int64_t begin, int64_t end, void* scratch) {
    Way::lesser().dense(p, begin, end, scratch);
  }
  static DenseRows dense_rows(Dtype dtype) {
    return Way::lesser().dense ? Way::lesser().dense_rows(dtype) : DenseRows::none;
  }
  static void widen(const void* from, Dtype dtype, int64_t count, int64_t padded, float* to) {
    Way::lesser().widen(from, dtype, count, padded, to);
  }

  static constexpr Isa isa(const char* name, const StepLoops* loops) {
    return {name, product, expand, prepared_bytes, prepare, loops, layout, dense, dense_rows, widen};
  }
};

}  // namespace
}  // namespace alphaprune
