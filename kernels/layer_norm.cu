// Layer norm over the last dimension: (x - mean) / sqrt(variance + eps) * weight + bias.
//
//   out [rows, hidden] T      x   rows of T, strided (kernels/rows.ts)      weight, bias   [hidden] W or null
//
// THREADS threads share a row and keep it in registers, so that it is read once: a block a row at FLUX's 3072, several
// rows a block where they are short.
// Bytes moved: rows * hidden * 2 * sizeof(T). Floor at FLUX's 4352 x 3072: bf16 53.5 MB, 18 us at 3.0 TB/s; f32 36 us.
// T, W: the dtypes. N: elements that move at a time, a divisor of hidden. THREADS, BLOCK, VECTORS: see kernels/rows.ts.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
layerNorm(T* out, const T* x, const W* weight, const W* bias, unsigned rows, int hidden, unsigned inner,
          long long outerStride, long long innerStride, float eps) {
  __shared__ float partials[2][32];
  const unsigned row = blockIdx.x * (BLOCK / THREADS) + threadIdx.x / THREADS;
  const int lane = threadIdx.x % THREADS;
  // Threads without a row take part in the sums all the same.
  const int length = row < rows ? hidden : 0;
  x += rowStart(row, inner, outerStride, innerStride);
  Vec<T, N> held[VECTORS];
  loadRow<THREADS>(held, x, lane, length);
  const RowNorm norm = normOfRow<THREADS>(held, lane, length, hidden, eps, partials);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int at = (j * THREADS + lane) * N;
    if (at >= length) continue;
    Vec<W, N> w, b;
    if (weight) w = loadVec<N>(weight + at);
    if (bias) b = loadVec<N>(bias + at);
#pragma unroll
    for (int i = 0; i < N; i++) {
      float y = norm(toFloat(held[j].v[i]));
      if (weight) y *= toFloat(w.v[i]);
      if (bias) y += toFloat(b.v[i]);
      held[j].v[i] = fromFloat<T>(y);
    }
  }
  storeRow<THREADS>(out + (long long)row * hidden, held, lane, length);
}
