/**
 * What of HIP's headers is in use. Source: `hip_runtime_api.h` and `driver_types.h` of ROCm 6.2 and 7; what was there in 5.2
 * has kept its values, but for the layout of `hipMemAllocationProp`. Handles and device addresses are 64-bit integers.
 */

/** The functions in use. */
export const HIP = {
  // hipError_t hipInit(unsigned int flags)
  hipInit: { parameters: ["u32"], result: "i32" },
  // hipError_t hipRuntimeGetVersion(int *runtimeVersion)
  hipRuntimeGetVersion: { parameters: ["buffer"], result: "i32" },
  // const char *hipGetErrorName(hipError_t hip_error)
  hipGetErrorName: { parameters: ["i32"], result: "pointer" },
  // const char *hipGetErrorString(hipError_t hipError)
  hipGetErrorString: { parameters: ["i32"], result: "pointer" },

  // hipError_t hipGetDeviceCount(int *count)
  hipGetDeviceCount: { parameters: ["buffer"], result: "i32" },
  // hipError_t hipDeviceGetName(char *name, int len, hipDevice_t device)
  hipDeviceGetName: { parameters: ["buffer", "i32", "i32"], result: "i32" },
  // hipError_t hipDeviceTotalMem(size_t *bytes, hipDevice_t device)
  hipDeviceTotalMem: { parameters: ["buffer", "i32"], result: "i32" },
  // hipError_t hipDeviceGetAttribute(int *pi, hipDeviceAttribute_t attr, int deviceId)
  hipDeviceGetAttribute: { parameters: ["buffer", "i32", "i32"], result: "i32" },
  // hipError_t hipGetDevicePropertiesR0600(hipDeviceProp_tR0600 *prop, int deviceId): from ROCm 6 on
  hipGetDevicePropertiesR0600: { parameters: ["buffer", "i32"], result: "i32", optional: true },
  // hipError_t hipSetDevice(int deviceId)
  hipSetDevice: { parameters: ["i32"], result: "i32" },

  // hipError_t hipStreamCreateWithFlags(hipStream_t *stream, unsigned int flags)
  hipStreamCreateWithFlags: { parameters: ["buffer", "u32"], result: "i32" },
  // hipError_t hipStreamSynchronize(hipStream_t stream)
  hipStreamSynchronize: { parameters: ["u64"], result: "i32" },
  // hipError_t hipStreamQuery(hipStream_t stream)
  hipStreamQuery: { parameters: ["u64"], result: "i32" },
  // hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned int flags)
  hipStreamWaitEvent: { parameters: ["u64", "u64", "u32"], result: "i32" },
  // hipError_t hipStreamDestroy(hipStream_t stream)
  hipStreamDestroy: { parameters: ["u64"], result: "i32" },
  // hipError_t hipEventCreateWithFlags(hipEvent_t *event, unsigned flags)
  hipEventCreateWithFlags: { parameters: ["buffer", "u32"], result: "i32" },
  // hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream)
  hipEventRecord: { parameters: ["u64", "u64"], result: "i32" },
  // hipError_t hipEventSynchronize(hipEvent_t event)
  hipEventSynchronize: { parameters: ["u64"], result: "i32" },
  // hipError_t hipEventQuery(hipEvent_t event)
  hipEventQuery: { parameters: ["u64"], result: "i32" },
  // hipError_t hipEventElapsedTime(float *ms, hipEvent_t start, hipEvent_t stop)
  hipEventElapsedTime: { parameters: ["buffer", "u64", "u64"], result: "i32" },
  // hipError_t hipEventDestroy(hipEvent_t event)
  hipEventDestroy: { parameters: ["u64"], result: "i32" },

  // hipError_t hipMemGetInfo(size_t *free, size_t *total)
  hipMemGetInfo: { parameters: ["buffer", "buffer"], result: "i32" },
  // hipError_t hipHostMalloc(void **ptr, size_t size, unsigned int flags)
  hipHostMalloc: { parameters: ["buffer", "usize", "u32"], result: "i32" },
  // hipError_t hipHostFree(void *ptr)
  hipHostFree: { parameters: ["u64"], result: "i32" },
  // hipError_t hipMemGetAllocationGranularity(size_t *granularity, const hipMemAllocationProp *prop,
  //     hipMemAllocationGranularity_flags option)
  hipMemGetAllocationGranularity: { parameters: ["buffer", "buffer", "i32"], result: "i32" },
  // hipError_t hipMemAddressReserve(void **ptr, size_t size, size_t alignment, void *addr, unsigned long long flags)
  hipMemAddressReserve: { parameters: ["buffer", "usize", "usize", "u64", "u64"], result: "i32" },
  // hipError_t hipMemAddressFree(void *devPtr, size_t size)
  hipMemAddressFree: { parameters: ["u64", "usize"], result: "i32" },
  // hipError_t hipMemCreate(hipMemGenericAllocationHandle_t *handle, size_t size, const hipMemAllocationProp *prop,
  //     unsigned long long flags)
  hipMemCreate: { parameters: ["buffer", "usize", "buffer", "u64"], result: "i32" },
  // hipError_t hipMemRelease(hipMemGenericAllocationHandle_t handle)
  hipMemRelease: { parameters: ["u64"], result: "i32" },
  // hipError_t hipMemMap(void *ptr, size_t size, size_t offset, hipMemGenericAllocationHandle_t handle,
  //     unsigned long long flags)
  hipMemMap: { parameters: ["u64", "usize", "usize", "u64", "u64"], result: "i32" },
  // hipError_t hipMemSetAccess(void *ptr, size_t size, const hipMemAccessDesc *desc, size_t count)
  hipMemSetAccess: { parameters: ["u64", "usize", "buffer", "usize"], result: "i32" },
  // hipError_t hipMemUnmap(void *ptr, size_t size)
  hipMemUnmap: { parameters: ["u64", "usize"], result: "i32" },

  // hipError_t hipMemcpyAsync(void *dst, const void *src, size_t sizeBytes, hipMemcpyKind kind, hipStream_t stream)
  hipMemcpyAsync: { parameters: ["u64", "u64", "usize", "i32", "u64"], result: "i32" },
  // hipError_t hipMemcpy2DAsync(void *dst, size_t dpitch, const void *src, size_t spitch, size_t width, size_t height,
  //     hipMemcpyKind kind, hipStream_t stream)
  hipMemcpy2DAsync: {
    parameters: ["u64", "usize", "u64", "usize", "usize", "usize", "i32", "u64"],
    result: "i32",
  },
  // hipError_t hipMemsetD8Async(hipDeviceptr_t dest, unsigned char value, size_t count, hipStream_t stream)
  hipMemsetD8Async: { parameters: ["u64", "u8", "usize", "u64"], result: "i32" },
  // hipError_t hipMemsetD32Async(hipDeviceptr_t dst, int value, size_t count, hipStream_t stream)
  hipMemsetD32Async: { parameters: ["u64", "i32", "usize", "u64"], result: "i32" },

  // hipError_t hipModuleLoadData(hipModule_t *module, const void *image)
  hipModuleLoadData: { parameters: ["buffer", "buffer"], result: "i32" },
  // hipError_t hipModuleUnload(hipModule_t module)
  hipModuleUnload: { parameters: ["u64"], result: "i32" },
  // hipError_t hipModuleGetFunction(hipFunction_t *function, hipModule_t module, const char *kname)
  hipModuleGetFunction: { parameters: ["buffer", "u64", "buffer"], result: "i32" },
  // hipError_t hipFuncGetAttribute(int *value, hipFunction_attribute attrib, hipFunction_t hfunc)
  hipFuncGetAttribute: { parameters: ["buffer", "i32", "u64"], result: "i32" },
  // hipError_t hipModuleLaunchKernel(hipFunction_t f, unsigned int gridDimX, unsigned int gridDimY,
  //     unsigned int gridDimZ, unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ,
  //     unsigned int sharedMemBytes, hipStream_t stream, void **kernelParams, void **extra)
  hipModuleLaunchKernel: {
    parameters: ["u64", "u32", "u32", "u32", "u32", "u32", "u32", "u32", "u64", "buffer", "buffer"],
    result: "i32",
  },

  // hipError_t hipStreamBeginCapture(hipStream_t stream, hipStreamCaptureMode mode)
  hipStreamBeginCapture: { parameters: ["u64", "i32"], result: "i32" },
  // hipError_t hipStreamEndCapture(hipStream_t stream, hipGraph_t *pGraph)
  hipStreamEndCapture: { parameters: ["u64", "buffer"], result: "i32" },
  // hipError_t hipGraphInstantiateWithFlags(hipGraphExec_t *pGraphExec, hipGraph_t graph, unsigned long long flags)
  hipGraphInstantiateWithFlags: { parameters: ["buffer", "u64", "u64"], result: "i32" },
  // hipError_t hipGraphLaunch(hipGraphExec_t graphExec, hipStream_t stream)
  hipGraphLaunch: { parameters: ["u64", "u64"], result: "i32" },
  // hipError_t hipGraphExecDestroy(hipGraphExec_t graphExec)
  hipGraphExecDestroy: { parameters: ["u64"], result: "i32" },
  // hipError_t hipGraphDestroy(hipGraph_t graph)
  hipGraphDestroy: { parameters: ["u64"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** Values of the headers' enums and macros; a test compares them with the headers of ROCm 5.2, which have kept them. */
export const HEADER = {
  hipErrorOutOfMemory: 2,
  hipErrorNotInitialized: 3,
  hipErrorInsufficientDriver: 35,
  hipErrorNoDevice: 100,
  hipErrorInvalidDevice: 101,
  hipErrorInvalidImage: 200,
  hipErrorNoBinaryForGpu: 209,
  hipErrorECCNotCorrectable: 214,
  hipErrorNotReady: 600,
  hipErrorIllegalAddress: 700,
  hipErrorLaunchOutOfResources: 701,
  hipErrorLaunchTimeOut: 702,
  hipErrorContextIsDestroyed: 709,
  hipErrorAssert: 710,
  hipErrorLaunchFailure: 719,

  hipDeviceAttributeMaxBlockDimX: 26,
  hipDeviceAttributeMaxBlockDimY: 27,
  hipDeviceAttributeMaxBlockDimZ: 28,
  hipDeviceAttributeMaxGridDimX: 29,
  hipDeviceAttributeMaxGridDimY: 30,
  hipDeviceAttributeMaxGridDimZ: 31,
  hipDeviceAttributeMaxThreadsPerBlock: 56,
  hipDeviceAttributeMultiprocessorCount: 63,
  hipDeviceAttributeMaxSharedMemoryPerBlock: 74,
  hipDeviceAttributeWarpSize: 87,

  HIP_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: 1,
  hipStreamNonBlocking: 1,
  hipEventDefault: 0,
  hipEventDisableTiming: 2,
  hipStreamCaptureModeRelaxed: 2,
  hipHostMallocPortable: 1,
  hipMemcpyHostToDevice: 1,
  hipMemcpyDeviceToHost: 2,
  hipMemcpyDeviceToDevice: 3,

  hipMemAllocationTypePinned: 1,
  hipMemLocationTypeDevice: 1,
  hipMemAllocationGranularityRecommended: 1,
  hipMemAccessFlagsProtReadWrite: 3,
  "sizeof(hipMemAllocationProp)": 32,
  "sizeof(hipMemAccessDesc)": 12,
  "offsetof(hipMemAccessDesc, location.type)": 0,
  "offsetof(hipMemAccessDesc, location.id)": 4,
  "offsetof(hipMemAccessDesc, flags)": 8,

  "(long)HIP_LAUNCH_PARAM_BUFFER_POINTER": 1,
  "(long)HIP_LAUNCH_PARAM_BUFFER_SIZE": 2,
  "(long)HIP_LAUNCH_PARAM_END": 3,
} as const;

/** The same of what came after ROCm 5.2, or has changed since: of ROCm 6.2's headers. */
export const NEWER_HEADER = {
  hipDeviceAttributeVirtualMemoryManagementSupported: 89,
  "offsetof(hipMemAllocationProp, type)": 0,
  "offsetof(hipMemAllocationProp, location.type)": 8,
  "offsetof(hipMemAllocationProp, location.id)": 12,
  "sizeof(hipDeviceProp_tR0600)": 1472,
  "offsetof(hipDeviceProp_tR0600, gcnArchName)": 1160,
} as const;

/** Bytes of hipDeviceProp_tR0600's `gcnArchName`. */
export const ARCH_NAME_BYTES = 256;
