// How much numbers differ from what they were before: each block leaves its sums of |x - before| and of |before|.
//
//   out [blocks, 2] f32      x, before   count * N elements of T
//
// Bytes moved: 2 * elements * sizeof(T). Floor for FLUX's 4096 x 3072 in bf16: 50 MB, 17 us at 3.0 TB/s.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
relativeChange(float* out, const T* x, const T* before, long long count) {
  __shared__ float partials[2][32];
  float difference = 0.0f, size = 0.0f;
  for (long long at = (long long)blockIdx.x * BLOCK + threadIdx.x; at < count; at += (long long)gridDim.x * BLOCK) {
    Vec<T, N> now = loadVec<N>(x + at * N), then = loadVec<N>(before + at * N);
#pragma unroll
    for (int i = 0; i < N; i++) {
      difference += fabsf(toFloat(now.v[i]) - toFloat(then.v[i]));
      size += fabsf(toFloat(then.v[i]));
    }
  }
  difference = blockSum(difference, partials[0], BLOCK / WARP);
  size = blockSum(size, partials[1], BLOCK / WARP);
  if (threadIdx.x == 0) {
    out[2 * blockIdx.x] = difference;
    out[2 * blockIdx.x + 1] = size;
  }
}
