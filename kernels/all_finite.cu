// Whether all numbers are finite: each block leaves 0, or NaN where it has met an infinity or a NaN.
//
//   out [blocks] f32      x   count * N elements of T
//
// Bytes moved: elements * sizeof(T). Floor for a picture of 3 x 1024 x 1024 in f32: 12.6 MB, 4 us at 3.0 TB/s.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) allFinite(float* out, const T* x, long long count) {
  __shared__ float partial[32];
  float sum = 0.0f;
  for (long long at = (long long)blockIdx.x * BLOCK + threadIdx.x; at < count; at += (long long)gridDim.x * BLOCK) {
    Vec<T, N> part = loadVec<N>(x + at * N);
#pragma unroll
    for (int i = 0; i < N; i++) sum += toFloat(part.v[i]) * 0.0f;
  }
  sum = blockSum(sum, partial, BLOCK / WARP);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
