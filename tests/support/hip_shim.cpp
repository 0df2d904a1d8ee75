// HIP, hipRTC, hipBLASLt and MIOpen for an NVIDIA GPU: what ffi/hip binds of them, forwarded to CUDA's driver, NVRTC and
// cuBLASLt. Test code: with it the HIP device's own sequence of calls runs on hardware that we have; it says nothing about
// AMD's libraries or speed. It is as strict as HIP where that is stricter or other than CUDA: kinds of copies, the marker
// behind a launch's arguments, options of the compiler, attributes' numbers.
//
// The GPU calls itself gfx950, whose float8 is NVIDIA's too, and has warps of 32. Convolutions are a plain kernel of ours.
// Linked to libcuda, libnvrtc and libcublasLt by their files (hip_shim.ts); the stand-ins of cuda_on_cpu.ts serve as well.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t u64;
typedef int64_t i64;

// -- CUDA, as far as it is called (statuses are ints, handles and addresses 64-bit integers) ------------------------------

extern "C" {
int cuInit(unsigned);
int cuGetErrorName(int, const char**);
int cuGetErrorString(int, const char**);
int cuDeviceGetCount(int*);
int cuDeviceGet(int*, int);
int cuDeviceGetName(char*, int, int);
int cuDeviceTotalMem_v2(u64*, int);
int cuDeviceGetAttribute(int*, int, int);
int cuDevicePrimaryCtxRetain(u64*, int);
int cuCtxSetCurrent(u64);
int cuStreamCreate(u64*, unsigned);
int cuStreamSynchronize(u64);
int cuStreamQuery(u64);
int cuStreamWaitEvent(u64, u64, unsigned);
int cuStreamDestroy_v2(u64);
int cuEventCreate(u64*, unsigned);
int cuEventRecord(u64, u64);
int cuEventSynchronize(u64);
int cuEventQuery(u64);
int cuEventElapsedTime(float*, u64, u64);
int cuEventDestroy_v2(u64);
int cuMemGetInfo_v2(u64*, u64*);
int cuMemHostAlloc(u64*, u64, unsigned);
int cuMemFreeHost(u64);
int cuMemGetAllocationGranularity(u64*, const void*, int);
int cuMemAddressReserve(u64*, u64, u64, u64, u64);
int cuMemAddressFree(u64, u64);
int cuMemCreate(u64*, u64, const void*, u64);
int cuMemRelease(u64);
int cuMemMap(u64, u64, u64, u64, u64);
int cuMemSetAccess(u64, u64, const void*, u64);
int cuMemUnmap(u64, u64);
int cuMemcpyHtoDAsync_v2(u64, u64, u64, u64);
int cuMemcpyDtoHAsync_v2(u64, u64, u64, u64);
int cuMemcpyDtoDAsync_v2(u64, u64, u64, u64);
int cuMemsetD8Async(u64, unsigned char, u64, u64);
int cuMemsetD32Async(u64, uint32_t, u64, u64);
int cuModuleLoadData(u64*, const void*);
int cuModuleUnload(u64);
int cuModuleGetFunction(u64*, u64, const char*);
int cuFuncGetAttribute(int*, int, u64);
int cuFuncSetAttribute(u64, int, int);
int cuLaunchKernel(u64, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, u64, void**, u64*);
int cuStreamBeginCapture_v2(u64, int);
int cuStreamEndCapture(u64, u64*);
int cuGraphInstantiateWithFlags(u64*, u64, u64);
int cuGraphLaunch(u64, u64);
int cuGraphExecDestroy(u64);
int cuGraphDestroy(u64);

const char* nvrtcGetErrorString(int);
int nvrtcVersion(int*, int*);
int nvrtcCreateProgram(u64*, const char*, const char*, int, const char* const*, const char* const*);
int nvrtcDestroyProgram(u64*);
int nvrtcCompileProgram(u64, int, const char* const*);
int nvrtcGetCUBINSize(u64, u64*);
int nvrtcGetCUBIN(u64, char*);
int nvrtcGetProgramLogSize(u64, u64*);
int nvrtcGetProgramLog(u64, char*);

int cublasLtCreate(u64*);
int cublasLtDestroy(u64);
int cublasLtMatmulDescCreate(u64*, int, int);
int cublasLtMatmulDescSetAttribute(u64, int, const void*, u64);
int cublasLtMatmulDescDestroy(u64);
int cublasLtMatrixLayoutCreate(u64*, int, u64, u64, i64);
int cublasLtMatrixLayoutSetAttribute(u64, int, const void*, u64);
int cublasLtMatrixLayoutDestroy(u64);
int cublasLtMatmulPreferenceCreate(u64*);
int cublasLtMatmulPreferenceSetAttribute(u64, int, const void*, u64);
int cublasLtMatmulPreferenceDestroy(u64);
int cublasLtMatmulAlgoGetHeuristic(u64, u64, u64, u64, u64, u64, u64, int, void*, int*);
int cublasLtMatmul(u64, u64, const void*, u64, u64, u64, u64, const void*, u64, u64, u64, u64, const void*, u64, u64, u64);
}

