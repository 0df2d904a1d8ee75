// Scales for what products will give, before they are computed, so that their epilogues can store E4M3: a product of a row a
// and a row w is at most |a| |w| (Cauchy-Schwarz).
//
//   layerBound     bound [2] f32: the largest length of a row of w, and the largest |bias|; to start with both 0
//   outputScales   scales [rows] f32 = SLACK / FLOAT8_ROW_LARGEST * the largest of
//                    lengths[row] * own[0] + own[1]                 own: of a layer whose results get the scale of their row
//                    largest length of all * all[0] + all[1]        all: of up to two layers whose results get mixed
//
//   w [rows, k] T dense, weightScales [rows] f32 where T is E4M3, else null; bias [rows] bf16 or null
//   lengths [rows], first and second [firstCount], [secondCount] f32: of rows of a; own, firstBound, secondBound [2] or null
//
// Such a scale is larger than the row needs, by some 2^4, so that its largest number is near 2. E4M3 has numbers down to 2^-9, with
// four bits from 2^-6 on: what is lost is lost for numbers that are 2^7 times smaller than the largest.
// Grids: layerBound rows / 8 (a warp a row, 256 threads), outputScales rows / 256. The latter's blocks all look at all lengths:
// 17 KB at FLUX's 4352 tokens.
// T: of w. N: elements that move at a time, a divisor of k.
#include "common.cuh"

// Roundings: to E4M3 of a by 2^-4, of v and of attention's weights by 2^-4 each, and of sums.
constexpr float SLACK = 1.25f;

extern "C" __global__ void __launch_bounds__(256)
layerBound(float* bound, const T* w, const float* weightScales, const bf16* bias, int rows, int k) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  float squares = 0.0f;
  for (int i = lane * N; i < k; i += 32 * N) {
    const Vec<T, N> x = loadVec<N>(w + (long long)row * k + i);
#pragma unroll
    for (int e = 0; e < N; e++) squares = fmaf(toFloat(x.v[e]), toFloat(x.v[e]), squares);
  }
  for (int mask = 16; mask > 0; mask /= 2) squares += shuffleXor(squares, mask);
  if (lane > 0) return;
  const float length = sqrtf(squares) * (weightScales == nullptr ? 1.0f : weightScales[row]);
  // Floats that are not negative are in the order of their bits.
  atomicMax((int*)bound, __float_as_int(length));
  if (bias != nullptr) atomicMax((int*)bound + 1, __float_as_int(fabsf(toFloat(bias[row]))));
}

__device__ __forceinline__ float largestLength(const float* lengths, int count, float* partial) {
  float largest = 0.0f;
  for (int i = threadIdx.x; i < count; i += 256) largest = fmaxf(largest, lengths[i]);
  return blockMax(largest, partial, 256 / WARP);
}

extern "C" __global__ void __launch_bounds__(256)
outputScales(float* scales, int rows, const float* lengths, const float* own, const float* first, int firstCount,
             const float* firstBound, const float* second, int secondCount, const float* secondBound) {
  __shared__ float partials[2][32];
  float bound = 0.0f;
  if (firstBound != nullptr) {
    bound = fmaxf(bound, fmaf(largestLength(first, firstCount, partials[0]), firstBound[0], firstBound[1]));
  }
  if (secondBound != nullptr) {
    bound = fmaxf(bound, fmaf(largestLength(second, secondCount, partials[1]), secondBound[0], secondBound[1]));
  }
  const int row = blockIdx.x * 256 + threadIdx.x;
  if (row >= rows) return;
  if (own != nullptr) bound = fmaxf(bound, fmaf(lengths[row], own[0], own[1]));
  scales[row] = scaleOf(bound * SLACK);
}
