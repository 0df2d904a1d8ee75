// Rows of a table by index, bit by bit.
//
//   out   [ids, words] dense      table   [vocabulary, words], rows tableRow bytes apart
//
// A word is BYTES bytes, 16 where sizes allow. One block a row. An index outside of the table writes bytes of 0xff,
// which is NaN in every float dtype: the host cannot look at the ids without waiting for the device.
// Bytes moved: ids * hidden * 2 * sizeof(dtype). Floor at T5's 512 x 4096 in bf16: 8.4 MB, 3 us at 3.0 TB/s.
#include "common.cuh"

extern "C" __global__ void embedding(void* out, const int* ids, const void* table, int vocabulary, int words,
                                     long long tableRow) {
  int id = ids[blockIdx.x];
  bool known = id >= 0 && id < vocabulary;
  const unsigned char* from = (const unsigned char*)table + (known ? id : 0) * tableRow;
  unsigned char* to = (unsigned char*)out + (long long)blockIdx.x * words * BYTES;
  for (int at = threadIdx.x; at < words; at += blockDim.x) {
    Vec<unsigned char, BYTES> word;
    if (known) {
      word = loadVec<BYTES>(from + (long long)at * BYTES);
    } else {
#pragma unroll
      for (int i = 0; i < BYTES; i++) word.v[i] = 0xff;
    }
    storeVec(to + (long long)at * BYTES, word);
  }
}
