// Residual connection and the root-mean-square norm of its sum: sum = residual + x, rounded to T, then
// normed = sum / sqrt(mean(sum^2) + eps) * weight.
//
//   sum, normed, residual   [rows, hidden] T, x the same in X, all dense      weight   [hidden] W
//
// THREADS threads share a row and keep the sum in registers, from which the norm is computed.
// Bytes moved: rows * hidden * (3 * sizeof(T) + sizeof(X)). Floor at T5's 512 x 4096 in bf16: 16.8 MB, 6 us at
// 3.0 TB/s.
// T, X, W: the dtypes. N: elements that move at a time, a divisor of hidden. THREADS, BLOCK, VECTORS: see kernels/rows.ts.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
addRmsNorm(T* sum, T* normed, const T* residual, const X* x, const W* weight, unsigned rows, int hidden, float eps) {
  __shared__ float partial[32];
  const unsigned row = blockIdx.x * (BLOCK / THREADS) + threadIdx.x / THREADS;
  const int lane = threadIdx.x % THREADS;
  // Threads without a row take part in the sums all the same.
  const int length = row < rows ? hidden : 0;
  const long long start = (long long)row * hidden;
  Vec<T, N> held[VECTORS];
  Vec<X, N> term[VECTORS];
  Vec<W, N> weights[VECTORS];
  loadRow<THREADS>(held, residual + start, lane, length);
  loadRow<THREADS>(term, x + start, lane, length);
  loadRow<THREADS>(weights, weight, lane, length);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    if ((j * THREADS + lane) * N >= length) continue;
#pragma unroll
    for (int i = 0; i < N; i++) {
      held[j].v[i] = fromFloat<T>(toFloat(held[j].v[i]) + toFloat(term[j].v[i]));
    }
  }
  storeRow<THREADS>(sum + start, held, lane, length);
  float squares = sumOfRow<THREADS>(held, lane, length, partial, [](float value) { return value * value; });
  float factor = rsqrtf(squares / hidden + eps);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    if ((j * THREADS + lane) * N >= length) continue;
#pragma unroll
    for (int i = 0; i < N; i++) {
      held[j].v[i] = fromFloat<T>(toFloat(held[j].v[i]) * factor * toFloat(weights[j].v[i]));
    }
  }
  storeRow<THREADS>(normed + start, held, lane, length);
}
