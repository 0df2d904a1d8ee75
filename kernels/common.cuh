// Types and helpers that all kernels share; architecture.cuh has what differs among GPUs. Three compilers read this file:
// NVRTC, hipRTC and, for tests on machines without a GPU, g++ with the emulation of tests/support. So it uses no vendor
// header.
//
// A launch fills in what a file leaves open: its text follows this one, behind lines such as `using T = bf16;` and
// `constexpr int N = 8;` (kernels/gpu.ts).
//
// Values are stored as T (float, bf16, f16, ...) and computed in float: toFloat(x), fromFloat<T>(x).
// Vec<T, N> is N of T moved by one load or store, 16 bytes where sizes allow: the unit of memory-bound kernels.

struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

// -- conversions -------------------------------------------------------------------------------------------------

__device__ __forceinline__ float toFloat(float x) { return x; }
__device__ __forceinline__ float toFloat(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float toFloat(int x) { return (float)x; }
__device__ __forceinline__ float toFloat(unsigned char x) { return (float)x; }

// Half precision by arithmetic on bits: subnormals are scaled up by a float multiplication.
__device__ __forceinline__ float toFloat(f16 x) {
  unsigned magnitude = x.bits & 0x7fffu;
  float value = magnitude >= 0x7c00u ? __uint_as_float(0x7f800000u | (magnitude & 0x3ffu) << 13)
                                     : __uint_as_float(magnitude << 13) * 5.192296858534828e33f;  // 2^112
  return __uint_as_float(__float_as_uint(value) | (unsigned)(x.bits & 0x8000u) << 16);
}

template <typename T> __device__ __forceinline__ T fromFloat(float x);
template <> __device__ __forceinline__ float fromFloat<float>(float x) { return x; }
// Round to nearest, ties to even. NaN stays NaN.
template <> __device__ __forceinline__ bf16 fromFloat<bf16>(float x) {
  bf16 y;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  unsigned raw = __float_as_uint(x);
  y.bits = (raw & 0x7fffffffu) > 0x7f800000u ? (unsigned short)0x7fff
                                             : (unsigned short)((raw + 0x7fffu + (raw >> 16 & 1u)) >> 16);
#endif
  return y;
}
template <> __device__ __forceinline__ f16 fromFloat<f16>(float x) {
  f16 y;
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  unsigned raw = __float_as_uint(x), magnitude = raw & 0x7fffffffu, half;
  if (magnitude > 0x7f800000u) half = 0x7fffu;
  else if (magnitude >= 0x477ff000u) half = 0x7c00u;  // 65520 and more
  else if (magnitude < 0x38800000u) {
    // Below 2^-14 the steps of f16 are those of f32 between 0.5 and 1: the addition rounds.
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  y.bits = (unsigned short)(half | (raw >> 16 & 0x8000u));
#endif
  return y;
}
template <> __device__ __forceinline__ unsigned char fromFloat<unsigned char>(float x) { return (unsigned char)x; }
#include "architecture.cuh"

// -- several elements at a time ----------------------------------------------------------------------------------

// N elements that move together, with one instruction for 16, 8, 4 and 2 bytes: the address is a multiple of that. The
// host chooses N = 1 for odd sizes and addresses.
template <typename T, int N> struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

template <int N, typename T> __device__ __forceinline__ Vec<T, N> loadVec(const T* p) {
  Vec<T, N> value;
  if (sizeof(value) == 16) {
    *reinterpret_cast<uint4*>(&value) = *reinterpret_cast<const uint4*>(p);
  } else if (sizeof(value) == 8) {
    *reinterpret_cast<unsigned long long*>(&value) = *reinterpret_cast<const unsigned long long*>(p);
  } else if (sizeof(value) == 4) {
    *reinterpret_cast<unsigned*>(&value) = *reinterpret_cast<const unsigned*>(p);
  } else if (sizeof(value) == 2) {
    *reinterpret_cast<unsigned short*>(&value) = *reinterpret_cast<const unsigned short*>(p);
  } else {
    for (int i = 0; i < N; i++) value.v[i] = p[i];
  }
  return value;
}
// To global memory.
template <int N, typename T> __device__ __forceinline__ void storeVec(T* p, const Vec<T, N>& value) {
  if (sizeof(value) == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(&value);
#ifdef __CUDA_ARCH__
    // NVIDIA's compilers take an assignment apart, and do not put it together again everywhere.
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 : : "l"(p), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w) : "memory");
#else
    *reinterpret_cast<uint4*>(p) = words;
#endif
  } else if (sizeof(value) == 8) {
    *reinterpret_cast<unsigned long long*>(p) = *reinterpret_cast<const unsigned long long*>(&value);
  } else if (sizeof(value) == 4) {
    *reinterpret_cast<unsigned*>(p) = *reinterpret_cast<const unsigned*>(&value);
  } else if (sizeof(value) == 2) {
    *reinterpret_cast<unsigned short*>(p) = *reinterpret_cast<const unsigned short*>(&value);
  } else {
    for (int i = 0; i < N; i++) p[i] = value.v[i];
  }
}

