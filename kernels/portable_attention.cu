// Attention for GPUs whose libraries have none: softmax(scale * q k^T) v for heads of 128, no mask, in bfloat16. Made for the
// matrix units of AMD's CDNA GPUs (MFMA); without them the same sums are computed by ordinary instructions, slowly.
//
//   out [batch, queries, heads, 128] bf16, q the same, k and v [batch, keys, heads, 128] bf16: any strides but a dense last
//   dimension, in multiples of 8 elements
//
// A block has 128 queries of one head, each group of 64 threads 32 of them. Keys come in tiles of 32, k's as they are and
// v's transposed in shared memory, the next tile on its way while this one is computed.
// A unit multiplies 32 x 8 by 8 x 32: of the first, thread l of 64 brings row l % 32, of the second column l % 32, each from
// 4 * (l / 32) on; of the result it has column l % 32, rows 8 * (i / 4) + 4 * (l / 32) + i % 4. So with k as the first and
// q^T as the second matrix a thread has 16 logits of one query, whose softmax needs one exchange with the thread that has the
// other 16; and these weights are just what it has to bring as the second matrix of v^T P^T, for the same keys.
// FLOP: 4 * queries * keys * 128 a head; 0.233 T for FLUX's 24 heads of 4352. 256 threads. Grid: queries / 128, heads, batch.
#include "common.cuh"

constexpr int HEAD_DIM = 128, KEYS = 32, QUERIES = 128, THREADS = 256, GROUP = 64;
// Elements from a row to the next in shared memory: more than there are, so that rows start in different banks.
constexpr int K_ROW = HEAD_DIM + 8, V_ROW = KEYS + 8;
constexpr float LOWEST = -3.402823466e38f;

// -- the matrix unit -------------------------------------------------------------------------------------------------

#ifdef __AMDGCN__
typedef short Frag __attribute__((vector_size(8)));
typedef float Sums __attribute__((vector_size(64)));
struct Unit {
  __device__ __forceinline__ void multiply(Frag a, Frag b, Sums& sums) {
    sums = __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(a, b, sums, 0, 0, 0);
  }
  __device__ __forceinline__ float otherHalf(float x) { return shuffleXor(x, 32); }
};
#else
struct alignas(8) Frag { unsigned short v[4]; };
struct Sums {
  float v[16];
  __device__ __forceinline__ float& operator[](int i) { return v[i]; }
};
// All threads of the block meet twice in each call.
struct Unit {
  Frag (&first)[THREADS];
  Frag (&second)[THREADS];
  __device__ __forceinline__ void multiply(Frag a, Frag b, Sums& sums) {
    const int lane = threadIdx.x % GROUP, group = threadIdx.x - lane;
    first[threadIdx.x] = a, second[threadIdx.x] = b;
    __syncthreads();
    for (int half = 0; half < 2; half++) {
      const Frag column = second[group + lane % 32 + 32 * half];
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const Frag row = first[group + 8 * (i / 4) + 4 * (lane / 32) + i % 4 + 32 * half];
        for (int k = 0; k < 4; k++) {
          sums.v[i] = fmaf(__uint_as_float((unsigned)row.v[k] << 16), __uint_as_float((unsigned)column.v[k] << 16),
                           sums.v[i]);
        }
      }
    }
    __syncthreads();
  }
  __device__ __forceinline__ float otherHalf(float x) {
    float* values = reinterpret_cast<float*>(first);
    values[threadIdx.x] = x;
    __syncthreads();
    const float other = values[threadIdx.x ^ 32];
    __syncthreads();
    return other;
  }
};
#endif

__device__ __forceinline__ Frag loadFrag(const bf16* p) { return *reinterpret_cast<const Frag*>(p); }

// -- tiles -----------------------------------------------------------------------------------------------------------

// A thread's pieces of a tile of keys: 16 bytes each, of a row that is `token` tokens behind the tile's first.
constexpr int PIECES = KEYS * HEAD_DIM / 8 / THREADS;
struct Held { Vec<bf16, 8> piece[PIECES]; };

