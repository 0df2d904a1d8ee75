// Gated residual connection and the adaptive layer norm of its sum: sum = residual + gate * x, rounded to T, then
// normed = (sum - mean) / sqrt(variance + eps) * (1 + scale) + shift. One gate, scale and shift for each sample.
//
//   sum, normed   [batch, tokens, hidden] T and O, dense
//   rowScales     [batch * tokens] f32, of normed where O is E4M3, else null; rowLengths the same or null: each row's
//                 Euclidean length
//   residual      [batch, tokens, hidden] T, x the same in X, both with any strides of batch and tokens
//   gate, scale, shift   [batch, hidden] G, S, B, with any stride of batch
//
// THREADS threads share a row and keep the sum in registers, from which the norm is computed. A sample's gate, scale and
// shift stay in the caches. Grid: rows of a sample / (BLOCK / THREADS), batch.
// Bytes moved: batch * tokens * hidden * (2 * sizeof(T) + sizeof(O) + sizeof(X)). Floor at FLUX's 4352 x 3072 in bf16:
// 107 MB, 36 us at 3.0 TB/s; with normed in E4M3 93.6 MB, 31 us.
// T, O, X, G, S, B: the dtypes; O is T, or E4M3 with a scale for each row, before which normed is not rounded to T.
// N: elements that move at a time, a divisor of hidden. THREADS, BLOCK, VECTORS: see kernels/rows.ts.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
gatedAdaLayerNorm(T* sum, O* normed, float* rowScales, float* rowLengths, const T* residual, const X* x, const G* gate, const S* scale,
                  const B* shift, int tokens, int hidden, long long residualBatch, long long residualRow,
                  long long xBatch, long long xRow, long long gateBatch, long long scaleBatch, long long shiftBatch,
                  float eps) {
  __shared__ float partials[2][32];
  const long long sample = blockIdx.y;
  const int token = blockIdx.x * (BLOCK / THREADS) + threadIdx.x / THREADS;
  const int lane = threadIdx.x % THREADS;
  // Threads without a row take part in the sums all the same.
  const int length = token < tokens ? hidden : 0;
  const long long row = sample * tokens + token;
  Vec<T, N> held[VECTORS];
  Vec<X, N> term[VECTORS];
  Vec<G, N> gates[VECTORS];
  loadRow<THREADS>(held, residual + sample * residualBatch + token * residualRow, lane, length);
  loadRow<THREADS>(term, x + sample * xBatch + token * xRow, lane, length);
  loadRow<THREADS>(gates, gate + sample * gateBatch, lane, length);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    if ((j * THREADS + lane) * N >= length) continue;
#pragma unroll
    for (int i = 0; i < N; i++) {
      float value = fmaf(toFloat(gates[j].v[i]), toFloat(term[j].v[i]), toFloat(held[j].v[i]));
      held[j].v[i] = fromFloat<T>(value);
    }
  }
  storeRow<THREADS>(sum + row * hidden, held, lane, length);
  storeAdaLayerNorm<THREADS>(normed, rowScales, rowLengths, row, held, scale + sample * scaleBatch, shift + sample * shiftBatch, lane,
                             length, hidden, eps, partials);
}
