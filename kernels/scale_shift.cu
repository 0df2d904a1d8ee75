// x * scale + shift with two numbers, element by element.
//
//   out, x   count * N elements of T
//
// Bytes moved: elements * 2 * sizeof(T). FLUX scales latents (128 x 128 x 16) and timesteps: a launch's latency.
#include "common.cuh"

extern "C" __global__ void scaleShift(T* out, const T* x, long long count, float scale, float shift) {
  eachElement<N, VECTORS>(out, x, count, [=](float value) { return fmaf(value, scale, shift); });
}
