// Linear layers on Hopper for one stream of tokens or two with weights of their own, and in their epilogues what follows:
//
//   y = (a b^T) * rowScales * columnScales + bias     a [rows, k] E, b [columns, k] E; scales in float8 only
//
//   LINEAR    out = y
//   RESIDUAL  out = residual + gate * y, y rounded to bf16 with its gate
//   GELU      out = gelu(y), in float8 with outScales, which the rows' results are known to stay below
//   QKV       columns of q, k and v, heads of 128: RMS norm of each head of q and k, rotary embedding, and to the tiles that
//             flash_attention.cu reads (attention_tiles.ts says how they lie)
//   QKV_GELU  the first 3 * hidden columns as QKV, the others as GELU
//
//   out [rows, columns] O (bf16, or E4M3 for GELU in float8), rows `outRow` apart; residual, gate [columns], bias bf16
//   turns [tokens, 64, 2] f32: cosine and sine of each pair; normQ, normK [128] bf16; q, k, v [heads, tiles, 128 x 128] in what attention multiplies
//
// Blocks stay and take tile after tile of 128 x TILE_N, two of a cluster the same columns: each brings half of b's rows to
// both. A warp brings tiles of 128 bytes of the summed dimension, STAGES of them at a time; two warpgroups multiply, 64 rows
// each. They leave their sums with 16 bits in shared memory and go on with the next tile, while three warps finish this one: a
// row a warp at a time, 8 columns a thread, so that what belongs to the columns stays in registers, and rows are read
// and written as a whole; of q and k two rows, 8 columns of two heads a thread.
// Sums are f32 in bfloat16, and f16 in float8: the units take 4 % less energy, and so less time, for sums of half the size. They are
// rounded to 11 bits every 32 elements of a row, which adds less to a result's error than rounding it to bf16 once; and they stay
// below f16's 65504, since rows are scaled for that (common.cuh, FLOAT8_ROW_LARGEST).
// FLOP: 2 * rows * columns * k; FLUX's 4352 x 21504 x 3072 0.575 T, 0.29 ms at 1979 TFLOP/s. Bytes: a once, b once or more
// often, as the L2 cache can keep them.
// sm_90a only (wgmma). 384 threads, clusters of 2. E: f8e4m3 or bf16, BYTES of it; TILED_BYTES of the tiles'. EPILOGUE: one
// of those above.
#include "common.cuh"
#include "hopper.cuh"

constexpr int LINEAR = 0, RESIDUAL = 1, GELU = 2, QKV = 3, QKV_GELU = 4;
constexpr int TILE_M = 128, ROWS = 64, HEAD_DIM = 128;
// Columns that a thread finishes of a row.
constexpr int WIDTH = 8;
// Warps that finish them.
constexpr int FINISHERS = 3, ALL_WARPS = FINISHERS + 8;
constexpr int A_BYTES = TILE_M * ROW_BYTES, B_BYTES = TILE_N * ROW_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr bool FLOAT8 = BYTES == 1;
// What a thread holds of its sums, and blocks of 8 columns: floats, or pairs of f16.
using SumType = SumsOf<FLOAT8>::Type;
constexpr int SUMS = FLOAT8 ? TILE_N / 4 : TILE_N / 2, BLOCKS = TILE_N / 8;
// From row to row of the finished sums: 16 bytes more than they have, against conflicts of banks.
constexpr int SUM_PITCH = TILE_N * 2 + 16;

// What a stream of tokens has of its own. Members have 8 bytes each, as a launch packs them.
struct Stream {
  const float *rowScales, *columnScales;
  const bf16* bias;
  unsigned char* out;
  const bf16 *residual, *gate;
  const float* outScales;
  const bf16 *normQ, *normK;
  // Rows of a, and which of all streams' tokens is the first.
  long long rows, start;
};
// What all streams have in common.
struct Joint {
  unsigned char *q, *k, *v;
  const float* turns;
  long long tiles, hidden, outRow, residualRow;
};

// -- products ----------------------------------------------------------------------------------------------------------