enum { OK = 0, INVALID_VALUE = 1, NOT_SUPPORTED = 801 };
#define TRY(call) do { int status_ = (call); if (status_) return status_; } while (0)

extern "C" {

// -- runtime and devices -------------------------------------------------------------------------------------------------

int hipInit(unsigned flags) { return cuInit(flags); }
int hipRuntimeGetVersion(int* version) { *version = 60241133; return OK; }
const char* hipGetErrorName(int error) {
  const char* text = nullptr;
  return cuGetErrorName(error, &text) == 0 ? text : "hipErrorUnknown";
}
const char* hipGetErrorString(int error) {
  const char* text = nullptr;
  return cuGetErrorString(error, &text) == 0 ? text : "no words";
}
int hipGetDeviceCount(int* count) { return cuDeviceGetCount(count); }
int hipDeviceGetName(char* name, int length, int device) {
  int handle;
  TRY(cuDeviceGet(&handle, device));
  return cuDeviceGetName(name, length, handle);
}
int hipDeviceTotalMem(u64* bytes, int device) {
  int handle;
  TRY(cuDeviceGet(&handle, device));
  return cuDeviceTotalMem_v2(bytes, handle);
}
int hipDeviceGetAttribute(int* value, int attribute, int device) {
  int handle, cuda;
  TRY(cuDeviceGet(&handle, device));
  switch (attribute) {
    case 26: case 27: case 28: cuda = attribute - 24; break;             // most threads in x, y, z
    case 29: case 30: case 31: cuda = attribute - 24; break;             // most blocks
    case 56: cuda = 1; break;                                            // most threads
    case 63: cuda = 16; break;                                           // multiprocessors
    case 74: *value = 65536; return OK;                                  // shared memory, as AMD's have it
    case 87: cuda = 10; break;                                           // warp
    case 89: cuda = 102; break;                                          // memory mapping
    default: return INVALID_VALUE;
  }
  return cuDeviceGetAttribute(value, cuda, handle);
}
int hipGetDevicePropertiesR0600(char* properties, int device) {
  memset(properties, 0, 1472);
  strcpy(properties + 1160, "gfx950:sramecc+:xnack-");
  return hipDeviceGetName(properties, 256, device);
}
int hipSetDevice(int device) {
  static u64 contexts[64];
  if (device < 0 || device >= 64) return 101;
  if (!contexts[device]) {
    int handle;
    TRY(cuDeviceGet(&handle, device));
    TRY(cuDevicePrimaryCtxRetain(&contexts[device], handle));
  }
  return cuCtxSetCurrent(contexts[device]);
}

// -- streams and events --------------------------------------------------------------------------------------------------

int hipStreamCreateWithFlags(u64* stream, unsigned flags) { return cuStreamCreate(stream, flags); }
int hipStreamSynchronize(u64 stream) { return cuStreamSynchronize(stream); }
int hipStreamQuery(u64 stream) { return cuStreamQuery(stream); }
int hipStreamWaitEvent(u64 stream, u64 event, unsigned flags) { return cuStreamWaitEvent(stream, event, flags); }
int hipStreamDestroy(u64 stream) { return cuStreamDestroy_v2(stream); }
int hipEventCreateWithFlags(u64* event, unsigned flags) { return cuEventCreate(event, flags); }
int hipEventRecord(u64 event, u64 stream) { return cuEventRecord(event, stream); }
int hipEventSynchronize(u64 event) { return cuEventSynchronize(event); }
int hipEventQuery(u64 event) { return cuEventQuery(event); }
int hipEventElapsedTime(float* milliseconds, u64 start, u64 stop) { return cuEventElapsedTime(milliseconds, start, stop); }
int hipEventDestroy(u64 event) { return cuEventDestroy_v2(event); }

// -- memory: both vendors' structs have the same layout ------------------------------------------------------------------

int hipMemGetInfo(u64* free, u64* total) { return cuMemGetInfo_v2(free, total); }
int hipHostMalloc(u64* pointer, u64 bytes, unsigned flags) { return cuMemHostAlloc(pointer, bytes, flags); }
int hipHostFree(u64 pointer) { return cuMemFreeHost(pointer); }
int hipMemGetAllocationGranularity(u64* bytes, const void* prop, int option) {
  return cuMemGetAllocationGranularity(bytes, prop, option);
}
int hipMemAddressReserve(u64* pointer, u64 bytes, u64 alignment, u64 address, u64 flags) {
  return cuMemAddressReserve(pointer, bytes, alignment, address, flags);
}
int hipMemAddressFree(u64 pointer, u64 bytes) { return cuMemAddressFree(pointer, bytes); }
int hipMemCreate(u64* handle, u64 bytes, const void* prop, u64 flags) { return cuMemCreate(handle, bytes, prop, flags); }
int hipMemRelease(u64 handle) { return cuMemRelease(handle); }
int hipMemMap(u64 pointer, u64 bytes, u64 offset, u64 handle, u64 flags) {
  return cuMemMap(pointer, bytes, offset, handle, flags);
}
int hipMemSetAccess(u64 pointer, u64 bytes, const void* access, u64 count) {
  return cuMemSetAccess(pointer, bytes, access, count);
}
int hipMemUnmap(u64 pointer, u64 bytes) { return cuMemUnmap(pointer, bytes); }

int hipMemcpyAsync(u64 target, u64 source, u64 bytes, int kind, u64 stream) {
  switch (kind) {
    case 1: return cuMemcpyHtoDAsync_v2(target, source, bytes, stream);
    case 2: return cuMemcpyDtoHAsync_v2(target, source, bytes, stream);
    case 3: return cuMemcpyDtoDAsync_v2(target, source, bytes, stream);
    default: return 21;  // hipErrorInvalidMemcpyDirection
  }
}
int hipMemcpy2DAsync(u64 target, u64 targetPitch, u64 source, u64 sourcePitch, u64 width, u64 height, int kind, u64 stream) {
  if (width > targetPitch || width > sourcePitch) return 12;  // hipErrorInvalidPitchValue
  for (u64 row = 0; row < height; row++) {
    TRY(hipMemcpyAsync(target + row * targetPitch, source + row * sourcePitch, width, kind, stream));
  }
  return OK;
}
int hipMemsetD8Async(u64 target, unsigned char value, u64 count, u64 stream) {
  return cuMemsetD8Async(target, value, count, stream);
}
int hipMemsetD32Async(u64 target, int value, u64 count, u64 stream) {
  return cuMemsetD32Async(target, (uint32_t)value, count, stream);
}

// -- modules and launches ------------------------------------------------------------------------------------------------

int hipModuleLoadData(u64* module, const void* image) { return cuModuleLoadData(module, image); }
int hipModuleUnload(u64 module) { return cuModuleUnload(module); }
int hipModuleGetFunction(u64* function, u64 module, const char* name) { return cuModuleGetFunction(function, module, name); }
int hipFuncGetAttribute(int* value, int attribute, u64 function) {
  return attribute == 1 ? cuFuncGetAttribute(value, attribute, function) : INVALID_VALUE;
}
int hipModuleLaunchKernel(u64 function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, u64 stream, void** parameters, u64* extra) {
  // HIP gives a block all its shared memory without being asked.
  if (shared > 48 << 10) TRY(cuFuncSetAttribute(function, 8, (int)shared));
  u64 cuda[5] = {1, 0, 2, 0, 0};
  if (extra) {
    if (extra[0] != 1 || extra[2] != 2 || extra[4] != 3) return INVALID_VALUE;
    cuda[1] = extra[1], cuda[3] = extra[3];
  }
  return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra ? cuda : nullptr);
}

