/**
 * The CUDA driver API by FFI, every status checked. A context is current per thread, so no call here is `nonblocking`, and
 * every call that needs the context makes it current first.
 */
import { FfiError, OutOfMemoryError } from "../errors.ts";
import type { GpuRuntime } from "../gpu_runtime.ts";
import { type OpenedLibrary, openLibrary, pinLibrary, textAt } from "../library.ts";
import { packStruct } from "../struct.ts";
import { CUDA, HEADER } from "./driver_header.ts";

/** After these the context is lost: every later call fails in the same way (cuda.h, comments of `cudaError_enum`). */
const FATAL: ReadonlySet<number> = new Set([
  HEADER.CUDA_ERROR_ECC_UNCORRECTABLE,
  HEADER.CUDA_ERROR_NVLINK_UNCORRECTABLE,
  HEADER.CUDA_ERROR_ILLEGAL_ADDRESS,
  HEADER.CUDA_ERROR_LAUNCH_TIMEOUT,
  HEADER.CUDA_ERROR_CONTEXT_IS_DESTROYED,
  HEADER.CUDA_ERROR_ASSERT,
  HEADER.CUDA_ERROR_HARDWARE_STACK_ERROR,
  HEADER.CUDA_ERROR_ILLEGAL_INSTRUCTION,
  HEADER.CUDA_ERROR_MISALIGNED_ADDRESS,
  HEADER.CUDA_ERROR_INVALID_ADDRESS_SPACE,
  HEADER.CUDA_ERROR_INVALID_PC,
  HEADER.CUDA_ERROR_LAUNCH_FAILED,
]);

const NO_GPU = "nvidia-smi lists the GPUs that the driver sees; CUDA_VISIBLE_DEVICES may hide some";
const UPDATE_DRIVER =
  "install a driver as new as the CUDA toolkit (nvidia-smi shows the newest CUDA it takes)";

const HINTS: Readonly<Record<number, string>> = {
  [HEADER.CUDA_ERROR_OUT_OF_MEMORY]: "nvidia-smi shows which programs use the GPU's memory",
  [HEADER.CUDA_ERROR_STUB_LIBRARY]:
    "this libcuda.so.1 is the toolkit's stub: install the NVIDIA driver, take the stubs off the search path",
  [HEADER.CUDA_ERROR_DEVICE_UNAVAILABLE]:
    "another process may hold the GPU in exclusive mode (nvidia-smi -q -d COMPUTE)",
  [HEADER.CUDA_ERROR_NO_DEVICE]: NO_GPU,
  [HEADER.CUDA_ERROR_INVALID_DEVICE]: NO_GPU,
  [HEADER.CUDA_ERROR_INVALID_IMAGE]: UPDATE_DRIVER,
  [HEADER.CUDA_ERROR_NO_BINARY_FOR_GPU]: UPDATE_DRIVER,
  [HEADER.CUDA_ERROR_INVALID_PTX]: UPDATE_DRIVER,
  [HEADER.CUDA_ERROR_UNSUPPORTED_PTX_VERSION]: UPDATE_DRIVER,
  [HEADER.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES]: "the block has too many threads for the kernel's registers",
  [HEADER.CUDA_ERROR_SYSTEM_NOT_READY]: "start nvidia-fabricmanager, which GPUs behind an NVSwitch need",
  [HEADER.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH]: "the driver was updated: reboot, or load its new kernel module",
  [HEADER.CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE]:
    "cuda-compat is not for this GPU: take it off LD_LIBRARY_PATH, update the driver instead",
  [HEADER.CUDA_ERROR_UNKNOWN]:
    "the module nvidia_uvm may be missing: run nvidia-smi, or nvidia-modprobe -u, as root",
};

const LOST =
  "work issued before that call went wrong and took the GPU's context with it: start the program again";

/** The driver whose context is current on this thread (every Worker has its own copy of this module). */
let entered: Driver | undefined;

/** Opens libcuda and initializes it. Throws {@link FfiError} without a driver or a GPU. */
export function openDriver(): Driver {
  const library = openLibrary("the NVIDIA driver (libcuda)", CUDA, {
    sonames: ["libcuda.so.1"],
    hint:
      "install the NVIDIA driver, 525 (CUDA 12.0) or newer: libcuda.so.1 comes with it and not with the toolkit",
  });
  pinLibrary(library.path); // its threads outlive this program's last look at it
  const driver = new Driver(library);
  try {
    driver.init();
  } catch (error) {
    driver[Symbol.dispose]();
    throw error;
  }
  return driver;
}

