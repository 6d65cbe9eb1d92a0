// alphaprune._cuda: addresses and sizes in, exceptions out. Shapes, dtypes and devices were checked one layer up. The
// same file makes the emulated module of the tests, whose addresses are the host's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"

namespace py = pybind11;

namespace alphaprune::cuda {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(Status status, const char* what) {
  if (status) throw std::runtime_error(std::string(what) + ": " + describe(status));
}

Dtype half_of(int32_t code) {
  if (code != static_cast<int32_t>(Dtype::float16) && code != static_cast<int32_t>(Dtype::bfloat16))
    throw std::invalid_argument("the CUDA kernels take float16 and bfloat16, not the dtype " + std::to_string(code));
  return static_cast<Dtype>(code);
}

// Makes a device current for as long as it lives.
class Current {
 public:
  explicit Current(int device) : device_(device) { check(set_device(device, &before_), "cudaSetDevice"); }
  ~Current() {
    int other;
    if (before_ != device_) set_device(before_, &other);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int device_, before_ = 0;
};

Device described(int device) {
  Device found;
  check(query(device, &found), "cudaDeviceGetAttribute");
  return found;
}

// Addresses of the biases of all members and their dtypes; empty: none has one.
using Biases = std::vector<std::pair<Address, int32_t>>;

// What a product is called with. y: of the members one after the other, each [tokens, rows].
struct Arguments {
  Address x;
  int64_t tokens;
  const Biases& biases;
  Address residual, y, stream;
};

Call call_of(Dtype dtype, const std::vector<int64_t>& rows, const Arguments& given) {
  if (!given.biases.empty() && given.biases.size() != rows.size())
    throw std::invalid_argument("wanted one bias for each weight, or none");
  if (given.residual && rows.size() > 1) throw std::invalid_argument("a residual is of a single weight");
  Call call{at<const void>(given.x),        {},           static_cast<int>(rows.size()),
            at<const void>(given.residual), given.tokens, dtype,
            at<void>(given.stream)};
  auto* y = at<uint16_t>(given.y);
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto [bias, code] = given.biases.empty() ? std::pair<Address, int32_t>{0, 0} : given.biases[i];
    call.out[i] = {y, rows[i], at<const void>(bias), static_cast<Dtype>(code)};
    y += given.tokens * rows[i];
  }
  return call;
}

// What a native weight reads of memory, and what the product after it does, if products look ahead: then each learns it
// from the one that comes after it, and has it fetched the next time.
class InOrder {
 public:
  using Tensors = std::vector<std::pair<Address, int64_t>>;  // addresses and bytes

  InOrder() = default;
  InOrder(const InOrder&) = default;
  InOrder& operator=(const InOrder&) = default;
  ~InOrder() {
    if (before_ == this) before_ = nullptr;
  }

  // The largest of what it reads, a kind each.
  void reads(const Tensors& tensors) {
    if (tensors.size() > kMostKinds)
      throw std::invalid_argument("a weight reads up to " + std::to_string(kMostKinds) + " kinds of bytes ahead");
    reads_ = {};
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].first % 16) throw std::invalid_argument("what is read ahead starts on 16 bytes");
      reads_.kinds[i].from[0] = at<const void>(tensors[i].first);
      reads_.kinds[i].bytes[0] = static_cast<uint32_t>(std::min(tensors[i].second, kMostBytes)) / 16 * 16;
    }
  }
  // Bytes of the next product that each has fetched; 0: none. What was learned before is forgotten: it may be gone.
  static void ahead(int64_t bytes) {
    if (bytes < 0) throw std::invalid_argument("products look ahead by some bytes, or by 0");
    ahead_ = bytes;
    before_ = nullptr;
    ++time_;
  }

 protected:
  void joins(const InOrder& member, size_t number) {
    for (int i = 0; i < kMostKinds; ++i) {
      reads_.kinds[i].from[number] = member.reads_.kinds[i].from[0];
      reads_.kinds[i].bytes[number] = member.reads_.kinds[i].bytes[0];
    }
  }
  // After each product.
  void in_order(int index, const Device& device, Address stream) {
    if (!ahead_) return;
    if (before_ && before_ != this) {
      before_->next_ = reads_;
      before_->learned_ = time_;
    }
    before_ = this;
    if (learned_ != time_) return;
    int64_t bytes = 0;
    for (const Ahead::Kind& kind : next_.kinds) bytes += std::accumulate(kind.bytes, std::end(kind.bytes), int64_t{0});
    next_.part = bytes ? static_cast<uint32_t>(std::min(256 * ahead_ / bytes, int64_t{256})) : 0;
    const Current current(index);
    check(cuda::fetch_ahead(next_, device, at<void>(stream)), "fetch_ahead");
  }

 private:
  static constexpr int64_t kMostBytes = 0xfffffff0;
  inline static int64_t ahead_ = 0, time_ = 0;
  inline static InOrder* before_ = nullptr;
  Ahead reads_{}, next_{};
  int64_t learned_ = 0;  // when
};

