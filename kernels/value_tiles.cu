// Values in float8, in the tiles that flash_attention.cu reads.
//
//   out [batch * heads, tiles, 128 x 128] E4M3      x, y [batch, tokens, heads, 128] T, any strides but a dense last dimension
//
// A tile has 128 tokens; those behind the last one are 0. Its rows are the head's dimensions and 128 bytes long, and their
// pieces of 16 bytes, which are 16 tokens, are swizzled as the matrix units want them: piece c of row r stands at c ^ (r % 8).
// The tokens from `first` on come from y. Values are multiplied by FLOAT8_VALUE_FACTOR, and saturate at 448.
// Grid: tiles, heads, batch; 256 threads.
// Bytes moved: 3 an element in bf16. Floor at FLUX's 4352 tokens x 24 heads x 128: 40 MB, 13 us at 3.0 TB/s.
#include "common.cuh"

constexpr int TILE = 128;
constexpr int THREADS = 256;

// Piece `column` of row `row` of this block's tile.
__device__ __forceinline__ unsigned char* pieceOf(unsigned char* out, int row, int column) {
  long long tile = ((long long)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  return out + tile * (TILE * TILE) + row * TILE + (column ^ row % 8) * 16;
}

// 16 neighbouring dimensions of a token; 0 behind the last one.
__device__ __forceinline__ void loadPiece(float* values, const T* x, int token, int column, int tokens, long long batch,
                                          long long tokenStride, long long head) {
  if (token >= tokens) {
    for (int i = 0; i < 16; i++) values[i] = 0.0f;
    return;
  }
  x += blockIdx.z * batch + token * tokenStride + blockIdx.y * head + column * 16;
#pragma unroll
  for (int i = 0; i < 16; i += N) {
    Vec<T, N> part = loadVec<N>(x + i);
#pragma unroll
    for (int j = 0; j < N; j++) values[i + j] = toFloat(part.v[j]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
valueTiles(unsigned char* out, const T* x, int tokens, long long batch, long long tokenStride, long long head,
           const T* y, int first, long long yBatch, long long yToken, long long yHead) {
  constexpr int PIECES = TILE * 8 / THREADS;
  // 4 bytes more a row: then neither writing rows nor reading columns keeps meeting the same banks.
  __shared__ unsigned short values[TILE][TILE / 2 + 2];
#pragma unroll
  for (int j = 0; j < PIECES; j++) {
    int inTile = (j * THREADS + threadIdx.x) / 8, column = threadIdx.x % 8;
    int token = blockIdx.x * TILE + inTile;
    float piece[16];
    if (token < first) loadPiece(piece, x, token, column, tokens, batch, tokenStride, head);
    else loadPiece(piece, y, token - first, column, tokens - first, yBatch, yToken, yHead);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      values[inTile][column * 8 + i] =
          toFloat8Pair(piece[2 * i] * FLOAT8_VALUE_FACTOR, piece[2 * i + 1] * FLOAT8_VALUE_FACTOR);
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < PIECES; j++) {
    int dimension = threadIdx.x % TILE, column = j * (THREADS / TILE) + threadIdx.x / TILE;
    int shift = dimension % 2 * 8;
    Vec<unsigned char, 16> piece;
#pragma unroll
    for (int i = 0; i < 16; i++) piece.v[i] = (unsigned char)(values[column * 16 + i][dimension / 2] >> shift);
    storeVec(pieceOf(out, dimension, column), piece);
  }
}
