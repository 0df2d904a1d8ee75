// Attention of float8 queries, keys and values on Hopper: softmax(scale * q k^T) v for heads of 128, no mask.
//
//   out [batch, queries, heads, 128] bf16, with any strides but a dense last dimension
//   q   [batch * heads, query tiles, 128 x 128] E4M3      k, v   [batch * heads, key tiles, 128 x 128] E4M3
//
// q, k and v lie in tiles as the matrix units read them from shared memory (joint_qk_norm_rope.cu and value_tiles.cu make
// them): a tile is one piece of 16 KB, so that one bulk copy brings it. v is transposed, since the units take float8 with
// the summed dimension innermost. k's rows are permuted within groups of 16: then the sums of q k^T that a thread holds
// are, in float8, just the piece of P that it has to give for P v, without exchange between threads.
//
// A block has 128 queries of one head: one warp brings tiles, two warpgroups compute 64 queries each. A warpgroup issues
// the product of the next keys before the softmax of these, so that the matrix units have work meanwhile; the other
// warpgroup fills what gaps are left (Shah et al. 2024, FlashAttention-3).
// P is exp2(8 + scale * log2(e) * (s - largest)): up to 256, so that float8 has all its exponents for small weights.
// FLOP: 4 * queries * keys * 128 a head; 0.233 T for FLUX's 24 heads of 4352, 0.118 ms at 1979 TFLOP/s. The exponentials
// alone take as long: 16 a clock and multiprocessor. Bytes: 16 KB of q, 32 KB for each 128 keys, mostly from the L2 cache.
// sm_90a only (wgmma). 384 threads, SHARED_BYTES of dynamic shared memory.
#include "common.cuh"

constexpr int HEAD_DIM = 128, KEYS = 128, QUERIES = 128, ROWS = 64;
constexpr int TILE_BYTES = 128 * 128;
constexpr int STAGES = 4;  // tiles of k, and of v, that are on their way or in use
constexpr float RANGE = 8.0f;

// -- barriers and copies in shared memory ------------------------------------------------------------------------------

__device__ __forceinline__ unsigned sharedAddress(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void initBarrier(unsigned barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}
// Waits for the end of the barrier's phase of this parity. The phase before the first counts as ended.
__device__ __forceinline__ void wait(unsigned barrier, unsigned parity) {
  unsigned done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);
}
// One tile from global to shared memory; it completes the barrier's phase.
__device__ __forceinline__ void copyTile(unsigned to, const unsigned char* from, unsigned barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(TILE_BYTES) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               : : "r"(to), "l"(from), "r"(TILE_BYTES), "r"(barrier) : "memory");
}

// -- products ----------------------------------------------------------------------------------------------------------

// Where rows of 128 bytes start in shared memory, for the matrix units: swizzled in groups of 8 rows. 32 bytes further
// along the rows are 2 more.
__device__ __forceinline__ unsigned long long descriptor(unsigned address) {
  return (unsigned long long)((address & 0x3ffffu) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
__device__ __forceinline__ void fenceProducts() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
__device__ __forceinline__ void commitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
template <int PENDING> __device__ __forceinline__ void waitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
}
// The compiler must not move reads of an accumulator before the wait.
__device__ __forceinline__ void hold(float (&d)[64]) {
#pragma unroll
  for (int i = 0; i < 64; i++) asm volatile("" : "+f"(d[i]) : : "memory");
}

// The 64 sums of an instruction, as its text names them (%0 to %63) and as its operands.
#define SUMS                                                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "       \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "       \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "       \
  "%62, %63}"
#define EIGHT(d, i)                                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),  \
      "+f"(d[i + 7])
#define SUM_OPERANDS(d)                                                                                        \
  EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24), EIGHT(d, 32), EIGHT(d, 40), EIGHT(d, 48), EIGHT(d, 56)