// The product of all tokens, `most` at a time: run(call) starts one part.
template <class Run>
void launch(Call call, int device, int64_t most, int64_t cols, Run run) {
  const py::gil_scoped_release release;
  const Current current(device);
  const int64_t tokens = call.tokens;
  for (int64_t first = 0; first < tokens; first += most) {
    Call part = call;
    part.tokens = std::min(most, tokens - first);
    part.x = static_cast<const uint16_t*>(call.x) + first * cols;
    for (int i = 0; i < call.members; ++i)
      part.out[i].y = static_cast<uint16_t*>(call.out[i].y) + first * call.out[i].rows;
    if (call.residual) part.residual = static_cast<const uint16_t*>(call.residual) + first * call.out[0].rows;
    run(part);
  }
}

// Throws unless these weights may be the members of one product. alike(a, b): whether two have the same columns, values
// and device.
template <class Of, class Alike>
void check_members(const std::vector<const Of*>& members, const Alike& alike) {
  if (members.empty() || members.size() > kMostMembers)
    throw std::invalid_argument("from 1 to " + std::to_string(kMostMembers) + " weights share a product");
  if (!std::all_of(members.begin(), members.end(), [&](const Of* one) { return alike(*members[0], *one); }))
    throw std::invalid_argument("weights that share a product have the same columns, dtypes, scales and device");
}

// One that has all of these weights, which have one member each.
template <class Of>
Of join(const std::vector<const Of*>& members) {
  Of all = *members[0];
  for (size_t i = 1; i < members.size(); ++i) {
    all.views_.push_back(members[i]->views_[0]);
    all.rows_.push_back(members[i]->rows_[0]);
    all.joins(*members[i], i);
    all.stage_units_ = std::max(all.stage_units_, members[i]->stage_units_);
  }
  return all;
}

// A validated SBT weight on a device, or several that share x. dtype: of x, and of the values where there is no scale;
// with one they are int8.
class Weight : public InOrder {
 public:
  Weight(Address values, Address mask, Address offsets, Address scale, int64_t rows, int64_t cols, int64_t groups,
         int32_t dtype, uint32_t stage_units, int device)
      : views_{{at<const void>(values), at<const uint32_t>(mask), at<const uint32_t>(offsets), rows, cols,
                scale ? Dtype::int8 : half_of(dtype), at<const float>(scale), groups}},
        rows_{rows},
        dtype_(half_of(dtype)),
        stage_units_(stage_units),
        index_(device),
        device_(described(device)) {
    if (rows < 1 || cols < 1) throw std::invalid_argument("a packed weight has at least one row and one column");
    if (values % 16 || mask % 8 || offsets % 4 || scale % 4)
      throw std::invalid_argument("on a GPU values start on 16 bytes, the mask on 8, offsets and scales on 4");
    if (groups != (scale ? 1 : 0) && !(scale && groups == ceil_div(cols, sbt::kScaleCols)))
      throw std::invalid_argument("int8 values have one scale per row or per 128 columns of it, others none");
  }