// -- graphs --------------------------------------------------------------------------------------------------------------

int hipStreamBeginCapture(u64 stream, int mode) { return cuStreamBeginCapture_v2(stream, mode); }
int hipStreamEndCapture(u64 stream, u64* graph) { return cuStreamEndCapture(stream, graph); }
int hipGraphInstantiateWithFlags(u64* executable, u64 graph, u64 flags) {
  return cuGraphInstantiateWithFlags(executable, graph, flags);
}
int hipGraphLaunch(u64 executable, u64 stream) { return cuGraphLaunch(executable, stream); }
int hipGraphExecDestroy(u64 executable) { return cuGraphExecDestroy(executable); }
int hipGraphDestroy(u64 graph) { return cuGraphDestroy(graph); }

// -- hipRTC --------------------------------------------------------------------------------------------------------------

// NVRTC opens its builtins by their bare name, which the loader finds in a wheel's folder only when they are loaded.
static void loadBuiltins() {
  Dl_info info;
  int major, minor;
  if (!dladdr((void*)nvrtcVersion, &info) || nvrtcVersion(&major, &minor)) return;
  const char* slash = strrchr(info.dli_fname, '/');
  char path[4096];
  snprintf(path, sizeof path, "%.*slibnvrtc-builtins.so.%d.%d", slash ? (int)(slash + 1 - info.dli_fname) : 0,
           info.dli_fname, major, minor);
  dlopen(path, RTLD_NOW);
}

