// The read loops of cpu/bandwidth.h for alphaprune._native.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/bandwidth.h"

namespace py = pybind11;

namespace alphaprune {
namespace {

py::list names() {
  py::list all;
  for (const ReadLoop* const* loop = read_loops(); *loop; ++loop) all.append((*loop)->name);
  return all;
}

uint64_t read(const std::string& name, uintptr_t begin, int64_t bytes, int streams) {
  if (begin % kLine || bytes < 0 || bytes % kLine) throw std::invalid_argument("whole lines of 64 bytes are read");
  if (streams < 1 || streams > kMostStreams) throw std::invalid_argument("a thread reads 1 to 4 streams");
  for (const ReadLoop* const* loop = read_loops(); *loop; ++loop) {
    if (name != (*loop)->name) continue;
    const py::gil_scoped_release release;
    return read_all(**loop, reinterpret_cast<const void*>(begin), bytes, streams);
  }
  throw std::invalid_argument("no read loop is called " + name);
}

}  // namespace

void bind_bandwidth(py::module_& m) {
  m.def("read_loops", names, "names of the loops that run here, widest loads first");
  m.def("read_loop", read, "(name, address, bytes, streams) -> the sum of all 64-bit words, modulo 2^64");
}

}  // namespace alphaprune
