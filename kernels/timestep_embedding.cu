// Sinusoidal embedding of a scalar: cos(t f_i), then sin(t f_i), f_i = 10000^(-i / half).
//
//   out   [batch, 2 * half] T      timesteps   [batch] float
//
// Every step is rounded to float, as in the reference; the functions themselves are computed in double, since at
// t = 1000 half a unit in the last place of an angle turns by 3e-5. Grid: columns, batch.
// Bytes moved: batch * 2 * half * sizeof(T). FLUX's 1 x 256 is a launch's latency.
#include "common.cuh"

extern "C" __global__ void timestepEmbedding(T* out, const float* timesteps, int half) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= half) return;
  float exponent = -9.210340371976184f * i / half;  // log(10000)
  float frequency = (float)exp((double)exponent);
  float angle = timesteps[blockIdx.y] * frequency;
  T* row = out + (long long)blockIdx.y * 2 * half;
  row[i] = fromFloat<T>((float)cos((double)angle));
  row[half + i] = fromFloat<T>((float)sin((double)angle));
}