// N elements of any dtype as floats, 16 bytes at a time.
template <int N, typename X> __device__ __forceinline__ void loadWide(float (&to)[N], const X* p) {
  constexpr int PART = N * sizeof(X) > 16 ? 16 / sizeof(X) : N;
#pragma unroll
  for (int i = 0; i < N; i += PART) {
    const Vec<X, PART> part = loadVec<PART>(p + i);
#pragma unroll
    for (int k = 0; k < PART; k++) to[i + k] = toFloat(part.v[k]);
  }
}

// -- element by element ------------------------------------------------------------------------------------------

// x / (1 + e^-u), for SiLU and its like. The quotient is a product with a reciprocal: two units in the last place, and 0
// where the result is below 1e-36.
__device__ __forceinline__ float timesSigmoid(float x, float u) { return __fdividef(x, 1.0f + expf(-u)); }

// out = f(x), or f(x, y), for `count` pieces of N elements that lie side by side; f takes and returns floats. out may be
// an input. Each thread holds VECTORS pieces, so that as many loads are in flight (kernels/elementwise.ts launches it).
template <int N, int VECTORS, typename T, typename X, typename F>
__device__ __forceinline__ void eachElement(T* out, const X* x, long long count, F f) {
  long long first = (long long)blockIdx.x * blockDim.x * VECTORS + threadIdx.x;
  Vec<X, N> held[VECTORS];
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * blockDim.x;
    if (at < count) held[j] = loadVec<N>(x + at * N);
  }
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * blockDim.x;
    if (at >= count) return;
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; i++) result.v[i] = fromFloat<T>(f(toFloat(held[j].v[i])));
    storeVec(out + at * N, result);
  }
}
template <int N, int VECTORS, typename T, typename X, typename Y, typename F>
__device__ __forceinline__ void eachElement(T* out, const X* x, const Y* y, long long count, F f) {
  long long first = (long long)blockIdx.x * blockDim.x * VECTORS + threadIdx.x;
  Vec<X, N> heldX[VECTORS];
  Vec<Y, N> heldY[VECTORS];
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * blockDim.x;
    if (at >= count) continue;
    heldX[j] = loadVec<N>(x + at * N);
    heldY[j] = loadVec<N>(y + at * N);
  }
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * blockDim.x;
    if (at >= count) return;
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; i++) result.v[i] = fromFloat<T>(f(toFloat(heldX[j].v[i]), toFloat(heldY[j].v[i])));
    storeVec(out + at * N, result);
  }
}

// -- strided tensors ---------------------------------------------------------------------------------------------

// Adds the place of entry `index` of DIMS dimensions to two offsets. size[0], the outermost, is not read.
template <int DIMS>
__device__ __forceinline__ void addPlace(unsigned index, const int* size, const long long* toStride, long long& to,
                                         const long long* fromStride, long long& from) {
#pragma unroll
  for (int dim = DIMS - 1; dim >= 0; dim--) {
    unsigned outer = dim > 0 ? index / (unsigned)size[dim] : 0;
    unsigned at = dim > 0 ? index - outer * (unsigned)size[dim] : index;
    to += at * toStride[dim];
    from += at * fromStride[dim];
    index = outer;
  }
}