// d = a b^T (+ d): 64 x 32 bytes of a and TILE_N x 32 of b. Behind the sums are the operands %A, %B and %ADD.
#define PRODUCT(n, kind, c, count, A, B, ADD, tail)                                                                 \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" ADD ", 0; wgmma.mma_async.sync.aligned.m64n" n kind " {"            \
               NAMES_##count "}, %" A ", %" B ", p, 1, 1" tail "; }" : SUMS_##count(c) : "l"(a), "l"(b), "r"(add))

template <typename S, int N>
__device__ __forceinline__ void multiply(S (&d)[N], unsigned long long a, unsigned long long b, int add) {
  static_assert(TILE_N == 256 || TILE_N == 208, "a width that has its instruction here");
  if constexpr (N == 64) PRODUCT("256", "k32.f16.e4m3.e4m3", "r", 64, "64", "65", "66", "");
  else if constexpr (N == 52) PRODUCT("208", "k32.f16.e4m3.e4m3", "r", 52, "52", "53", "54", "");
  else if constexpr (N == 128) PRODUCT("256", "k16.f32.bf16.bf16", "f", 128, "128", "129", "130", ", 0, 0");
  else PRODUCT("208", "k16.f32.bf16.bf16", "f", 104, "104", "105", "106", ", 0, 0");
}

// Leaves a warpgroup's sums in shared memory, as bf16 or f16: `to` is its first row.
__device__ __forceinline__ void leaveSums(unsigned to, const SumType (&d)[SUMS], int thread) {
  const int lane = thread % 32, block = lane / 8;
  const unsigned row = to + (thread / 32 * 16 + lane % 8 + block % 2 * 8) * SUM_PITCH + block / 2 * 16;
#pragma unroll
  for (int j = 0; j < BLOCKS; j += 2) {
    unsigned w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (FLOAT8) w[i] = d[2 * j + i];
      else w[i] = toBfloat16Pair(d[4 * j + 2 * i], d[4 * j + 2 * i + 1]);
    }
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 : : "r"(row + 16 * j), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
  }
}

// -- epilogues ---------------------------------------------------------------------------------------------------------

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in float8 times 2 `half` and by the units' own tanh, which is good to
// 2^-11.
__device__ __forceinline__ float gelu(float x, float half) {
  const float inner = x * fmaf(x * x, 0.7978845608f * 0.044715f, 0.7978845608f);
  if constexpr (!FLOAT8) return timesSigmoid(x, 2.0f * inner);
  float turned;
  asm("tanh.approx.f32 %0, %1;" : "=f"(turned) : "f"(inner));
  const float scaled = x * half;
  return fmaf(scaled, turned, scaled);
}

// By the units' own approximations, which are good to 2^-22: the compiler's divisions have branches for what is not normal.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverseRoot(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Stores are not told to the compiler, so that it may move what the next rows need in front of them: nothing here reads what
// it has written.
__device__ __forceinline__ void store16(void* p, const unsigned (&w)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" : : "l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]));
}
__device__ __forceinline__ void storeBfloat16(void* p, const float (&y)[WIDTH]) {
  unsigned w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = toBfloat16Pair(y[2 * i], y[2 * i + 1]);
  store16(p, w);
}
__device__ __forceinline__ void storeFloat8(void* p, const float (&y)[WIDTH]) {
  const unsigned low = toFloat8Quad(y[0], y[1], y[2], y[3]), high = toFloat8Quad(y[4], y[5], y[6], y[7]);
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(p), "r"(low), "r"(high));
}
template <int EACH> __device__ __forceinline__ void storeElements(void* p, const float (&y)[WIDTH]) {
  if constexpr (EACH == 1) storeFloat8(p, y);
  else storeBfloat16(p, y);
}

// What a thread knows of its 8 columns.
struct Columns {
  float scale[WIDTH], bias[WIDTH];

  __device__ __forceinline__ void load(const Stream& s, int column) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) bias[i] = 0.0f, scale[i] = 1.0f;
    if (s.bias != nullptr) loadWide(bias, s.bias + column);
    if constexpr (FLOAT8) loadWide(scale, s.columnScales + column);
  }
  // y in the place of the sums.
  __device__ __forceinline__ void finish(float (&y)[WIDTH], float rowScale) const {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) y[i] = FLOAT8 ? fmaf(y[i] * rowScale, scale[i], bias[i]) : y[i] + bias[i];
  }
};

