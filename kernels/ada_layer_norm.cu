// Adaptive layer norm: (x - mean) / sqrt(variance + eps) * (1 + scale) + shift, one scale and shift for each sample.
//
//   out   [batch, tokens, hidden] O, dense      x   the same of T with any strides of batch and tokens
//   rowScales   [batch * tokens] f32 where O is E4M3, else null; rowLengths the same or null: each row's Euclidean length
//   scale [batch, hidden] S, shift [batch, hidden] B, with any stride of batch
//
// THREADS threads share a row and keep it in registers, so that it is read once. A sample's scale and shift (12 KB at
// FLUX's 3072 in bf16) stay in the caches. Grid: rows of a sample / (BLOCK / THREADS), batch.
// Bytes moved: batch * tokens * hidden * (sizeof(T) + sizeof(O)). Floor at FLUX's 4352 x 3072 in bf16: 53.5 MB, 18 us at
// 3.0 TB/s; from bf16 to E4M3 40.1 MB, 13 us.
// T, O, S, B: the dtypes; O is T, or E4M3 with a scale for each row, before which the row is not rounded to T.
// N: elements that move at a time, a divisor of hidden. THREADS, BLOCK, VECTORS: see kernels/rows.ts.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
adaLayerNorm(O* out, float* rowScales, float* rowLengths, const T* x, const S* scale, const B* shift, int tokens, int hidden,
             long long xBatch, long long xRow, long long scaleBatch, long long shiftBatch, float eps) {
  __shared__ float partials[2][32];
  const long long sample = blockIdx.y;
  const int token = blockIdx.x * (BLOCK / THREADS) + threadIdx.x / THREADS;
  const int lane = threadIdx.x % THREADS;
  // Threads without a row take part in the sums all the same.
  const int length = token < tokens ? hidden : 0;
  const long long row = sample * tokens + token;
  Vec<T, N> held[VECTORS];
  loadRow<THREADS>(held, x + sample * xBatch + token * xRow, lane, length);
  storeAdaLayerNorm<THREADS>(out, rowScales, rowLengths, row, held, scale + sample * scaleBatch, shift + sample * shiftBatch, lane,
                             length, hidden, eps, partials);
}
