// Casts to E4M3 with scales, as common.cuh says.
//
//   quantizeRows      values [rows, k] f8, scales [rows] f32      x  rows of T, strided (kernels/rows.ts): a scale a row
//   largestOfParts    parts [blocks] f32                          x  count * N elements of T
//   quantizeTensor    values f8, scale [1] f32                    x  count * N elements of T: one scale for all of them
//
// quantizeRows: THREADS threads share a row and keep it in registers, so that it is read once. For a whole tensor each
// block finds the largest of its part, and each block of the second kernel the largest of those: no atomics, nothing to
// clear before.
// Bytes moved: rows * k * (sizeof(T) + 1), and sizeof(T) more for a whole tensor, which the cache may still have. Floor
// at FLUX's 4352 x 3072 in bf16: 40 MB, 13 us at 3.0 TB/s; at 4352 x 15360: 201 MB, 67 us.
// T: the dtype. N: elements that move at a time. THREADS, BLOCK, VECTORS: see kernels/rows.ts, kernels/elementwise.ts.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
quantizeRows(f8e4m3* values, float* scales, const T* x, unsigned rows, int k, unsigned inner, long long outerStride,
             long long innerStride) {
  __shared__ float partials[32];
  const unsigned row = blockIdx.x * (BLOCK / THREADS) + threadIdx.x / THREADS;
  const int lane = threadIdx.x % THREADS;
  // Threads without a row take part in the search all the same.
  const int length = row < rows ? k : 0;
  x += rowStart(row, inner, outerStride, innerStride);
  values += (long long)row * k;
  Vec<T, N> held[VECTORS];
  loadRow<THREADS>(held, x, lane, length);
  storeRow<THREADS>(values, scales + row, held, lane, length, partials);
}

extern "C" __global__ void __launch_bounds__(BLOCK) largestOfParts(float* parts, const T* x, long long count) {
  __shared__ float partials[32];
  const long long step = (long long)gridDim.x * BLOCK;
  float largest = 0.0f;
  for (long long first = (long long)blockIdx.x * BLOCK + threadIdx.x; first < count; first += VECTORS * step) {
    Vec<T, N> held[VECTORS];
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
      long long at = first + j * step;
      if (at < count) held[j] = loadVec<N>(x + at * N);
    }
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
      if (first + j * step < count) largest = largestOf(largest, held[j]);
    }
  }
  largest = blockMax(largest, partials, BLOCK / WARP);
  if (threadIdx.x == 0) parts[blockIdx.x] = largest;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
quantizeTensor(f8e4m3* values, float* scale, const T* x, long long count, const float* parts, int partCount) {
  __shared__ float partials[32];
  const long long first = (long long)blockIdx.x * BLOCK * VECTORS + threadIdx.x;
  // On their way while the parts are looked at.
  Vec<T, N> held[VECTORS];
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * BLOCK;
    if (at < count) held[j] = loadVec<N>(x + at * N);
  }
  float largest = 0.0f;
  for (int i = threadIdx.x; i < partCount; i += BLOCK) largest = fmaxf(largest, parts[i]);
  const float found = scaleOf(blockMax(largest, partials, BLOCK / WARP), FLOAT8_LARGEST);
  if (blockIdx.x == 0 && threadIdx.x == 0) scale[0] = found;
  const float factor = __frcp_rn(found);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * BLOCK;
    if (at < count) storeQuantized(values + at * N, held[j], factor);
  }
}