// Piece `piece` of 16 bytes of a row of a tile of a head.
__device__ __forceinline__ unsigned char* pieceOf(unsigned char* tiles, long long tile, int row, int piece) {
  return tiles + (tile * TILED_BYTES + piece / 8) * (TILE_M * ROW_BYTES) + row * ROW_BYTES + (piece % 8 ^ row % 8) * 16;
}

// One thread's place in the half of a tile that a warpgroup has left: rows from `row` on, counted in its stream.
struct Half {
  unsigned sums;  // of the first row, in shared memory
  unsigned left, parity;  // the barrier that says that they are there
  int row, firstColumn, columns, warp, warps, lane;
  float eps;
};

// The two sums of a word.
__device__ __forceinline__ void widenSums(unsigned word, float& first, float& second) {
  if constexpr (FLOAT8) {
    widenHalves(word, first, second);
  } else {
    first = __uint_as_float(word << 16);
    second = __uint_as_float(word & 0xffff0000u);
  }
}

// A thread's 8 sums of a row, two a word.
struct Sums {
  unsigned w[4];

  __device__ __forceinline__ void load(unsigned from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(from));
  }
  __device__ __forceinline__ void widen(float (&y)[WIDTH]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) widenSums(w[i], y[2 * i], y[2 * i + 1]);
  }
};

// Each warp takes every `warps`th unit of `count`, BATCH of them at a time: a unit is a row or several, of which a thread has
// PIECES times 8 sums, `from` on in its first unit, `apart` bytes apart; units are `pitch` bytes apart. load(b, unit) fetches
// what a unit needs from memory into place b, and is called for the next units before finish(b, unit, y) of these; the first
// are fetched before the sums are there. There are no branches between units, so that they are computed side by side: behind
// the last one it is done once more.
template <int BATCH, int PIECES, typename H, typename L, typename F>
__device__ __forceinline__ void eachUnit(const Half& at, unsigned from, unsigned pitch, unsigned apart, int count, L load, F finish) {
  H held[2][BATCH];
  const int last = count - 1, step = BATCH * at.warps;
  const auto loadBatch = [&](int first, H (&to)[BATCH]) {
#pragma unroll
    for (int b = 0; b < BATCH; b++) load(min(first + b * at.warps, last), to[b]);
  };
  const auto finishBatch = [&](int first, const H (&fetched)[BATCH]) {
    Sums sums[BATCH][PIECES];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
#pragma unroll
      for (int piece = 0; piece < PIECES; piece++) {
        sums[b][piece].load(from + min(first + b * at.warps, last) * pitch + piece * apart);
      }
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      float y[PIECES][WIDTH];
#pragma unroll
      for (int piece = 0; piece < PIECES; piece++) sums[b][piece].widen(y[piece]);
      finish(min(first + b * at.warps, last), fetched[b], y);
    }
  };
  loadBatch(at.warp, held[0]);
  wait(at.left, at.parity);
#pragma unroll 1
  for (int i = at.warp; i < count; i += 2 * step) {
    loadBatch(i + step, held[1]);
    finishBatch(i, held[0]);
    if (i + step >= count) break;
    loadBatch(i + 2 * step, held[0]);
    finishBatch(i + step, held[1]);
  }
}

// The same for single rows, of which a thread has 8 sums.
template <int BATCH, typename H, typename L, typename F>
__device__ __forceinline__ void eachRow(const Half& at, int count, L load, F finish) {
  eachUnit<BATCH, 1, H>(at, at.sums + at.lane * WIDTH * 2, SUM_PITCH, 0, count, load,
                        [&](int row, const H& held, float (&y)[1][WIDTH]) { finish(row, held, y[0]); });
}