/**
 * Checked calls of the driver, named as in C without `cu`. Each throws an {@link FfiError} with the call's name and
 * the driver's words, {@link OutOfMemoryError} where memory is short.
 *
 * A driver serves one context: that of {@link retainContext}. An error that ends the context (an illegal address, ...)
 * shows in whatever call comes next; from then on all calls throw an error that names that first one.
 *
 * Arguments that C reads or writes during a call are typed arrays; host addresses that outlive it are bigints. It keeps
 * nothing alive: whoever passes an address holds what is behind it.
 */
export class Driver implements GpuRuntime {
  readonly #library: OpenedLibrary<typeof CUDA>;
  readonly #cu: OpenedLibrary<typeof CUDA>["symbols"];
  // Where calls put their results.
  readonly #out = new BigUint64Array(1);
  readonly #out2 = new BigUint64Array(1);
  readonly #int = new Int32Array(this.#out.buffer);
  readonly #float = new Float32Array(this.#out.buffer);
  /** `CUmemAllocationProp`: ordinary memory of the context's device. */
  #memory = new Uint8Array();
  /** `CUmemAccessDesc`: that device reads and writes it. */
  #access = new Uint8Array();
  #context: bigint | undefined;
  #device = 0;
  #failure: FfiError | undefined;
  #closed = false;

  constructor(library: OpenedLibrary<typeof CUDA>) {
    this.#library = library;
    this.#cu = library.symbols;
  }

  /** Where libcuda was found. */
  get path(): string {
    return this.#library.path;
  }

  /** Whether an error has ended the context. */
  get isLost(): boolean {
    return this.#failure !== undefined;
  }

  /** Throws where an error has ended the context, with that error's words. */
  checkAlive(): void {
    if (this.#failure === undefined) return;
    throw new FfiError(`cuda: the GPU's context was lost earlier: ${this.#failure.message}`, {
      cause: this.#failure,
      hint: LOST,
    });
  }

  // -- driver and devices --

  init(): void {
    this.#check(this.#cu.cuInit(0), "cuInit");
  }

  /** The newest CUDA version that the driver takes: `[13, 0]`. */
  driverGetVersion(): [major: number, minor: number] {
    this.#check(this.#cu.cuDriverGetVersion(this.#int), "cuDriverGetVersion");
    return [Math.floor(this.#int[0] / 1000), this.#int[0] % 1000 / 10];
  }

  deviceGetCount(): number {
    this.#check(this.#cu.cuDeviceGetCount(this.#int), "cuDeviceGetCount");
    return this.#int[0];
  }

  /** The handle of the device with this index. */
  deviceGet(ordinal: number): number {
    this.#check(this.#cu.cuDeviceGet(this.#int, ordinal), "cuDeviceGet");
    return this.#int[0];
  }

  deviceGetName(device: number): string {
    const name = new Uint8Array(256);
    this.#check(this.#cu.cuDeviceGetName(name, name.length, device), "cuDeviceGetName");
    return new TextDecoder().decode(name.subarray(0, name.indexOf(0)));
  }

  /** E.g. `"0000:18:00.0"`. */
  deviceGetPciBusId(device: number): string {
    const id = new Uint8Array(32);
    this.#check(this.#cu.cuDeviceGetPCIBusId(id, id.length, device), "cuDeviceGetPCIBusId");
    return new TextDecoder().decode(id.subarray(0, id.indexOf(0)));
  }

  /** Bytes. */
  deviceTotalMem(device: number): number {
    this.#check(this.#cu.cuDeviceTotalMem_v2(this.#out, device), "cuDeviceTotalMem");
    return Number(this.#out[0]);
  }

  /** @param attribute `HEADER.CU_DEVICE_ATTRIBUTE_...` */
  deviceGetAttribute(attribute: number, device: number): number {
    this.#check(this.#cu.cuDeviceGetAttribute(this.#int, attribute, device), "cuDeviceGetAttribute");
    return this.#int[0];
  }

  /** Takes the device's primary context, which libraries of the CUDA runtime share, for all calls of this driver. */
  retainContext(device: number): void {
    this.#check(this.#cu.cuDevicePrimaryCtxRetain(this.#out, device), "cuDevicePrimaryCtxRetain");
    this.#context = this.#out[0];
    this.#device = device;
    this.#memory = packStruct(HEADER["sizeof(CUmemAllocationProp)"], [
      [HEADER["offsetof(CUmemAllocationProp, type)"], HEADER.CU_MEM_ALLOCATION_TYPE_PINNED],
      [HEADER["offsetof(CUmemAllocationProp, location.type)"], HEADER.CU_MEM_LOCATION_TYPE_DEVICE],
      [HEADER["offsetof(CUmemAllocationProp, location.id)"], device],
    ]);
    this.#access = packStruct(HEADER["sizeof(CUmemAccessDesc)"], [
      [HEADER["offsetof(CUmemAccessDesc, location.type)"], HEADER.CU_MEM_LOCATION_TYPE_DEVICE],
      [HEADER["offsetof(CUmemAccessDesc, location.id)"], device],
      [HEADER["offsetof(CUmemAccessDesc, flags)"], HEADER.CU_MEM_ACCESS_FLAGS_PROT_READWRITE],
    ]);
    this.enter();
  }