__device__ __forceinline__ void loadTile(Held& held, const bf16* x, long long tokenStride, int first, int keys) {
#pragma unroll
  for (int j = 0; j < PIECES; j++) {
    const int index = threadIdx.x + j * THREADS, token = first + index / (HEAD_DIM / 8);
    if (token < keys) held.piece[j] = loadVec<8>(x + token * tokenStride + index % (HEAD_DIM / 8) * 8);
    else for (int i = 0; i < 8; i++) held.piece[j].v[i].bits = 0;  // 0 * anything must be 0
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
portableAttention(bf16* out, const bf16* q, const bf16* k, const bf16* v, int queries, int keys, long long outBatch,
                  long long outToken, long long outHead, long long qBatch, long long qToken, long long qHead,
                  long long kBatch, long long kToken, long long kHead, long long vBatch, long long vToken,
                  long long vHead, float scale) {
  __shared__ Vec<bf16, 8> kPieces[KEYS * K_ROW / 8], vPieces[HEAD_DIM * V_ROW / 8];
  bf16 *const kTile = kPieces->v, *const vTile = vPieces->v;
#ifdef __AMDGCN__
  Unit unit;
#else
  __shared__ Frag exchanged[2][THREADS];
  Unit unit = {exchanged[0], exchanged[1]};
#endif
  const int lane = threadIdx.x % GROUP, column = lane % 32, half = lane / 32;
  const int query = blockIdx.x * QUERIES + threadIdx.x / GROUP * 32 + column;
  const long long head = blockIdx.y, sample = blockIdx.z;
  k += sample * kBatch + head * kHead;
  v += sample * vBatch + head * vHead;
  // Threads behind the last query compute it once more, and store nothing.
  q += sample * qBatch + head * qHead + (query < queries ? query : queries - 1) * qToken;
  Frag qs[HEAD_DIM / 8];
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 8; step++) qs[step] = loadFrag(q + 8 * step + 4 * half);

  Sums o[HEAD_DIM / 32];
#pragma unroll
  for (int block = 0; block < HEAD_DIM / 32; block++) {
#pragma unroll
    for (int i = 0; i < 16; i++) o[block][i] = 0.0f;
  }
  float largest = LOWEST, sum = 0.0f;  // of scaled logits; of this thread's weights
  Held heldK, heldV;
  loadTile(heldK, k, kToken, 0, keys);
  loadTile(heldV, v, vToken, 0, keys);
  for (int first = 0; first < keys; first += KEYS) {
    __syncthreads();  // nobody reads the tile before any more
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
      const int index = threadIdx.x + j * THREADS, row = index / (HEAD_DIM / 8), at = index % (HEAD_DIM / 8) * 8;
      kPieces[(row * K_ROW + at) / 8] = heldK.piece[j];
#pragma unroll
      for (int i = 0; i < 8; i++) vTile[(at + i) * V_ROW + row] = heldV.piece[j].v[i];
    }
    __syncthreads();
    if (first + KEYS < keys) {
      loadTile(heldK, k, kToken, first + KEYS, keys);
      loadTile(heldV, v, vToken, first + KEYS, keys);
    }
    Sums s;
#pragma unroll
    for (int i = 0; i < 16; i++) s[i] = 0.0f;
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 8; step++) {
      unit.multiply(loadFrag(kTile + column * K_ROW + 8 * step + 4 * half), qs[step], s);
    }
    float tileLargest = LOWEST;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int key = first + 8 * (i / 4) + 4 * half + i % 4;
      s[i] = key < keys ? s[i] * scale : LOWEST;
      tileLargest = fmaxf(tileLargest, s[i]);
    }
    tileLargest = fmaxf(tileLargest, unit.otherHalf(tileLargest));
    const float before = largest;
    largest = fmaxf(largest, tileLargest);
    const float shrink = exp2f(before - largest);
    sum *= shrink;
    Frag p[KEYS / 8];
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const float weight = exp2f(s[i] - largest);
      sum += weight;
      reinterpret_cast<bf16*>(p)[i] = fromFloat<bf16>(weight);
    }
#pragma unroll
    for (int block = 0; block < HEAD_DIM / 32; block++) {
#pragma unroll
      for (int i = 0; i < 16; i++) o[block][i] *= shrink;
#pragma unroll
      for (int step = 0; step < KEYS / 8; step++) {
        unit.multiply(loadFrag(vTile + (32 * block + column) * V_ROW + 8 * step + 4 * half), p[step], o[block]);
      }
    }
  }
  const float factor = 1.0f / (sum + unit.otherHalf(sum));
  if (query >= queries) return;
  out += sample * outBatch + head * outHead + query * outToken;
#pragma unroll
  for (int block = 0; block < HEAD_DIM / 32; block++) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      Vec<bf16, 4> values;
#pragma unroll
      for (int j = 0; j < 4; j++) values.v[j] = fromFloat<bf16>(o[block][i + j] * factor);
      storeVec(out + 32 * block + 2 * i + 4 * half, values);
    }
  }
}