__device__ __forceinline__ void storeLinear(const Half& at, const Stream& s, const Joint& joint) {
  struct Held { Vec<bf16, WIDTH> before; float rowScale; };
  const int column = at.firstColumn + at.lane * WIDTH, count = min(ROWS, (int)s.rows - at.row);
  if (at.lane >= TILE_N / WIDTH || column >= at.columns || count <= 0) return wait(at.left, at.parity);
  Columns own;
  own.load(s, column);
  float gate[WIDTH];
  if constexpr (EPILOGUE == RESIDUAL) loadWide(gate, s.gate + column);
  const bf16* before = s.residual + at.row * joint.residualRow + column;
  bf16* out = reinterpret_cast<bf16*>(s.out) + at.row * joint.outRow + column;
  const auto load = [&](int i, Held& held) {
    if constexpr (FLOAT8) held.rowScale = s.rowScales[at.row + i];
    if constexpr (EPILOGUE == RESIDUAL) held.before = loadVec<WIDTH>(before + i * joint.residualRow);
  };
  eachRow<4, Held>(at, count, load, [&](int i, const Held& held, float (&y)[WIDTH]) {
    own.finish(y, held.rowScale);
    if constexpr (EPILOGUE == RESIDUAL) {
#pragma unroll
      for (int e = 0; e < WIDTH; e++) y[e] = fmaf(gate[e], y[e], toFloat(held.before.v[e]));
    }
    storeBfloat16(out + i * joint.outRow, y);
  });
}

// `before`: columns in front of the first that GELU has.
__device__ __forceinline__ void storeGelu(const Half& at, const Stream& s, const Joint& joint, int before) {
  struct Held { float rowScale, outScale; };
  const int column = at.firstColumn + at.lane * WIDTH, count = min(ROWS, (int)s.rows - at.row);
  if (at.lane >= TILE_N / WIDTH || column >= at.columns || count <= 0) return wait(at.left, at.parity);
  Columns own;
  own.load(s, column);
  unsigned char* out = s.out + (at.row * joint.outRow + column - before) * BYTES;
  const auto load = [&](int i, Held& held) {
    if constexpr (FLOAT8) held.rowScale = s.rowScales[at.row + i], held.outScale = s.outScales[at.row + i];
  };
  eachRow<4, Held>(at, count, load, [&](int i, const Held& held, float (&y)[WIDTH]) {
    own.finish(y, held.rowScale);
    const float half = FLOAT8 ? 0.5f * reciprocal(held.outScale) : 0.5f;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) y[e] = gelu(y[e], half);
    storeElements<BYTES>(out + i * joint.outRow * BYTES, y);
  });
}

// 16 threads share a row of two heads, and 8 dimensions of both, so that what turns them is loaded once; a warp has two rows.
__device__ __forceinline__ void storeQueryOrKey(bool key, int head, const Half& at, const Stream& s, const Joint& joint) {
  struct Held { float rowScale, turns[WIDTH]; };
  const int firstToken = (int)s.start + at.row, rows = (int)s.rows - at.row, tile = firstToken / TILE_M;
  // A tile that none of the stream's tokens is in is another's, or nobody's.
  if (tile * TILE_M >= s.start + s.rows) return wait(at.left, at.parity);
  const int dim = at.lane % 16 * WIDTH, byte = dim * TILED_BYTES, second = at.lane / 16;
  const bool upper = at.lane & 8;
  unsigned char* out[2];
  Columns own[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    out[h] = pieceOf(key ? joint.k : joint.q, (head + h) * joint.tiles + tile, 0, byte / 128 * 8) + byte % 16;
    own[h].load(s, at.firstColumn + h * HEAD_DIM + dim);
  }
  float weight[WIDTH];
  loadWide(weight, (key ? s.normK : s.normQ) + dim);
  const float* turns = joint.turns + s.start * HEAD_DIM + dim;
  const auto load = [&](int pair, Held& held) {
    const int row = min(at.row + 2 * pair + second, (int)s.rows - 1);
    if constexpr (FLOAT8) held.rowScale = s.rowScales[row];
    loadWide(held.turns, turns + row * HEAD_DIM);
  };
  const unsigned from = at.sums + second * SUM_PITCH + dim * 2;
  eachUnit<2, 2, Held>(at, from, 2 * SUM_PITCH, HEAD_DIM * 2, ROWS / 2, load, [&](int pair, const Held& held, float (&y)[2][WIDTH]) {
    float squares[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      own[h].finish(y[h], held.rowScale);
      squares[h] = 0.0f;
#pragma unroll
      for (int e = 0; e < WIDTH; e++) squares[h] = fmaf(y[h][e], y[h][e], squares[h]);
    }
    // Half of the threads add up one head's, the others the other's.
    float sum = (upper ? squares[1] : squares[0]) + shuffleXor(upper ? squares[0] : squares[1], 8);
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) sum += shuffleXor(sum, mask);
    const int i = 2 * pair + second;
    // Behind the last token there are zeros.
    const float mine = i < rows ? inverseRoot(fmaf(sum, 1.0f / HEAD_DIM, at.eps)) : 0.0f, other = shuffleXor(mine, 8);
    int row = firstToken % TILE_M + i;
    if (key && TILED_BYTES == 1) row = row / 16 * 16 + row % 4 / 2 * 8 + row % 16 / 4 * 2 + row % 2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float factor = upper == (h == 1) ? mine : other;
#pragma unroll
      for (int e = 0; e < WIDTH; e++) y[h][e] *= factor * weight[e];
#pragma unroll
      for (int e = 0; e < WIDTH; e += 2) {
        const float former = y[h][e], latter = y[h][e + 1], c = held.turns[e], turn = held.turns[e + 1];
        y[h][e] = fmaf(former, c, -latter * turn);
        y[h][e + 1] = fmaf(latter, c, former * turn);
      }
      storeElements<TILED_BYTES>(out[h] + row * ROW_BYTES + (byte / 16 % 8 ^ row % 8) * 16, y[h]);
    }
  });
}

