// alphaprune._native: addresses and sizes in, exceptions out. Shapes and dtypes were checked one layer up.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/pack.h"

namespace py = pybind11;

namespace alphaprune {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const Isa& isa_named(const std::string& name) {
  for (const Isa* const* isa = isas(); *isa; ++isa) {
    if (name != (*isa)->name) continue;
    const std::string reason = unavailable(**isa);
    if (!reason.empty()) throw std::invalid_argument(name + ": " + reason);
    return **isa;
  }
  throw std::invalid_argument(name + " was not compiled in");
}

Dtype dtype_of(int32_t code) {
  if (code < 0 || code > 2) throw std::invalid_argument("no dtype has the code " + std::to_string(code));
  return static_cast<Dtype>(code);
}

// A validated packed weight bound to one ISA: what a call needs besides x, y and bias.
class Weight {
 public:
  Weight(Address values, Address mask, Address offsets, int64_t rows, int64_t cols, int32_t dtype,
         const std::string& isa)
      : view_{at<const void>(values), at<const uint32_t>(mask), at<const uint32_t>(offsets), rows, cols,
              dtype_of(dtype)},
        isa_(isa_named(isa)) {
    if (rows < 1 || cols < 1) throw std::invalid_argument("a packed weight has at least one row and one column");
  }

  void multiply(Address x, int32_t dtype, int64_t tokens, int64_t stride, Address bias, int32_t bias_dtype,
                Address y) const {
    const Activations activations{at<const void>(x), dtype_of(dtype), tokens, stride};
    const Bias b{at<const void>(bias), dtype_of(bias_dtype)};
    const py::gil_scoped_release release;
    alphaprune::multiply(isa_, view_, activations, b, at<void>(y), view_.rows);
  }

  void expand(int64_t first, int64_t last, Address out) const {
    if (first < 0 || first % sbt::kTileRows || last < first || last > view_.rows)
      throw std::invalid_argument("rows to expand start on a multiple of 16 and end inside the weight");
    const py::gil_scoped_release release;
    alphaprune::expand(isa_, view_, first, last, at<void>(out));
  }

 private:
  sbt::View view_;
  const Isa& isa_;
};

py::list isa_list() {
  py::list all;
  for (const Isa* const* isa = isas(); *isa; ++isa) all.append(py::make_tuple((*isa)->name, unavailable(**isa)));
  return all;
}

void mask_and_offsets(Address weight, Address keep, int64_t rows, int64_t cols, int32_t dtype, Address mask,
                      Address offsets) {
  const Dtype code = dtype_of(dtype);
  const py::gil_scoped_release release;
  if (!pack_mask(at<const void>(weight), at<const uint8_t>(keep), rows, cols, code, at<uint32_t>(mask),
                 at<uint32_t>(offsets)))
    throw std::overflow_error("more than 34e9 values in one weight");
}

void values(Address weight, int64_t rows, int64_t cols, int32_t dtype, Address mask, Address offsets, Address out) {
  const Dtype code = dtype_of(dtype);
  const py::gil_scoped_release release;
  pack_values(at<const void>(weight), rows, cols, code, at<const uint32_t>(mask), at<const uint32_t>(offsets),
              at<void>(out));
}

py::tuple fault(Address mask, Address offsets, int64_t rows, int64_t cols) {
  Finding found;
  {
    const py::gil_scoped_release release;
    found = check(at<const uint32_t>(mask), at<const uint32_t>(offsets), rows, cols);
  }
  return py::make_tuple(static_cast<int32_t>(found.fault), found.tile);
}

}  // namespace
}  // namespace alphaprune

PYBIND11_MODULE(_native, m) {
  using namespace alphaprune;
  m.attr("COMPILER") = ALPHAPRUNE_COMPILER;
  m.def("isas", isa_list, "[(name, reason it cannot run here or '')], best first");
  m.def("pack_mask", mask_and_offsets);
  m.def("pack_values", values);
  m.def("unpack_mask", [](Address mask, int64_t rows, int64_t cols, Address keep) {
    const py::gil_scoped_release release;
    unpack_mask(at<const uint32_t>(mask), rows, cols, at<uint8_t>(keep));
  });
  m.def("fault", fault, "(code, tile) of the first fault of mask and offsets");
  m.def("count_bits", [](Address words, int64_t count) {
    const py::gil_scoped_release release;
    return count_bits(at<const uint32_t>(words), count);
  });
  py::class_<Weight>(m, "Weight")
      .def(py::init<Address, Address, Address, int64_t, int64_t, int32_t, const std::string&>())
      .def("multiply", &Weight::multiply)
      .def("expand", &Weight::expand);
}