  /**
   * Makes the context current on this thread, where it is not. Calls of this class do so by themselves; who calls
   * another library for this device does so before.
   */
  enter(): void {
    if (entered === this) return;
    if (this.#context === undefined) throw new FfiError("cuda: no context was taken, or it was given back");
    this.#check(this.#cu.cuCtxSetCurrent(this.#context), "cuCtxSetCurrent");
    entered = this;
  }

  // -- streams and events --

  /** A stream that does not wait for the legacy default stream. */
  streamCreate(): bigint {
    this.enter();
    this.#check(this.#cu.cuStreamCreate(this.#out, HEADER.CU_STREAM_NON_BLOCKING), "cuStreamCreate");
    return this.#out[0];
  }

  /** Blocks until all work of the stream is done. */
  streamSynchronize(stream: bigint): void {
    this.enter();
    this.#check(this.#cu.cuStreamSynchronize(stream), "cuStreamSynchronize");
  }

  /** Whether all work of the stream is done. */
  streamQuery(stream: bigint): boolean {
    this.enter();
    return this.#ready(this.#cu.cuStreamQuery(stream), "cuStreamQuery");
  }

  /** Later work of the stream waits for the event. */
  streamWaitEvent(stream: bigint, event: bigint): void {
    this.enter();
    this.#check(this.#cu.cuStreamWaitEvent(stream, event, 0), "cuStreamWaitEvent");
  }

  streamDestroy(stream: bigint): void {
    this.enter();
    this.#check(this.#cu.cuStreamDestroy_v2(stream), "cuStreamDestroy");
  }

  /** @param timing whether {@link eventElapsedTime} takes it; without, it costs less */
  eventCreate(timing: boolean): bigint {
    this.enter();
    const flags = timing ? HEADER.CU_EVENT_DEFAULT : HEADER.CU_EVENT_DISABLE_TIMING;
    this.#check(this.#cu.cuEventCreate(this.#out, flags), "cuEventCreate");
    return this.#out[0];
  }

  eventRecord(event: bigint, stream: bigint): void {
    this.enter();
    this.#check(this.#cu.cuEventRecord(event, stream), "cuEventRecord");
  }

  /** Blocks until the work before the event is done. */
  eventSynchronize(event: bigint): void {
    this.enter();
    this.#check(this.#cu.cuEventSynchronize(event), "cuEventSynchronize");
  }

  /** Whether the work before the event is done. */
  eventQuery(event: bigint): boolean {
    this.enter();
    return this.#ready(this.#cu.cuEventQuery(event), "cuEventQuery");
  }

  /** Milliseconds between two events that have happened; resolution half a microsecond. */
  eventElapsedTime(start: bigint, end: bigint): number {
    this.enter();
    this.#check(this.#cu.cuEventElapsedTime(this.#float, start, end), "cuEventElapsedTime");
    return this.#float[0];
  }

  eventDestroy(event: bigint): void {
    this.enter();
    this.#check(this.#cu.cuEventDestroy_v2(event), "cuEventDestroy");
  }

  // -- memory --

  /** Bytes of the GPU's memory: what no program uses, and all. */
  memGetInfo(): { free: number; total: number } {
    this.enter();
    this.#check(this.#cu.cuMemGetInfo_v2(this.#out, this.#out2), "cuMemGetInfo");
    return { free: Number(this.#out[0]), total: Number(this.#out2[0]) };
  }

  memAlloc(bytes: number): bigint {
    this.enter();
    this.#check(this.#cu.cuMemAlloc_v2(this.#out, BigInt(bytes)), "cuMemAlloc");
    return this.#out[0];
  }

  /** Waits for all work that may use the memory. */
  memFree(pointer: bigint): void {
    this.enter();
    this.#check(this.#cu.cuMemFree_v2(pointer), "cuMemFree");
  }

  /** Page-locked host memory, which copies read and write without the CPU; any context may use it. */
  memHostAlloc(bytes: number): bigint {
    this.enter();
    const flags = HEADER.CU_MEMHOSTALLOC_PORTABLE;
    this.#check(this.#cu.cuMemHostAlloc(this.#out, BigInt(bytes), flags), "cuMemHostAlloc");
    return this.#out[0];
  }

  memFreeHost(address: bigint): void {
    this.enter();
    this.#check(this.#cu.cuMemFreeHost(address), "cuMemFreeHost");
  }

  /** Sizes and addresses of mapped memory are multiples of this many bytes. */
  memGetAllocationGranularity(): number {
    this.enter();
    const option = HEADER.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    this.#check(
      this.#cu.cuMemGetAllocationGranularity(this.#out, this.#memory, option),
      "cuMemGetAllocationGranularity",
    );
    return Number(this.#out[0]);
  }

  /** A range of addresses with no memory behind them. */
  memAddressReserve(bytes: number): bigint {
    this.enter();
    this.#check(
      this.#cu.cuMemAddressReserve(this.#out, BigInt(bytes), 0n, 0n, 0n),
      "cuMemAddressReserve",
    );
    return this.#out[0];
  }

  memAddressFree(pointer: bigint, bytes: number): void {
    this.enter();
    this.#check(this.#cu.cuMemAddressFree(pointer, BigInt(bytes)), "cuMemAddressFree");
  }

  /** Memory of the device that has no address yet. */
  memCreate(bytes: number): bigint {
    this.enter();
    this.#check(this.#cu.cuMemCreate(this.#out, BigInt(bytes), this.#memory, 0n), "cuMemCreate");
    return this.#out[0];
  }

  /** Gives the handle up; the memory goes when it is not mapped (any more). */
  memRelease(handle: bigint): void {
    this.enter();
    this.#check(this.#cu.cuMemRelease(handle), "cuMemRelease");
  }

  memMap(pointer: bigint, bytes: number, handle: bigint): void {
    this.enter();
    this.#check(this.#cu.cuMemMap(pointer, BigInt(bytes), 0n, handle, 0n), "cuMemMap");
  }

  /** Lets this device read and write mapped memory. */
  memSetAccess(pointer: bigint, bytes: number): void {
    this.enter();
    this.#check(this.#cu.cuMemSetAccess(pointer, BigInt(bytes), this.#access, 1n), "cuMemSetAccess");
  }

  /** Takes whole mappings away. No work may use them any more. */
  memUnmap(pointer: bigint, bytes: number): void {
    this.enter();
    this.#check(this.#cu.cuMemUnmap(pointer, BigInt(bytes)), "cuMemUnmap");
  }

  /** Issues a copy from the host; the host's bytes are read later when `source` is page-locked. */
  memcpyHtoDAsync(target: bigint, source: bigint, bytes: number, stream: bigint): void {
    this.enter();
    this.#check(this.#cu.cuMemcpyHtoDAsync_v2(target, source, BigInt(bytes), stream), "cuMemcpyHtoDAsync");
  }

  /** Issues a copy to the host; its bytes are written later when `target` is page-locked. */
  memcpyDtoHAsync(target: bigint, source: bigint, bytes: number, stream: bigint): void {
    this.enter();
    this.#check(this.#cu.cuMemcpyDtoHAsync_v2(target, source, BigInt(bytes), stream), "cuMemcpyDtoHAsync");
  }

  memcpyDtoDAsync(target: bigint, source: bigint, bytes: number, stream: bigint): void {
    this.enter();
    this.#check(this.#cu.cuMemcpyDtoDAsync_v2(target, source, BigInt(bytes), stream), "cuMemcpyDtoDAsync");
  }

  /** Sets `count` bytes. */
  memsetD8Async(target: bigint, value: number, count: number, stream: bigint): void {
    this.enter();
    this.#check(this.#cu.cuMemsetD8Async(target, value, BigInt(count), stream), "cuMemsetD8Async");
  }

  /** Sets `count` 32-bit words. */
  memsetD32Async(target: bigint, value: number, count: number, stream: bigint): void {
    this.enter();
    this.#check(this.#cu.cuMemsetD32Async(target, value, BigInt(count), stream), "cuMemsetD32Async");
  }

  // -- modules and launches --

  /** @param image a cubin. @param name its file's, for messages. */
  moduleLoadData(image: Uint8Array<ArrayBuffer>, name: string): bigint {
    this.enter();
    const status = this.#cu.cuModuleLoadData(this.#out, image);
    if (status !== 0) this.#fail(status, `cuModuleLoadData of ${name}`);
    return this.#out[0];
  }

  moduleUnload(module: bigint): void {
    this.enter();
    this.#check(this.#cu.cuModuleUnload(module), "cuModuleUnload");
  }

  /** @param file of the module, for messages. */
  moduleGetFunction(module: bigint, name: string, file: string): bigint {
    this.enter();
    const status = this.#cu.cuModuleGetFunction(this.#out, module, new TextEncoder().encode(`${name}\0`));
    if (status !== 0) this.#fail(status, `cuModuleGetFunction of ${name} in ${file}`);
    return this.#out[0];
  }

  /** @param attribute `HEADER.CU_FUNC_ATTRIBUTE_...` */
  funcGetAttribute(attribute: number, kernel: bigint): number {
    this.enter();
    this.#check(this.#cu.cuFuncGetAttribute(this.#int, attribute, kernel), "cuFuncGetAttribute");
    return this.#int[0];
  }

  /** @param attribute `HEADER.CU_FUNC_ATTRIBUTE_...` */
  funcSetAttribute(kernel: bigint, attribute: number, value: number): void {
    this.enter();
    this.#check(this.#cu.cuFuncSetAttribute(kernel, attribute, value), "cuFuncSetAttribute");
  }

  /**
   * @param parameters addresses of the arguments, or null. @param extra `CU_LAUNCH_PARAM_...` and addresses, see cuda.h,
   *   or null: one of both, unless the kernel has no parameters. The driver reads all of it before it returns.
   * @param name the kernel's, for messages
   */
  launchKernel(
    kernel: bigint,
    [gridX, gridY, gridZ]: readonly [number, number, number],
    [blockX, blockY, blockZ]: readonly [number, number, number],
    shared: number,
    stream: bigint,
    parameters: BigUint64Array<ArrayBuffer> | null,
    extra: BigUint64Array<ArrayBuffer> | null,
    name: string,
  ): void {
    this.enter();
    const status = this.#cu.cuLaunchKernel(
      kernel,
      gridX,
      gridY,
      gridZ,
      blockX,
      blockY,
      blockZ,
      shared,
      stream,
      parameters,
      extra,
    );
    if (status !== 0) this.#fail(status, `cuLaunchKernel of ${name}`);
  }

  /**
   * How to copy tiles of 128 bytes of `boxRows` rows, swizzled, from `rows` rows of `rowBytes` bytes each, `stride` bytes
   * apart. What is outside becomes 0.
   *
   * @returns a CUtensorMap. @param what it describes, for messages.
   */
  tensorMapEncode(
    address: bigint,
    rows: number,
    rowBytes: number,
    stride: number,
    boxRows: number,
    what: string,
  ): Uint8Array<ArrayBuffer> {
    this.enter();
    const bytes = HEADER["sizeof(CUtensorMap)"];
    // The driver wants its address to be a multiple of 64.
    const room = new Uint8Array(bytes + 64);
    const start = Deno.UnsafePointer.value(Deno.UnsafePointer.of(room));
    const offset = Number(-start & 63n);
    const status = this.#cu.cuTensorMapEncodeTiled(
      start + BigInt(offset),
      HEADER.CU_TENSOR_MAP_DATA_TYPE_UINT8,
      2,
      address,
      BigUint64Array.of(BigInt(rowBytes), BigInt(rows)),
      BigUint64Array.of(BigInt(stride)),
      Uint32Array.of(128, boxRows),
      Uint32Array.of(1, 1),
      HEADER.CU_TENSOR_MAP_INTERLEAVE_NONE,
      HEADER.CU_TENSOR_MAP_SWIZZLE_128B,
      HEADER.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      HEADER.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    );
    if (status !== 0) this.#fail(status, `cuTensorMapEncodeTiled of ${what}`);
    return room.slice(offset, offset + bytes);
  }

