// From one stream's projections to its part of joint attention's inputs: RMS norm of each head of q and k, rotary
// embedding of neighbouring pairs, and with COPY_V v as it is.
//
//   outQ, outK, outV   [batch, tokens, heads, headDim] O: the stream's tokens in tensors of all streams
//   q, k, v            [batch, tokens, heads, headDim] T with any strides but a dense last dimension
//   normQ, normK       [headDim] W      cosines, sines   [tokens, headDim] f32, dense rows
//
// With TILES, they go to the tiles that flash_attention.cu reads (attention_tiles.ts says how those lie), in float8 q and k
// only. `start` is the stream's first token among all of them; tokens behind the last one become 0.
//
// One block a token. LANES threads share a head, and a thread keeps its part of the token's two table rows in registers
// for HEADS heads of q and as many of k: the tables are read once a token, and all heads are on their way at a time.
// Grid: tokens (with TILES up to the end of the last tile), batch.
// Bytes moved: 2 * sizeof(T) an element of q, k and v, and the tables once. Floors at FLUX's 24 heads x 128 in bf16 at
// 3.0 TB/s: 4352 tokens without v 107 + 4.5 MB, 37 us; 4096 tokens with v 151 + 4.2 MB, 52 us; 4352 tokens to float8
// tiles 80 + 4.5 MB, 28 us, to bf16 tiles with v 160 + 4.5 MB, 55 us.
// T, W, O: the dtypes. N: elements that move at a time, 1 or an even divisor of headDim. LANES: a power of two, part of a
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

template <typename S>
__device__ __forceinline__ void storeHeads(S* out, const Vec<S, N> (&held)[HEADS][VECTORS], Heads own) {
#pragma unroll
  for (int h = 0; h < HEADS; h++) storeRow<LANES>(out + own.head(h) * own.headDim, held[h], own.lane, own.length(h));
}

// Into the rows of this token in the tiles of its heads: pieces of 16 bytes, swizzled; those of k in float8 permuted among
// 16 rows.
template <typename S>
__device__ __forceinline__ void storeTiles(S* out, const Vec<S, N> (&held)[HEADS][VECTORS], Heads own, int token,
                                           int tiles, bool permuted) {
  constexpr int BYTES = sizeof(S);
  int row = token % 128, place = row % 16;
  if (permuted && BYTES == 1) row += 8 * (place % 4 / 2) + 2 * (place / 4) + place % 2 - place;
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    if (own.length(h) == 0) continue;
    long long tile = ((long long)blockIdx.y * own.heads + own.head(h)) * tiles + token / 128;
    unsigned char* rows = (unsigned char*)out + (tile * 128 * BYTES + row) * 128;
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
      int byte = (j * LANES + own.lane) * N * BYTES, inRow = byte % 128;
      storeVec((S*)(rows + byte / 128 * (128 * 128) + (inRow / 16 ^ row % 8) * 16 + inRow % 16), held[h][j]);
    }
  }
}

// Norm and rotation, with one rounding.
__device__ __forceinline__ void turnHeads(Vec<O, N> (&out)[HEADS][VECTORS], const Vec<T, N> (&held)[HEADS][VECTORS],
                                          const Vec<W, N> (&weight)[VECTORS], const float (&c)[VECTORS][N],
                                          const float (&s)[VECTORS][N], float eps, Heads own) {
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
        out[h][j].v[i] = fromFloat<O>(fmaf(normal[i], c[j][i], second ? turned : -turned));
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
jointQkNormRope(O* outQ, O* outK, T* outV, const T* q, const T* k, const T* v, const W* normQ, const W* normK,
                const float* cosines, const float* sines, int heads, int headDim, float eps, long long outBatch,
                long long qBatch, long long qToken, long long qHead, long long kBatch, long long kToken,
                long long kHead, long long vBatch, long long vToken, long long vHead, long long cosToken,
                long long sinToken, int tokens, int start, int tiles) {
  const long long token = blockIdx.x, sample = blockIdx.y;
  const Heads own = {(int)threadIdx.x % LANES, (int)threadIdx.x / LANES, heads, headDim};
  const long long out = sample * outBatch + token * heads * headDim;
  Vec<O, N> turned[HEADS][VECTORS];
  if (TILES && token >= tokens) {  // the rest of the last tile
#pragma unroll
    for (int i = 0; i < HEADS * VECTORS * N; i++) turned[i / N / VECTORS][i / N % VECTORS].v[i % N] = fromFloat<O>(0.0f);
    storeTiles(outQ, turned, own, start + (int)token, tiles, false);
    storeTiles(outK, turned, own, start + (int)token, tiles, true);
    if (COPY_V) storeTiles((O*)outV, turned, own, start + (int)token, tiles, false);
    return;
  }
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
    loadWide(c[j], cosines + token * cosToken + at);
    loadWide(s[j], sines + token * sinToken + at);
  }
  turnHeads(turned, heldQ, weightQ, c, s, eps, own);
  if (TILES) storeTiles(outQ, turned, own, start + (int)token, tiles, false);
  else storeHeads(outQ + out, turned, own);
  turnHeads(turned, heldK, weightK, c, s, eps, own);
  if (TILES) storeTiles(outK, turned, own, start + (int)token, tiles, true);
  else storeHeads(outK + out, turned, own);
  if (COPY_V && TILES) storeTiles(outV, heldV, own, start + (int)token, tiles, false);
  else if (COPY_V) storeHeads(outV + out, heldV, own);
}