  // Of weights with one member each: one that has all of them, and whose product is one launch. It reads what they
  // read.
  static Weight joined(const std::vector<const Weight*>& members) {
    check_members(members, [](const Weight& a, const Weight& b) {
      const sbt::View &one = a.views_[0], &other = b.views_[0];
      return b.views_.size() == 1 && one.cols == other.cols && one.dtype == other.dtype && one.groups == other.groups &&
             a.dtype_ == b.dtype_ && a.index_ == b.index_;
    });
    return join(members);
  }

  void multiply(Address x, int64_t tokens, const Biases& biases, Address residual, Address y, Address stream) {
    const auto product = [&](const Call& part) {
      return views_[0].scale ? sbt_mma_int8(views_.data(), stage_units_, device_, part)
                             : sbt_mma(views_.data(), stage_units_, device_, part, row_tiles_);
    };
    launch(call_of(dtype_, rows_, {x, tokens, biases, residual, y, stream}), index_, kMostTokens, views_[0].cols,
           [&](const Call& part) { check(product(part), "sbt_mma"); });
    in_order(index_, device_, stream);
  }

  // The same, multiplied with so many row tiles of a warp at a time.
  Weight by_row_tiles(int row_tiles) const {
    if (row_tiles < 0 || row_tiles > 2 || views_[0].scale)
      throw std::invalid_argument("float values are multiplied by 1 or 2 row tiles, or 0 for what is chosen");
    Weight other = *this;
    other.row_tiles_ = row_tiles;
    return other;
  }

  void expand(int64_t first, int64_t last, Address out, Address stream) const {
    if (views_.size() > 1) throw std::invalid_argument("a single weight is expanded");
    sbt::View part = views_[0];
    if (first < 0 || first % sbt::kTileRows || last < first || last > part.rows)
      throw std::invalid_argument("rows to expand start on a multiple of 16 and end inside the weight");
    if (part.scale) throw std::invalid_argument("sbt_expand has 16-bit values, not int8");
    part.rows = last;
    const py::gil_scoped_release release;
    const Current current(index_);
    check(sbt_expand(part, stage_units_, first / sbt::kTileRows, ceil_div(last, sbt::kTileRows), at<void>(out),
                     at<void>(stream)),
          "sbt_expand");
  }

 private:
  template <class Of>
  friend Of join(const std::vector<const Of*>& members);
  std::vector<sbt::View> views_;  // of the members
  std::vector<int64_t> rows_;
  int row_tiles_ = 0;
  Dtype dtype_;
  uint32_t stage_units_;
  int index_;
  Device device_;
};

// Pairs of neighbouring columns on a device, of one weight or of several that share x.
class PairWeight : public InOrder {
 public:
  static constexpr int64_t kMostPairMma = 16;  // tokens, past which sm_90 has a faster kernel

  // cols: of x. dtype: of each of a pair, x and y.
  PairWeight(Address values, Address mask, Address offsets, int64_t rows, int64_t cols, int32_t dtype,
             uint32_t stage_units, int device)
      : views_{{at<const void>(values), at<const uint32_t>(mask), at<const uint32_t>(offsets), rows, ceil_div(cols, 2),
                half_of(dtype)}},
        rows_{rows},
        cols_(cols),
        stage_units_(stage_units),
        index_(device),
        device_(described(device)) {
    if (rows < 1 || cols < 1) throw std::invalid_argument("a packed weight has at least one row and one column");
    if (values % 16 || mask % 16 || offsets % 4)
      throw std::invalid_argument("values and mask of pairs start on 16 bytes, offsets on 4");
  }

  // As of Weight.
  static PairWeight joined(const std::vector<const PairWeight*>& members) {
    check_members(members, [](const PairWeight& a, const PairWeight& b) {
      return b.views_.size() == 1 && a.cols_ == b.cols_ && a.views_[0].dtype == b.views_[0].dtype &&
             a.index_ == b.index_;
    });
    return join(members);
  }

