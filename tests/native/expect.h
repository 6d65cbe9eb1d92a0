// What the C++ tests share: a check that goes on after a failure, and memory that ends where nothing may be touched.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

int failures = 0;

#define EXPECT(condition, ...)                    \
  do {                                            \
    if (!(condition)) {                           \
      ++failures;                                 \
      std::printf("%s:%d: ", __FILE__, __LINE__); \
      std::printf(__VA_ARGS__);                   \
      std::printf("\n");                          \
    }                                             \
  } while (0)

// `bytes` of memory whose end is the end of a page; the next page faults. Filled with NaN patterns.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t body = (bytes + page - 1) / page * page;
    mapped_ = body + page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + body, page, PROT_NONE)) std::abort();
    start_ = base_ + body - bytes;
    std::memset(start_, 0xff, bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(start_);
  }

 private:
  char* base_;
  char* start_;
  size_t mapped_;
};

// Whether the program's arguments, after `quick` if that is the first, name this or nothing.
inline bool chosen(int count, char** arguments, bool quick, const char* name) {
  bool found = count == 1 + quick;
  for (int i = 1 + quick; i < count; ++i) found |= !std::strcmp(arguments[i], name);
  return found;
}

}  // namespace
