// Copies rows of words, bit by bit, between two strided tensors of one shape: contiguous and concat.
//
// The words of a row lie `step` bytes apart; OUTER dimensions of sizes n0 (the outermost, not passed), n1, ... number
// the rows. Strides are in bytes. A word is BYTES bytes, 16 where sizes and strides allow.
// Block: x walks a row, y takes rows; a thread holds ROWS * COLUMNS words, so that as many loads are in flight. Blocks
// are numbered row by row. transpose.cu serves where no dimension is dense in both tensors.
// Bytes moved: elements * 2 * size. Floor at FLUX's 4352 x 12288 in bf16: 214 MB, 71 us at 3.0 TB/s.
#include "common.cuh"

extern "C" __global__ void copyRows(void* out, const void* x, int rows, int words, int columnBlocks,
                                    long long toStep, long long fromStep, int n1, int n2, int n3, int n4,
                                    long long to0, long long to1, long long to2, long long to3, long long to4,
                                    long long from0, long long from1, long long from2, long long from3,
                                    long long from4) {
  const int size[5] = {1, n1, n2, n3, n4};
  const long long toStride[5] = {to0, to1, to2, to3, to4}, fromStride[5] = {from0, from1, from2, from3, from4};
  unsigned rowBlock = blockIdx.x / (unsigned)columnBlocks;
  unsigned columnBlock = blockIdx.x - rowBlock * columnBlocks;
  long long firstRow = (long long)rowBlock * blockDim.y * ROWS + threadIdx.y;
  long long firstWord = (long long)columnBlock * blockDim.x * COLUMNS + threadIdx.x;

  Vec<unsigned char, BYTES> held[ROWS * COLUMNS];
  long long to[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    long long row = firstRow + i * blockDim.y, from = 0;
    to[i] = 0;
    if (row >= rows) continue;
    addPlace<OUTER>((unsigned)row, size, toStride, to[i], fromStride, from);
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      long long word = firstWord + j * blockDim.x;
      if (word < words) held[i * COLUMNS + j] = loadVec<BYTES>((const unsigned char*)x + from + word * fromStep);
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    if (firstRow + i * blockDim.y >= rows) return;
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      long long word = firstWord + j * blockDim.x;
      if (word < words) storeVec((unsigned char*)out + to[i] + word * toStep, held[i * COLUMNS + j]);
    }
  }
}
