// A Linear layer of a few rows by a weight in 8-bit floats: x @ (weight * scale)^T + bias. What takes time is reading the
// weight, once.
//
//   out [rows, features] T, dense         weight [features, k] E4M3, dense              bias [features] T, or null
//   x [rows, k] T, rows stride apart      scales [features] f32, or one for all of them
//
// A warp has FEATURES rows of the weight and ROWS rows of x: what it widens of either it multiplies with all that it has of
// the other, and x comes out of the first cache. Sums are in f32; scale and bias come behind them. Where there are more
// rows, blocks that read the same weight are neighbours, so that all but the first find it in the cache.
//
// Bytes moved: features * k, and little else. Floor for FLUX's modulations, 18432 x 3072: 57 MB, 19 us at 3.0 TB/s.
// Arithmetic for an element of the weight: ROWS products, ROWS / FEATURES conversions of x, two of the weight.
// T: the dtype. N: elements of the weight that move at a time, 16 or 1. BLOCK: threads.
#include "common.cuh"

// Elements of the weight that are floats at a time: as many of x in bf16 are 16 bytes.
constexpr int PART = N < 8 ? N : 8;

template <int COUNT> __device__ __forceinline__ void widen(float (&to)[COUNT], const f8e4m3* from) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) fromFloat8Quad(reinterpret_cast<const unsigned*>(from)[i / 4], to + i);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = toFloat(from[i]);
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
linearFewRows(T* out, const T* x, const f8e4m3* weight, const float* scales, const T* bias, int rows, int features,
              int k, long long stride, int passes, int rowwise) {
  const int lane = threadIdx.x % WARP;
  const int firstRow = blockIdx.x % passes * ROWS;
  const int firstFeature = (blockIdx.x / passes * (BLOCK / WARP) + threadIdx.x / WARP) * FEATURES;
  // What lies behind the end is computed with the last one's numbers, and not stored.
  const f8e4m3* weights[FEATURES];
#pragma unroll
  for (int f = 0; f < FEATURES; f++) weights[f] = weight + (long long)min(firstFeature + f, features - 1) * k;
  const T* inputs[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) inputs[r] = x + min(firstRow + r, rows - 1) * stride;

  float sums[ROWS][FEATURES] = {};
  for (int at = lane * N; at < k; at += WARP * N) {
    Vec<f8e4m3, N> held[FEATURES];
#pragma unroll
    for (int f = 0; f < FEATURES; f++) held[f] = loadVec<N>(weights[f] + at);
#pragma unroll
    for (int part = 0; part < N; part += PART) {
      float wide[FEATURES][PART];
#pragma unroll
      for (int f = 0; f < FEATURES; f++) widen(wide[f], held[f].v + part);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        float values[PART];
        loadWide(values, inputs[r] + at + part);
#pragma unroll
        for (int f = 0; f < FEATURES; f++) {
#pragma unroll
          for (int i = 0; i < PART; i++) sums[r][f] = fmaf(values[i], wide[f][i], sums[r][f]);
        }
      }
    }
  }

  // All lanes have each sum; each lane stores one.
  float mine = 0.0f;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int f = 0; f < FEATURES; f++) {
      const float sum = warpSum(sums[r][f]);
      if (lane == r * FEATURES + f) mine = sum;
    }
  }
  const int row = firstRow + lane / FEATURES, feature = firstFeature + lane % FEATURES;
  if (lane >= ROWS * FEATURES || row >= rows || feature >= features) return;
  const float shift = bias == nullptr ? 0.0f : toFloat(bias[feature]);
  out[(long long)row * features + feature] = fromFloat<T>(fmaf(mine, scales[rowwise ? feature : 0], shift));
}