static int compileForDevice(u64 program) {
  static int loaded = (loadBuiltins(), 1);
  (void)loaded;
  int major = 0, minor = 0;
  if (cuDeviceGetAttribute(&major, 75, 0) || cuDeviceGetAttribute(&minor, 76, 0)) return 11;
  char architecture[64];
  snprintf(architecture, sizeof architecture, "--gpu-architecture=sm_%d%d%s", major, minor, major >= 9 ? "a" : "");
  const char* options[] = {architecture, "-std=c++17", "-default-device"};
  return nvrtcCompileProgram(program, 3, options);
}

const char* hiprtcGetErrorString(int result) { return nvrtcGetErrorString(result); }
int hiprtcVersion(int* major, int* minor) { *major = 9, *minor = 0; return 0; }
int hiprtcCreateProgram(u64* program, const char* text, const char* name, int headers, const char* const* sources,
                        const char* const* names) {
  return nvrtcCreateProgram(program, text, name, headers, sources, names);
}
int hiprtcDestroyProgram(u64* program) { return nvrtcDestroyProgram(program); }
int hiprtcCompileProgram(u64 program, int count, const char* const* options) {
  static const char* const known[] = {"--offload-arch=gfx950", "-std=c++17", "-O3", "-ffp-contract=on"};
  for (int i = 0; i < count; i++) {
    int is = 0;
    for (const char* option : known) is |= strcmp(option, options[i]) == 0;
    if (!is) return 5;  // HIPRTC_ERROR_INVALID_OPTION
  }
  return compileForDevice(program);
}
int hiprtcGetCodeSize(u64 program, u64* bytes) { return nvrtcGetCUBINSize(program, bytes); }
int hiprtcGetCode(u64 program, char* code) { return nvrtcGetCUBIN(program, code); }
int hiprtcGetProgramLogSize(u64 program, u64* bytes) { return nvrtcGetProgramLogSize(program, bytes); }
int hiprtcGetProgramLog(u64 program, char* log) { return nvrtcGetProgramLog(program, log); }

// -- hipBLASLt -----------------------------------------------------------------------------------------------------------

enum { BLAS_OK = 0, BLAS_INVALID_VALUE = 3, BLAS_INTERNAL = 6, BLAS_NOT_SUPPORTED = 7 };
static int blasStatus(int cublas) {
  return cublas == 0 ? BLAS_OK : cublas == 15 ? BLAS_NOT_SUPPORTED : cublas == 7 ? BLAS_INVALID_VALUE : BLAS_INTERNAL;
}

struct BlasLayout { u64 cublas; int type; };
struct BlasAlgorithm { unsigned char cublas[64]; };

