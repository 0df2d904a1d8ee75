// Each pixel becomes a square of 2 x 2, bit by bit.
//
//   upsampleNearest              out   [rows * 2, width * 2] T             x   [rows, width] T
//   upsampleNearestInterleaved   out   [rows * 2, width * 2, channels] T   x   [rows, width, channels] T
//
// All pictures' rows lie behind one another, planar those of all channels. A thread takes N pixels (planar) or N channels
// of a pixel (interleaved) of ROWS rows. Planar it writes 2 N to two rows of out each, 8 bytes in, 16 bytes out at a time;
// interleaved it writes the same 16 bytes to four places.
// Block: x walks a row, y takes rows. Bytes moved: pixels * channels * 5 * sizeof(T). Floor at the autoencoder's last one,
// 256 x 512 x 512 to 256 x 1024 x 1024 in bf16: 671 MB, 224 us at 3.0 TB/s.
#include "common.cuh"

extern "C" __global__ void upsampleNearest(T* out, const T* x, int rows, int width) {
  int first = blockIdx.x * blockDim.y * ROWS + threadIdx.y;
  for (int column = threadIdx.x * N; column < width; column += blockDim.x * N) {
    Vec<T, N> held[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
      long long row = first + j * blockDim.y;
      if (row < rows) held[j] = loadVec<N>(x + row * width + column);
    }
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
      long long row = first + j * blockDim.y;
      if (row >= rows) break;
      Vec<T, 2 * N> twice;
#pragma unroll
      for (int i = 0; i < N; i++) twice.v[2 * i] = twice.v[2 * i + 1] = held[j].v[i];
      // Offsets in 64 bits throughout: with an int in between nvcc loses the second store's alignment and splits it.
      long long to = row * 4 * width + 2 * column;
      storeVec(out + to, twice);
      storeVec(out + (to + 2ll * width), twice);
    }
  }
}

// A row is much longer than a planar one, so the grid's y shares it out.
extern "C" __global__ void upsampleNearestInterleaved(T* out, const T* x, int rows, int width, int channels) {
  const int first = blockIdx.x * blockDim.y * ROWS + threadIdx.y;
  const long long length = (long long)width * channels;
  const long long at = ((long long)blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (at >= length) return;
  Vec<T, N> held[ROWS];
#pragma unroll
  for (int j = 0; j < ROWS; j++) {
    long long row = first + j * blockDim.y;
    if (row < rows) held[j] = loadVec<N>(x + row * length + at);
  }
  // What lies in front of the pixel in x lies twice in front of it in out.
  const long long column = at + (long long)((unsigned)at / (unsigned)channels) * channels;
#pragma unroll
  for (int j = 0; j < ROWS; j++) {
    long long row = first + j * blockDim.y;
    if (row >= rows) break;
    T* to = out + row * 4 * length + column;
    storeVec(to, held[j]);
    storeVec(to + channels, held[j]);
    storeVec(to + 2 * length, held[j]);
    storeVec(to + (2 * length + channels), held[j]);
  }
}
