// Softmax of rows of attention logits: exp(x - largest) / sum, with x = logits + bias; keys behind the causal limit get 0.
//
//   out [rows, keys] T      logits [rows, keys] f32, may be the same memory as out
//   bias   B or null: row r reads it at r / perHead * biasHead + r % perHead * biasRow
//   causalStart   row r sees keys up to causalStart + r % perHead; all keys where it is negative
//
// softmaxRows: THREADS threads share a row and keep it in registers, so that it is read once. softmaxLongRows: a block a
// row of any length, read twice; largest value and sum are kept up to date together (Milakov & Gimelshein 2018).
// Bytes moved: rows * keys * (4 + sizeof(T)). Floor for FLUX's 24 heads of 4352 x 4352 at 3.0 TB/s: f32 3.6 GB, 1.2 ms;
// bf16 2.7 GB, 0.9 ms.
// T, B: the dtypes. N: elements that move at a time, a divisor of keys. THREADS, BLOCK, VECTORS: see kernels/rows.ts.
#include "common.cuh"

// Below all finite logits; unlike -infinity it can be subtracted from -infinity.
constexpr float LOWEST = -3.402823466e38f;

// Where a row's bias starts, and how many keys it sees.
struct RowOptions { const B* bias; int end; };
__device__ __forceinline__ RowOptions optionsOf(unsigned row, int keys, const B* bias, unsigned perHead,
                                                long long biasHead, long long biasRow, int causalStart) {
  const unsigned head = row / perHead, query = row % perHead;
  return {bias ? bias + head * biasHead + query * biasRow : nullptr,
          causalStart < 0 ? keys : (int)(causalStart + query + 1)};
}

// Logits and bias of keys at, at + 1, ...; -infinity for those that the row does not see.
__device__ __forceinline__ Vec<float, N> load(const float* logits, RowOptions options, int at) {
  Vec<float, N> x = loadVec<N>(logits + at);
  if (options.bias) {
    Vec<B, N> b = loadVec<N>(options.bias + at);
#pragma unroll
    for (int i = 0; i < N; i++) x.v[i] += toFloat(b.v[i]);
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (at + i >= options.end) x.v[i] = __uint_as_float(0xff800000u);
  }
  return x;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
softmaxRows(T* out, const float* logits, const B* bias, unsigned rows, int keys, unsigned perHead,
            long long biasHead, long long biasRow, int causalStart) {
  __shared__ float partials[2][32];
  const unsigned row = blockIdx.x * (BLOCK / THREADS) + threadIdx.x / THREADS;
  const int lane = threadIdx.x % THREADS;
  // Threads without a row take part in the sums all the same.
  const int length = row < rows ? keys : 0;
  const RowOptions options = optionsOf(row, keys, bias, perHead, biasHead, biasRow, causalStart);
  logits += (long long)row * keys;
  out += (long long)row * keys;
  Vec<float, N> held[VECTORS];
  float largest = LOWEST;
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int at = (j * THREADS + lane) * N;
    if (at >= length) continue;
    held[j] = load(logits, options, at);
#pragma unroll
    for (int i = 0; i < N; i++) largest = fmaxf(largest, held[j].v[i]);
  }
  largest = rowMax<THREADS>(largest, partials[0]);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    if ((j * THREADS + lane) * N >= length) continue;
#pragma unroll
    for (int i = 0; i < N; i++) sum += held[j].v[i] = expf(held[j].v[i] - largest);
  }
  const float factor = 1.0f / rowSum<THREADS>(sum, partials[1]);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int at = (j * THREADS + lane) * N;
    if (at >= length) continue;
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; i++) {
      result.v[i] = fromFloat<T>(at + i < options.end ? held[j].v[i] * factor : 0.0f);
    }
    storeVec(out + at, result);
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
softmaxLongRows(T* out, const float* logits, const B* bias, int keys, unsigned perHead, long long biasHead,
                long long biasRow, int causalStart) {
  __shared__ float partials[2][32];
  const RowOptions options = optionsOf(blockIdx.x, keys, bias, perHead, biasHead, biasRow, causalStart);
  logits += (long long)blockIdx.x * keys;
  out += (long long)blockIdx.x * keys;
  float own = LOWEST, sum = 0.0f;
#pragma unroll 4
  for (int at = threadIdx.x * N; at < keys; at += BLOCK * N) {
    Vec<float, N> x = load(logits, options, at);
    float before = own;
#pragma unroll
    for (int i = 0; i < N; i++) own = fmaxf(own, x.v[i]);
    sum *= expf(before - own);
#pragma unroll
    for (int i = 0; i < N; i++) sum += expf(x.v[i] - own);
  }
  const float largest = blockMax(own, partials[0], BLOCK / WARP);
  const float factor = 1.0f / blockSum(sum * expf(own - largest), partials[1], BLOCK / WARP);
#pragma unroll 4
  for (int at = threadIdx.x * N; at < keys; at += BLOCK * N) {
    Vec<float, N> x = load(logits, options, at);
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; i++) {
      result.v[i] = fromFloat<T>(at + i < options.end ? expf(x.v[i] - largest) * factor : 0.0f);
    }
    storeVec(out + at, result);
  }
}
