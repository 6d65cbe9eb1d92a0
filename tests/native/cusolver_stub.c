// Stands in for libcusolver where there is no GPU: it checks every argument of the calls that alphaprune/cusolver.py
// makes, solves on host memory by Jacobi rotations, and spoils all that the real one may spoil.
// -DOLD: a library from before the batched solver.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, ALLOC_FAILED = 2, INVALID_VALUE = 3, EXECUTION_FAILED = 6, INVALID_WORKSPACE = 31 };
enum { NO_VECTORS = 0, LOWER = 0, UPPER = 1 };

static int handle, params, handles;
static void* stream;

// What a test reads and sets.
int64_t stub_calls, stub_matrices, stub_largest_batch, stub_per_matrix = 64, stub_limit = 32768;
int64_t stub_unsolved = -1;  // this matrix of the next call does not converge
int stub_status;             // what the solvers return without doing anything
void* stub_stream;
int64_t stub_wrong;  // 1-based position of the last refused argument

int cusolverGetVersion(int* version) {
#ifdef OLD
  *version = 11604;
#else
  *version = 11702;
#endif
  return SUCCESS;
}

int cusolverDnCreate(void** out) {
  if (stub_status) return stub_status;
  handles += 1;
  *out = &handle;
  return SUCCESS;
}

int cusolverDnSetStream(void* h, void* s) {
  if (h != &handle) return INVALID_VALUE;
  stream = s;
  return SUCCESS;
}

int cusolverDnCreateParams(void** out) {
  *out = &params;
  return SUCCESS;
}

static int wrong(int64_t position, int condition) {
  if (condition) stub_wrong = position;
  return condition;
}

// The arguments that all four functions begin with; the order is that of cusolverDn.h.
static int refused(void* h, void* p, int jobz, int uplo, int64_t n, int type_a, const void* a, int64_t lda, int type_w,
                   const void* w, int compute, int64_t batch) {
  return wrong(1, h != &handle) || wrong(2, p != &params) || wrong(3, jobz != NO_VECTORS) ||
         wrong(4, uplo != LOWER && uplo != UPPER) || wrong(5, n < 1) || wrong(6, type_a != 0 && type_a != 1) ||
         wrong(7, !a || (uintptr_t)a % 16) || wrong(8, lda < n) || wrong(9, type_w != type_a) ||
         wrong(10, !w || w == a || (uintptr_t)w % 4) || wrong(11, compute != type_a) ||
         wrong(17, batch < 1 || batch > stub_limit || n * lda * batch > INT32_MAX);
}

static size_t device_bytes(int64_t n, int64_t batch) { return (size_t)(stub_per_matrix * batch + 8 * n); }
static size_t host_bytes(int64_t n, int64_t batch) { return (size_t)(16 * n + batch); }

static double get(const void* a, int type, int64_t i) { return type ? ((const double*)a)[i] : ((const float*)a)[i]; }
static void put(void* a, int type, int64_t i, double value) {
  if (type) {
    ((double*)a)[i] = value;
  } else {
    ((float*)a)[i] = (float)value;
  }
}

static int ascending(const void* left, const void* right) {
  double a = *(const double*)left, b = *(const double*)right;
  return (a > b) - (a < b);
}

// Cyclic Jacobi (Golub and Van Loan, Matrix Computations, 8.5) on s [n, n]; its diagonal becomes the eigenvalues.
static void diagonalize(double* s, int64_t n) {
  for (int sweep = 0; sweep < 40; sweep++) {
    for (int64_t p = 0; p < n; p++) {
      for (int64_t q = p + 1; q < n; q++) {
        if (s[p * n + q] == 0) continue;
        double theta = (s[q * n + q] - s[p * n + p]) / (2 * s[p * n + q]);
        double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
        double c = 1 / sqrt(t * t + 1), d = t * c;
        for (int64_t k = 0; k < n; k++) {
          double x = s[k * n + p], y = s[k * n + q];
          s[k * n + p] = c * x - d * y;
          s[k * n + q] = d * x + c * y;
        }
        for (int64_t k = 0; k < n; k++) {
          double x = s[p * n + k], y = s[q * n + k];
          s[p * n + k] = c * x - d * y;
          s[q * n + k] = d * x + c * y;
        }
      }
    }
  }
}

