// Memory for what a call needs beside its arguments.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "../layout.h"

namespace alphaprune {
namespace {

// Memory that a thread keeps between calls, so that the hot path never allocates.
class Buffer {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      data_.reset(std::aligned_alloc(64, static_cast<size_t>(ceil_div(static_cast<int64_t>(bytes), 64)) * 64));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

}  // namespace
}  // namespace alphaprune
