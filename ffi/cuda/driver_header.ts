/**
 * What of `cuda.h` is in use. Source: CUDA 13.0; all functions are there since 12.0. Handles (streams, events, modules, ...)
 * and device addresses are 64-bit integers.
 */

/** The functions in use. */
export const CUDA = {
  // CUresult cuInit(unsigned int Flags)
  cuInit: { parameters: ["u32"], result: "i32" },
  // CUresult cuDriverGetVersion(int *driverVersion)
  cuDriverGetVersion: { parameters: ["buffer"], result: "i32" },
  // CUresult cuGetErrorName(CUresult error, const char **pStr)
  cuGetErrorName: { parameters: ["i32", "buffer"], result: "i32" },
  // CUresult cuGetErrorString(CUresult error, const char **pStr)
  cuGetErrorString: { parameters: ["i32", "buffer"], result: "i32" },

  // CUresult cuDeviceGetCount(int *count)
  cuDeviceGetCount: { parameters: ["buffer"], result: "i32" },
  // CUresult cuDeviceGet(CUdevice *device, int ordinal)
  cuDeviceGet: { parameters: ["buffer", "i32"], result: "i32" },
  // CUresult cuDeviceGetName(char *name, int len, CUdevice dev)
  cuDeviceGetName: { parameters: ["buffer", "i32", "i32"], result: "i32" },
  // CUresult cuDeviceGetPCIBusId(char *pciBusId, int len, CUdevice dev)
  cuDeviceGetPCIBusId: { parameters: ["buffer", "i32", "i32"], result: "i32" },
  // CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice dev)
  cuDeviceTotalMem_v2: { parameters: ["buffer", "i32"], result: "i32" },
  // CUresult cuDeviceGetAttribute(int *pi, CUdevice_attribute attrib, CUdevice dev)
  cuDeviceGetAttribute: { parameters: ["buffer", "i32", "i32"], result: "i32" },
  // CUresult cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev)
  cuDevicePrimaryCtxRetain: { parameters: ["buffer", "i32"], result: "i32" },
  // CUresult cuDevicePrimaryCtxRelease_v2(CUdevice dev)
  cuDevicePrimaryCtxRelease_v2: { parameters: ["i32"], result: "i32" },
  // CUresult cuCtxSetCurrent(CUcontext ctx)
  cuCtxSetCurrent: { parameters: ["u64"], result: "i32" },

  // CUresult cuStreamCreate(CUstream *phStream, unsigned int Flags)
  cuStreamCreate: { parameters: ["buffer", "u32"], result: "i32" },
  // CUresult cuStreamSynchronize(CUstream hStream)
  cuStreamSynchronize: { parameters: ["u64"], result: "i32" },
  // CUresult cuStreamQuery(CUstream hStream)
  cuStreamQuery: { parameters: ["u64"], result: "i32" },
  // CUresult cuStreamWaitEvent(CUstream hStream, CUevent hEvent, unsigned int Flags)
  cuStreamWaitEvent: { parameters: ["u64", "u64", "u32"], result: "i32" },
  // CUresult cuStreamDestroy_v2(CUstream hStream)
  cuStreamDestroy_v2: { parameters: ["u64"], result: "i32" },
  // CUresult cuEventCreate(CUevent *phEvent, unsigned int Flags)
  cuEventCreate: { parameters: ["buffer", "u32"], result: "i32" },
  // CUresult cuEventRecord(CUevent hEvent, CUstream hStream)
  cuEventRecord: { parameters: ["u64", "u64"], result: "i32" },
  // CUresult cuEventSynchronize(CUevent hEvent)
  cuEventSynchronize: { parameters: ["u64"], result: "i32" },
  // CUresult cuEventQuery(CUevent hEvent)
  cuEventQuery: { parameters: ["u64"], result: "i32" },
  // CUresult cuEventElapsedTime(float *pMilliseconds, CUevent hStart, CUevent hEnd)
  cuEventElapsedTime: { parameters: ["buffer", "u64", "u64"], result: "i32" },
  // CUresult cuEventDestroy_v2(CUevent hEvent)
  cuEventDestroy_v2: { parameters: ["u64"], result: "i32" },

  // CUresult cuMemGetInfo_v2(size_t *free, size_t *total)
  cuMemGetInfo_v2: { parameters: ["buffer", "buffer"], result: "i32" },
  // CUresult cuMemAlloc_v2(CUdeviceptr *dptr, size_t bytesize)
  cuMemAlloc_v2: { parameters: ["buffer", "usize"], result: "i32" },
  // CUresult cuMemFree_v2(CUdeviceptr dptr)
  cuMemFree_v2: { parameters: ["u64"], result: "i32" },
  // CUresult cuMemHostAlloc(void **pp, size_t bytesize, unsigned int Flags)
  cuMemHostAlloc: { parameters: ["buffer", "usize", "u32"], result: "i32" },
  // CUresult cuMemFreeHost(void *p)
  cuMemFreeHost: { parameters: ["u64"], result: "i32" },
  // CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop,
  //     CUmemAllocationGranularity_flags option)
  cuMemGetAllocationGranularity: { parameters: ["buffer", "buffer", "i32"], result: "i32" },
  // CUresult cuMemAddressReserve(CUdeviceptr *ptr, size_t size, size_t alignment, CUdeviceptr addr,
  //     unsigned long long flags)
  cuMemAddressReserve: { parameters: ["buffer", "usize", "usize", "u64", "u64"], result: "i32" },
  // CUresult cuMemAddressFree(CUdeviceptr ptr, size_t size)
  cuMemAddressFree: { parameters: ["u64", "usize"], result: "i32" },
  // CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop,
  //     unsigned long long flags)
  cuMemCreate: { parameters: ["buffer", "usize", "buffer", "u64"], result: "i32" },
  // CUresult cuMemRelease(CUmemGenericAllocationHandle handle)
  cuMemRelease: { parameters: ["u64"], result: "i32" },
  // CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
  //     unsigned long long flags)
  cuMemMap: { parameters: ["u64", "usize", "usize", "u64", "u64"], result: "i32" },
  // CUresult cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc, size_t count)
  cuMemSetAccess: { parameters: ["u64", "usize", "buffer", "usize"], result: "i32" },
  // CUresult cuMemUnmap(CUdeviceptr ptr, size_t size)
  cuMemUnmap: { parameters: ["u64", "usize"], result: "i32" },

  // CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr dstDevice, const void *srcHost, size_t ByteCount, CUstream hStream)
  cuMemcpyHtoDAsync_v2: { parameters: ["u64", "u64", "usize", "u64"], result: "i32" },
  // CUresult cuMemcpyDtoHAsync_v2(void *dstHost, CUdeviceptr srcDevice, size_t ByteCount, CUstream hStream)
  cuMemcpyDtoHAsync_v2: { parameters: ["u64", "u64", "usize", "u64"], result: "i32" },
  // CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr dstDevice, CUdeviceptr srcDevice, size_t ByteCount, CUstream hStream)
  cuMemcpyDtoDAsync_v2: { parameters: ["u64", "u64", "usize", "u64"], result: "i32" },
  // CUresult cuMemsetD8Async(CUdeviceptr dstDevice, unsigned char uc, size_t N, CUstream hStream)
  cuMemsetD8Async: { parameters: ["u64", "u8", "usize", "u64"], result: "i32" },
  // CUresult cuMemsetD32Async(CUdeviceptr dstDevice, unsigned int ui, size_t N, CUstream hStream)
  cuMemsetD32Async: { parameters: ["u64", "u32", "usize", "u64"], result: "i32" },

  // CUresult cuModuleLoadData(CUmodule *module, const void *image)
  cuModuleLoadData: { parameters: ["buffer", "buffer"], result: "i32" },
  // CUresult cuModuleUnload(CUmodule hmod)
  cuModuleUnload: { parameters: ["u64"], result: "i32" },
  // CUresult cuModuleGetFunction(CUfunction *hfunc, CUmodule hmod, const char *name)
  cuModuleGetFunction: { parameters: ["buffer", "u64", "buffer"], result: "i32" },
  // CUresult cuFuncGetAttribute(int *pi, CUfunction_attribute attrib, CUfunction hfunc)
  cuFuncGetAttribute: { parameters: ["buffer", "i32", "u64"], result: "i32" },
  // CUresult cuFuncSetAttribute(CUfunction hfunc, CUfunction_attribute attrib, int value)
  cuFuncSetAttribute: { parameters: ["u64", "i32", "i32"], result: "i32" },
  // CUresult cuLaunchKernel(CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ,
  //     unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ, unsigned int sharedMemBytes,
  //     CUstream hStream, void **kernelParams, void **extra)
  cuLaunchKernel: {
    parameters: ["u64", "u32", "u32", "u32", "u32", "u32", "u32", "u32", "u64", "buffer", "buffer"],
    result: "i32",
  },
  // CUresult cuTensorMapEncodeTiled(CUtensorMap *tensorMap, CUtensorMapDataType tensorDataType, cuuint32_t tensorRank,
  //     void *globalAddress, const cuuint64_t *globalDim, const cuuint64_t *globalStrides, const cuuint32_t *boxDim,
  //     const cuuint32_t *elementStrides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
  //     CUtensorMapL2promotion l2Promotion, CUtensorMapFloatOOBfill oobFill); since CUDA 12.0
  cuTensorMapEncodeTiled: {
    parameters: [
      "u64",
      "i32",
      "u32",
      "u64",
      "buffer",
      "buffer",
      "buffer",
      "buffer",
      "i32",
      "i32",
      "i32",
      "i32",
    ],
    result: "i32",
  },

  // CUresult cuStreamBeginCapture_v2(CUstream hStream, CUstreamCaptureMode mode)
  cuStreamBeginCapture_v2: { parameters: ["u64", "i32"], result: "i32" },
  // CUresult cuStreamEndCapture(CUstream hStream, CUgraph *phGraph)
  cuStreamEndCapture: { parameters: ["u64", "buffer"], result: "i32" },
  // CUresult cuStreamIsCapturing(CUstream hStream, CUstreamCaptureStatus *captureStatus)
  cuStreamIsCapturing: { parameters: ["u64", "buffer"], result: "i32" },
  // CUresult cuGraphGetNodes(CUgraph hGraph, CUgraphNode *nodes, size_t *numNodes)
  cuGraphGetNodes: { parameters: ["u64", "buffer", "buffer"], result: "i32" },
  // CUresult cuGraphInstantiateWithFlags(CUgraphExec *phGraphExec, CUgraph hGraph, unsigned long long flags)
  cuGraphInstantiateWithFlags: { parameters: ["buffer", "u64", "u64"], result: "i32" },
  // CUresult cuGraphLaunch(CUgraphExec hGraphExec, CUstream hStream)
  cuGraphLaunch: { parameters: ["u64", "u64"], result: "i32" },
  // CUresult cuGraphExecDestroy(CUgraphExec hGraphExec)
  cuGraphExecDestroy: { parameters: ["u64"], result: "i32" },
  // CUresult cuGraphDestroy(CUgraph hGraph)
  cuGraphDestroy: { parameters: ["u64"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** Values of cuda.h's enums, and sizes and offsets of its structs, in bytes; a test compares them with the header. */
export const HEADER = {
  CUDA_ERROR_OUT_OF_MEMORY: 2,
  CUDA_ERROR_STUB_LIBRARY: 34,
  CUDA_ERROR_DEVICE_UNAVAILABLE: 46,
  CUDA_ERROR_NO_DEVICE: 100,
  CUDA_ERROR_INVALID_DEVICE: 101,
  CUDA_ERROR_INVALID_IMAGE: 200,
  CUDA_ERROR_NO_BINARY_FOR_GPU: 209,
  CUDA_ERROR_ECC_UNCORRECTABLE: 214,
  CUDA_ERROR_INVALID_PTX: 218,
  CUDA_ERROR_NVLINK_UNCORRECTABLE: 220,
  CUDA_ERROR_UNSUPPORTED_PTX_VERSION: 222,
  CUDA_ERROR_NOT_READY: 600,
  CUDA_ERROR_ILLEGAL_ADDRESS: 700,
  CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: 701,
  CUDA_ERROR_LAUNCH_TIMEOUT: 702,
  CUDA_ERROR_CONTEXT_IS_DESTROYED: 709,
  CUDA_ERROR_ASSERT: 710,
  CUDA_ERROR_HARDWARE_STACK_ERROR: 714,
  CUDA_ERROR_ILLEGAL_INSTRUCTION: 715,
  CUDA_ERROR_MISALIGNED_ADDRESS: 716,
  CUDA_ERROR_INVALID_ADDRESS_SPACE: 717,
  CUDA_ERROR_INVALID_PC: 718,
  CUDA_ERROR_LAUNCH_FAILED: 719,
  CUDA_ERROR_SYSTEM_NOT_READY: 802,
  CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: 803,
  CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE: 804,
  CUDA_ERROR_UNKNOWN: 999,

  CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: 1,
  CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: 2,
  CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: 3,
  CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: 4,
  CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: 5,
  CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: 6,
  CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: 7,
  CU_DEVICE_ATTRIBUTE_WARP_SIZE: 10,
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: 16,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: 76,
  CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: 97,
  CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: 102,

  CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: 1,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: 8,

  CU_STREAM_NON_BLOCKING: 1,
  CU_EVENT_DEFAULT: 0,
  CU_EVENT_DISABLE_TIMING: 2,
  CU_STREAM_CAPTURE_MODE_RELAXED: 2,
  CU_STREAM_CAPTURE_STATUS_ACTIVE: 1,
  CU_MEMHOSTALLOC_PORTABLE: 1,

  CU_MEM_ALLOCATION_TYPE_PINNED: 1,
  CU_MEM_LOCATION_TYPE_DEVICE: 1,
  CU_MEM_ALLOC_GRANULARITY_RECOMMENDED: 1,
  CU_MEM_ACCESS_FLAGS_PROT_READWRITE: 3,
  "sizeof(CUmemAllocationProp)": 32,
  "offsetof(CUmemAllocationProp, type)": 0,
  "offsetof(CUmemAllocationProp, location.type)": 8,
  "offsetof(CUmemAllocationProp, location.id)": 12,
  "sizeof(CUmemAccessDesc)": 12,
  "offsetof(CUmemAccessDesc, location.type)": 0,
  "offsetof(CUmemAccessDesc, location.id)": 4,
  "offsetof(CUmemAccessDesc, flags)": 8,

  CU_TENSOR_MAP_DATA_TYPE_UINT8: 0,
  CU_TENSOR_MAP_INTERLEAVE_NONE: 0,
  CU_TENSOR_MAP_SWIZZLE_128B: 3,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B: 3,
  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE: 0,
  "sizeof(CUtensorMap)": 128,

  CU_LAUNCH_PARAM_END_AS_INT: 0,
  CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT: 1,
  CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT: 2,
} as const;