// ROCm 7's, or that of HIP_SHIM_HIPBLASLT: before 1.0 scales for rows had attributes of their own and no modes.
static int blasVersion() {
  const char* version = getenv("HIP_SHIM_HIPBLASLT");
  return version ? atoi(version) : 100000;
}
int hipblasLtGetVersion(u64, int* version) { *version = blasVersion(); return BLAS_OK; }
int hipblasLtCreate(u64* handle) { return blasStatus(cublasLtCreate(handle)); }
int hipblasLtDestroy(u64 handle) { return blasStatus(cublasLtDestroy(handle)); }

int hipblasLtMatmulDescCreate(u64* desc, int compute, int scaleType) {
  if (compute != 2 || scaleType != 0) return BLAS_INVALID_VALUE;
  return blasStatus(cublasLtMatmulDescCreate(desc, 68, 0));
}
int hipblasLtMatmulDescSetAttribute(u64 desc, int attribute, const void* value, u64 bytes) {
  int number = 0;
  if (bytes == 4) memcpy(&number, value, 4);
  switch (attribute) {
    case 0: case 1: {  // transpositions
      if (bytes != 4 || (number != 111 && number != 112)) return BLAS_INVALID_VALUE;
      const int transposed = number == 112;
      return blasStatus(cublasLtMatmulDescSetAttribute(desc, 3 + attribute, &transposed, 4));
    }
    case 2: return blasStatus(cublasLtMatmulDescSetAttribute(desc, 7, value, bytes));    // epilogue
    case 3: return blasStatus(cublasLtMatmulDescSetAttribute(desc, 8, value, bytes));    // bias
    case 4: return blasStatus(cublasLtMatmulDescSetAttribute(desc, 26, value, bytes));   // its type
    case 5: case 6: {  // scales: float8, for which sums stay in AMD's matrix units anyway
      const int8_t fast = 1;
      int status = cublasLtMatmulDescSetAttribute(desc, 25, &fast, 1);
      if (status == 0) status = cublasLtMatmulDescSetAttribute(desc, 12 + attribute, value, bytes);
      return blasStatus(status);
    }
    case 31: case 32:
      if (blasVersion() < 100000) return BLAS_INVALID_VALUE;
      return blasStatus(cublasLtMatmulDescSetAttribute(desc, attribute, value, bytes));
    case 102: case 103: {  // scales for rows, before there were modes
      if (blasVersion() >= 100000) return BLAS_INVALID_VALUE;
      const int rows = 3;
      int status = cublasLtMatmulDescSetAttribute(desc, attribute - 71, &rows, 4);
      return status ? blasStatus(status) : hipblasLtMatmulDescSetAttribute(desc, attribute - 97, value, bytes);
    }
    default: return BLAS_INVALID_VALUE;
  }
}
int hipblasLtMatmulDescDestroy(u64 desc) { return blasStatus(cublasLtMatmulDescDestroy(desc)); }

int hipblasLtMatrixLayoutCreate(u64* layout, int type, u64 rows, u64 cols, i64 ld) {
  BlasLayout made = {0, type};
  int status = cublasLtMatrixLayoutCreate(&made.cublas, type, rows, cols, ld);
  if (status == 0) *layout = (u64) new BlasLayout(made);
  return blasStatus(status);
}
int hipblasLtMatrixLayoutSetAttribute(u64 layout, int attribute, const void* value, u64 bytes) {
  if (attribute != 0 && attribute != 1) return BLAS_INVALID_VALUE;  // batch and its stride
  return blasStatus(cublasLtMatrixLayoutSetAttribute(((BlasLayout*)layout)->cublas, 5 + attribute, value, bytes));
}
int hipblasLtMatrixLayoutDestroy(u64 layout) {
  int status = cublasLtMatrixLayoutDestroy(((BlasLayout*)layout)->cublas);
  delete (BlasLayout*)layout;
  return blasStatus(status);
}