__device__ __forceinline__ void storeValues(int head, const Half& at, const Stream& s, const Joint& joint) {
  const int firstToken = (int)s.start + at.row, rows = (int)s.rows - at.row, tile = firstToken / TILE_M;
  // A tile that none of the stream's tokens is in is another's, or nobody's.
  if (tile * TILE_M >= s.start + s.rows) return wait(at.left, at.parity);
  if constexpr (TILED_BYTES == 1) {
    // The tile is transposed: a thread makes pieces of 16 tokens for two of its dimensions, from words of both.
    constexpr int PARTS = TILE_N / 64, UNITS = ROWS / 16 * PARTS;
    struct Held { float bias[2], scale[2], rowScale; };
    const auto load = [&](int unit, Held& held) {
      const int column = at.firstColumn + unit % PARTS * 64 + 2 * at.lane, first = unit / PARTS * 16;
      held.bias[0] = held.bias[1] = 0.0f;
      if (s.bias != nullptr) {
        const Vec<bf16, 2> pair = loadVec<2>(s.bias + column);
        held.bias[0] = toFloat(pair.v[0]), held.bias[1] = toFloat(pair.v[1]);
      }
      held.scale[0] = held.scale[1] = 1.0f;
      if constexpr (FLOAT8) loadWide(held.scale, s.columnScales + column);
#pragma unroll
      for (int d = 0; d < 2; d++) held.bias[d] *= FLOAT8_VALUE_FACTOR, held.scale[d] *= FLOAT8_VALUE_FACTOR;
      held.rowScale = FLOAT8 ? s.rowScales[min(at.row + first + at.lane % 16, (int)s.rows - 1)] : 1.0f;
    };
    const auto finish = [&](int unit, const Held& held) {
      const int column = unit % PARTS * 64 + 2 * at.lane, first = unit / PARTS * 16;
      unsigned pairs[16], pieces[2][4];
#pragma unroll
      for (int i = 0; i < 16; i++) {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pairs[i]) : "r"(at.sums + (first + i) * SUM_PITCH + 2 * column));
      }
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        float y[2][4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const bool inside = first + i + e < rows;
          const float rowScale = __shfl_sync(0xffffffffu, held.rowScale, i + e);
          float x[2];
          widenSums(pairs[i + e], x[0], x[1]);
#pragma unroll
          for (int d = 0; d < 2; d++) {
            const float value = fmaf(x[d] * rowScale, held.scale[d], held.bias[d]);
            y[d][e] = inside ? value : 0.0f;
          }
        }
#pragma unroll
        for (int d = 0; d < 2; d++) pieces[d][i / 4] = toFloat8Quad(y[d][0], y[d][1], y[d][2], y[d][3]);
      }
#pragma unroll
      for (int d = 0; d < 2; d++) {
        store16(pieceOf(joint.v, (head + column / HEAD_DIM) * joint.tiles + tile, column % HEAD_DIM + d,
                        (firstToken + first) % TILE_M / 16), pieces[d]);
      }
    };
    Held held[2];
    load(at.warp, held[0]);
    wait(at.left, at.parity);
