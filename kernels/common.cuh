// Types and helpers that all kernels share. Three compilers read this file: NVRTC, hipRTC and, for tests on machines
// without a GPU, g++ with the emulation of tests/support. So it includes nothing and uses no vendor header.
//
// A launch fills in what a file leaves open: its text follows this one, behind lines such as `using T = bf16;` and
// `constexpr int N = 8;` (kernels/gpu.ts).
//
// Values are stored as T (float, bf16, f16, ...) and computed in float: toFloat(x), fromFloat<T>(x).
// Vec<T, N> is N of T moved by one load or store, 16 bytes where sizes allow: the unit of memory-bound kernels.

#ifndef FLUX_EMULATED
#ifdef __HIP_PLATFORM_AMD__
#define WARP 64
#else
#define WARP 32
#endif
#endif

struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };
struct f8e4m3 { unsigned char bits; };
struct f8e5m2 { unsigned char bits; };

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

// E4M3 (OCP): bias 7, no infinities, NaN is all ones. E5M2 is the upper byte of f16.
__device__ __forceinline__ float toFloat(f8e4m3 x) {
  unsigned magnitude = x.bits & 0x7fu;
  float value = magnitude == 0x7fu ? __uint_as_float(0x7fc00000u)
                                   : __uint_as_float(magnitude << 20) * 1.329227995784916e36f;  // 2^120
  return __uint_as_float(__float_as_uint(value) | (unsigned)(x.bits & 0x80u) << 24);
}
__device__ __forceinline__ float toFloat(f8e5m2 x) {
  f16 half;
  half.bits = (unsigned short)(x.bits << 8);
  return toFloat(half);
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
template <> __device__ __forceinline__ unsigned char fromFloat<unsigned char>(float x) { return (unsigned char)x; }

// -- several elements at a time ----------------------------------------------------------------------------------

// N elements that move together; 16 bytes with one instruction. The host chooses N = 1 for odd sizes and addresses.
template <typename T, int N> struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

template <int N, typename T> __device__ __forceinline__ Vec<T, N> loadVec(const T* p) {
  Vec<T, N> value;
  if (sizeof(value) == 16) {
    *reinterpret_cast<uint4*>(&value) = *reinterpret_cast<const uint4*>(p);
  } else {
    for (int i = 0; i < N; i++) value.v[i] = p[i];
  }
  return value;
}
template <int N, typename T> __device__ __forceinline__ void storeVec(T* p, const Vec<T, N>& value) {
  if (sizeof(value) == 16) {
    *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&value);
  } else {
    for (int i = 0; i < N; i++) p[i] = value.v[i];
  }
}

// -- sums over threads -------------------------------------------------------------------------------------------

__device__ __forceinline__ float shuffleXor(float x, int mask) {
#ifdef __HIP_PLATFORM_AMD__
  return __shfl_xor(x, mask);
#else
  return __shfl_xor_sync(0xffffffffu, x, mask);
#endif
}

// Sum over the warp, in every lane. All lanes take part.
__device__ __forceinline__ float warpSum(float x) {
  for (int mask = WARP / 2; mask > 0; mask /= 2) x += shuffleXor(x, mask);
  return x;
}
__device__ __forceinline__ float warpMax(float x) {
  for (int mask = WARP / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffleXor(x, mask));
  return x;
}

// Sum over the block, in every thread. `partial` is shared memory for one float a warp (32 always suffice); the block
// is whole warps, and all threads take part. Safe to call again at once.
__device__ __forceinline__ float blockSum(float x, float* partial) {
  x = warpSum(x);
  int warps = blockDim.x / WARP;
  if (warps == 1) return x;
  __syncthreads();
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < warps; i++) sum += partial[i];
  return sum;
}
__device__ __forceinline__ float blockMax(float x, float* partial) {
  x = warpMax(x);
  int warps = blockDim.x / WARP;
  if (warps == 1) return x;
  __syncthreads();
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
  __syncthreads();
  float largest = partial[0];
  for (int i = 1; i < warps; i++) largest = fmaxf(largest, partial[i]);
  return largest;
}