  // -- graphs --

  /** Work that is issued to the stream is recorded from here on. See device.ts for why the mode is "relaxed". */
  streamBeginCapture(stream: bigint): void {
    this.enter();
    this.#check(
      this.#cu.cuStreamBeginCapture_v2(stream, HEADER.CU_STREAM_CAPTURE_MODE_RELAXED),
      "cuStreamBeginCapture",
    );
  }

  /** Ends recording, also one that has failed: then it throws. */
  streamEndCapture(stream: bigint): bigint {
    this.enter();
    this.#out[0] = 0n;
    this.#check(this.#cu.cuStreamEndCapture(stream, this.#out), "cuStreamEndCapture");
    return this.#out[0];
  }

  /** Whether the stream records, and nothing has made the recording invalid. */
  streamIsCapturing(stream: bigint): boolean {
    this.enter();
    this.#check(this.#cu.cuStreamIsCapturing(stream, this.#int), "cuStreamIsCapturing");
    return this.#int[0] === HEADER.CU_STREAM_CAPTURE_STATUS_ACTIVE;
  }

  /** How many kernels, copies, ... a graph has. */
  graphNodeCount(graph: bigint): number {
    this.enter();
    this.#check(this.#cu.cuGraphGetNodes(graph, null, this.#out), "cuGraphGetNodes");
    return Number(this.#out[0]);
  }

  graphInstantiate(graph: bigint): bigint {
    this.enter();
    this.#check(this.#cu.cuGraphInstantiateWithFlags(this.#out, graph, 0n), "cuGraphInstantiate");
    return this.#out[0];
  }

  graphLaunch(executable: bigint, stream: bigint): void {
    this.enter();
    this.#check(this.#cu.cuGraphLaunch(executable, stream), "cuGraphLaunch");
  }

  graphExecDestroy(executable: bigint): void {
    this.enter();
    this.#check(this.#cu.cuGraphExecDestroy(executable), "cuGraphExecDestroy");
  }

  graphDestroy(graph: bigint): void {
    this.enter();
    this.#check(this.#cu.cuGraphDestroy(graph), "cuGraphDestroy");
  }

  /** Gives the context back; what was made in it goes with the last who holds it. */
  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    try {
      if (this.#context === undefined) return;
      if (entered === this) {
        this.#cu.cuCtxSetCurrent(0n);
        entered = undefined;
      }
      this.#context = undefined;
      this.#check(this.#cu.cuDevicePrimaryCtxRelease_v2(this.#device), "cuDevicePrimaryCtxRelease");
    } finally {
      this.#library.close();
    }
  }

  // -- helpers --

  #check(status: number, call: string): void {
    if (status !== 0) this.#fail(status, call);
  }

  #ready(status: number, call: string): boolean {
    if (status === HEADER.CUDA_ERROR_NOT_READY) return false;
    this.#check(status, call);
    return true;
  }

  #fail(status: number, call: string): never {
    this.checkAlive();
    const name = this.#text(status, "cuGetErrorName") ?? `error ${status}`;
    const text = this.#text(status, "cuGetErrorString");
    const message = `cuda: ${call} failed: ${name} (${status})${text === undefined ? "" : `, ${text}`}`;
    if (FATAL.has(status)) {
      this.#failure = new FfiError(message, { hint: LOST });
      throw this.#failure;
    }
    const hint = HINTS[status];
    const ErrorClass = status === HEADER.CUDA_ERROR_OUT_OF_MEMORY ? OutOfMemoryError : FfiError;
    throw new ErrorClass(message, hint === undefined ? {} : { hint });
  }

  #text(status: number, call: "cuGetErrorName" | "cuGetErrorString"): string | undefined {
    this.#out2[0] = 0n;
    this.#cu[call](status, this.#out2);
    return textAt(Deno.UnsafePointer.create(this.#out2[0]));
  }
}