#pragma unroll 1
    for (int unit = at.warp; unit < UNITS; unit += 2 * at.warps) {
      load(min(unit + at.warps, UNITS - 1), held[1]);
      finish(unit, held[0]);
      if (unit + at.warps >= UNITS) break;
      load(min(unit + 2 * at.warps, UNITS - 1), held[0]);
      finish(unit + at.warps, held[1]);
    }
  } else {
    struct Held { float rowScale; };
    const int dim = at.lane % 16 * WIDTH, piece = dim / WIDTH;
    unsigned char* out = pieceOf(joint.v, (head + at.lane / 16) * joint.tiles + tile, 0, piece / 8 * 8);
    Columns own;
    own.load(s, at.firstColumn + at.lane * WIDTH);
    const auto load = [&](int i, Held& held) {
      if constexpr (FLOAT8) held.rowScale = s.rowScales[min(at.row + i, (int)s.rows - 1)];
    };
    eachRow<4, Held>(at, ROWS, load, [&](int i, const Held& held, float (&y)[WIDTH]) {
      own.finish(y, held.rowScale);
#pragma unroll
      for (int e = 0; e < WIDTH; e++) y[e] = i < rows ? y[e] : 0.0f;
      const int row = firstToken % TILE_M + i;
      storeBfloat16(out + row * ROW_BYTES + (piece % 8 ^ row % 8) * 16, y);
    });
  }
}

__device__ __forceinline__ void storeHalf(const Half& at, const Stream& s, const Joint& joint) {
  if constexpr (EPILOGUE == LINEAR || EPILOGUE == RESIDUAL) storeLinear(at, s, joint);
  if constexpr (EPILOGUE == GELU) storeGelu(at, s, joint, 0);
  if constexpr (EPILOGUE == QKV || EPILOGUE == QKV_GELU) {
    static_assert(TILE_N % HEAD_DIM == 0 || EPILOGUE < QKV, "tiles of whole heads");
    const int hidden = joint.hidden, which = at.firstColumn / hidden, head = at.firstColumn % hidden / HEAD_DIM;
    if (which < 2) storeQueryOrKey(which == 1, head, at, s, joint);
    else if (EPILOGUE == QKV || which == 2) storeValues(head, at, s, joint);
    else if constexpr (EPILOGUE == QKV_GELU) storeGelu(at, s, joint, 3 * hidden);
  }
}

// A tile of columns for a pair of tiles of rows.
struct Item { int pair, columnTile; };

// The `item`th of all: slabs of rows one after another, so that a slab of a stays in the L2 cache while b goes by.
__device__ __forceinline__ Item itemOf(int item, int pairs, int slab, int columnTiles) {
  const int first = item / (slab * columnTiles) * slab, count = min(slab, pairs - first);
  const int inSlab = item - first * columnTiles;
  return {first + inSlab % count, inSlab / count};
}

