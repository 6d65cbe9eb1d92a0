// alphaprune._native: addresses and sizes in, exceptions out. Shapes and dtypes were checked one layer up.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/norm.h"
#include "cpu/pack.h"

namespace py = pybind11;

namespace alphaprune {

void bind_bandwidth(py::module_& m);  // bandwidth_bindings.cpp

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
  if (code < 0 || code > 3) throw std::invalid_argument("no dtype has the code " + std::to_string(code));
  return static_cast<Dtype>(code);
}

Dtype float_of(int32_t code) {
  if (code < 0 || code > 2) throw std::invalid_argument("no float has the code " + std::to_string(code));
  return static_cast<Dtype>(code);
}

// A validated packed weight bound to one ISA: what a call needs besides x, y and bias.
class Weight {
 public:
  Weight(Address values, Address mask, Address offsets, Address scale, int64_t rows, int64_t cols, int64_t groups,
         int32_t dtype, bool to_bytes, const std::string& isa)
      : view_{at<const void>(values),
              at<const uint32_t>(mask),
              at<const uint32_t>(offsets),
              rows,
              cols,
              dtype_of(dtype),
              at<const float>(scale),
              groups,
              to_bytes},
        isa_(isa_named(isa)) {
    if (rows < 1 || cols < 1) throw std::invalid_argument("a packed weight has at least one row and one column");
    const bool scaled = view_.dtype == Dtype::int8;
    if (scaled ? groups != 1 && groups != ceil_div(cols, sbt::kScaleCols) : groups != 0)
      throw std::invalid_argument("scales come with int8 values, one per row or per 128 columns of a row");
    if (scaled && !scale) throw std::invalid_argument("int8 values need scales");
    if (to_bytes && !scaled) throw std::invalid_argument("activations are rounded to 8 bits beside int8 values only");
  }

  void multiply(Address x, int32_t dtype, int64_t tokens, int64_t stride, Address bias, int32_t bias_dtype,
                Address y) const {
    const Activations activations{at<const void>(x), float_of(dtype), tokens, stride};
    const Item item{view_, {at<const void>(bias), float_of(bias_dtype)}, at<void>(y), view_.rows};
    const py::gil_scoped_release release;
    alphaprune::multiply(isa_, &item, 1, activations);
  }

  void expand(int64_t first, int64_t last, Address out, int32_t out_dtype) const {
    if (first < 0 || first % sbt::kTileRows || last < first || last > view_.rows)
      throw std::invalid_argument("rows to expand start on a multiple of 16 and end inside the weight");
    const Dtype to = dtype_of(out_dtype);
    if (to != view_.dtype && view_.dtype != Dtype::int8)
      throw std::invalid_argument("float weights expand to their own dtype");
    const py::gil_scoped_release release;
    alphaprune::expand(isa_, view_, first, last, to, at<void>(out));
  }

  const sbt::View& view() const { return view_; }
  const Isa& isa() const { return isa_; }

 private:
  sbt::View view_;
  const Isa& isa_;
};

// Several weights that share their activations.
class Group {
 public:
  explicit Group(const std::vector<const Weight*>& weights) : isa_(checked(weights)->isa()) {
    for (const Weight* weight : weights) items_.push_back({weight->view(), {}, nullptr, weight->view().rows});
    for (const Weight* weight : weights)
      if (&weight->isa() != &isa_ || weight->view().cols != items_[0].weight.cols)
        throw std::invalid_argument("weights of a group share the columns and the instruction set");
  }

  void multiply(Address x, int32_t dtype, int64_t tokens, int64_t stride, const std::vector<Address>& biases,
                const std::vector<int32_t>& bias_dtypes, const std::vector<Address>& ys) const {
    if (biases.size() != items_.size() || bias_dtypes.size() != items_.size() || ys.size() != items_.size())
      throw std::invalid_argument("a group needs a bias, its dtype and an output for each weight");
    const Activations activations{at<const void>(x), float_of(dtype), tokens, stride};
    std::vector<Item> items = items_;
    for (size_t i = 0; i < items.size(); ++i) {
      items[i].bias = {at<const void>(biases[i]), float_of(bias_dtypes[i])};
      items[i].y = at<void>(ys[i]);
    }
    const py::gil_scoped_release release;
    alphaprune::multiply(isa_, items.data(), static_cast<int64_t>(items.size()), activations);
  }

 private:
  static const Weight* checked(const std::vector<const Weight*>& weights) {
    if (weights.empty()) throw std::invalid_argument("a group has at least one weight");
    for (const Weight* weight : weights)
      if (!weight) throw std::invalid_argument("a group has weights only");
    return weights[0];
  }

  const Isa& isa_;
  std::vector<Item> items_;
};

// Dense weights [rows, cols] in one dtype, which has to be one that the ISA has such a product for.
class Dense {
 public:
  Dense(int64_t rows, int64_t cols, int32_t dtype, const std::string& isa)
      : rows_(rows), cols_(cols), dtype_(float_of(dtype)), isa_(isa_named(isa)) {
    if (rows < 1 || cols < 1) throw std::invalid_argument("a weight has at least one row and one column");
    if (!takes_dense(isa_, dtype_)) throw std::invalid_argument(isa + " has no dense product for it");
  }

