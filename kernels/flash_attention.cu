// Attention on Hopper from tiles in float8 or bfloat16: softmax(scale * q k^T) v for heads of 128, no mask.
//
//   out [batch, queries, heads, 128] O, with any strides but a dense last dimension; outScales [queries] f32 or null: what
//       results are divided by, in E4M3
//   q   [batch * heads, query tiles, 128 x 128] E      k, v   [batch * heads, key tiles, 128 x 128] E
//   partial [split tiles * parts, 128, 128] f32 and moments [split tiles * parts, 128, 2] f32: see below
//
// q, k and v lie in tiles as the matrix units read them from shared memory (attention_tiles.ts says how): a tile is one
// piece, so that one bulk copy brings it. In float8, v is transposed, since the units take it with the summed dimension
// innermost only, and k's rows are permuted within groups of 16: then the sums of q k^T that a thread holds are, in float8,
// just the piece of P that it has to give for P v, without exchange between threads. In bfloat16 both lie as they are.
//
// A block has 128 queries of one head: one warp brings tiles, two warpgroups compute 64 queries each. A warpgroup computes P of
// some keys while the product of P and v of the keys before runs; the other warpgroup fills what gaps are left (Shah et al.
// 2024, FlashAttention-3).
// P is exp2(scale * log2(e) * s + shift). A row's shift follows from the first keys, whose largest weight becomes 2^RANGE, and
// is only lowered where a thread's sum of P passes LIMIT, so that logits are neither compared nor sums rescaled at each tile.
// It is lowered by whole powers of 2, so that what was rounded to itself still is.
// Sums of P v are f32 in bfloat16, and f16 in float8, which takes 3 to 4 % less energy and time (fused_linear.cu says more). With v in
// its tiles divided by 8 and P's sums below 512 a tile, those of 34 tiles stay below 65504 unless a mean of v is above 30.
// Should that be, or logits leap by so much that a float overflows, the block begins again, carefully: with a new shift for each tile,
// and in float8 with f32 for what tiles add up to.
// A block a multiprocessor: the last tiles would leave most of them idle. So the tiles from `whole` on are split among
// `parts` blocks by their keys, which leave sums, shifts (negated) and sums of P for mergeParts.
// FLOP: 4 * queries * keys * 128 a head; 0.233 T for FLUX's 24 heads of 4352: 0.118 ms at 1979 TFLOP/s in float8, 0.236 in
// bfloat16. The exponentials take 0.12 ms: 16 a clock and multiprocessor. Bytes: a tile of q, and of k and v for each 128
// keys, mostly from the L2 cache.
// sm_90a only (wgmma). 384 threads. E, O: f8e4m3 or bf16. BYTES: of E. STAGES: tiles of k, and of v, that are on their way or
// in use.
#include "common.cuh"
#include "hopper.cuh"

constexpr int HEAD_DIM = 128, KEYS = 128, QUERIES = 128, ROWS = 64;
// In bfloat16 a tile is two halves of 64 columns.
constexpr int HALF_BYTES = 128 * ROW_BYTES, TILE_BYTES = HALF_BYTES * BYTES;
// In float8 there is room for small weights below, down to 2^-9, and for larger ones above.
constexpr int RANGE = BYTES == 1 ? 5 : 0;
// The same for a block that is careful: 128 weights of 1 and values of 448 sum to 57344.
constexpr int CAREFUL_RANGE = 0;
// What a thread's 32 weights of a row may sum to. Beyond, the sum is brought to between 2^RANGE and twice that.
constexpr float LIMIT = BYTES == 1 ? 128.0f : 1.8446744e19f;
// What a thread holds of its sums of P v: floats, or pairs of f16.
using SumType = SumsOf<BYTES == 1>::Type;
constexpr int SUMS = BYTES == 1 ? 32 : 64;
// Products of q and k sum 32 bytes of a row at a time; those of P and v as many keys: 32 in float8, 16 in bfloat16.
constexpr int LOGIT_STEPS = 4 * BYTES, SUM_STEPS = 4 * BYTES;

