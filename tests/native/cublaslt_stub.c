// Stands in for libcublasLt where there is no GPU: it checks every argument of the calls that bench/engines/cublaslt.py
// makes, and multiplies on host memory.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { HANDLE = 0x11, PRODUCT = 0x22, LAYOUT = 0x33, PREFERENCE = 0x44 };
enum { R_32F = 0, R_16BF = 14, COMPUTE_32F = 68, TRANSA = 3, MAX_WORKSPACE_BYTES = 1 };
enum { PROPOSALS = 4, REFUSED = 2 };  // the heuristic knows so many; this one it does not find usable

typedef struct {
  int what, kind, transposed;
  uint64_t rows, cols, workspace;
  int64_t ld;
} Thing;

typedef struct {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
} Proposal;

// What a test reads and sets.
int64_t stub_calls[PROPOSALS];
void* stub_stream;
int64_t stub_wrong;  // 1-based position of the last refused argument
int stub_status;     // what a product returns without doing anything

static int wrong(int64_t position, int condition) {
  if (condition) stub_wrong = position;
  return condition;
}

static int make(void** out, Thing thing) {
  if (!out) return INVALID_VALUE;
  Thing* made = malloc(sizeof(Thing));
  *made = thing;
  *out = made;
  return SUCCESS;
}

static int is(const void* pointer, int what) { return pointer && ((const Thing*)pointer)->what == what; }

int cublasLtCreate(void** out) { return make(out, (Thing){.what = HANDLE}); }

int cublasLtMatmulDescCreate(void** out, int compute, int scale) {
  if (wrong(2, compute != COMPUTE_32F) || wrong(3, scale != R_32F)) return INVALID_VALUE;
  return make(out, (Thing){.what = PRODUCT});
}

int cublasLtMatmulDescSetAttribute(void* product, int attribute, const void* value, size_t size) {
  if (wrong(1, !is(product, PRODUCT)) || wrong(2, attribute != TRANSA) || wrong(4, size != 4)) return INVALID_VALUE;
  memcpy(&((Thing*)product)->transposed, value, 4);
  return SUCCESS;
}

int cublasLtMatrixLayoutCreate(void** out, int kind, uint64_t rows, uint64_t cols, int64_t ld) {
  if (wrong(2, kind != R_16BF) || wrong(3, rows == 0) || wrong(4, cols == 0) || wrong(5, ld < (int64_t)rows))
    return INVALID_VALUE;
  return make(out, (Thing){.what = LAYOUT, .kind = kind, .rows = rows, .cols = cols, .ld = ld});
}

int cublasLtMatmulPreferenceCreate(void** out) { return make(out, (Thing){.what = PREFERENCE}); }

int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t size) {
  if (wrong(1, !is(preference, PREFERENCE)) || wrong(2, attribute != MAX_WORKSPACE_BYTES) || wrong(4, size != 8))
    return INVALID_VALUE;
  memcpy(&((Thing*)preference)->workspace, value, 8);
  return SUCCESS;
}

// op(A) [rows of D, inner], B [inner, columns of D], as the arguments of both functions have them.
static int misfits(const Thing* product, const Thing* a, const Thing* b, const Thing* c, const Thing* d) {
  uint64_t rows = product->transposed ? a->cols : a->rows, inner = product->transposed ? a->rows : a->cols;
  return inner != b->rows || rows != d->rows || b->cols != d->cols || c->rows != d->rows || c->cols != d->cols;
}

int cublasLtMatmulAlgoGetHeuristic(void* handle, void* product, void* a, void* b, void* c, void* d, void* preference,
                                   int requested, Proposal* found, int* count) {
  if (wrong(1, !is(handle, HANDLE)) || wrong(2, !is(product, PRODUCT)) || wrong(3, !is(a, LAYOUT)) ||
      wrong(4, !is(b, LAYOUT)) || wrong(5, !is(c, LAYOUT)) || wrong(6, !is(d, LAYOUT)) ||
      wrong(7, !is(preference, PREFERENCE)) || wrong(8, requested < 1) || wrong(9, !found) || wrong(10, !count) ||
      wrong(3, misfits(product, a, b, c, d)))
    return INVALID_VALUE;
  int most = requested < PROPOSALS ? requested : PROPOSALS;
  for (int i = 0; i < most; i++) {
    memset(&found[i], 0xCD, sizeof(Proposal));
    for (int j = 0; j < 8; j++) found[i].algorithm[j] = 0xA100 + (uint64_t)(8 * i + j);
    found[i].workspace = i == PROPOSALS - 1 ? ((Thing*)preference)->workspace : 0;
    found[i].state = i == REFUSED ? NOT_SUPPORTED : SUCCESS;
    found[i].waves = 0.5f;
  }
  *count = most;
  return SUCCESS;
}

static float get(const uint16_t* at, int64_t i) {
  uint32_t bits = (uint32_t)at[i] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static uint16_t rounded(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

int cublasLtMatmul(void* handle, void* product, const float* alpha, const uint16_t* a, void* of_a, const uint16_t* b,
                   void* of_b, const float* beta, const uint16_t* c, void* of_c, uint16_t* d, void* of_d,
                   const uint64_t* algorithm, void* workspace, size_t bytes, void* stream) {
  const Thing *pa = of_a, *pb = of_b, *pd = of_d;
  if (stub_status) return stub_status;
  if (wrong(1, !is(handle, HANDLE)) || wrong(2, !is(product, PRODUCT)) || wrong(3, !alpha || *alpha != 1) ||
      wrong(4, !a) || wrong(5, !is(of_a, LAYOUT)) || wrong(6, !b || b == a) || wrong(7, !is(of_b, LAYOUT)) ||
      wrong(8, !beta || *beta != 0) || wrong(9, c != d) || wrong(10, !is(of_c, LAYOUT)) ||
      wrong(11, !d || d == a || d == b) || wrong(12, !is(of_d, LAYOUT)) ||
      wrong(5, misfits(product, pa, pb, of_c, pd)) || wrong(13, !algorithm))
    return INVALID_VALUE;
  int64_t number = (int64_t)(algorithm[0] - 0xA100) / 8;
  if (wrong(13, number < 0 || number >= PROPOSALS || number == REFUSED || algorithm[7] != algorithm[0] + 7) ||
      wrong(14, !workspace || (uintptr_t)workspace % 16) || wrong(15, bytes < (size_t)32 << 20))
    return INVALID_VALUE;
  memset(workspace, 0xCD, bytes);
  int transposed = ((const Thing*)product)->transposed;
  for (int64_t column = 0; column < (int64_t)pd->cols; column++) {
    for (int64_t row = 0; row < (int64_t)pd->rows; row++) {
      float sum = 0;
      for (int64_t k = 0; k < (int64_t)pb->rows; k++)
        sum += get(a, transposed ? k + row * pa->ld : row + k * pa->ld) * get(b, k + column * pb->ld);
      d[row + column * pd->ld] = rounded(sum);
    }
  }
  stub_calls[number] += 1;
  stub_stream = stream;
  return SUCCESS;
}