// Where row `row` starts, of rows that lie as kernels/rows.ts says. Most tensors need no division.
__device__ __forceinline__ long long rowStart(unsigned row, unsigned inner, long long outerStride,
                                              long long innerStride) {
  if (row < inner) return row * innerStride;
  return row / inner * outerStride + row % inner * innerStride;
}

// -- sums over threads -------------------------------------------------------------------------------------------

// Sum over the warp, in every lane. All lanes take part.
__device__ __forceinline__ float warpSum(float x) {
  for (int mask = WARP / 2; mask > 0; mask /= 2) x += shuffleXor(x, mask);
  return x;
}
__device__ __forceinline__ float warpMax(float x) {
  for (int mask = WARP / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffleXor(x, mask));
  return x;
}

// Sum over the block's `warps` warps, in every thread. `partial` is shared memory for one float a warp (32 always
// suffice), of this call alone: who sums twice has two of them, and so needs one barrier a sum. All threads take part.
__device__ __forceinline__ float blockSum(float x, float* partial, int warps) {
  x = warpSum(x);
  if (warps == 1) return x;
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < warps; i++) sum += partial[i];
  return sum;
}
__device__ __forceinline__ float blockMax(float x, float* partial, int warps) {
  x = warpMax(x);
  if (warps == 1) return x;
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
  __syncthreads();
  float largest = partial[0];
#pragma unroll
  for (int i = 1; i < warps; i++) largest = fmaxf(largest, partial[i]);
  return largest;
}

// Sum over the THREADS threads that share a row: neighbouring lanes of a warp (a power of two of them) or the whole
// block, for which `partial` is as above. All threads of the block take part.
template <int THREADS> __device__ __forceinline__ float rowSum(float x, float* partial) {
  if constexpr (THREADS > WARP) {
    return blockSum(x, partial, THREADS / WARP);
  } else {
    for (int mask = THREADS / 2; mask > 0; mask /= 2) x += shuffleXor(x, mask);
    return x;
  }
}
template <int THREADS> __device__ __forceinline__ float rowMax(float x, float* partial) {
  if constexpr (THREADS > WARP) {
    return blockMax(x, partial, THREADS / WARP);
  } else {
    for (int mask = THREADS / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffleXor(x, mask));
    return x;
  }
}

// -- rows in registers -------------------------------------------------------------------------------------------

// THREADS threads share a row of `length` elements (a multiple of N), as rowSum says. Vector j of thread `lane` has the
// elements from (j * THREADS + lane) * N on, where these are in front of length. A thread without a row has length 0.

template <int THREADS, typename T, int N, int VECTORS>
__device__ __forceinline__ void loadRow(Vec<T, N> (&held)[VECTORS], const T* row, int lane, int length) {
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int at = (j * THREADS + lane) * N;
    if (at < length) held[j] = loadVec<N>(row + at);
  }
}

// To be called when all loads are issued, which would wait for the stores.
template <int THREADS, typename T, int N, int VECTORS>
__device__ __forceinline__ void storeRow(T* row, const Vec<T, N> (&held)[VECTORS], int lane, int length) {
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int at = (j * THREADS + lane) * N;
    if (at < length) storeVec(row + at, held[j]);
  }
}

// The row in float: for kernels that use its elements often enough that to convert them each time costs more.
template <typename T, int N, int VECTORS>
__device__ __forceinline__ void widenRow(Vec<float, N> (&wide)[VECTORS], const Vec<T, N> (&held)[VECTORS]) {
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
#pragma unroll
    for (int i = 0; i < N; i++) wide[j].v[i] = toFloat(held[j].v[i]);
  }
}

