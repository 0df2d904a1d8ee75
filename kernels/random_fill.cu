// Random numbers by counting: Philox 4x32-10 (Salmon et al. 2011). Element i comes from block i / 4 of the stream, so it
// depends on seed, stream and i alone: not on the launch, the dtype or its neighbours.
//
//   out [count] T, dense: numbers * scale + shift
//
// Uniform numbers in [0, 1) are a word's upper 24 bits. Normal ones come in pairs from two words (Box & Muller 1958).
// A thread makes N elements and writes them at once.
// Bytes moved: count * sizeof(T). Floor for FLUX's 17 G parameters in bf16: 34 GB, 11 ms at 3.0 TB/s written; some 40
// instructions an element make it about twice that.
// T: the dtype. N: elements of 16 bytes. ALIGNED: 1 where out's address is a multiple of 16, else 0. NORMAL: 1 or 0.
#include "common.cuh"

// Turns a counter into four random words, in ten rounds.
__device__ __forceinline__ void philox(unsigned* words, unsigned key0, unsigned key1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    unsigned long long even = 0xd2511f53ull * words[0], odd = 0xcd9e8d57ull * words[2];
    words[0] = (unsigned)(odd >> 32) ^ words[1] ^ key0;
    words[1] = (unsigned)odd;
    words[2] = (unsigned)(even >> 32) ^ words[3] ^ key1;
    words[3] = (unsigned)even;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

__device__ __forceinline__ float uniform(unsigned word) { return (float)(word >> 8) * 0x1p-24f; }

extern "C" __global__ void randomFill(T* out, long long count, unsigned long long seed, long long stream, float scale,
                                      float shift) {
  const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * N;
  Vec<T, N> result;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    unsigned long long block = (unsigned long long)(first + i) / 4;
    unsigned words[4] = {(unsigned)block, (unsigned)(block >> 32), (unsigned)stream, 0};
    philox(words, (unsigned)seed, (unsigned)(seed >> 32));
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      float a = uniform(words[k]), b = uniform(words[k + 1]);
      if (NORMAL) {
        // 1 - a is not 0 and exact. The angle is from -pi to pi, where the fast functions are good to 2^-21.
        float radius = sqrtf(-2.0f * logf(1.0f - a)), angle = (b - 0.5f) * 6.2831853f;
        a = radius * __cosf(angle);
        b = radius * __sinf(angle);
      }
      result.v[i + k] = fromFloat<T>(a * scale + shift);
      result.v[i + k + 1] = fromFloat<T>(b * scale + shift);
    }
  }
  if (ALIGNED && first + N <= count) {
    storeVec(out + first, result);
  } else {
    for (int i = 0; i < N; i++) {
      if (first + i < count) out[first + i] = result.v[i];
    }
  }
}
