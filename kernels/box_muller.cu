// torch's normal numbers from its uniform ones (Box & Muller 1958), bit for bit as its CPU generator makes them: in blocks
// of 16, eight of u1 and eight of u2 become eight of r cos t and eight of r sin t, r = sqrt(-2 ln(1 - u1)), t = 2 pi u2.
//
//   out   [16 * blocks] T      uniform   [16 * blocks] float, multiples of 2^-24 from 0 up to 1
//
// Logarithm, sine and cosine are Cephes' polynomials in float. Which products and sums are fused, and which are not, is
// part of the result: so every step is written as the one instruction that it is, for a compiler to leave alone.
// One thread for each pair. Bytes moved: 16 * blocks * (4 + sizeof(T)); FLUX's 262144 numbers are a launch's latency.
#include "common.cuh"

__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float fma3(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Natural logarithm of m * 2^-24, m an integer from 1 to 2^24.
__device__ __forceinline__ float logOfUniform(float u) {
  // u = x * 2^exponent with x in [0.5, 1); moved to [sqrt(1/2), sqrt(2)) and shifted by one.
  int exponent = (int)(__float_as_uint(u) >> 23) - 126;
  float x = __uint_as_float((__float_as_uint(u) & 0x7fffffu) | 0x3f000000u);
  if (x < 0.707106781186547524f) {
    exponent -= 1;
    x = add(add(x, -1.0f), x);
  } else {
    x = add(x, -1.0f);
  }
  float z = mul(x, x), e = (float)exponent;
  float y = fma3(7.0376836292e-2f, x, -1.1514610310e-1f);
  y = fma3(y, x, 1.1676998740e-1f);
  y = fma3(y, x, -1.2420140846e-1f);
  y = fma3(y, x, 1.4249322787e-1f);
  y = fma3(y, x, -1.6668057665e-1f);
  y = fma3(y, x, 2.0000714765e-1f);
  y = fma3(y, x, -2.4999993993e-1f);
  y = fma3(y, x, 3.3333331174e-1f);
  y = fma3(mul(y, x), z, mul(e, -2.12194440e-4f));
  y = fma3(z, -0.5f, y);
  return fma3(e, 0.693359375f, add(x, y));
}

extern "C" __global__ void boxMuller(T* out, const float* uniform, int pairs) {
  int pair = blockIdx.x * blockDim.x + threadIdx.x;
  if (pair >= pairs) return;
  long long first = (long long)(pair / 8) * 16 + pair % 8;
  float radius = __fsqrt_rn(mul(-2.0f, logOfUniform(add(1.0f, -uniform[first]))));
  float theta = mul(6.283185307179586f, uniform[first + 8]);

  // The octant, made even, tells which polynomial and sign serve sine and cosine; pi/4 is taken off in three parts.
  int octant = ((int)mul(theta, 1.27323954473516f) + 1) & ~1;
  float o = (float)octant;
  float x = fma3(o, -0.78515625f, theta);
  x = fma3(o, -2.4187564849853515625e-4f, x);
  x = fma3(o, -3.77489497744594108e-8f, x);
  float z = mul(x, x);

  float c = fma3(2.443315711809948e-5f, z, -1.388731625493765e-3f);
  c = fma3(c, z, 4.166664568298827e-2f);
  c = fma3(mul(c, z), z, mul(z, -0.5f));
  c = add(c, 1.0f);

  float s = fma3(-1.9515295891e-4f, z, 8.3321608736e-3f);
  s = fma3(s, z, -1.6666654611e-1f);
  s = fma3(mul(s, z), x, x);

  bool swap = octant & 2;
  float sine = swap ? c : s, cosine = swap ? s : c;
  if (octant & 4) sine = -sine;
  if (!((octant - 2) & 4)) cosine = -cosine;
  // + 0: torch multiplies by the standard deviation 1 and adds the mean 0, which turns -0 into 0.
  out[first] = fromFloat<T>(add(mul(radius, cosine), 0.0f));
  out[first + 8] = fromFloat<T>(add(mul(radius, sine), 0.0f));
}
