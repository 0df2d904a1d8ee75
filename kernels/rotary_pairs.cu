// Rotary tables as pairs: cosine and sine of each angle beside each other, once instead of for both numbers that it turns.
//
//   out [tokens, headDim / 2, 2] f32      cosines, sines [tokens, headDim] f32, dense rows, each number twice
//
// A thread a pair. Grid: tokens * headDim / 2 / 256. Bytes moved: 12 * tokens * headDim; 6.7 MB at FLUX's 4352 x 128.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
rotaryPairs(float* out, const float* cosines, const float* sines, int count, int pairs, long long cosToken,
            long long sinToken) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  const long long token = i / pairs, pair = i % pairs;
  const Vec<float, 2> both = {{cosines[token * cosToken + 2 * pair], sines[token * sinToken + 2 * pair]}};
  storeVec(out + 2ll * i, both);
}