// One tile from global to shared memory; it completes the barrier's phase.
__device__ __forceinline__ void bringTile(unsigned to, const unsigned char* from, unsigned barrier) {
  arriveExpecting(barrier, TILE_BYTES);
  copyBulk(to, from, TILE_BYTES, barrier);
}

// -- products ----------------------------------------------------------------------------------------------------------

// d = a b^T (+ d) for logits: 64 x 32 bytes of a, and 128 x 32 of b, from shared memory.
#define LOGITS(kind, tail)                                                                                          \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128" kind "{" NAMES_64          \
               "}, %64, %65, p, 1, 1" tail "; }" : SUMS_64("f") : "l"(a), "l"(b), "r"(add))
// d = a b (+ d) for sums: a from registers. Behind the sums are the operands %A0 to %A3, %B and %ADD.
#define PRODUCT(kind, c, count, A0, A1, A2, A3, B, ADD, tail)                                                         \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" ADD ", 0; wgmma.mma_async.sync.aligned.m64n128" kind "{"            \
               NAMES_##count "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B ", p, 1, 1" tail "; }"                     \
               : SUMS_##count(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
__device__ __forceinline__ void multiply(float (&d)[64], unsigned long long a, unsigned long long b, int add) {
  if constexpr (BYTES == 1) LOGITS("k32.f32.e4m3.e4m3 ", "");
  else LOGITS("k16.f32.bf16.bf16 ", ", 0, 0");
}
__device__ __forceinline__ void multiply(unsigned (&d)[32], const unsigned* a, unsigned long long b, int add) {
  PRODUCT("k32.f16.e4m3.e4m3 ", "r", 32, "32", "33", "34", "35", "36", "37", "");
}
__device__ __forceinline__ void multiply(float (&d)[64], const unsigned* a, unsigned long long b, int add) {
  PRODUCT("k16.f32.bf16.bf16 ", "f", 64, "64", "65", "66", "67", "68", "69", ", 1");  // b's rows are keys
}

// Sums times what their rows shrink by.
__device__ __forceinline__ void shrinkSums(float (&o)[64], const float (&shrink)[2]) {
#pragma unroll
  for (int i = 0; i < 64; i++) o[i] *= shrink[i / 2 % 2];
}
__device__ __forceinline__ void shrinkSums(unsigned (&o)[32], const float (&shrink)[2]) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(shrink[row]));
#pragma unroll
    for (int i = row; i < 32; i += 2) asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(o[i]) : "r"(pair));
  }
}
// Adds sums to what tiles before have given.
__device__ __forceinline__ void addSums(float (&to)[64], const unsigned (&o)[32]) {
#pragma unroll
  for (int i = 0; i < 32; i++) {
    float first, second;
    widenHalves(o[i], first, second);
    to[2 * i] += first, to[2 * i + 1] += second;
  }
}
__device__ __forceinline__ void addSums(float (&to)[64], const float (&o)[64]) {
#pragma unroll
  for (int i = 0; i < 64; i++) to[i] += o[i];
}

// -- softmax -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2Fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Largest of the 4 threads that share a row.
__device__ __forceinline__ float rowLargest(float x) {
  x = fmaxf(x, shuffleXor(x, 1));
  return fmaxf(x, shuffleXor(x, 2));
}

// What a thread knows of its two rows, 8 apart: P is exp2(scale * s + shift), and its part of the sum of P.
struct Rows { float shift[2], sum[2]; };

// Lets the largest logit of these keys and those before become 2^range, and says by how much what was summed shrinks.
__device__ __forceinline__ void shiftToLargest(const float (&s)[64], Rows& rows, float (&shrink)[2], float scale, int range) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float largest = -3.402823466e38f;
#pragma unroll
    for (int i = 2 * row; i < 64; i += 4) largest = fmaxf(largest, fmaxf(s[i], s[i + 1]));
    const float shift = fminf(rows.shift[row], range - rowLargest(largest) * scale);
    shrink[row] = exp2Fast(shift - rows.shift[row]);
    rows.shift[row] = shift;
    rows.sum[row] *= shrink[row];
  }
}