  void multiply(Address x, int64_t tokens, const Biases& biases, Address residual, Address y, Address stream) {
    const bool aligned = x % 16 == 0 && cols_ % 8 == 0;
    const auto product = [&](const Call& part) {
      return device_.capability == 90 && aligned && part.tokens > kMostPairMma
                 ? pair_wgmma(views_.data(), stage_units_, device_, part, cols_)
                 : pair_mma(views_.data(), cols_, stage_units_, device_, part);
    };
    launch(call_of(views_[0].dtype, rows_, {x, tokens, biases, residual, y, stream}), index_, kMostTokens, cols_,
           [&](const Call& part) { check(product(part), "pair_mma"); });
    in_order(index_, device_, stream);
  }

 private:
  template <class Of>
  friend Of join(const std::vector<const Of*>& members);
  std::vector<sbt::View> views_;  // of the members: a column for each pair
  std::vector<int64_t> rows_;
  int64_t cols_;
  uint32_t stage_units_;
  int index_;
  Device device_;
};

// A validated SBT weight on a device of compute capability 9.0, or several that share x.
class WideWeight : public InOrder {
 public:
  WideWeight(Address values, Address mask, Address offsets, int64_t rows, int64_t cols, int32_t dtype,
             uint32_t stage_units, int device)
      : views_{{at<const void>(values), at<const uint32_t>(mask), at<const uint32_t>(offsets), rows, cols,
                half_of(dtype)}},
        rows_{rows},
        stage_units_(stage_units),
        index_(device),
        device_(described(device)) {
    if (rows < 1 || cols < 1) throw std::invalid_argument("a packed weight has at least one row and one column");
    if (values % 16 || mask % 16 || offsets % 4)
      throw std::invalid_argument("sbt_wgmma's values and mask start on 16 bytes, offsets on 4");
    if (device_.capability != 90)
      throw std::invalid_argument("sbt_wgmma runs on compute capability 9.0, the device has " +
                                  std::to_string(device_.capability / 10) + "." +
                                  std::to_string(device_.capability % 10));
  }

  // As of Weight.
  static WideWeight joined(const std::vector<const WideWeight*>& members) {
    check_members(members, [](const WideWeight& a, const WideWeight& b) {
      const sbt::View &one = a.views_[0], &other = b.views_[0];
      return b.views_.size() == 1 && one.cols == other.cols && one.dtype == other.dtype && a.index_ == b.index_;
    });
    return join(members);
  }

  // Rows of x are padded to a multiple of 8 elements, and start on 16 bytes.
  void multiply(Address x, int64_t tokens, const Biases& biases, Address residual, Address y, Address stream) {
    const sbt::View& first = views_[0];
    const int64_t stride = ceil_div(first.cols, 8) * 8;
    if (x % 16) throw std::invalid_argument("sbt_wgmma's x starts on 16 bytes");
    launch(call_of(first.dtype, rows_, {x, tokens, biases, residual, y, stream}), index_, kMostWideTokens, stride,
           [&](const Call& part) {
             check(sbt_wgmma(views_.data(), stage_units_, ways_, device_, part, stride), "sbt_wgmma");
           });
    in_order(index_, device_, stream);
  }

  // The same, shared out so (WideWays); zeros for what is chosen.
  WideWeight by_ways(int groups, int slices, int splits) const {
    WideWeight other = *this;
    other.ways_ = {groups, slices, splits};
    return other;
  }

 private:
  template <class Of>
  friend Of join(const std::vector<const Of*>& members);
  std::vector<sbt::View> views_;  // of the members
  std::vector<int64_t> rows_;
  WideWays ways_{};
  uint32_t stage_units_;
  int index_;
  Device device_;
};