// pairs: of tiles of rows, of the first stream `pairs0`, `slab` of them at a time. kTiles: of 128 bytes.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
fusedLinear(const __grid_constant__ TensorMap a0, const __grid_constant__ TensorMap b0, const __grid_constant__ TensorMap a1,
            const __grid_constant__ TensorMap b1, const __grid_constant__ Stream s0, const __grid_constant__ Stream s1,
            const __grid_constant__ Joint joint, int pairs0, int pairs, int slab, int columns, int columnTiles, int kTiles,
            float eps) {
  extern __shared__ unsigned char dynamicShared[];
  __shared__ unsigned long long barriers[2 * STAGES + 4];
  const unsigned stages = (sharedAddress(dynamicShared) + 1023u) & ~1023u, sums = stages + STAGES * STAGE_BYTES;
  const unsigned full = sharedAddress(barriers), empty = full + 8 * STAGES;
  // Of a warpgroup's finished sums.
  const unsigned left = empty + 8 * STAGES, taken = left + 16;
  const unsigned rank = blockInCluster();
  // Shuffled, so that the compiler knows it to be the same in a warp: or else it guards each shuffle and wait against threads that
  // have taken another branch.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = warp / 4;
  const int work = pairs * columnTiles, step = gridDim.x / 2;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      initBarrier(full + 8 * stage, 1);
      initBarrier(empty + 8 * stage, 4);  // two warpgroups of two blocks are done with it
    }
    for (int half = 0; half < 2; half++) {
      initBarrier(left + 8 * half, 128);
      initBarrier(taken + 8 * half, 32 * FINISHERS);
    }
    fenceBarriers();
  }
  meetCluster();

  if (group == 0) {
    if (warp == 0) {
      if (threadIdx.x == 0) {
        int stage = 0;
        unsigned parity = 1;
        for (int item = blockIdx.x / 2; item < work; item += step) {
          const auto [pair, columnTile] = itemOf(item, pairs, slab, columnTiles);
          const bool second = pair >= pairs0;
          const TensorMap* a = second ? &a1 : &a0;
          const TensorMap* b = second ? &b1 : &b0;
          const int row = (2 * (second ? pair - pairs0 : pair) + rank) * TILE_M;
          const int column = columnTile * TILE_N + rank * (TILE_N / 2);
          for (int k = 0; k < kTiles; k++) {
            const unsigned to = stages + stage * STAGE_BYTES, barrier = full + 8 * stage;
            wait(empty + 8 * stage, parity);
            arriveExpecting(barrier, STAGE_BYTES);
            copyTile(to, a, k * ROW_BYTES, row, barrier);
            copyTileTo(3, to + A_BYTES + rank * (B_BYTES / 2), b, k * ROW_BYTES, column, barrier);
            if (++stage == STAGES) stage = 0, parity ^= 1;
          }
        }
      }
    } else {
      unsigned parity = 0;
      for (int item = blockIdx.x / 2; item < work; item += step, parity ^= 1) {
        const auto [pair, columnTile] = itemOf(item, pairs, slab, columnTiles);
        const bool second = pair >= pairs0;
        const Stream& s = second ? s1 : s0;
        const int tile = 2 * (second ? pair - pairs0 : pair) + rank;
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
          const Half at = {sums + half * ROWS * SUM_PITCH, left + 8 * half, parity, tile * TILE_M + half * ROWS, columnTile * TILE_N, columns,
                           warp - 1, item + step < work ? FINISHERS : ALL_WARPS, (int)threadIdx.x % 32, eps};
          storeHalf(at, s, joint);
          arrive(taken + 8 * half);
        }
      }
    }
  } else {
    const int thread = threadIdx.x % 128, half = group - 1;
    const unsigned long long aRows = descriptor(stages + half * ROWS * ROW_BYTES);
    const unsigned long long bRows = descriptor(stages + A_BYTES);
    SumType d[SUMS];
    int stage = 0;
    unsigned parity = 0, takenParity = 1, leftParity = 1;
    for (int item = blockIdx.x / 2; item < work; item += step) {
      int before = 0;
      for (int k = 0; k < kTiles; k++) {
        wait(full + 8 * stage, parity);
        hold(d);
        fenceProducts();
#pragma unroll
        for (int part = 0; part < 4; part++) {
          const unsigned long long along = stage * (unsigned long long)(STAGE_BYTES / 16) + 2 * part;
          multiply(d, aRows + along, bRows + along, k > 0 || part > 0);
        }
        commitProducts();
        if (k > 0) {
          waitProducts<1>();
          if (thread < 2) arriveAt(empty + 8 * before, thread);
        }
        before = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      waitProducts<0>();
      hold(d);
      if (thread < 2) arriveAt(empty + 8 * before, thread);
      wait(taken + 8 * half, takenParity);
      takenParity ^= 1;
      leaveSums(sums + half * ROWS * SUM_PITCH, d, thread);
      arrive(left + 8 * half);
      leftParity ^= 1;
      if (item + step < work) continue;
      // The last tile: all warps finish it.
      const auto [pair, columnTile] = itemOf(item, pairs, slab, columnTiles);
      const bool second = pair >= pairs0;
      const int tile = 2 * (second ? pair - pairs0 : pair) + rank;
#pragma unroll 1
      for (int part = 0; part < 2; part++) {
        const Half at = {sums + part * ROWS * SUM_PITCH, left + 8 * part, leftParity, tile * TILE_M + part * ROWS, columnTile * TILE_N, columns,
                         FINISHERS - 4 + warp, ALL_WARPS, thread % 32, eps};
        storeHalf(at, second ? s1 : s0, joint);
      }
      break;
    }
  }
  // The first warp's other threads have not waited for the one that brings tiles.
  __syncwarp();
  meetCluster();
}
