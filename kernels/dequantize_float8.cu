// 8-bit floats times their scales: what quantize_float8.cu was given, to within 1/16 of each value.
//
//   out [rows, k] T, dense      values [rows, k] E4M3, dense      scales   [rows] f32, or one for all rows
//
// A thread turns VECTORS pieces of N values. Bytes moved: elements * (1 + sizeof(T)). Floor for a weight of 3072 x 12288
// in bf16: 113 MB, 38 us at 3.0 TB/s.
#include "common.cuh"

extern "C" __global__ void dequantize(T* out, const f8e4m3* values, const float* scales, long long count, int pieces,
                                      int rowwise) {
  long long first = (long long)blockIdx.x * blockDim.x * VECTORS + threadIdx.x;
  Vec<f8e4m3, N> held[VECTORS];
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * blockDim.x;
    if (at < count) held[j] = loadVec<N>(values + at * N);
  }
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * blockDim.x;
    if (at >= count) return;
    float scale = scales[rowwise ? at / pieces : 0];
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; i++) result.v[i] = fromFloat<T>(toFloat(held[j].v[i]) * scale);
    storeVec(out + at * N, result);
  }
}