int hipblasLtMatmulPreferenceCreate(u64* preference) {
  int status = cublasLtMatmulPreferenceCreate(preference);
  const int computeType = 2;  // partial sums are added in f32
  if (status == 0) status = cublasLtMatmulPreferenceSetAttribute(*preference, 3, &computeType, 4);
  return blasStatus(status);
}
int hipblasLtMatmulPreferenceSetAttribute(u64 preference, int attribute, const void* value, u64 bytes) {
  if (attribute != 1) return BLAS_INVALID_VALUE;
  return blasStatus(cublasLtMatmulPreferenceSetAttribute(preference, 1, value, bytes));
}
int hipblasLtMatmulPreferenceDestroy(u64 preference) { return blasStatus(cublasLtMatmulPreferenceDestroy(preference)); }

// Bytes of an element, which is the alignment that cuBLASLt may rely on: hipBLASLt is not told any. Float8 wants 16, of its
// results too.
enum { FLOAT8 = 28 };
static int alignmentOf(int type) { return type == 0 ? 4 : type == FLOAT8 ? 16 : 2; }

int hipblasLtMatmulAlgoGetHeuristic(u64 handle, u64 desc, u64 a, u64 b, u64 c, u64 d, u64 preference, int requested,
                                    unsigned char* results, int* returned) {
  enum { MOST = 64, CUBLAS = 96, HIPBLAS = 56 };
  static unsigned char found[MOST * CUBLAS];
  if (requested > MOST) return BLAS_INVALID_VALUE;
  const BlasLayout* layouts[] = {(BlasLayout*)a, (BlasLayout*)b, (BlasLayout*)c, (BlasLayout*)d};
  for (int i = 0; i < 4; i++) {
    const int alignment = alignmentOf(layouts[0]->type == FLOAT8 ? FLOAT8 : layouts[i]->type);
    int status = cublasLtMatmulPreferenceSetAttribute(preference, 5 + i, &alignment, 4);
    if (status) return blasStatus(status);
  }
  int status = cublasLtMatmulAlgoGetHeuristic(handle, desc, layouts[0]->cublas, layouts[1]->cublas, layouts[2]->cublas,
                                              layouts[3]->cublas, preference, requested, found, returned);
  if (status) return blasStatus(status);
  memset(results, 0, (size_t)requested * HIPBLAS);
  for (int i = 0; i < *returned; i++) {
    const unsigned char* from = found + i * CUBLAS;
    unsigned char* to = results + i * HIPBLAS;
    BlasAlgorithm* kept = new BlasAlgorithm;  // for the life of the process
    memcpy(kept->cublas, from, sizeof kept->cublas);
    memcpy(to, &kept, sizeof kept);
    memcpy(to + 24, from + 64, 8);  // scratch
    int state;
    memcpy(&state, from + 72, 4);
    state = blasStatus(state);
    memcpy(to + 32, &state, 4);
  }
  return BLAS_OK;
}
int hipblasLtMatmul(u64 handle, u64 desc, const void* alpha, u64 a, u64 aLayout, u64 b, u64 bLayout, const void* beta, u64 c,
                    u64 cLayout, u64 d, u64 dLayout, const void* algorithm, u64 workspace, u64 bytes, u64 stream) {
  const BlasAlgorithm* kept;
  memcpy(&kept, algorithm, sizeof kept);
  return blasStatus(cublasLtMatmul(handle, desc, alpha, a, ((BlasLayout*)aLayout)->cublas, b, ((BlasLayout*)bLayout)->cublas,
                                   beta, c, ((BlasLayout*)cLayout)->cublas, d, ((BlasLayout*)dLayout)->cublas, kept->cublas,
                                   workspace, bytes, stream));
}

// -- MIOpen --------------------------------------------------------------------------------------------------------------

