// What a CUDA kernel's text expects of its compiler, for g++: the emulated GPU (emulated_gpu.ts) puts this file in front
// of a kernel. It has no vendor header's names but those below and includes nothing, as NVRTC does, so that a kernel
// that needs more fails here too. simt_runtime.cpp runs the threads.
#pragma once

#define FLUX_EMULATED 1
// Lanes of a warp, as many bits of a mask: 64 on an AMD GPU, which `SIMT_HIP` says this is.
#ifdef SIMT_HIP
#define __AMDGCN__ 1
#define WARP 64
typedef unsigned long long SimtMask;
#else
#define WARP 32
typedef unsigned SimtMask;
#endif
const SimtMask SIMT_ALL = ~(SimtMask)0;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static
// A section of its own, so that the runtime can poison all shared variables before each block.
#define __shared__ static __attribute__((section("simt_shared")))

typedef decltype(sizeof(0)) size_t;

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };

#define SIMT_VECTORS(type, name)                                                                    \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                          \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; };            \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                  \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMT_VECTORS(char, char)
SIMT_VECTORS(unsigned char, uchar)
SIMT_VECTORS(short, short)
SIMT_VECTORS(unsigned short, ushort)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
SIMT_VECTORS(float, float)
SIMT_VECTORS(double, double)
SIMT_VECTORS(long long, longlong)
SIMT_VECTORS(unsigned long long, ulonglong)
#undef SIMT_VECTORS

// -- the runtime -------------------------------------------------------------------------------------------------

// Kernels are compiled with hidden names, so that none is mistaken for one of the process's; these are shared.
#pragma GCC visibility push(default)
extern "C" {
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
extern const int warpSize;

// A launch: grid and block (x, y, z each), dynamic shared bytes, the addresses of the arguments.
struct SimtLaunch {
  int grid[3], block[3];
  int sharedBytes;
  void** arguments;
};
// Where it failed, and how: see FAULTS in emulated_kernel.ts.
struct SimtFault {
  int code;
  int block[3], thread[3];
};
void simtRun(const SimtLaunch*, SimtFault*, void (*kernel)(void** arguments), char* shared, char* sharedEnd);

void simtSyncThreads();
// Waits for the other lanes of `mask` and hands out what each brought: a warp's values, of which `*present` says who came.
// Lanes that meet must ask for the same `operation`.
const unsigned long long* simtExchange(SimtMask mask, int operation, unsigned long long value, SimtMask* present);
int simtLane();
extern char simtDynamicShared[];
}
#pragma GCC visibility pop

// -- barriers, shuffles and votes --------------------------------------------------------------------------------

inline void __syncthreads() { simtSyncThreads(); }
inline void __syncwarp(SimtMask mask = SIMT_ALL) {
  SimtMask present;
  simtExchange(mask, 1, 0, &present);
}

// A lane that did not come gives all ones (NaN), what a GPU leaves undefined.
template <typename T> T simtShuffle(SimtMask mask, int operation, T value, int lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  unsigned long long bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  SimtMask present;
  const unsigned long long* values = simtExchange(mask, operation, bits, &present);
  unsigned long long got = present >> lane & 1 ? values[lane] : ~0ull;
  __builtin_memcpy(&value, &got, sizeof(T));
  return value;
}
// Lanes talk within segments of `width`; one that points outside of its segment gets its own value back.
template <typename T> T __shfl_sync(SimtMask mask, T value, int lane, int width = WARP) {
  return simtShuffle(mask, 2, value, (simtLane() & ~(width - 1)) | (lane & (width - 1)));
}
template <typename T> T __shfl_xor_sync(SimtMask mask, T value, int laneMask, int width = WARP) {
  int self = simtLane(), other = self ^ laneMask;
  return simtShuffle(mask, 3, value, other < (self & ~(width - 1)) + width ? other : self);
}
template <typename T> T __shfl_down_sync(SimtMask mask, T value, unsigned delta, int width = WARP) {
  int self = simtLane();
  return simtShuffle(mask, 4, value, (self & (width - 1)) + (int)delta < width ? self + (int)delta : self);
}
template <typename T> T __shfl_up_sync(SimtMask mask, T value, unsigned delta, int width = WARP) {
  int self = simtLane();
  return simtShuffle(mask, 5, value, (self & (width - 1)) >= (int)delta ? self - (int)delta : self);
}

