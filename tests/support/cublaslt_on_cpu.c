/*
 * A stand-in for libcublasLt that computes on the CPU, in the plainest way, what a call describes. It is compiled
 * against the real header, so its functions have the real library's signatures and values. Algorithms that it hands
 * out are good for the alignments that were asked for only, and the first of them is refused when it is called.
 */
#ifdef CUDA_ON_CPU /* without the header, whose values the compiler is given one by one: cuda_on_cpu.ts */
#include <stddef.h>
#include <stdint.h>
typedef int cublasStatus_t, cublasComputeType_t, cudaDataType_t, cudaDataType, cublasLtMatmulDescAttributes_t;
typedef int cublasLtMatrixLayoutAttribute_t, cublasLtMatmulPreferenceAttributes_t;
typedef void *cublasLtHandle_t, *cublasLtMatmulDesc_t, *cublasLtMatrixLayout_t, *cublasLtMatmulPreference_t;
typedef uint64_t cudaStream_t;
typedef struct { uint64_t data[8]; } cublasLtMatmulAlgo_t;
typedef struct {
  cublasLtMatmulAlgo_t algo;
  size_t workspaceSize;
  cublasStatus_t state;
  float wavesCount;
  int reserved[4];
} cublasLtMatmulHeuristicResult_t;
enum { CUBLAS_STATUS_INVALID_VALUE = 7, CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F = 0 };
int fake_call(uint64_t stream, void (*call)(const void *), const void *data, uint64_t bytes);
#else
#include <cublasLt.h>
#endif
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  int32_t compute, scale, transA, transB;
  uint32_t epilogue;
  int32_t biasType;
  const void *bias;
  int8_t fastAccum;
  int32_t scaleModeA, scaleModeB;
  const float *scaleA, *scaleB;
} Operation;

typedef struct {
  int32_t type;
  uint64_t rows, cols;
  int64_t ld, stride;
  int32_t batch;
} Layout;

typedef struct {
  uint64_t workspace;
  uint32_t reduction, align[4];
} Preference;

enum { REFUSED = 1, TAKEN = 2, WORKSPACE = 4096 };

static int heuristicCalls, objects;

int standInHeuristicCalls(void) { return heuristicCalls; }
int standInObjects(void) { return objects; }

static void *create(size_t size) {
  objects++;
  return calloc(1, size);
}