// Turns logits into P, and sums a thread's.
__device__ __forceinline__ void weigh(float (&s)[64], const Rows& rows, float (&sum)[2], float scale) {
#pragma unroll
  for (int row = 0; row < 2; row++) sum[row] = 0.0f;
#pragma unroll
  for (int i = 0; i < 64; i += 2) {
    const int row = i / 2 % 2;
    s[i] = exp2Fast(fmaf(s[i], scale, rows.shift[row]));
    s[i + 1] = exp2Fast(fmaf(s[i + 1], scale, rows.shift[row]));
    sum[row] += s[i] + s[i + 1];
  }
}

// Brings rows whose sums are above LIMIT below it, and says by which power of 2.
__device__ __forceinline__ void lower(float (&s)[64], Rows& rows, float (&sum)[2], float (&shrink)[2]) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    const float most = rowLargest(sum[row]);
    const int exponent = RANGE + 127 - (int)(__float_as_uint(most) >> 23);
    shrink[row] = most > LIMIT ? __uint_as_float((unsigned)(127 + exponent) << 23) : 1.0f;
    rows.shift[row] += most > LIMIT ? (float)exponent : 0.0f;
    rows.sum[row] *= shrink[row];
    sum[row] *= shrink[row];
#pragma unroll
    for (int i = 2 * row; i < 64; i += 4) s[i] *= shrink[row], s[i + 1] *= shrink[row];
  }
}

// P in the order in which the second product takes it: see the banner. In bfloat16 a step's 16 keys are two blocks of 8.
__device__ __forceinline__ void packRows(unsigned (&p)[4 * SUM_STEPS], const float (&s)[64]) {
#pragma unroll
  for (int step = 0; step < SUM_STEPS; step++) {
#pragma unroll
    for (int part = 0; part < 4; part++) {
      if constexpr (BYTES == 1) {
        const int i = 16 * step + 8 * (part / 2) + 2 * (part % 2);
        p[4 * step + part] = toFloat8Quad(s[i], s[i + 1], s[i + 4], s[i + 5]);
      } else {
        const int i = 8 * step + 2 * part;
        p[4 * step + part] = toBfloat16Pair(s[i], s[i + 1]);
      }
    }
  }
}

// v is in its tiles times this.
constexpr float VALUE_FACTOR = BYTES == 1 ? FLOAT8_VALUE_FACTOR : 1.0f;
// What a query's results are divided by before they are rounded.
__device__ __forceinline__ float scaleOfRow(const float* scales, int query) { return scales == nullptr ? 1.0f : scales[query]; }

