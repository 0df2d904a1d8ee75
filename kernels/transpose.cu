// Copies elements between two tensors of one shape, bit by bit, where one dimension (a) is dense in the source and
// another (b) in the target: NCHW to NHWC and back.
//
// A block takes a tile of SIDE x SIDE elements through shared memory as words of E elements: 4 bytes where sizes and
// strides allow. So a warp reads 128 bytes along a and writes 128 bytes along b. OUTER dimensions of sizes n0 (the
// outermost, not passed), n1, ... number the pairs of a and b; strides are in elements. 256 threads. Blocks are
// numbered along b, then a, then the outer dimensions.
// Bytes moved: elements * 2 * sizeof(T). Floor at the autoencoder's 128 x 1024 x 1024 in bf16: 537 MB, 179 us at
// 3.0 TB/s.
#include "common.cuh"

constexpr int SIDE = 32 * E;
constexpr int GROUPS = 8;  // of 32 threads
// Words that a thread reads, and words along a of which it writes E rows each.
constexpr int READS = SIDE / GROUPS, WRITES = 32 / GROUPS;

extern "C" __global__ void transposeTiles(T* out, const T* x, int sizeA, int sizeB, int tilesA, int tilesB,
                                          long long toA, long long fromB, int n1, int n2, int n3, long long to0,
                                          long long to1, long long to2, long long to3, long long from0,
                                          long long from1, long long from2, long long from3) {
  // Word w of row r stands at w ^ (r / E): then neither writing rows nor reading columns meets a bank twice.
  __shared__ Vec<T, E> tile[SIDE][32];
  const int size[4] = {1, n1, n2, n3};
  const long long toStride[4] = {to0, to1, to2, to3}, fromStride[4] = {from0, from1, from2, from3};
  unsigned rest = blockIdx.x / (unsigned)tilesB;
  int firstB = (blockIdx.x - rest * tilesB) * SIDE;
  unsigned outer = rest / (unsigned)tilesA;
  int firstA = (rest - outer * tilesA) * SIDE;
  long long to = 0, from = 0;
  addPlace<OUTER>(outer, size, toStride, to, fromStride, from);
  int lane = threadIdx.x % 32, group = threadIdx.x / 32;

  int a = firstA + lane * E;
  Vec<T, E> held[READS];
#pragma unroll
  for (int j = 0; j < READS; j++) {
    int b = firstB + j * GROUPS + group;
    if (a < sizeA && b < sizeB) held[j] = loadVec<E>(x + from + b * fromB + a);
  }
#pragma unroll
  for (int j = 0; j < READS; j++) {
    int row = j * GROUPS + group;
    tile[row][lane ^ (row / E)] = held[j];
  }
  __syncthreads();
  int b = firstB + lane * E;
#pragma unroll
  for (int j = 0; j < WRITES; j++) {
    int word = j * GROUPS + group;
    Vec<T, E> column[E];
#pragma unroll
    for (int i = 0; i < E; i++) column[i] = tile[lane * E + i][word ^ lane];
#pragma unroll
    for (int i = 0; i < E; i++) {
      int row = firstA + word * E + i;
      Vec<T, E> result;
#pragma unroll
      for (int k = 0; k < E; k++) result.v[k] = column[k].v[i];
      if (row < sizeA && b < sizeB) storeVec(out + to + row * toA + b, result);
    }
  }
}