// Nibble-delta rows on a device, for few tokens, of one weight or of several that share x.
class DeltaWeight : public InOrder {
 public:
  // members: rows of each weight. sizes: K, shares, rows of a share, lines of a part, words of a thread's begins,
  // columns of a block. pairs: of two members, silu of the first product times the second.
  DeltaWeight(const std::array<Address, 8>& tensors, std::vector<int64_t> members, const std::array<int64_t, 6>& sizes,
              bool pairs, int32_t dtype, int device)
      : view_{at<const void>(tensors[0]),
              at<const uint32_t>(tensors[1]),
              at<const uint32_t>(tensors[2]),
              at<const uint32_t>(tensors[3]),
              at<const uint32_t>(tensors[4]),
              at<const uint32_t>(tensors[5]),
              at<const uint32_t>(tensors[6]),
              at<const uint32_t>(tensors[7]),
              std::accumulate(members.begin(), members.end(), int64_t{0}),
              sizes[0],
              sizes[1],
              sizes[2],
              sizes[3],
              sizes[4],
              sizes[5],
              pairs},
        members_(std::move(members)),
        dtype_(half_of(dtype)),
        index_(device),
        device_(described(device)),
        most_(delta_most_tokens(view_, device_)) {
    const int64_t block_cols = view_.block_cols;
    if (block_cols < 8 || block_cols % 8 || block_cols > kMostBlockCols)
      throw std::invalid_argument("a block of columns has a multiple of 8, at most " + std::to_string(kMostBlockCols));
    if (view_.share_rows > delta_threads()) throw std::invalid_argument("a share of rows has at most one per thread");
    if (members_.empty() || members_.size() > kMostMembers)
      throw std::invalid_argument("from 1 to " + std::to_string(kMostMembers) + " weights share a product");
    if (pairs && (members_.size() != 2 || members_[0] != members_[1] || view_.share_rows % 2))
      throw std::invalid_argument("pairs are of two weights with as many rows");
  }

  // norm: the weight of an RMSNorm before the product, or 0.
  void multiply(Address x, int64_t tokens, const Biases& biases, Address residual, Address y, Address stream,
                Address norm, float epsilon) {
    if (norm && !(delta_takes_norm(view_) && epsilon > 0))
      throw std::invalid_argument("a norm has an epsilon above 0, and its columns are in one block");
    const Call call = call_of(dtype_, members_, {x, tokens, biases, residual, y, stream});
    launch(call, index_, most_, view_.cols, [&](const Call& part) {
      check(delta_spmv(view_, device_, part, {at<const void>(norm), epsilon}), "delta_spmv");
    });
    in_order(index_, device_, stream);
  }

 private:
  DeltaView view_;
  std::vector<int64_t> members_;
  Dtype dtype_;
  int index_;
  Device device_;
  int64_t most_;
};

// 2:4 panels on a device, of one weight or of several that share x.
class NmWeight : public InOrder {
 public:
  NmWeight(Address panels, int64_t rows, int64_t cols, int32_t dtype, int device)
      : view_{{at<const void>(panels)}, cols},
        rows_{rows},
        dtype_(half_of(dtype)),
        index_(device),
        device_(described(device)) {
    if (panels % 16) throw std::invalid_argument("panels start on 16 bytes");
  }

  // As of Weight.
  static NmWeight joined(const std::vector<const NmWeight*>& members) {
    check_members(members, [](const NmWeight& a, const NmWeight& b) {
      return b.rows_.size() == 1 && a.view_.cols == b.view_.cols && a.dtype_ == b.dtype_ && a.index_ == b.index_;
    });
    NmWeight all = *members[0];
    for (size_t i = 1; i < members.size(); ++i) {
      all.view_.panels[i] = members[i]->view_.panels[0];
      all.joins(*members[i], i);
      all.rows_.push_back(members[i]->rows_[0]);
    }
    return all;
  }

  void multiply(Address x, int64_t tokens, const Biases& biases, Address residual, Address y, Address stream) {
    const bool aligned = x % 16 == 0 && view_.cols % 8 == 0;
    const bool wide = device_.capability == 90 && aligned && tokens > kMostNmTokens;
    const auto product = [&](const Call& part) {
      return wide ? nm_wgmma(view_, ways_, device_, part) : nm_mma_sp(view_, device_, part);
    };
    launch(call_of(dtype_, rows_, {x, tokens, biases, residual, y, stream}), index_,
           wide ? kMostNmWideTokens : kMostNmTokens, view_.cols,
           [&](const Call& part) { check(product(part), "nm_mma_sp"); });
    in_order(index_, device_, stream);
  }