extern "C" __global__ void __launch_bounds__(384, 1)
flashAttention(O* out, const float* outScales, float* partial, float* moments, const unsigned char* q, const unsigned char* k,
               const unsigned char* v, int queries, int queryTiles, int keys, int keyTiles, int heads, int whole, int parts,
               long long outBatch, long long outToken, long long outHead, float scale) {
  extern __shared__ unsigned char dynamicShared[];
  __shared__ unsigned long long barriers[2 + 4 * STAGES];
  __shared__ int overflows;
  const unsigned shared = (sharedAddress(dynamicShared) + 1023u) & ~1023u;  // tiles start at multiples of 1024
  const unsigned qTile = shared, kTiles = shared + TILE_BYTES, vTiles = kTiles + STAGES * TILE_BYTES;
  const unsigned qFull = sharedAddress(barriers), kFull = qFull + 8, kEmpty = kFull + 8 * STAGES;
  const unsigned vFull = kEmpty + 8 * STAGES, vEmpty = vFull + 8 * STAGES, judged = vEmpty + 8 * STAGES;
  // Shuffled, so that the compiler knows it to be the same in a warp (fused_linear.cu).
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  // This block's tile of queries, counted through all heads, and its keys.
  const int split = (int)blockIdx.x - whole;  // below 0 for all keys
  const int queryTile = split < 0 ? blockIdx.x : whole + split / parts;
  const int firstKeys = split < 0 ? 0 : split % parts * keyTiles / parts;
  const int endKeys = split < 0 ? keyTiles : (split % parts + 1) * keyTiles / parts;
  const int head = queryTile / queryTiles;  // of all samples
  if (threadIdx.x == 0) {
    initBarrier(qFull, 1);
    for (int stage = 0; stage < STAGES; stage++) {
      initBarrier(kFull + 8 * stage, 1);
      initBarrier(vFull + 8 * stage, 1);
      initBarrier(kEmpty + 8 * stage, 2);  // both warpgroups are done with it
      initBarrier(vEmpty + 8 * stage, 2);
    }
    initBarrier(judged, 256);  // all that compute have said whether their sums overflow
    overflows = 0;
    fenceBarriers();
  }
  __syncthreads();

  const int tiles = endKeys - firstKeys;
  // Whether the block has to begin again.
  auto overflowed = [&] {
    wait(judged, 0);
    return *(volatile int*)&overflows != 0;
  };
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      bringTile(qTile, q + (long long)queryTile * TILE_BYTES, qFull);
      int sent = 0;
      do {
        const unsigned char* kTile = k + ((long long)head * keyTiles + firstKeys) * TILE_BYTES;
        const unsigned char* vTile = v + ((long long)head * keyTiles + firstKeys) * TILE_BYTES;
        for (const int end = sent + tiles; sent < end; sent++, kTile += TILE_BYTES, vTile += TILE_BYTES) {
          const int stage = sent % STAGES;
          const unsigned before = sent / STAGES % 2 ^ 1;
          wait(kEmpty + 8 * stage, before);
          bringTile(kTiles + stage * TILE_BYTES, kTile, kFull + 8 * stage);
          wait(vEmpty + 8 * stage, before);
          bringTile(vTiles + stage * TILE_BYTES, vTile, vFull + 8 * stage);
        }
      } while (sent == tiles && overflowed());
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const bool elected = thread == 0;
    const unsigned long long qRows = descriptor(qTile + (group - 1) * ROWS * ROW_BYTES);
    const unsigned long long kRows = descriptor(kTiles), vRows = descriptor(vTiles, BYTES == 1 ? 16 : HALF_BYTES);
    // Of descriptors: to the next tile, to its other half, and 32 bytes along its rows or 16 rows on.
    constexpr unsigned long long NEXT_TILE = TILE_BYTES / 16, NEXT_HALF = HALF_BYTES / 16;
    constexpr unsigned long long NEXT_KEYS = BYTES == 1 ? 2 : 16 * ROW_BYTES / 16;
    float s[64];
    SumType o[SUMS];
    unsigned p[4 * SUM_STEPS];
    Rows rows;
    float sum[2], shrink[2];
    // What tiles are counted from: those of a block that begins again stand behind the first ones.
    int base = 0;

    // Tiles are counted from this block's first.
    auto issueLogits = [&](int tile) {
      const int stage = (base + tile) % STAGES;
      wait(kFull + 8 * stage, (base + tile) / STAGES % 2);
      hold(s);
      fenceProducts();
#pragma unroll
      for (int step = 0; step < LOGIT_STEPS; step++) {
        const unsigned long long along = step / 4 * NEXT_HALF + 2 * (step % 4);
        multiply(s, qRows + along, kRows + stage * NEXT_TILE + along, step > 0);
      }
      commitProducts();
    };
    auto issueSums = [&](int tile, bool add) {
      const int stage = (base + tile) % STAGES;
      wait(vFull + 8 * stage, (base + tile) / STAGES % 2);
      hold(o);
      fenceProducts();
#pragma unroll
      for (int step = 0; step < SUM_STEPS; step++) {
        multiply(o, p + 4 * step, vRows + stage * NEXT_TILE + step * NEXT_KEYS, add || step > 0);
      }
      commitProducts();
    };
    // What products have read of shared memory is free when they are done.
    auto finishLogits = [&](int tile) {
      hold(s);
      if (elected) arrive(kEmpty + 8 * ((base + tile) % STAGES));
    };
    auto finishSums = [&](int tile) {
      waitProducts<0>();
      hold(o);
      if (elected) arrive(vEmpty + 8 * ((base + tile) % STAGES));
    };
    // Keys behind the last one, in the last tile.
    auto mask = [&](int tile) {
      const int first = (firstKeys + tile) * KEYS;
      if (keys - first >= KEYS) return;
#pragma unroll
      for (int i = 0; i < 64; i++) {
        const int block = i / 4, e = i % 2;
        const int key = first + (BYTES == 1 ? block / 2 * 16 + 4 * (lane % 4) + 2 * (block % 2) + e
                                            : block * 8 + 2 * (lane % 4) + e);
        if (key >= keys) s[i] = -3.402823466e38f;
      }
    };
    // In bfloat16 warpgroups take turns to issue products; barrier `group` says that it is this one's. Nothing gained in float8.
    auto awaitTurn = [&] {
      if constexpr (BYTES == 2) asm volatile("bar.sync %0, 256;" : : "r"(group) : "memory");
    };
    auto passTurn = [&] {
      if constexpr (BYTES == 2) asm volatile("bar.arrive %0, 256;" : : "r"(3 - group) : "memory");
    };
    // Whether this warp has a row whose weights are too large.
    auto tooLarge = [&] { return __any_sync(0xffffffffu, fmaxf(sum[0], sum[1]) > LIMIT); };
    auto sumRows = [&] { rows.sum[0] += sum[0], rows.sum[1] += sum[1]; };

    // The block's sums of P v, each tile's added to those before.
    float result[64];
    auto begin = [&](int range) {
      issueLogits(0);
      waitProducts<0>();
      finishLogits(0);
      mask(0);
      rows = {{3.402823466e38f, 3.402823466e38f}, {0.0f, 0.0f}};
      shiftToLargest(s, rows, shrink, scale, range);
      weigh(s, rows, sum, scale);
    };
    auto proceed = [&](int tile, bool add) {
      sumRows();
      awaitTurn();
      issueLogits(tile);
      issueSums(tile - 1, add);
      passTurn();
      waitProducts<1>();
      finishLogits(tile);
      mask(tile);
    };
    if (group == 2) passTurn();
    wait(qFull, 0);
    begin(RANGE);
    if (tooLarge()) lower(s, rows, sum, shrink);
    packRows(p, s);
    for (int tile = 1; tile < tiles; tile++) {
      proceed(tile, tile > 1);
      weigh(s, rows, sum, scale);
      bool shrinks = false;
      if (tooLarge()) {
        lower(s, rows, sum, shrink);
        shrinks = true;
      }
      // Behind a branch, since the compiler would move it in front of the exponentials.
      finishSums(tile - 1);
      if (shrinks) shrinkSums(o, shrink);
      packRows(p, s);
    }
    sumRows();
    issueSums(tiles - 1, tiles > 1);
    finishSums(tiles - 1);
#pragma unroll
    for (int i = 0; i < 64; i++) result[i] = 0.0f;
    addSums(result, o);
    // What has overflowed is infinite or NaN from there on, and so is its difference from itself not 0.
    float difference = (rows.sum[0] - rows.sum[0]) + (rows.sum[1] - rows.sum[1]);
    if constexpr (BYTES == 1) {
#pragma unroll
      for (int i = 0; i < 64; i++) difference = fmaf(result[i], 0.0f, difference);
    }
    if (!(difference == 0.0f)) atomicOr(&overflows, 1);
    arrive(judged);
    if (overflowed()) {
      base = tiles;
      begin(CAREFUL_RANGE);
      packRows(p, s);
#pragma unroll
      for (int i = 0; i < 64; i++) result[i] = 0.0f;
      for (int tile = 1; tile < tiles; tile++) {
        proceed(tile, false);
        shiftToLargest(s, rows, shrink, scale, CAREFUL_RANGE);
        weigh(s, rows, sum, scale);
        finishSums(tile - 1);
        addSums(result, o);
        shrinkSums(result, shrink);
        packRows(p, s);
      }
      sumRows();
      issueSums(tiles - 1, false);
      finishSums(tiles - 1);
      addSums(result, o);
    }

    const int row0 = (group - 1) * ROWS + thread / 32 * 16 + lane / 4;
    out += head / heads * outBatch + head % heads * outHead;
#pragma unroll
    for (int row = 0; row < 2; row++) {
      float sum = rows.sum[row];
      sum += shuffleXor(sum, 1);
      sum += shuffleXor(sum, 2);
      const int inTile = row0 + 8 * row, query = queryTile % queryTiles * QUERIES + inTile;
      if (split >= 0) {
        const long long at = (long long)split * QUERIES + inTile;
        if (lane % 4 == 0) moments[2 * at] = -rows.shift[row], moments[2 * at + 1] = sum;
#pragma unroll
        for (int block = 0; block < 16; block++) {
          Vec<float, 2> pair = {{result[4 * block + 2 * row], result[4 * block + 2 * row + 1]}};
          storeVec(partial + at * HEAD_DIM + block * 8 + 2 * (lane % 4), pair);
        }
        continue;
      }
      // Rows behind the last query take part in the exchange.
      const bool inside = query < queries;
      const float factor = inside ? 1.0f / (VALUE_FACTOR * sum * scaleOfRow(outScales, query)) : 0.0f;
      O* to = out + query * outToken;
      if constexpr (sizeof(O) == 1) {
#pragma unroll
        for (int group = 0; group < 16; group += 8) {
          unsigned w[4];  // two blocks of 8 columns each
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float* x = result + 4 * (group + 2 * i) + 2 * row;
            w[i] = toFloat8Quad(x[0] * factor, x[1] * factor, x[4] * factor, x[5] * factor);
          }
          transposeQuad(w);
          const Vec<unsigned, 4> piece = {{__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410),
                                           __byte_perm(w[0], w[1], 0x7632), __byte_perm(w[2], w[3], 0x7632)}};
          if (inside) storeVec((unsigned*)(to + 8 * group + 16 * (lane % 4)), piece);
        }
      } else {
#pragma unroll
        for (int group = 0; group < 16; group += 4) {
          unsigned w[4];  // a block of 8 columns each
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float* x = result + 4 * (group + i) + 2 * row;
            w[i] = toBfloat16Pair(x[0] * factor, x[1] * factor);
          }
          transposeQuad(w);
          const Vec<unsigned, 4> piece = {{w[0], w[1], w[2], w[3]}};
          if (inside) storeVec((unsigned*)(to + 8 * (group + lane % 4)), piece);
        }
      }
    }
  }
}