// Sum over the row of f(element).
template <int THREADS, typename T, int N, int VECTORS, typename F>
__device__ __forceinline__ float sumOfRow(const Vec<T, N> (&held)[VECTORS], int lane, int length, float* partial, F f) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    if ((j * THREADS + lane) * N >= length) continue;
#pragma unroll
    for (int i = 0; i < N; i++) sum += f(toFloat(held[j].v[i]));
  }
  return rowSum<THREADS>(sum, partial);
}

// Layer norm of an element, with the mean and 1 / sqrt(variance + eps) of its row.
struct RowNorm {
  float mean, factor;
  __device__ __forceinline__ float operator()(float x) const { return (x - mean) * factor; }
};
template <int THREADS, typename T, int N, int VECTORS>
__device__ __forceinline__ RowNorm normOfRow(const Vec<T, N> (&held)[VECTORS], int lane, int length, int hidden,
                                             float eps, float (&partials)[2][32]) {
  float mean = sumOfRow<THREADS>(held, lane, length, partials[0], [](float x) { return x; }) / hidden;
  // The variance from differences, not from squares: activations of T5 and FLUX have means far from zero.
  float squares =
      sumOfRow<THREADS>(held, lane, length, partials[1], [=](float x) { return (x - mean) * (x - mean); });
  return {mean, rsqrtf(squares / hidden + eps)};
}

// What adaptive layer norm makes of the row: norm(element) * (1 + scale) + shift.
template <int THREADS, typename T, int N, int VECTORS, typename S, typename B>
__device__ __forceinline__ void modulateRow(Vec<T, N> (&held)[VECTORS], const RowNorm& norm, const S* scale,
                                            const B* shift, int lane, int length) {
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int at = (j * THREADS + lane) * N;
    if (at >= length) continue;
    Vec<S, N> a = loadVec<N>(scale + at);
    Vec<B, N> b = loadVec<N>(shift + at);
#pragma unroll
    for (int i = 0; i < N; i++) {
      float normal = norm(toFloat(held[j].v[i]));
      held[j].v[i] = fromFloat<T>(fmaf(normal, 1.0f + toFloat(a.v[i]), toFloat(b.v[i])));
    }
  }
}

// -- 8-bit floats with scales ------------------------------------------------------------------------------------

// value = x * (1 / scale), rounded to E4M3, with scale = largest |x| / what the largest is to become: FLOAT8_LARGEST where a tensor
// has one scale, FLOAT8_ROW_LARGEST where each row has its own.
//
// The latter is E4M3's largest divided by 2^4, for sums in f16, which end at 65504 (fused_linear.cu): a row of weights is scaled so
// that its absolute values sum to at most FLOAT8_ROW_SUM (quantize_weight_rows.cu). So no sum of products is above 28 * FLOAT8_ROW_SUM =
// 49152, and a quarter of that remains for what rounding adds. Normal numbers still reach down to 2^-11 of the largest.
constexpr float FLOAT8_ROW_LARGEST = 28.0f, FLOAT8_ROW_SUM = 49152.0f / 28.0f;
// What v is multiplied by in attention's tiles of E4M3, for sums in f16 (flash_attention.cu).
constexpr float FLOAT8_VALUE_FACTOR = 0.125f;
// As the smallest largest value: rows of zeros have a scale too.
constexpr float FLOAT8_SMALLEST = 1e-12f;

// A NaN does not count: it stays one whatever its scale is.
template <typename T, int N> __device__ __forceinline__ float largestOf(float largest, const Vec<T, N>& x) {
#pragma unroll
  for (int i = 0; i < N; i++) largest = fmaxf(largest, fabsf(toFloat(x.v[i])));
  return largest;
}

__device__ __forceinline__ float scaleOf(float largest, float becomes = FLOAT8_ROW_LARGEST) {
  return __fdiv_rn(fmaxf(largest, FLOAT8_SMALLEST), becomes);
}