  // The same, many tokens shared out as NmWays says.
  NmWeight by_ways(int tokens, int groups) const {
    NmWeight other = *this;
    other.ways_ = {tokens, groups};
    return other;
  }

 private:
  NmView view_;
  std::vector<int64_t> rows_;  // of the members
  NmWays ways_{};
  Dtype dtype_;
  int index_;
  Device device_;
};

}  // namespace
}  // namespace alphaprune::cuda

PYBIND11_MODULE(ALPHAPRUNE_MODULE, m) {
  using namespace alphaprune::cuda;
  m.attr("COMPILER") = ALPHAPRUNE_COMPILER;
  m.attr("ARCHITECTURES") = ALPHAPRUNE_ARCHITECTURES;
  m.attr("CHUNK_TILES") = chunk_tiles();
  m.def(
      "devices",
      [] {
        int count = 0;
        const Status status = device_count(&count);
        return py::make_tuple(count, status ? describe(status) : "");
      },
      "(number of devices, reason why there is none or '')");
  m.def(
      "device",
      [](int index) {
        const Device found = described(index);
        return py::make_tuple(found.capability, found.multiprocessors, found.shared_bytes);
      },
      "(capability as major * 10 + minor, multiprocessors, bytes of shared memory of a block)");
  m.def("ahead", &InOrder::ahead, "how many bytes of the next product's weight each has fetched meanwhile; 0: none");
  m.def("prepare", [](int device) { check(prepare(device), "cudaFuncSetAttribute"); });
#ifdef ALPHAPRUNE_EMULATE_CUDA
  m.def("emulate_in_order", &emulate_in_order, "0 forwards, 1 backwards, 2 warps apart");
  m.def(
      "emulate_device",
      [](int capability, int multiprocessors, int shared_bytes) {
        emulate_device({capability, multiprocessors, shared_bytes});
      },
      "what `device` tells, until it is called again");
  m.def(
      "fetched_ahead",
      [] {
        std::vector<std::pair<Address, uint32_t>> all;
        for (const auto& one : emulate_fetched()) all.emplace_back(reinterpret_cast<Address>(one.first), one.second);
        return all;
      },
      "(address, bytes) of all that was fetched ahead since it was last called");
#endif
  py::class_<InOrder>(m, "InOrder").def("reads", &InOrder::reads);
  py::class_<Weight, InOrder>(m, "Weight")
      .def(py::init<Address, Address, Address, Address, int64_t, int64_t, int64_t, int32_t, uint32_t, int>())
      .def_static("joined", &Weight::joined)
      .def("multiply", &Weight::multiply)
      .def("by_row_tiles", &Weight::by_row_tiles)
      .def("expand", &Weight::expand);
  py::class_<PairWeight, InOrder>(m, "PairWeight")
      .def(py::init<Address, Address, Address, int64_t, int64_t, int32_t, uint32_t, int>())
      .def_static("joined", &PairWeight::joined)
      .def("multiply", &PairWeight::multiply);
  py::class_<WideWeight, InOrder>(m, "WideWeight")
      .def(py::init<Address, Address, Address, int64_t, int64_t, int32_t, uint32_t, int>())
      .def_static("joined", &WideWeight::joined)
      .def("multiply", &WideWeight::multiply)
      .def("by_ways", &WideWeight::by_ways);
  py::class_<DeltaWeight, InOrder>(m, "DeltaWeight")
      .def(py::init<const std::array<Address, 8>&, std::vector<int64_t>, const std::array<int64_t, 6>&, bool, int32_t,
                    int>())
      .def("multiply", &DeltaWeight::multiply, py::arg("x"), py::arg("tokens"), py::arg("biases"), py::arg("residual"),
           py::arg("y"), py::arg("stream"), py::arg("norm") = 0, py::arg("epsilon") = 0.0f);
  py::class_<NmWeight, InOrder>(m, "NmWeight")
      .def(py::init<Address, int64_t, int64_t, int32_t, int>())
      .def_static("joined", &NmWeight::joined)
      .def("by_ways", &NmWeight::by_ways)
      .def("multiply", &NmWeight::multiply);
}
