// What differs among GPUs, beside instructions that a kernel names itself: threads in step, and 8-bit floats. A part of
// common.cuh, which takes it in where conversions are known.

// -- threads in step ---------------------------------------------------------------------------------------------

// 64 on AMD's compute GPUs (hipRTC defines __AMDGCN__, as every compiler for them), 32 on NVIDIA's.
#ifndef FLUX_EMULATED
#ifdef __AMDGCN__
#define WARP 64
#else
#define WARP 32
#endif
#endif

__device__ __forceinline__ float shuffleXor(float x, int mask) {
#ifdef __AMDGCN__
  return __shfl_xor(x, mask);
#else
  return __shfl_xor_sync(0xffffffffu, x, mask);
#endif
}

// -- 8-bit floats ------------------------------------------------------------------------------------------------

// E4M3 is what a GPU's matrix units multiply, and so not the same everywhere: the OCP's on NVIDIA GPUs and AMD's gfx950
// (bias 7, largest 448, NaN is all ones), "FNUZ" on AMD's gfx940 to gfx942 (bias 8, largest 240, no -0, whose code is the
// only NaN). Neither has infinities. Tensors of f8e4m3 hold their GPU's own; ffi/float8.ts has both for the host.
// E5M2 is the OCP's everywhere: the upper byte of f16.

#if defined(__gfx940__) || defined(__gfx941__) || defined(__gfx942__)
#define FLOAT8_FNUZ 1
#endif
#ifndef FLOAT8_FNUZ
#define FLOAT8_FNUZ 0
#endif
// Instructions that convert: AMD's, in the format of the GPU; NVIDIA's.
#if defined(__gfx940__) || defined(__gfx941__) || defined(__gfx942__) || defined(__gfx950__)
#define FLOAT8_AMD 1
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define FLOAT8_NVIDIA 1
#endif

struct f8e4m3 { unsigned char bits; };
struct f8e5m2 { unsigned char bits; };

constexpr float FLOAT8_LARGEST = FLOAT8_FNUZ ? 240.0f : 448.0f;

__device__ __forceinline__ float toFloat(f8e4m3 x) {
#ifdef FLOAT8_AMD
  return __builtin_amdgcn_cvt_f32_fp8((int)x.bits, 0);
#else
  unsigned magnitude = x.bits & 0x7fu;
  bool nan = FLOAT8_FNUZ ? x.bits == 0x80u : magnitude == 0x7fu;
  // The exponent's bias becomes 127: 2^120, or 2^119.
  const float rebias = FLOAT8_FNUZ ? 6.64613997892458e35f : 1.329227995784916e36f;
  float value = nan ? __uint_as_float(0x7fc00000u) : __uint_as_float(magnitude << 20) * rebias;
  return __uint_as_float(__float_as_uint(value) | (nan && FLOAT8_FNUZ ? 0u : (unsigned)(x.bits & 0x80u) << 24));
#endif
}
__device__ __forceinline__ float toFloat(f8e5m2 x) {
  f16 half;
  half.bits = (unsigned short)(x.bits << 8);
  return toFloat(half);
}

#ifdef FLOAT8_AMD
// The instruction does not saturate by itself.
__device__ __forceinline__ float saturated(float x) {
  return x != x ? x : __builtin_amdgcn_fmed3f(x, FLOAT8_LARGEST, -FLOAT8_LARGEST);
}
#endif