  void multiply(Address weight, Address x, int64_t tokens, Address bias, int32_t bias_dtype, Address y) const {
    const Activations activations{at<const void>(x), dtype_, tokens, cols_};
    const Bias added{at<const void>(bias), float_of(bias_dtype)};
    const py::gil_scoped_release release;
    multiply_dense(isa_, at<const void>(weight), rows_, cols_, added, at<void>(y), activations);
  }

 private:
  int64_t rows_, cols_;
  Dtype dtype_;
  const Isa& isa_;
};

void rms_norm(Address h, Address delta, Address weight, Address out, int64_t rows, int64_t cols, int32_t dtype,
              float epsilon, const std::string& isa) {
  const Norm p{at<void>(h), at<const void>(delta), at<const void>(weight), at<void>(out), rows, cols, float_of(dtype),
               epsilon};
  const Isa& named = isa_named(isa);
  const py::gil_scoped_release release;
  alphaprune::norm(named, p);
}

void gate(Address gate, Address up, Address out, int64_t count, int32_t dtype, const std::string& isa) {
  const Swiglu p{at<const void>(gate), at<const void>(up), at<void>(out), count, float_of(dtype)};
  const Isa& named = isa_named(isa);
  const py::gil_scoped_release release;
  swiglu(named, p);
}

// Attention of a step over a cache of one layout, which may move: its address comes with each call.
class Attend {
 public:
  Attend(int64_t heads, int64_t key_heads, int64_t dim, int32_t dtype, int64_t window, int64_t page,
         int64_t page_stride, int64_t position_stride, int64_t head_stride, const std::string& isa)
      : isa_(isa_named(isa)) {
    if (key_heads < 1 || heads < 1 || heads % key_heads || dim < 32 || dim % 32 || dim > kMostDim || page < 1)
      throw std::invalid_argument("attention needs heads that share keys evenly, of a multiple of 32 up to 512");
    p_.heads = heads, p_.key_heads = key_heads, p_.dim = dim, p_.window = window;
    p_.page = page, p_.page_stride = page_stride;
    p_.position_stride = position_stride, p_.head_stride = head_stride;
    p_.dtype = float_of(dtype);
  }

  // Addresses and what is between sequences, as attention.h has them; norm: weights of q and k or 0, and epsilons.
  void run(const std::array<Address, 3>& qkv, const std::array<int64_t, 3>& strides, Address out, Address keys,
           Address values, const std::array<Address, 2>& turns, int64_t turn_stride, Address table,
           int64_t table_stride, Address slots, Address positions, int64_t sequences,
           const std::array<Address, 2>& norm, const std::array<float, 2>& epsilon) const {
    Attention p = p_;
    p.q = at<const void>(qkv[0]), p.k = at<const void>(qkv[1]), p.v = at<const void>(qkv[2]);
    p.q_stride = strides[0], p.k_stride = strides[1], p.v_stride = strides[2];
    p.out = at<void>(out), p.keys = at<void>(keys), p.values = at<void>(values);
    p.cos = at<const void>(turns[0]), p.sin = at<const void>(turns[1]), p.turn_stride = turn_stride;
    p.table = at<const int64_t>(table), p.table_stride = table_stride;
    p.slots = at<const int64_t>(slots), p.positions = at<const int64_t>(positions), p.sequences = sequences;
    p.q_weight = at<const void>(norm[0]), p.k_weight = at<const void>(norm[1]);
    p.q_epsilon = epsilon[0], p.k_epsilon = epsilon[1];
    const py::gil_scoped_release release;
    attend(isa_, p);
  }

 private:
  Attention p_{};
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

py::tuple fault(Address mask, Address offsets, int64_t rows, int64_t cols, int32_t dtype) {
  const Dtype code = dtype_of(dtype);
  Finding found;
  {
    const py::gil_scoped_release release;
    found = check(at<const uint32_t>(mask), at<const uint32_t>(offsets), rows, cols, code);
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
  m.def("rms_norm", rms_norm);
  m.def("swiglu", gate);
  m.def("fault", fault, "(code, tile) of the first fault of mask and offsets");
  m.def("count_bits", [](Address words, int64_t count) {
    const py::gil_scoped_release release;
    return count_bits(at<const uint32_t>(words), count);
  });
  py::class_<Weight>(m, "Weight")
      .def(py::init<Address, Address, Address, Address, int64_t, int64_t, int64_t, int32_t, bool, const std::string&>())
      .def("multiply", &Weight::multiply)
      .def("expand", &Weight::expand);
  py::class_<Group>(m, "Group")
      .def(py::init<const std::vector<const Weight*>&>(), "Weights of one instruction set and one K that share x")
      .def("multiply", &Group::multiply);
  py::class_<Dense>(m, "Dense")
      .def(py::init<int64_t, int64_t, int32_t, const std::string&>())
      .def("multiply", &Dense::multiply);
  py::class_<Attend>(m, "Attention")
      .def(py::init<int64_t, int64_t, int64_t, int32_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    const std::string&>())
      .def("run", &Attend::run);
  bind_bandwidth(m);
}
