// From one stream's projections to its part of joint attention's inputs: RMS norm of each head of q and k, rotary
// embedding of neighbouring pairs, and with COPY_V v as it is.
//
//   outQ, outK, outV   [batch, tokens, heads, headDim] T: the stream's tokens in tensors of all streams
//   q, k, v            [batch, tokens, heads, headDim] T with any strides but a dense last dimension
//   normQ, normK       [headDim] W      cosines, sines   [tokens, headDim] f32, dense rows
//
// One block a token. LANES threads share a head, and a thread keeps its part of the token's two table rows in registers
// for HEADS heads of q and as many of k: the tables are read once a token, and all heads are on their way at a time.
// Grid: tokens, batch.
// Bytes moved: 2 * sizeof(T) an element of q, k and v, and the tables once. Floors at FLUX's 24 heads x 128 in bf16 at
// 3.0 TB/s: 4352 tokens without v 107 + 4.5 MB, 37 us; 4096 tokens with v 151 + 4.2 MB, 52 us.
// T, W: the dtypes. N: elements that move at a time, 1 or an even divisor of headDim. LANES: a power of two, part of a
// warp. VECTORS: pieces of a head that a thread has. BLOCK: threads, whole warps.
#include "common.cuh"

// What the threads of a block have in common for q, k and v.
struct Heads {
  int lane, group, heads, headDim;

  __device__ __forceinline__ int length(int h) const { return group + h * (BLOCK / LANES) < heads ? headDim : 0; }
  __device__ __forceinline__ long long head(int h) const { return group + h * (BLOCK / LANES); }
};

__device__ __forceinline__ void loadHeads(Vec<T, N> (&held)[HEADS][VECTORS], const T* x, long long stride, Heads own) {
#pragma unroll
  for (int h = 0; h < HEADS; h++) loadRow<LANES>(held[h], x + own.head(h) * stride, own.lane, own.length(h));
}

__device__ __forceinline__ void storeHeads(T* out, const Vec<T, N> (&held)[HEADS][VECTORS], Heads own) {
#pragma unroll
  for (int h = 0; h < HEADS; h++) storeRow<LANES>(out + own.head(h) * own.headDim, held[h], own.lane, own.length(h));
}

// Norm and rotation in place, with one rounding.
__device__ __forceinline__ void turnHeads(Vec<T, N> (&held)[HEADS][VECTORS], const Vec<W, N> (&weight)[VECTORS],
                                          const float (&c)[VECTORS][N], const float (&s)[VECTORS][N], float eps,
                                          Heads own) {
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    float squares = sumOfRow<LANES>(held[h], own.lane, own.length(h), nullptr, [](float x) { return x * x; });
    float factor = rsqrtf(squares / own.headDim + eps);
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
      float normal[N];
#pragma unroll
      for (int i = 0; i < N; i++) normal[i] = toFloat(held[h][j].v[i]) * factor * toFloat(weight[j].v[i]);
      // The pair's other half is with the neighbour where N = 1 splits the pairs.
      float neighbour = N == 1 ? shuffleXor(normal[0], 1) : 0.0f;
#pragma unroll
      for (int i = 0; i < N; i++) {
        float turned = (N == 1 ? neighbour : normal[(i ^ 1) % N]) * s[j][i];
        bool second = (N == 1 ? own.lane : i) % 2;
        held[h][j].v[i] = fromFloat<T>(fmaf(normal[i], c[j][i], second ? turned : -turned));
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
jointQkNormRope(T* outQ, T* outK, T* outV, const T* q, const T* k, const T* v, const W* normQ, const W* normK,
                const float* cosines, const float* sines, int heads, int headDim, float eps, long long outBatch,
                long long qBatch, long long qToken, long long qHead, long long kBatch, long long kToken,
                long long kHead, long long vBatch, long long vToken, long long vHead, long long cosToken,
                long long sinToken) {
  const long long token = blockIdx.x, sample = blockIdx.y;
  const Heads own = {(int)threadIdx.x % LANES, (int)threadIdx.x / LANES, heads, headDim};
  const long long out = sample * outBatch + token * heads * headDim;
  Vec<T, N> heldQ[HEADS][VECTORS], heldK[HEADS][VECTORS], heldV[HEADS][VECTORS];
  loadHeads(heldQ, q + sample * qBatch + token * qToken, qHead, own);
  loadHeads(heldK, k + sample * kBatch + token * kToken, kHead, own);
  if (COPY_V) loadHeads(heldV, v + sample * vBatch + token * vToken, vHead, own);
  Vec<W, N> weightQ[VECTORS], weightK[VECTORS];
  loadRow<LANES>(weightQ, normQ, own.lane, headDim);
  loadRow<LANES>(weightK, normK, own.lane, headDim);
  float c[VECTORS][N], s[VECTORS][N];
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int at = (j * LANES + own.lane) * N;
    if (at >= headDim) continue;
    loadFloats<N>(c[j], cosines + token * cosToken + at);
    loadFloats<N>(s[j], sines + token * sinToken + at);
  }
  turnHeads(heldQ, weightQ, c, s, eps, own);
  storeHeads(outQ + out, heldQ, own);
  turnHeads(heldK, weightK, c, s, eps, own);
  storeHeads(outK + out, heldK, own);
  if (COPY_V) storeHeads(outV + out, heldV, own);
}
