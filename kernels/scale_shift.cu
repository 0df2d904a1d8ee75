// x * scale + shift with two numbers, element by element.
//
//   out, x   count * N elements of T
//
// Bytes moved: elements * 2 * sizeof(T). FLUX scales latents (128 x 128 x 16) and timesteps: a launch's latency.
#include "common.cuh"

extern "C" __global__ void scaleShift(T* out, const T* x, long long count, float scale, float shift) {
  long long first = (long long)blockIdx.x * blockDim.x * VECTORS + threadIdx.x;
  Vec<T, N> held[VECTORS];
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * blockDim.x;
    if (at < count) held[j] = loadVec<N>(x + at * N);
  }
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * blockDim.x;
    if (at >= count) return;
#pragma unroll
    for (int i = 0; i < N; i++) held[j].v[i] = fromFloat<T>(fmaf(toFloat(held[j].v[i]), scale, shift));
    storeVec(out + at * N, held[j]);
  }
}