// One matrix, by columns at a; only the triangle that uplo names is read, and the whole is spoiled.
static int solve(int uplo, int64_t n, int type, void* a, int64_t lda, void* w) {
  double* s = malloc(sizeof(double) * (size_t)(n * n + n));
  if (!s) return ALLOC_FAILED;
  double* found = s + n * n;
  for (int64_t column = 0; column < n; column++) {
    for (int64_t row = 0; row < n; row++) {
      int stored = uplo == UPPER ? row <= column : row >= column;
      s[row * n + column] = get(a, type, stored ? row + column * lda : column + row * lda);
    }
  }
  diagonalize(s, n);
  for (int64_t i = 0; i < n; i++) found[i] = s[i * n + i];
  qsort(found, (size_t)n, sizeof(double), ascending);
  for (int64_t i = 0; i < n; i++) put(w, type, i, found[i]);
  for (int64_t i = 0; i < n * lda; i++) put(a, type, i, NAN);
  free(s);
  return SUCCESS;
}

static int run(int uplo, int64_t n, int type, char* a, int64_t lda, char* w, void* device, size_t on_device, void* host,
               size_t on_host, int* info, int64_t batch) {
  size_t size = type ? 8 : 4;
  if (stub_status) return stub_status;
  if (wrong(7, isnan(get(a, type, 0)))) return INVALID_VALUE;  // what was there is no matrix, but W
  if (wrong(12, !device || (uintptr_t)device % 16) || wrong(14, !host) || wrong(16, !info || (uintptr_t)info % 4))
    return INVALID_VALUE;
  if (wrong(13, on_device < device_bytes(n, batch)) || wrong(15, on_host < host_bytes(n, batch)))
    return INVALID_WORKSPACE;
  memset(device, 0xCD, on_device);
  memset(host, 0xCD, on_host);
  stub_calls += 1;
  stub_matrices += batch;
  stub_stream = stream;
  if (batch > stub_largest_batch) stub_largest_batch = batch;
  for (int64_t i = 0; i < batch; i++) {
    char* one = a + (size_t)(i * n * lda) * size;
    info[i] = 0;
    if (i == stub_unsolved) {
      info[i] = 3;
      continue;
    }
    int status = solve(uplo, n, type, one, lda, w + (size_t)(i * n) * size);
    if (status) return status;
  }
  stub_unsolved = -1;
  return SUCCESS;
}

int cusolverDnXsyevd_bufferSize(void* h, void* p, int jobz, int uplo, int64_t n, int type_a, const void* a, int64_t lda,
                                int type_w, const void* w, int compute, size_t* device, size_t* host) {
  if (refused(h, p, jobz, uplo, n, type_a, a, lda, type_w, w, compute, 1) || !device || !host) return INVALID_VALUE;
  *device = device_bytes(n, 1);
  *host = host_bytes(n, 1);
  return SUCCESS;
}

int cusolverDnXsyevd(void* h, void* p, int jobz, int uplo, int64_t n, int type_a, void* a, int64_t lda, int type_w,
                     void* w, int compute, void* device, size_t on_device, void* host, size_t on_host, int* info) {
  if (refused(h, p, jobz, uplo, n, type_a, a, lda, type_w, w, compute, 1)) return INVALID_VALUE;
  return run(uplo, n, type_a, a, lda, w, device, on_device, host, on_host, info, 1);
}

#ifndef OLD
int cusolverDnXsyevBatched_bufferSize(void* h, void* p, int jobz, int uplo, int64_t n, int type_a, const void* a,
                                      int64_t lda, int type_w, const void* w, int compute, size_t* device, size_t* host,
                                      int64_t batch) {
  if (refused(h, p, jobz, uplo, n, type_a, a, lda, type_w, w, compute, batch) || !device || !host) return INVALID_VALUE;
  *device = device_bytes(n, batch);
  *host = host_bytes(n, batch);
  return SUCCESS;
}

int cusolverDnXsyevBatched(void* h, void* p, int jobz, int uplo, int64_t n, int type_a, void* a, int64_t lda,
                           int type_w, void* w, int compute, void* device, size_t on_device, void* host, size_t on_host,
                           int* info, int64_t batch) {
  if (refused(h, p, jobz, uplo, n, type_a, a, lda, type_w, w, compute, batch)) return INVALID_VALUE;
  return run(uplo, n, type_a, a, lda, w, device, on_device, host, on_host, info, batch);
}
#endif