// The rows of split tiles from their parts: a warp a row. Grid: split tiles, 16; 256 threads.
extern "C" __global__ void __launch_bounds__(256)
mergeParts(O* out, const float* outScales, const float* partial, const float* moments, int queries, int queryTiles, int heads, int whole,
           int parts, long long outBatch, long long outToken, long long outHead) {
  const int queryTile = whole + blockIdx.x, inTile = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = queryTile / queryTiles, query = queryTile % queryTiles * QUERIES + inTile;
  if (query >= queries) return;
  long long at = (long long)blockIdx.x * parts * QUERIES + inTile;
  float largest = moments[2 * at];
  for (int part = 1; part < parts; part++) largest = fmaxf(largest, moments[2 * (at + part * QUERIES)]);
  float sum = 0.0f, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int part = 0; part < parts; part++, at += QUERIES) {
    const float weight = exp2Fast(moments[2 * at] - largest);
    sum = fmaf(moments[2 * at + 1], weight, sum);
    const Vec<float, 4> values = loadVec<4>(partial + at * HEAD_DIM + lane * 4);
    for (int i = 0; i < 4; i++) o[i] = fmaf(values.v[i], weight, o[i]);
  }
  out += head / heads * outBatch + head % heads * outHead + query * outToken + lane * 4;
  const Vec<float, 4> result = {{o[0], o[1], o[2], o[3]}};
  const float factor = 1.0f / (VALUE_FACTOR * sum * scaleOfRow(outScales, query));
  if constexpr (sizeof(O) == 1) storeQuantized((f8e4m3*)out, result, factor);
  else storeVec((unsigned*)out, Vec<unsigned, 2>{{toBfloat16Pair(o[0] * factor, o[1] * factor),
                                                  toBfloat16Pair(o[2] * factor, o[3] * factor)}});
}
