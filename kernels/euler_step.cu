// One Euler step, element by element: sample + dt * velocity.
//
//   out, sample   count * N floats      velocity   as many of T      dt   one float, on the device
//
// Bytes moved: elements * (8 + sizeof(T)). FLUX's packed latents are 4096 x 64: 2.6 MB in bf16, 1 us at 3.0 TB/s.
#include "common.cuh"

extern "C" __global__ void eulerStep(float* out, const float* sample, const T* velocity, long long count,
                                     const float* dt) {
  float step = *dt;
  eachElement<N, VECTORS>(out, sample, velocity, count, [=](float x, float v) { return fmaf(step, v, x); });
}