// A thread an output; sums in double.
static const char CONVOLUTION[] = R"(
__device__ double at(const void* p, long long i, int type) {
  if (type == 1) return ((const float*)p)[i];
  unsigned bits = ((const unsigned short*)p)[i];
  if (type == 5) return __uint_as_float(bits << 16);
  unsigned magnitude = bits & 0x7fffu;
  float value = magnitude >= 0x7c00u ? __uint_as_float(0x7f800000u | (magnitude & 0x3ffu) << 13)
                                     : __uint_as_float(magnitude << 13) * 5.192296858534828e33f;
  return bits & 0x8000u ? -value : value;
}
__device__ void put(void* p, long long i, int type, float x) {
  unsigned raw = __float_as_uint(x), magnitude = raw & 0x7fffffffu;
  if (type == 1) { ((float*)p)[i] = x; return; }
  unsigned half;
  if (type == 5) {
    half = magnitude > 0x7f800000u ? 0x7fffu : (raw + 0x7fffu + (raw >> 16 & 1u)) >> 16;
  } else {
    if (magnitude > 0x7f800000u) half = 0x7fffu;
    else if (magnitude >= 0x477ff000u) half = 0x7c00u;
    else if (magnitude < 0x38800000u) half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    else half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    half |= raw >> 16 & 0x8000u;
  }
  ((unsigned short*)p)[i] = (unsigned short)half;
}
extern "C" __global__ void convolution(void* y, const void* x, const void* w, int type, int last, long long count,
                                       int channels, int height, int width, int filters, int rows, int columns,
                                       int outHeight, int outWidth, int padHeight, int padWidth, int stepHeight,
                                       int stepWidth) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  int f, oy, ox;
  long long n = i;
  if (last) f = n % filters, n /= filters, ox = n % outWidth, n /= outWidth, oy = n % outHeight, n /= outHeight;
  else ox = n % outWidth, n /= outWidth, oy = n % outHeight, n /= outHeight, f = n % filters, n /= filters;
  double sum = 0;
  for (int r = 0; r < rows; r++) {
    int iy = oy * stepHeight + r - padHeight;
    if (iy < 0 || iy >= height) continue;
    for (int s = 0; s < columns; s++) {
      int ix = ox * stepWidth + s - padWidth;
      if (ix < 0 || ix >= width) continue;
      for (int c = 0; c < channels; c++) {
        long long from = last ? ((n * height + iy) * width + ix) * channels + c : ((n * channels + c) * height + iy) * width + ix;
        long long by = last ? (((long long)f * rows + r) * columns + s) * channels + c
                            : (((long long)f * channels + c) * rows + r) * columns + s;
        sum += at(x, from, type) * at(w, by, type);
      }
    }
  }
  put(y, i, type, (float)sum);
}
)";

struct Picture { int type, layout, lengths[4]; };
struct Convolution { int pad[2], step[2]; };
struct Miopen { u64 stream, module, function; };
enum { MIOPEN_OK = 0, MIOPEN_BAD = 3, MIOPEN_INTERNAL = 7 };

int miopenGetVersion(u64* major, u64* minor, u64* patch) { *major = 3, *minor = 2, *patch = 0; return MIOPEN_OK; }
const char* miopenGetErrorString(int status) { return status == MIOPEN_OK ? "miopenStatusSuccess" : "miopenStatusBadParm"; }
int miopenCreateWithStream(u64* handle, u64 stream) {
  Miopen made = {stream, 0, 0};
  u64 program, bytes;
  if (nvrtcCreateProgram(&program, CONVOLUTION, "convolution.cu", 0, nullptr, nullptr)) return MIOPEN_INTERNAL;
  int failed = compileForDevice(program);
  if (!failed) failed = nvrtcGetCUBINSize(program, &bytes);
  char* image = failed ? nullptr : (char*)malloc(bytes);
  if (!failed) failed = nvrtcGetCUBIN(program, image);
  nvrtcDestroyProgram(&program);
  if (!failed) failed = cuModuleLoadData(&made.module, image);
  if (!failed) failed = cuModuleGetFunction(&made.function, made.module, "convolution");
  free(image);
  if (failed) return MIOPEN_INTERNAL;
  *handle = (u64) new Miopen(made);
  return MIOPEN_OK;
}
int miopenDestroy(u64 handle) {
  int failed = cuModuleUnload(((Miopen*)handle)->module);
  delete (Miopen*)handle;
  return failed ? MIOPEN_INTERNAL : MIOPEN_OK;
}
int miopenCreateTensorDescriptor(u64* descriptor) { *descriptor = (u64) new Picture(); return MIOPEN_OK; }
int miopenSetNdTensorDescriptorWithLayout(u64 descriptor, int type, int layout, const int* lengths, int count) {
  if (count != 4 || (type != 0 && type != 1 && type != 5) || (layout != 0 && layout != 1)) return MIOPEN_BAD;
  Picture* picture = (Picture*)descriptor;
  picture->type = type, picture->layout = layout;
  memcpy(picture->lengths, lengths, sizeof picture->lengths);
  return MIOPEN_OK;
}
int miopenDestroyTensorDescriptor(u64 descriptor) { delete (Picture*)descriptor; return MIOPEN_OK; }
int miopenCreateConvolutionDescriptor(u64* descriptor) { *descriptor = (u64) new Convolution(); return MIOPEN_OK; }
int miopenInitConvolutionDescriptor(u64 descriptor, int mode, int padHeight, int padWidth, int stepHeight, int stepWidth,
                                    int dilationHeight, int dilationWidth) {
  if (mode != 0 || dilationHeight != 1 || dilationWidth != 1) return MIOPEN_BAD;
  *(Convolution*)descriptor = {{padHeight, padWidth}, {stepHeight, stepWidth}};
  return MIOPEN_OK;
}
int miopenDestroyConvolutionDescriptor(u64 descriptor) { delete (Convolution*)descriptor; return MIOPEN_OK; }

