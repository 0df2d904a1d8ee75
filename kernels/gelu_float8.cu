// Casts `before` and, behind it, GELU of x (in its tanh form) to E4M3 with a scale for each row, as common.cuh says.
//
//   values   [rows, beforeCount + count] E4M3, dense      scales   [rows] f32
//   before   rows of beforeCount elements of T (0: it is not read); x   rows of count elements of T; both strided
//            (kernels/rows.ts)
//
// THREADS threads share a row and keep it in registers, in float, so that it is read once.
// Bytes moved: rows * (beforeCount + count) * (sizeof(T) + 1). Floor at FLUX's 4352 x (3072 + 12288) in bf16: 201 MB, 67 us
// at 3.0 TB/s; at 4096 x 12288: 151 MB, 50 us.
// T: the dtype. N: elements that move at a time, a divisor of both counts. THREADS, BLOCK, VECTORS: see kernels/rows.ts.
#include "common.cuh"

// x * sigmoid(2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3), as x / (1 + 2^w). By approximations, to a few units in the
// last place of float: with exact functions arithmetic would take longer than the bytes.
__device__ __forceinline__ float gelu(float x) {
  const float w = x * fmaf(-0.10294324f, x * x, -2.3022082f);
#ifdef __CUDA_ARCH__
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(w));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return x * inverse;
#else
  return x * (1.0f / (1.0f + exp2f(w)));
#endif
}

extern "C" __global__ void __launch_bounds__(BLOCK)
geluFloat8(f8e4m3* values, float* scales, const T* before, const T* x, unsigned rows, int beforeCount, int count,
           unsigned beforeInner, long long beforeOuterStride, long long beforeInnerStride, unsigned inner,
           long long outerStride, long long innerStride) {
  __shared__ float partials[32];
  const unsigned row = blockIdx.x * (BLOCK / THREADS) + threadIdx.x / THREADS;
  const int lane = threadIdx.x % THREADS;
  // Threads without a row take part in the search all the same.
  const int length = row < rows ? beforeCount + count : 0;
  before += rowStart(row, beforeInner, beforeOuterStride, beforeInnerStride);
  x += rowStart(row, inner, outerStride, innerStride);
  Vec<T, N> loaded[VECTORS];
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int at = (j * THREADS + lane) * N;
    if (at < length) loaded[j] = loadVec<N>(at < beforeCount ? before + at : x + (at - beforeCount));
  }
  Vec<float, N> held[VECTORS];
  widenRow(held, loaded);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    if ((j * THREADS + lane) * N < beforeCount) continue;
#pragma unroll
    for (int i = 0; i < N; i++) held[j].v[i] = gelu(held[j].v[i]);
  }
  storeRow<THREADS>(values + (long long)row * (beforeCount + count), scales + row, held, lane, length, partials);
}