// Rounds to nearest, ties to even. What is larger than the largest, infinities too, becomes that. NaN loses its sign.
template <> __device__ __forceinline__ f8e4m3 fromFloat<f8e4m3>(float x) {
  f8e4m3 y;
#if defined(FLOAT8_AMD)
  y.bits = (unsigned char)__builtin_amdgcn_cvt_pk_fp8_f32(saturated(x), 0.0f, 0, false);
#elif defined(FLOAT8_NVIDIA)
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  y.bits = (unsigned char)pair;
#else
  unsigned raw = __float_as_uint(x), magnitude = raw & 0x7fffffffu, sign = raw >> 24 & 0x80u;
  // In bits of f32: the largest, the smallest normal, and what takes the exponent from one bias to the other.
  const unsigned largest = FLOAT8_FNUZ ? 0x43700000u : 0x43e00000u;
  const unsigned normal = FLOAT8_FNUZ ? 0x3c000000u : 0x3c800000u;
  const unsigned bias = FLOAT8_FNUZ ? 0x3b800000u : 0x3c000000u;
  // Below the smallest normal the steps are those of f32 between 2^14 and 2^15, or half of that: the addition rounds.
  const float steps = FLOAT8_FNUZ ? 8192.0f : 16384.0f;
  unsigned code;
  if (magnitude > 0x7f800000u) code = FLOAT8_FNUZ ? 0x80u : 0x7fu, sign = 0;
  else if (magnitude >= largest) code = FLOAT8_FNUZ ? 0x7fu : 0x7eu;
  else if (magnitude < normal) code = __float_as_uint(__uint_as_float(magnitude) + steps) - __float_as_uint(steps);
  else code = (magnitude - bias + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  y.bits = (unsigned char)(FLOAT8_FNUZ && code == 0 ? 0u : code | sign);
#endif
  return y;
}
// Two at a time, as the instructions have them; the first one lies at the lower address.
__device__ __forceinline__ unsigned short toFloat8Pair(float first, float second) {
#if defined(FLOAT8_AMD)
  return (unsigned short)__builtin_amdgcn_cvt_pk_fp8_f32(saturated(first), saturated(second), 0, false);
#elif defined(FLOAT8_NVIDIA)
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return (unsigned short)(fromFloat<f8e4m3>(first).bits | fromFloat<f8e4m3>(second).bits << 8);
#endif
}
// Four: a word, which compilers otherwise put together byte by byte.
__device__ __forceinline__ unsigned toFloat8Quad(float first, float second, float third, float fourth) {
#if defined(FLOAT8_AMD)
  int low = __builtin_amdgcn_cvt_pk_fp8_f32(saturated(first), saturated(second), 0, false);
  return (unsigned)__builtin_amdgcn_cvt_pk_fp8_f32(saturated(third), saturated(fourth), low, true);
#elif defined(FLOAT8_NVIDIA)
  unsigned quad;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(quad) : "f"(first), "f"(second), "f"(third), "f"(fourth));
  return quad;
#else
  return toFloat8Pair(first, second) | (unsigned)toFloat8Pair(third, fourth) << 16;
#endif
}
// And back: the four numbers of a word.
__device__ __forceinline__ void fromFloat8Quad(unsigned quad, float* to) {
#if defined(FLOAT8_AMD)
  const auto low = __builtin_amdgcn_cvt_pk_f32_fp8((int)quad, false);
  const auto high = __builtin_amdgcn_cvt_pk_f32_fp8((int)quad, true);
  to[0] = low[0], to[1] = low[1], to[2] = high[0], to[3] = high[1];
#elif defined(FLOAT8_NVIDIA)
  // By way of f16, which has all numbers of E4M3.
  asm("{\n"
      ".reg .b16 low, high, first, second, third, fourth;\n"
      ".reg .b32 lowPair, highPair;\n"
      "mov.b32 {low, high}, %4;\n"
      "cvt.rn.f16x2.e4m3x2 lowPair, low;\n"
      "cvt.rn.f16x2.e4m3x2 highPair, high;\n"
      "mov.b32 {first, second}, lowPair;\n"
      "mov.b32 {third, fourth}, highPair;\n"
      "cvt.f32.f16 %0, first;\n"
      "cvt.f32.f16 %1, second;\n"
      "cvt.f32.f16 %2, third;\n"
      "cvt.f32.f16 %3, fourth;\n"
      "}"
      : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
      : "r"(quad));
#else
#pragma unroll
  for (int i = 0; i < 4; i++) to[i] = toFloat(f8e4m3{(unsigned char)(quad >> 8 * i)});
#endif
}