// d = a b^T (+ d): 64 x 32 bytes of a, from shared memory or from registers, 128 x 32 of b.
__device__ __forceinline__ void multiply(float (&d)[64], unsigned long long a, unsigned long long b, int add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; "
               "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " SUMS ", %64, %65, p, 1, 1; }"
               : SUM_OPERANDS(d)
               : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void multiply(float (&d)[64], const unsigned* a, unsigned long long b, int add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; "
               "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " SUMS ", {%64, %65, %66, %67}, %68, p, 1, 1; }"
               : SUM_OPERANDS(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// -- softmax -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2Fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Four numbers as float8, the first in the lowest byte.
__device__ __forceinline__ unsigned pack(float a, float b, float c, float d) {
  return (unsigned)toFloat8Pair(a, b) | (unsigned)toFloat8Pair(c, d) << 16;
}

// Largest of the 4 threads that share a row.
__device__ __forceinline__ float rowLargest(float x) {
  x = fmaxf(x, shuffleXor(x, 1));
  return fmaxf(x, shuffleXor(x, 2));
}

// What a thread knows of its two rows, 8 apart: the largest logit, and its part of the sum of P.
struct Rows { float largest[2], sum[2]; };

// Turns logits into P, and says by how much what was summed before has shrunk.
__device__ __forceinline__ void softmax(float (&s)[64], Rows& rows, float (&shrink)[2], float scale) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float largest = rows.largest[row];
#pragma unroll
    for (int i = 2 * row; i < 64; i += 4) largest = fmaxf(largest, fmaxf(s[i], s[i + 1]));
    largest = rowLargest(largest);
    shrink[row] = exp2Fast((rows.largest[row] - largest) * scale);
    rows.largest[row] = largest;
    const float shift = RANGE - largest * scale;
    float sum = 0.0f;
#pragma unroll
    for (int i = 2 * row; i < 64; i += 4) {
      s[i] = exp2Fast(fmaf(s[i], scale, shift));
      s[i + 1] = exp2Fast(fmaf(s[i + 1], scale, shift));
      sum += s[i] + s[i + 1];
    }
    rows.sum[row] = rows.sum[row] * shrink[row] + sum;
  }
}

// P in the order in which the second product takes it: see the banner.
__device__ __forceinline__ void packRows(unsigned (&p)[16], const float (&s)[64]) {
#pragma unroll
  for (int step = 0; step < 4; step++) {
#pragma unroll
    for (int part = 0; part < 4; part++) {
      int i = 16 * step + 8 * (part / 2) + 2 * (part % 2);
      p[4 * step + part] = pack(s[i], s[i + 1], s[i + 4], s[i + 5]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(384, 1)
flashAttentionFloat8(bf16* out, const unsigned char* q, const unsigned char* k, const unsigned char* v, int queries,
                     int keys, int keyTiles, int heads, long long outBatch, long long outToken, long long outHead,
                     float scale) {
  extern __shared__ unsigned char dynamicShared[];
  __shared__ unsigned long long barriers[1 + 4 * STAGES];
  const unsigned shared = (sharedAddress(dynamicShared) + 1023u) & ~1023u;  // tiles start at multiples of 1024
  const unsigned qTile = shared, kTiles = shared + TILE_BYTES, vTiles = kTiles + STAGES * TILE_BYTES;
  const unsigned qFull = sharedAddress(barriers), kFull = qFull + 8, kEmpty = kFull + 8 * STAGES;
  const unsigned vFull = kEmpty + 8 * STAGES, vEmpty = vFull + 8 * STAGES;
  const int group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    initBarrier(qFull, 1);
    for (int stage = 0; stage < STAGES; stage++) {
      initBarrier(kFull + 8 * stage, 1);
      initBarrier(vFull + 8 * stage, 1);
      initBarrier(kEmpty + 8 * stage, 2);  // both warpgroups are done with it
      initBarrier(vEmpty + 8 * stage, 2);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
  }
  __syncthreads();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      copyTile(qTile, q + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * TILE_BYTES, qFull);
      const unsigned char* kTile = k + (long long)blockIdx.y * keyTiles * TILE_BYTES;
      const unsigned char* vTile = v + (long long)blockIdx.y * keyTiles * TILE_BYTES;
      for (int tile = 0; tile < keyTiles; tile++, kTile += TILE_BYTES, vTile += TILE_BYTES) {
        const int stage = tile % STAGES;
        const unsigned before = tile / STAGES % 2 ^ 1;
        wait(kEmpty + 8 * stage, before);
        copyTile(kTiles + stage * TILE_BYTES, kTile, kFull + 8 * stage);
        wait(vEmpty + 8 * stage, before);
        copyTile(vTiles + stage * TILE_BYTES, vTile, vFull + 8 * stage);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const bool elected = thread == 0;
    const unsigned long long qRows = descriptor(qTile + (group - 1) * ROWS * HEAD_DIM);
    const unsigned long long kRows = descriptor(kTiles), vRows = descriptor(vTiles);
    constexpr unsigned long long NEXT_TILE = TILE_BYTES / 16;
    float s[64], o[64];
    unsigned p[16];
    Rows rows = {{-3.402823466e38f, -3.402823466e38f}, {0.0f, 0.0f}};
    float shrink[2];

    auto issueLogits = [&](int tile) {
      const int stage = tile % STAGES;
      wait(kFull + 8 * stage, tile / STAGES % 2);
      hold(s);
      fenceProducts();
#pragma unroll
      for (int step = 0; step < 4; step++) multiply(s, qRows + 2 * step, kRows + stage * NEXT_TILE + 2 * step, step > 0);
      commitProducts();
    };
    auto issueSums = [&](int tile) {
      const int stage = tile % STAGES;
      wait(vFull + 8 * stage, tile / STAGES % 2);
      hold(o);
      fenceProducts();
#pragma unroll
      for (int step = 0; step < 4; step++) {
        multiply(o, p + 4 * step, vRows + stage * NEXT_TILE + 2 * step, tile > 0 || step > 0);
      }
      commitProducts();
    };
    // Keys behind the last one, in the last tile.
    auto mask = [&](int tile) {
      if (keys - tile * KEYS >= KEYS) return;
#pragma unroll
      for (int i = 0; i < 64; i++) {
        const int block = i / 4, e = i % 2;
        const int key = tile * KEYS + block / 2 * 16 + 4 * (lane % 4) + 2 * (block % 2) + e;
        if (key >= keys) s[i] = -3.402823466e38f;
      }
    };

    wait(qFull, 0);
    issueLogits(0);
    waitProducts<0>();
    hold(s);
    if (elected) arrive(kEmpty);
    mask(0);
    softmax(s, rows, shrink, scale);
    packRows(p, s);
    for (int tile = 1; tile < keyTiles; tile++) {
      issueLogits(tile);
      issueSums(tile - 1);
      waitProducts<1>();
      hold(s);
      if (elected) arrive(kEmpty + 8 * (tile % STAGES));
      mask(tile);
      softmax(s, rows, shrink, scale);
      waitProducts<0>();
      hold(o);
      if (elected) arrive(vEmpty + 8 * ((tile - 1) % STAGES));
#pragma unroll
      for (int i = 0; i < 64; i++) o[i] *= shrink[i / 2 % 2];
      packRows(p, s);
    }
    issueSums(keyTiles - 1);
    waitProducts<0>();
    hold(o);

    const int first = blockIdx.x * QUERIES + (group - 1) * ROWS + thread / 32 * 16 + lane / 4;
    out += blockIdx.y / heads * outBatch + blockIdx.y % heads * outHead;
#pragma unroll
    for (int row = 0; row < 2; row++) {
      float sum = rows.sum[row];
      sum += shuffleXor(sum, 1);
      sum += shuffleXor(sum, 2);
      const float factor = 1.0f / sum;
      const int query = first + 8 * row;
      if (query >= queries) continue;
#pragma unroll
      for (int block = 0; block < 16; block++) {
        Vec<bf16, 2> pair;
        pair.v[0] = fromFloat<bf16>(o[4 * block + 2 * row] * factor);
        pair.v[1] = fromFloat<bf16>(o[4 * block + 2 * row + 1] * factor);
        storeVec(out + query * outToken + block * 8 + 2 * (lane % 4), pair);
      }
    }
  }
}
