// E4M3 with a scale for each row, for weights: of several scales the one that leaves the least.
//
//   values [rows, k] f8, scales [rows] f32      x  rows of T, strided (kernels/rows.ts)
//
// A value is rounded to 4 bits wherever it falls, but which way, and by how much, depends on the scale. So each row tries
// CANDIDATES scales over a power of 2, behind which roundings repeat: from the one that makes its largest value FLOAT8_LARGEST, or that
// times the smallest power of 2 with which absolute values sum to FLOAT8_ROW_SUM at most, to almost twice that. Over rows of 3072
// normal weights, squared errors become 5 % less, once and for all.
// THREADS threads share a row and keep it in registers. Bytes moved: rows * k * (sizeof(T) + 1); but it is bound by roundings:
// some 6 instructions for each value and candidate, 20 ms for FLUX's 12 G weights and 8 candidates.
// T: the dtype. N: elements that move at a time. THREADS, BLOCK, VECTORS: see kernels/rows.ts.
#include "common.cuh"

// (E4M3 of x * factor - x * factor)^2, summed.
template <int N> __device__ __forceinline__ float errorsOf(const Vec<float, N>& x, float factor) {
  float sum = 0.0f, scaled[N], rounded[N];
#pragma unroll
  for (int i = 0; i < N; i++) scaled[i] = x.v[i] * factor;
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      fromFloat8Quad(toFloat8Quad(scaled[i], scaled[i + 1], scaled[i + 2], scaled[i + 3]), rounded + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) rounded[i] = toFloat(fromFloat<f8e4m3>(scaled[i]));
  }
#pragma unroll
  for (int i = 0; i < N; i++) sum = fmaf(rounded[i] - scaled[i], rounded[i] - scaled[i], sum);
  return sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
quantizeWeightRows(f8e4m3* values, float* scales, const T* x, unsigned rows, int k, unsigned inner, long long outerStride,
                   long long innerStride) {
  __shared__ float partials[2][32];
  const unsigned row = blockIdx.x * (BLOCK / THREADS) + threadIdx.x / THREADS;
  const int lane = threadIdx.x % THREADS;
  // Threads without a row take part in the search all the same.
  const int length = row < rows ? k : 0;
  x += rowStart(row, inner, outerStride, innerStride);
  values += (long long)row * k;
  Vec<T, N> loaded[VECTORS];
  loadRow<THREADS>(loaded, x, lane, length);
  Vec<float, N> held[VECTORS];
  widenRow(held, loaded);
  const float sum = sumOfRow<THREADS>(held, lane, length, partials[1], [](float x) { return fabsf(x); });
  const float largest = largestOfRow<THREADS>(held, lane, length, partials[0]);
  float first = scaleOf(largest, FLOAT8_LARGEST);
  while (sum > first * FLOAT8_ROW_SUM) first *= 2.0f;
  float best = first, least = 0.0f;
#pragma unroll 1
  for (int c = 0; c < CANDIDATES; c++) {
    const float step = 1.0f + (float)c / CANDIDATES, scale = first * step, factor = __frcp_rn(scale);
    float error = 0.0f;
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
      if ((j * THREADS + lane) * N < length) error += errorsOf(held[j], factor);
    }
    // Who has met for this sum has read the partials of the one before.
    error = step * step * rowSum<THREADS>(error, partials[1 - c % 2]);
    if (c == 0 || error < least) least = error, best = scale;
  }
  storeScaledRow<THREADS>(values, scales + row, held, lane, length, best);
}