static cublasStatus_t destroy(void *object) {
  objects--;
  free(object);
  return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t copy(void *field, size_t size, const void *buf, size_t given) {
  if (size != given) return CUBLAS_STATUS_INVALID_VALUE;
  memcpy(field, buf, size);
  return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion(void) { return 130100; }
const char *cublasLtGetStatusName(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_OTHER";
}
const char *cublasLtGetStatusString(cublasStatus_t status) { return status ? "no" : "yes"; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
  *handle = create(1);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute, cudaDataType_t scale) {
  Operation *operation = create(sizeof *operation);
  operation->compute = compute;
  operation->scale = scale;
  operation->epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  operation->biasType = -1;
  *desc = (cublasLtMatmulDesc_t)operation;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return destroy(desc); }

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attr,
                                              const void *buf, size_t size) {
  Operation *o = (Operation *)desc;
  switch (attr) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return copy(&o->transA, sizeof o->transA, buf, size);
    case CUBLASLT_MATMUL_DESC_TRANSB: return copy(&o->transB, sizeof o->transB, buf, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return copy(&o->epilogue, sizeof o->epilogue, buf, size);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return copy(&o->bias, sizeof o->bias, buf, size);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return copy(&o->biasType, sizeof o->biasType, buf, size);
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM: return copy(&o->fastAccum, sizeof o->fastAccum, buf, size);
    case CUBLASLT_MATMUL_DESC_A_SCALE_MODE: return copy(&o->scaleModeA, sizeof o->scaleModeA, buf, size);
    case CUBLASLT_MATMUL_DESC_B_SCALE_MODE: return copy(&o->scaleModeB, sizeof o->scaleModeB, buf, size);
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER: return copy(&o->scaleA, sizeof o->scaleA, buf, size);
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER: return copy(&o->scaleB, sizeof o->scaleB, buf, size);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
  Layout *made = create(sizeof *made);
  *made = (Layout){type, rows, cols, ld, 0, 1};
  *layout = (cublasLtMatrixLayout_t)made;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return destroy(layout); }

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attr,
                                                const void *buf, size_t size) {
  Layout *l = (Layout *)layout;
  switch (attr) {
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return copy(&l->batch, sizeof l->batch, buf, size);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return copy(&l->stride, sizeof l->stride, buf, size);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
  *preference = create(sizeof(Preference));
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) { return destroy(preference); }

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attr, const void *buf,
                                                    size_t size) {
  Preference *p = (Preference *)preference;
  switch (attr) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return copy(&p->workspace, sizeof p->workspace, buf, size);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return copy(&p->reduction, sizeof p->reduction, buf, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return copy(&p->align[0], sizeof p->align[0], buf, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return copy(&p->align[1], sizeof p->align[1], buf, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return copy(&p->align[2], sizeof p->align[2], buf, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return copy(&p->align[3], sizeof p->align[3], buf, size);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}

static int hasBias(const Operation *o) { return (o->epilogue & CUBLASLT_EPILOGUE_BIAS) != 0; }
static int hasGelu(const Operation *o) { return (o->epilogue & CUBLASLT_EPILOGUE_GELU) != 0; }

/* What Hopper's matrix units take of float8: A transposed, B not, sizes and columns of 16 bytes, two scales of a kind. */
static int takesFloat8(const Operation *o, const Layout *a, const Layout *b, const Layout *d) {
  return b->type == CUDA_R_8F_E4M3 && (d->type == CUDA_R_16BF || d->type == CUDA_R_32F) && d->batch == 1 &&
         o->transA == CUBLAS_OP_T && o->transB == CUBLAS_OP_N && o->fastAccum == 1 && o->scaleA != NULL &&
         o->scaleB != NULL && o->scaleModeA == o->scaleModeB &&
         (o->scaleModeA == CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F ||
          o->scaleModeA == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F) &&
         a->rows % 16 == 0 && d->rows % 16 == 0 && a->ld % 16 == 0 && b->ld % 16 == 0;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B,
                                              cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[], int *returned) {
  const Operation *o = (const Operation *)desc;
  const Layout *d = (const Layout *)D;
  const Preference *p = (const Preference *)preference;
  heuristicCalls++;
  *returned = 0;
  if (o->compute != CUBLAS_COMPUTE_32F || o->scale != CUDA_R_32F || requested < 3 || p->workspace < WORKSPACE)
    return CUBLAS_STATUS_INVALID_VALUE;
  if (p->reduction != CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE || C != D) return CUBLAS_STATUS_INVALID_VALUE;
  int float8 = ((const Layout *)A)->type == CUDA_R_8F_E4M3;
  if (float8 && !takesFloat8(o, (const Layout *)A, (const Layout *)B, d)) return CUBLAS_STATUS_INVALID_VALUE;
  if (!float8 && (o->fastAccum || o->scaleA || o->scaleB)) return CUBLAS_STATUS_INVALID_VALUE;
  if (hasBias(o) && (o->bias == NULL || o->biasType != (float8 ? CUDA_R_16BF : d->type)))
    return CUBLAS_STATUS_INVALID_VALUE;
#ifndef CUDA_ON_CPU
  if (d->rows == 13) return CUBLAS_STATUS_SUCCESS; /* a size with no algorithm */
#endif
  for (int i = 0; i < 3; i++) {
    memset(&results[i], 0, sizeof results[i]);
    results[i].state = i == 0 ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
    results[i].workspaceSize = WORKSPACE;
    results[i].algo.data[0] = i == 1 ? REFUSED : TAKEN;
    for (int j = 0; j < 4; j++) results[i].algo.data[1 + j] = p->align[j];
    results[i].algo.data[5] = (uint64_t)o->bias & -(uint64_t)o->bias;
  }
  *returned = 3;
  return CUBLAS_STATUS_SUCCESS;
}

static float load(const void *base, int32_t type, int64_t at) {
  if (type == CUDA_R_32F) return ((const float *)base)[at];
  if (type == CUDA_R_8F_E4M3) {
    int code = ((const uint8_t *)base)[at], exponent = code >> 3 & 15, mantissa = code & 7;
    float magnitude = exponent == 0 ? ldexpf(mantissa, -9) : ldexpf(8 + mantissa, exponent - 10);
    if ((code & 0x7f) == 0x7f) magnitude = NAN;
    return code & 0x80 ? -magnitude : magnitude;
  }
  uint32_t bits = (uint32_t)((const uint16_t *)base)[at] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static void store(void *base, int32_t type, int64_t at, float value) {
  if (type == CUDA_R_32F) {
    ((float *)base)[at] = value;
  } else {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    ((uint16_t *)base)[at] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

static int misaligned(const void *pointer, uint64_t alignment) { return ((uint64_t)pointer & (alignment - 1)) != 0; }

/* A call whose operands fit together. */
typedef struct {
  Operation o;
  Layout a, b, d;
  float alpha;
  const void *A, *B;
  void *D;
  uint64_t k;
} Call;

static void multiply(const void *data) {
  const Call *call = data;
  const Operation *o = &call->o;
  const Layout *a = &call->a, *b = &call->b, *d = &call->d;
  const void *A = call->A, *B = call->B;
  void *D = call->D;
  uint64_t m = d->rows, n = d->cols, k = call->k;
  for (int i = 0; i < d->batch; i++)
    for (uint64_t column = 0; column < n; column++)
      for (uint64_t row = 0; row < m; row++) {
        double sum = 0;
        for (uint64_t l = 0; l < k; l++) {
          int64_t atA = i * a->stride + (o->transA ? l + row * a->ld : row + l * a->ld);
          int64_t atB = i * b->stride + (o->transB ? column + l * b->ld : l + column * b->ld);
          sum += (double)load(A, a->type, atA) * load(B, b->type, atB);
        }
        sum *= call->alpha;
        if (a->type == CUDA_R_8F_E4M3) {
          int vectors = o->scaleModeA == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
          sum *= (double)o->scaleA[vectors ? row : 0] * o->scaleB[vectors ? column : 0];
        }
        if (hasBias(o)) {
          sum += load(o->bias, o->biasType, row);
        }
        if (hasGelu(o)) sum = 0.5 * sum * (1 + tanh(0.7978845608028654 * (sum + 0.044715 * sum * sum * sum)));
        store(D, d->type, i * d->stride + row + column * d->ld, (float)sum);
      }
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha, const void *A,
                              cublasLtMatrixLayout_t Adesc, const void *B, cublasLtMatrixLayout_t Bdesc,
                              const void *beta, const void *C, cublasLtMatrixLayout_t Cdesc, void *D,
                              cublasLtMatrixLayout_t Ddesc, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspaceSize, cudaStream_t stream) {
  const Operation *o = (const Operation *)desc;
  const Layout *a = (const Layout *)Adesc, *b = (const Layout *)Bdesc, *d = (const Layout *)Ddesc;
  if (algo->data[0] == REFUSED) return CUBLAS_STATUS_NOT_SUPPORTED;
#ifndef CUDA_ON_CPU
  if (workspace != (void *)0x7000 || workspaceSize != WORKSPACE || stream != (cudaStream_t)0x5) return CUBLAS_STATUS_INVALID_VALUE;
#endif
  if (C != D || Cdesc != Ddesc || *(const float *)beta != 0) return CUBLAS_STATUS_INVALID_VALUE;
  if (misaligned(A, algo->data[1]) || misaligned(B, algo->data[2]) || misaligned(C, algo->data[3]) ||
      misaligned(D, algo->data[4]))
    return CUBLAS_STATUS_INVALID_VALUE;
  uint64_t m = d->rows, n = d->cols, k = o->transA ? a->rows : a->cols;
  if ((o->transA ? a->cols : a->rows) != m || (o->transB ? b->rows : b->cols) != n ||
      (o->transB ? b->cols : b->rows) != k || a->type != b->type || a->batch != d->batch || b->batch != d->batch ||
      a->ld < (int64_t)a->rows || b->ld < (int64_t)b->rows || d->ld < (int64_t)d->rows)
    return CUBLAS_STATUS_INVALID_VALUE;
  if (hasBias(o) && misaligned(o->bias, algo->data[5] > 256 ? 256 : algo->data[5])) return CUBLAS_STATUS_INVALID_VALUE;
  Call call = {*o, *a, *b, *d, *(const float *)alpha, A, B, D, k};
#ifdef CUDA_ON_CPU
  return fake_call(stream, multiply, &call, sizeof call) ? CUBLAS_STATUS_INVALID_VALUE : CUBLAS_STATUS_SUCCESS;
#else
  multiply(&call);
  return CUBLAS_STATUS_SUCCESS;
#endif
}
