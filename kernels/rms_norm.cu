// Root-mean-square norm over the last dimension: x / sqrt(mean(x^2) + eps) * weight.
//
//   out [rows, hidden] T      x   rows of T, strided (kernels/rows.ts)      weight   [hidden] W
//
// THREADS threads share a row and keep it in registers, so that it is read once: a block a row of T5's 4096, a quarter
// of a warp a row of QK-norm's 128 in bf16.
// Bytes moved: rows * hidden * 2 * sizeof(T). Floors: QK-norm of 4352 tokens x 24 heads x 128: bf16 53.5 MB, 18 us at
// 3.0 TB/s; f32 36 us. T5's 512 x 4096 in bf16: 8.4 MB, 3 us.
// T, W: the dtypes. N: elements that move at a time, a divisor of hidden. THREADS, BLOCK, VECTORS: see kernels/rows.ts.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
rmsNorm(T* out, const T* x, const W* weight, unsigned rows, int hidden, unsigned inner, long long outerStride,
        long long innerStride, float eps) {
  __shared__ float partial[32];
  const unsigned row = blockIdx.x * (BLOCK / THREADS) + threadIdx.x / THREADS;
  const int lane = threadIdx.x % THREADS;
  // Threads without a row take part in the sums all the same.
  const int length = row < rows ? hidden : 0;
  x += rowStart(row, inner, outerStride, innerStride);
  out += (long long)row * hidden;
  Vec<T, N> held[VECTORS];
  loadRow<THREADS>(held, x, lane, length);
  float squares = sumOfRow<THREADS>(held, lane, length, partial, [](float value) { return value * value; });
  float factor = rsqrtf(squares / hidden + eps);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int at = (j * THREADS + lane) * N;
    if (at >= length) continue;
    Vec<W, N> w = loadVec<N>(weight + at);
#pragma unroll
    for (int i = 0; i < N; i++) {
      held[j].v[i] = fromFloat<T>(toFloat(held[j].v[i]) * factor * toFloat(w.v[i]));
    }
  }
  storeRow<THREADS>(out, held, lane, length);
}