// Stores x * factor. Through words: compilers would put a Vec of bytes together byte by byte.
template <typename T, int N>
__device__ __forceinline__ void storeQuantized(f8e4m3* p, const Vec<T, N>& x, float factor) {
  if constexpr (N % 4 == 0) {
    Vec<unsigned, N / 4> words;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      words.v[i / 4] = toFloat8Quad(toFloat(x.v[i]) * factor, toFloat(x.v[i + 1]) * factor,
                                    toFloat(x.v[i + 2]) * factor, toFloat(x.v[i + 3]) * factor);
    }
    storeVec(reinterpret_cast<unsigned*>(p), words);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) p[i] = fromFloat<f8e4m3>(toFloat(x.v[i]) * factor);
  }
}

// The row's largest absolute value. `partial` is as for rowMax; all threads of the block take part.
template <int THREADS, typename T, int N, int VECTORS>
__device__ __forceinline__ float largestOfRow(const Vec<T, N> (&held)[VECTORS], int lane, int length, float* partial) {
  float largest = 0.0f;
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    if ((j * THREADS + lane) * N < length) largest = largestOf(largest, held[j]);
  }
  return rowMax<THREADS>(largest, partial);
}

// storeRow in E4M3 by a scale, which is stored, too.
template <int THREADS, typename T, int N, int VECTORS>
__device__ __forceinline__ void storeScaledRow(f8e4m3* row, float* scale, const Vec<T, N> (&held)[VECTORS], int lane,
                                               int length, float found) {
  if (lane == 0 && length > 0) *scale = found;
  const float factor = __frcp_rn(found);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    int at = (j * THREADS + lane) * N;
    if (at < length) storeQuantized(row + at, held[j], factor);
  }
}

// The same by the scale that the row's largest value asks for. `partial` is as for rowMax; all threads of the block take part.
template <int THREADS, typename T, int N, int VECTORS>
__device__ __forceinline__ void storeRow(f8e4m3* row, float* scale, const Vec<T, N> (&held)[VECTORS], int lane,
                                         int length, float* partial) {
  const float found = scaleOf(largestOfRow<THREADS>(held, lane, length, partial));
  storeScaledRow<THREADS>(row, scale, held, lane, length, found);
}

// -- adaptive layer norm -----------------------------------------------------------------------------------------

// Stores the norm of row `row` of out, which has `hidden` elements, modulated by scale and shift.
template <int THREADS, typename T, int N, int VECTORS, typename S, typename B>
__device__ __forceinline__ void storeAdaLayerNorm(T* out, float*, float*, long long row, Vec<T, N> (&held)[VECTORS],
                                                  const S* scale, const B* shift, int lane, int length, int hidden,
                                                  float eps, float (&partials)[2][32]) {
  const RowNorm norm = normOfRow<THREADS>(held, lane, length, hidden, eps, partials);
  modulateRow<THREADS>(held, norm, scale, shift, lane, length);
  storeRow<THREADS>(out + row * hidden, held, lane, length);
}
// The same in E4M3, with the rows' scales, and with their lengths where they are wanted. The row is held in float, neither
// rounded nor converted in between.
template <int THREADS, typename T, int N, int VECTORS, typename S, typename B>
__device__ __forceinline__ void storeAdaLayerNorm(f8e4m3* out, float* rowScales, float* rowLengths, long long row,
                                                  const Vec<T, N> (&loaded)[VECTORS], const S* scale,
                                                  const B* shift, int lane, int length, int hidden,
                                                  float eps, float (&partials)[2][32]) {
  Vec<float, N> held[VECTORS];
  widenRow(held, loaded);
  const RowNorm norm = normOfRow<THREADS>(held, lane, length, hidden, eps, partials);
  modulateRow<THREADS>(held, norm, scale, shift, lane, length);
  // Who has met for the second sum has read the partials of the first.
  storeRow<THREADS>(out + row * hidden, rowScales + row, held, lane, length, partials[0]);
  if (rowLengths == nullptr) return;
  const float squares = sumOfRow<THREADS>(held, lane, length, partials[1], [](float x) { return x * x; });
  if (lane == 0 && length > 0) rowLengths[row] = sqrtf(squares);
}