static int fits(const Picture* w, const Picture* x, const Convolution* c, const Picture* y) {
  if (w->type != x->type || y->type != x->type || w->layout != x->layout || y->layout != x->layout) return 0;
  for (int i = 0; i < 2; i++) {
    if (y->lengths[2 + i] != (x->lengths[2 + i] + 2 * c->pad[i] - w->lengths[2 + i]) / c->step[i] + 1) return 0;
  }
  return w->lengths[1] == x->lengths[1] && y->lengths[0] == x->lengths[0] && y->lengths[1] == w->lengths[0];
}
// Two solutions, so that there is something to choose: the second one wants scratch.
int miopenConvolutionForwardGetSolutionCount(u64, u64 w, u64 x, u64 convolution, u64 y, u64* count) {
  if (!fits((Picture*)w, (Picture*)x, (Convolution*)convolution, (Picture*)y)) return MIOPEN_BAD;
  *count = 2;
  return MIOPEN_OK;
}
int miopenConvolutionForwardGetSolution(u64, u64, u64, u64, u64, u64 most, u64* count, unsigned char* solutions) {
  *count = most < 2 ? most : 2;
  for (u64 i = 0; i < *count; i++) {
    const u64 bytes = i == 0 ? 0 : 1024, id = 7 + i;
    memset(solutions + 32 * i, 0, 32);
    memcpy(solutions + 32 * i + 8, &bytes, 8);
    memcpy(solutions + 32 * i + 16, &id, 8);
  }
  return MIOPEN_OK;
}
int miopenConvolutionForwardCompileSolution(u64, u64, u64, u64, u64, u64 id) {
  return id == 7 || id == 8 ? MIOPEN_OK : MIOPEN_BAD;
}
int miopenConvolutionForwardImmediate(u64 handle, u64 wDesc, u64 w, u64 xDesc, u64 x, u64 convolution, u64 yDesc, u64 y,
                                      u64 workspace, u64 bytes, u64 id) {
  const Picture *filter = (Picture*)wDesc, *input = (Picture*)xDesc, *output = (Picture*)yDesc;
  const Convolution* c = (Convolution*)convolution;
  const Miopen* miopen = (Miopen*)handle;
  if (!fits(filter, input, c, output) || (id == 8 ? workspace == 0 || bytes != 1024 : id != 7)) return MIOPEN_BAD;
  i64 count = 1;
  for (int length : output->lengths) count *= length;
  struct {
    u64 y, x, w;
    int type, last;
    i64 count;
    int channels, height, width, filters, rows, columns, outHeight, outWidth, padHeight, padWidth, stepHeight, stepWidth;
  } arguments = {y, x, w, input->type, input->layout, count, input->lengths[1], input->lengths[2], input->lengths[3],
                 filter->lengths[0], filter->lengths[2], filter->lengths[3], output->lengths[2], output->lengths[3],
                 c->pad[0], c->pad[1], c->step[0], c->step[1]};
  u64 size = sizeof arguments, extra[] = {1, (u64)&arguments, 2, (u64)&size, 0};
  const unsigned blocks = (unsigned)((count + 127) / 128);
  return cuLaunchKernel(miopen->function, blocks, 1, 1, 128, 1, 1, 0, miopen->stream, nullptr, extra) ? MIOPEN_INTERNAL
                                                                                                     : MIOPEN_OK;
}
}
