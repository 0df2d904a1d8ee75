// A matrix times a number, rounded to another dtype, into the corner of a larger one; the rest of that becomes zero.
//
//   out [rows, columns] T, its rows outStride elements apart      x [xRows, xColumns] U, dense, no larger
//
// A thread makes one element, with nothing specialised but the dtypes: matrices of any size run the same code. Bytes moved:
// x's and out's. Floor for a factor of 12288 x 64 in bf16: 3 MB, 1 us at 3.0 TB/s.
#include "common.cuh"

extern "C" __global__ void scaleInto(T* out, const U* x, float scale, int rows, int columns, long long outStride,
                                     int xRows, int xColumns) {
  long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= (long long)rows * columns) return;
  int row = at / columns;
  int column = at % columns;
  float value = row < xRows && column < xColumns ? scale * toFloat(x[(long long)row * xColumns + column]) : 0.0f;
  out[row * outStride + column] = fromFloat<T>(value);
}