inline SimtMask __ballot_sync(SimtMask mask, int predicate) {
  SimtMask present, ballot = 0;
  const unsigned long long* values = simtExchange(mask, 6, predicate != 0, &present);
  for (int lane = 0; lane < WARP; lane++) {
    if (present >> lane & 1 && values[lane]) ballot |= (SimtMask)1 << lane;
  }
  return ballot;
}
inline int __any_sync(SimtMask mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(SimtMask mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

#ifdef SIMT_HIP
// HIP's shuffles and votes are of all lanes.
template <typename T> T __shfl(T value, int lane, int width = WARP) { return __shfl_sync(SIMT_ALL, value, lane, width); }
template <typename T> T __shfl_xor(T value, int mask, int width = WARP) {
  return __shfl_xor_sync(SIMT_ALL, value, mask, width);
}

// The matrix unit's product of a 32 x 8 and an 8 x 32 matrix of bfloat16, added to 32 x 32 floats. Lane l brings row l % 32
// of a and column l % 32 of b, each from 4 * (l / 32) on; it has column l % 32 of the sums, rows 8 * (i / 4) +
// 4 * (l / 32) + i % 4.
#pragma GCC diagnostic ignored "-Wpsabi"  // nobody calls this across libraries
typedef short SimtFrag __attribute__((vector_size(8)));
typedef float SimtSums __attribute__((vector_size(64)));
inline SimtSums __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(SimtFrag a, SimtFrag b, SimtSums sums, int, int, int) {
  unsigned long long bits;
  unsigned short rows[64][4], column[2][4];
  SimtMask present;
  __builtin_memcpy(&bits, &a, 8);
  const unsigned long long* values = simtExchange(SIMT_ALL, 7, bits, &present);
  if (present == SIMT_ALL) __builtin_memcpy(rows, values, sizeof(rows));
  else __builtin_memset(rows, 0xff, sizeof(rows));  // NaN
  __builtin_memcpy(&bits, &b, 8);
  values = simtExchange(SIMT_ALL, 8, bits, &present);
  const int lane = simtLane();
  for (int half = 0; half < 2; half++) __builtin_memcpy(column[half], &values[lane % 32 + 32 * half], 8);
  auto widen = [](unsigned short x) {
    unsigned word = (unsigned)x << 16;
    float value;
    __builtin_memcpy(&value, &word, 4);
    return value;
  };
  for (int i = 0; i < 16; i++) {
    const int row = 8 * (i / 4) + 4 * (lane / 32) + i % 4;
    float sum = sums[i];
    for (int k = 0; k < 8; k++) sum += widen(rows[row + 32 * (k / 4)][k % 4]) * widen(column[k / 4][k % 4]);
    sums[i] = sum;
  }
  return sums;
}
#endif

// -- memory ------------------------------------------------------------------------------------------------------

template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
template <typename T> void __stcs(T* p, T value) { *p = value; }
template <typename T> void __stcg(T* p, T value) { *p = value; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// One emulated thread runs at a time, so plain accesses are atomic.
#define SIMT_ATOMICS(type)                                                                             \
  inline type atomicAdd(type* p, type x) { type old = *p; *p = old + x; return old; }                 \
  inline type atomicExch(type* p, type x) { type old = *p; *p = x; return old; }
#define SIMT_INTEGER_ATOMICS(type)                                                                     \
  SIMT_ATOMICS(type)                                                                                   \
  inline type atomicMax(type* p, type x) { type old = *p; if (x > old) *p = x; return old; }          \
  inline type atomicMin(type* p, type x) { type old = *p; if (x < old) *p = x; return old; }          \
  inline type atomicOr(type* p, type x) { type old = *p; *p = old | x; return old; }                  \
  inline type atomicCAS(type* p, type is, type x) { type old = *p; if (old == is) *p = x; return old; }
SIMT_ATOMICS(float)
SIMT_ATOMICS(double)
SIMT_INTEGER_ATOMICS(int)
SIMT_INTEGER_ATOMICS(unsigned)
SIMT_INTEGER_ATOMICS(unsigned long long)
#undef SIMT_ATOMICS
#undef SIMT_INTEGER_ATOMICS

// -- numbers -----------------------------------------------------------------------------------------------------

template <typename To, typename From> To simtBits(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) { return simtBits<unsigned>(x); }
inline int __float_as_int(float x) { return simtBits<int>(x); }
inline float __uint_as_float(unsigned x) { return simtBits<float>(x); }
inline float __int_as_float(int x) { return simtBits<float>(x); }

#define SIMT_MIN_MAX(type)                                        \
  inline type min(type a, type b) { return b < a ? b : a; }       \
  inline type max(type a, type b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline double min(double a, double b) { return __builtin_fmin(a, b); }
inline double max(double a, double b) { return __builtin_fmax(a, b); }
inline int abs(int x) { return x < 0 ? -x : x; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }

// Each float function with the double one of the same stem, both also under the overloaded name.
#define SIMT_MATH(stem)                                                    \
  inline float stem##f(float x) { return __builtin_##stem##f(x); }        \
  inline double stem(double x) { return __builtin_##stem(x); }            \
  inline float stem(float x) { return __builtin_##stem##f(x); }
#define SIMT_MATH2(stem)                                                            \
  inline float stem##f(float x, float y) { return __builtin_##stem##f(x, y); }     \
  inline double stem(double x, double y) { return __builtin_##stem(x, y); }        \
  inline float stem(float x, float y) { return __builtin_##stem##f(x, y); }
SIMT_MATH(sqrt)
SIMT_MATH(exp)
SIMT_MATH(exp2)
SIMT_MATH(expm1)
SIMT_MATH(log)
SIMT_MATH(log2)
SIMT_MATH(log10)
SIMT_MATH(log1p)
SIMT_MATH(sin)
SIMT_MATH(cos)
SIMT_MATH(tanh)
SIMT_MATH(erf)
SIMT_MATH(fabs)
SIMT_MATH(floor)
SIMT_MATH(ceil)
SIMT_MATH(round)
SIMT_MATH(rint)
SIMT_MATH(trunc)
SIMT_MATH2(pow)
SIMT_MATH2(fmod)
SIMT_MATH2(fmax)
SIMT_MATH2(fmin)
SIMT_MATH2(copysign)
#undef SIMT_MATH
#undef SIMT_MATH2
inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }
inline void sincosf(float x, float* sine, float* cosine) {
  *sine = __builtin_sinf(x);
  *cosine = __builtin_cosf(x);
}
inline float __expf(float x) { return __builtin_expf(x); }
inline float __logf(float x) { return __builtin_logf(x); }
inline float __log2f(float x) { return __builtin_log2f(x); }
inline float __sinf(float x) { return __builtin_sinf(x); }
inline float __cosf(float x) { return __builtin_cosf(x); }
inline float __powf(float x, float y) { return __builtin_powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline int __float2int_rn(float x) { return (int)__builtin_rintf(x); }
inline unsigned __float2uint_rn(float x) { return (unsigned)(long long)__builtin_rintf(x); }
inline float __saturatef(float x) { return __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }

// -- the trampoline ----------------------------------------------------------------------------------------------

// What emulated_arguments.ts compares with the arguments: the letter of a parameter's type, with a pointer's element size
// in bits 8 and up (0 where any tensor fits).
template <typename T> struct SimtParameter;
template <> struct SimtParameter<int> { static const int code = 'i'; };
template <> struct SimtParameter<unsigned> { static const int code = 'i'; };
template <> struct SimtParameter<long> { static const int code = 'l'; };
template <> struct SimtParameter<unsigned long> { static const int code = 'l'; };
template <> struct SimtParameter<long long> { static const int code = 'l'; };
template <> struct SimtParameter<unsigned long long> { static const int code = 'l'; };
template <> struct SimtParameter<float> { static const int code = 'f'; };
template <typename T> struct SimtElement { static const int size = sizeof(T) <= 8 ? sizeof(T) : 0; };
template <> struct SimtElement<void> { static const int size = 0; };
template <typename T> struct SimtElement<const T> : SimtElement<T> {};
template <typename T> struct SimtParameter<T*> { static const int code = 'p' | SimtElement<T>::size << 8; };

template <int... I> struct SimtIndices {};
template <int N, int... I> struct SimtCount : SimtCount<N - 1, N - 1, I...> {};
template <int... I> struct SimtCount<0, I...> { typedef SimtIndices<I...> type; };

template <auto kernel, typename... P, int... I>
void simtCall(void (*)(P...), SimtIndices<I...>, void** arguments) {
  (void)arguments;
  kernel(*reinterpret_cast<P*>(arguments[I])...);
}
template <typename... P> int simtParametersOf(void (*)(P...), int* codes) {
  int count = 0;
  ((codes[count++] = SimtParameter<P>::code), ...);
  return count;
}
template <typename... P> constexpr int simtArity(void (*)(P...)) { return sizeof...(P); }

extern "C" char __start_simt_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_simt_shared[] __attribute__((weak, visibility("hidden")));

// What a compiled kernel exports. `simtParameters` fills in at most 64 codes and returns how many there are.
#define SIMT_EXPORT(kernel) SIMT_EXPORT_NAMED(kernel, )
#define SIMT_EXPORT_NAMED(kernel, suffix)                                                                \
  static void simtThreadOf##suffix(void** arguments) {                                                   \
    simtCall<&kernel>(&kernel, SimtCount<simtArity(&kernel)>::type(), arguments);                        \
  }                                                                                                      \
  _Pragma("GCC visibility push(default)")                                                                \
  extern "C" int simtParameters##suffix(int* codes) { return simtParametersOf(&kernel, codes); }                 \
  extern "C" int simtSharedBytes##suffix() { return (int)(__stop_simt_shared - __start_simt_shared); }           \
  extern "C" void simtLaunch##suffix(const SimtLaunch* launch, SimtFault* fault) {                               \
    simtRun(launch, fault, simtThreadOf##suffix, __start_simt_shared, __stop_simt_shared);                       \
  }                                                                                                      \
  _Pragma("GCC visibility pop")
