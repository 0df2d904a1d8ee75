/**
 * HIP's runtime by FFI, every status checked: the twin of cuda/driver.ts. HIP has no contexts: a device is current per
 * thread, so no call here is `nonblocking`, and every call that needs it makes it current first.
 */
import { FfiError, OutOfMemoryError } from "../errors.ts";
import type { GpuRuntime } from "../gpu_runtime.ts";
import { type OpenedLibrary, openLibrary, pinLibrary, textAt } from "../library.ts";
import { packStruct } from "../struct.ts";
import { ARCH_NAME_BYTES, HEADER, HIP, NEWER_HEADER } from "./runtime_header.ts";
import { INSTALL_ROCM, rocmSonames } from "./versions.ts";

/** After these the GPU does nothing more for this process. */
const FATAL: ReadonlySet<number> = new Set([
  HEADER.hipErrorECCNotCorrectable,
  HEADER.hipErrorIllegalAddress,
  HEADER.hipErrorLaunchTimeOut,
  HEADER.hipErrorContextIsDestroyed,
  HEADER.hipErrorAssert,
  HEADER.hipErrorLaunchFailure,
]);

const NO_GPU =
  "rocminfo lists the GPUs that ROCm sees; HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES may hide some, " +
  "and the user must be in the groups render and video";
const UPDATE_ROCM = "this ROCm does not know the GPU: rocminfo shows what it is, a newer ROCm may have it";

const HINTS: Readonly<Record<number, string>> = {
  [HEADER.hipErrorOutOfMemory]: "rocm-smi shows which programs use the GPU's memory",
  [HEADER.hipErrorNotInitialized]: NO_GPU,
  [HEADER.hipErrorInsufficientDriver]: "install the amdgpu driver of this ROCm, or reboot after its update",
  [HEADER.hipErrorNoDevice]: NO_GPU,
  [HEADER.hipErrorInvalidDevice]: NO_GPU,
  [HEADER.hipErrorInvalidImage]: UPDATE_ROCM,
  [HEADER.hipErrorNoBinaryForGpu]: UPDATE_ROCM,
  [HEADER.hipErrorLaunchOutOfResources]: "the block has too many threads for the kernel's registers",
};

const LOST = "work issued before that call went wrong on the GPU: start the program again";

/** The runtime whose device is current on this thread (every Worker has its own copy of this module). */
let entered: HipRuntime | undefined;

/** Opens libamdhip64 without initializing it. Throws {@link LibraryNotFoundError}. */
export function openHipLibrary(sonames = rocmSonames("libamdhip64")): OpenedLibrary<typeof HIP> {
  const library = openLibrary("HIP's runtime (libamdhip64)", HIP, { sonames, hint: INSTALL_ROCM });
  pinLibrary(library.path); // its threads outlive this program's last look at it
  return library;
}

/** Opens libamdhip64 and initializes it. Throws {@link FfiError} without ROCm or a GPU. */
export function openRuntime(): HipRuntime {
  const runtime = new HipRuntime(openHipLibrary());
  try {
    runtime.init();
  } catch (error) {
    runtime[Symbol.dispose]();
    throw error;
  }
  return runtime;
}

/**
 * Checked calls of HIP, named as in C without `hip`. Each throws an {@link FfiError} with the call's name and HIP's words,
 * {@link OutOfMemoryError} where memory is short.
 *
 * A runtime serves one device: that of {@link useDevice}. An error that ends the work on the GPU (an illegal address, ...)
 * shows in whatever call comes next; from then on all calls throw an error that names that first one.
 *
 * Arguments that C reads or writes during a call are typed arrays; host addresses that outlive it are bigints. It keeps
 * nothing alive: whoever passes an address holds what is behind it.
 */
export class HipRuntime implements GpuRuntime {
  readonly #library: OpenedLibrary<typeof HIP>;
  readonly #hip: OpenedLibrary<typeof HIP>["symbols"];
  // Where calls put their results.
  readonly #out = new BigUint64Array(1);
  readonly #out2 = new BigUint64Array(1);
  readonly #int = new Int32Array(this.#out.buffer);
  readonly #float = new Float32Array(this.#out.buffer);
  /** `hipMemAllocationProp`: ordinary memory of the device. */
  #memory = new Uint8Array();
  /** `hipMemAccessDesc`: that device reads and writes it. */
  #access = new Uint8Array();
  #device: number | undefined;
  #failure: FfiError | undefined;
  #closed = false;

  constructor(library: OpenedLibrary<typeof HIP>) {
    this.#library = library;
    this.#hip = library.symbols;
  }

  /** Where libamdhip64 was found. */
  get path(): string {
    return this.#library.path;
  }

  get isLost(): boolean {
    return this.#failure !== undefined;
  }

  checkAlive(): void {
    if (this.#failure === undefined) return;
    throw new FfiError(`hip: the GPU was lost earlier: ${this.#failure.message}`, {
      cause: this.#failure,
      hint: LOST,
    });
  }

  // -- runtime and devices --

  init(): void {
    this.#check(this.#hip.hipInit(0), "hipInit");
  }

  /** HIP's version as it counts: 60241133 is 6.2.41133. */
  runtimeGetVersion(): number {
    this.#check(this.#hip.hipRuntimeGetVersion(this.#int), "hipRuntimeGetVersion");
    return this.#int[0];
  }

  getDeviceCount(): number {
    this.#check(this.#hip.hipGetDeviceCount(this.#int), "hipGetDeviceCount");
    return this.#int[0];
  }

  deviceGetName(device: number): string {
    const name = new Uint8Array(256);
    this.#check(this.#hip.hipDeviceGetName(name, name.length, device), "hipDeviceGetName");
    return textOf(name);
  }

  /** Bytes. */
  deviceTotalMem(device: number): number {
    this.#check(this.#hip.hipDeviceTotalMem(this.#out, device), "hipDeviceTotalMem");
    return Number(this.#out[0]);
  }

  /** @param attribute `HEADER.hipDeviceAttribute...` */
  deviceGetAttribute(attribute: number, device: number): number {
    this.#check(this.#hip.hipDeviceGetAttribute(this.#int, attribute, device), "hipDeviceGetAttribute");
    return this.#int[0];
  }

  /**
   * What compilers call the GPU: `"gfx942"`, without the features that HIP names behind it, as in `"gfx942:sramecc+:xnack-"`:
   * code for the plain name runs with all of them.
   *
   * @throws {FfiError} before ROCm 6
   */
  deviceArchitecture(device: number): string {
    const { hipGetDevicePropertiesR0600: get } = this.#hip;
    if (get === null) {
      throw new FfiError(`hip: ${this.path} has no hipGetDevicePropertiesR0600: it is older than ROCm 6`, {
        hint: INSTALL_ROCM,
      });
    }
    const properties = new Uint8Array(NEWER_HEADER["sizeof(hipDeviceProp_tR0600)"]);
    this.#check(get(properties, device), "hipGetDeviceProperties");
    const start = NEWER_HEADER["offsetof(hipDeviceProp_tR0600, gcnArchName)"];
    return textOf(properties.subarray(start, start + ARCH_NAME_BYTES)).split(":")[0];
  }

  /** Takes the device for all calls of this runtime. */
  useDevice(device: number): void {
    this.#device = device;
    this.#memory = packStruct(HEADER["sizeof(hipMemAllocationProp)"], [
      [NEWER_HEADER["offsetof(hipMemAllocationProp, type)"], HEADER.hipMemAllocationTypePinned],
      [NEWER_HEADER["offsetof(hipMemAllocationProp, location.type)"], HEADER.hipMemLocationTypeDevice],
      [NEWER_HEADER["offsetof(hipMemAllocationProp, location.id)"], device],
    ]);
    this.#access = packStruct(HEADER["sizeof(hipMemAccessDesc)"], [
      [HEADER["offsetof(hipMemAccessDesc, location.type)"], HEADER.hipMemLocationTypeDevice],
      [HEADER["offsetof(hipMemAccessDesc, location.id)"], device],
      [HEADER["offsetof(hipMemAccessDesc, flags)"], HEADER.hipMemAccessFlagsProtReadWrite],
    ]);
    this.enter();
  }

  enter(): void {
    if (entered === this) return;
    if (this.#device === undefined) throw new FfiError("hip: no device was taken, or it was given back");
    this.#check(this.#hip.hipSetDevice(this.#device), "hipSetDevice");
    entered = this;
  }

  // -- streams and events --

  streamCreate(): bigint {
    this.enter();
    this.#check(
      this.#hip.hipStreamCreateWithFlags(this.#out, HEADER.hipStreamNonBlocking),
      "hipStreamCreateWithFlags",
    );
    return this.#out[0];
  }

  streamSynchronize(stream: bigint): void {
    this.enter();
    this.#check(this.#hip.hipStreamSynchronize(stream), "hipStreamSynchronize");
  }

  streamQuery(stream: bigint): boolean {
    this.enter();
    return this.#ready(this.#hip.hipStreamQuery(stream), "hipStreamQuery");
  }

  streamWaitEvent(stream: bigint, event: bigint): void {
    this.enter();
    this.#check(this.#hip.hipStreamWaitEvent(stream, event, 0), "hipStreamWaitEvent");
  }

  streamDestroy(stream: bigint): void {
    this.enter();
    this.#check(this.#hip.hipStreamDestroy(stream), "hipStreamDestroy");
  }

  eventCreate(timing: boolean): bigint {
    this.enter();
    const flags = timing ? HEADER.hipEventDefault : HEADER.hipEventDisableTiming;
    this.#check(this.#hip.hipEventCreateWithFlags(this.#out, flags), "hipEventCreateWithFlags");
    return this.#out[0];
  }

  eventRecord(event: bigint, stream: bigint): void {
    this.enter();
    this.#check(this.#hip.hipEventRecord(event, stream), "hipEventRecord");
  }

  eventSynchronize(event: bigint): void {
    this.enter();
    this.#check(this.#hip.hipEventSynchronize(event), "hipEventSynchronize");
  }

  eventQuery(event: bigint): boolean {
    this.enter();
    return this.#ready(this.#hip.hipEventQuery(event), "hipEventQuery");
  }

  eventElapsedTime(start: bigint, end: bigint): number {
    this.enter();
    this.#check(this.#hip.hipEventElapsedTime(this.#float, start, end), "hipEventElapsedTime");
    return this.#float[0];
  }

  eventDestroy(event: bigint): void {
    this.enter();
    this.#check(this.#hip.hipEventDestroy(event), "hipEventDestroy");
  }

  // -- memory --

  memGetInfo(): { free: number; total: number } {
    this.enter();
    this.#check(this.#hip.hipMemGetInfo(this.#out, this.#out2), "hipMemGetInfo");
    return { free: Number(this.#out[0]), total: Number(this.#out2[0]) };
  }

  memHostAlloc(bytes: number): bigint {
    this.enter();
    const flags = HEADER.hipHostMallocPortable;
    this.#check(this.#hip.hipHostMalloc(this.#out, BigInt(bytes), flags), "hipHostMalloc");
    return this.#out[0];
  }

  memFreeHost(address: bigint): void {
    this.enter();
    this.#check(this.#hip.hipHostFree(address), "hipHostFree");
  }

  memGetAllocationGranularity(): number {
    this.enter();
    const option = HEADER.hipMemAllocationGranularityRecommended;
    this.#check(
      this.#hip.hipMemGetAllocationGranularity(this.#out, this.#memory, option),
      "hipMemGetAllocationGranularity",
    );
    return Number(this.#out[0]);
  }

  memAddressReserve(bytes: number): bigint {
    this.enter();
    this.#check(
      this.#hip.hipMemAddressReserve(this.#out, BigInt(bytes), 0n, 0n, 0n),
      "hipMemAddressReserve",
    );
    return this.#out[0];
  }

  memAddressFree(pointer: bigint, bytes: number): void {
    this.enter();
    this.#check(this.#hip.hipMemAddressFree(pointer, BigInt(bytes)), "hipMemAddressFree");
  }

  memCreate(bytes: number): bigint {
    this.enter();
    this.#check(this.#hip.hipMemCreate(this.#out, BigInt(bytes), this.#memory, 0n), "hipMemCreate");
    return this.#out[0];
  }

  memRelease(handle: bigint): void {
    this.enter();
    this.#check(this.#hip.hipMemRelease(handle), "hipMemRelease");
  }

  memMap(pointer: bigint, bytes: number, handle: bigint): void {
    this.enter();
    this.#check(this.#hip.hipMemMap(pointer, BigInt(bytes), 0n, handle, 0n), "hipMemMap");
  }

  memSetAccess(pointer: bigint, bytes: number): void {
    this.enter();
    this.#check(this.#hip.hipMemSetAccess(pointer, BigInt(bytes), this.#access, 1n), "hipMemSetAccess");
  }

  memUnmap(pointer: bigint, bytes: number): void {
    this.enter();
    this.#check(this.#hip.hipMemUnmap(pointer, BigInt(bytes)), "hipMemUnmap");
  }

  memcpyHtoDAsync(target: bigint, source: bigint, bytes: number, stream: bigint): void {
    this.#copy(target, source, bytes, HEADER.hipMemcpyHostToDevice, stream);
  }

  memcpyDtoHAsync(target: bigint, source: bigint, bytes: number, stream: bigint): void {
    this.#copy(target, source, bytes, HEADER.hipMemcpyDeviceToHost, stream);
  }

  /** Copies `height` rows of `width` bytes on the device, which start every so many bytes. */
  memcpy2DAsync(
    target: bigint,
    targetPitch: number,
    source: bigint,
    sourcePitch: number,
    width: number,
    height: number,
    stream: bigint,
  ): void {
    this.enter();
    const sizes = [targetPitch, sourcePitch, width, height].map(BigInt);
    const [to, from, bytes, rows] = sizes;
    const kind = HEADER.hipMemcpyDeviceToDevice;
    this.#check(
      this.#hip.hipMemcpy2DAsync(target, to, source, from, bytes, rows, kind, stream),
      "hipMemcpy2DAsync",
    );
  }

  memsetD8Async(target: bigint, value: number, count: number, stream: bigint): void {
    this.enter();
    this.#check(this.#hip.hipMemsetD8Async(target, value, BigInt(count), stream), "hipMemsetD8Async");
  }

  /** Sets `count` 32-bit words. */
  memsetD32Async(target: bigint, value: number, count: number, stream: bigint): void {
    this.enter();
    this.#check(this.#hip.hipMemsetD32Async(target, value, BigInt(count), stream), "hipMemsetD32Async");
  }

  // -- modules and launches --

  /** @param image a code object. @param name its file's, for messages. */
  moduleLoadData(image: Uint8Array<ArrayBuffer>, name: string): bigint {
    this.enter();
    const status = this.#hip.hipModuleLoadData(this.#out, image);
    if (status !== 0) this.#fail(status, `hipModuleLoadData of ${name}`);
    return this.#out[0];
  }

  moduleUnload(module: bigint): void {
    this.enter();
    this.#check(this.#hip.hipModuleUnload(module), "hipModuleUnload");
  }

  moduleGetFunction(module: bigint, name: string, file: string): bigint {
    this.enter();
    const status = this.#hip.hipModuleGetFunction(this.#out, module, new TextEncoder().encode(`${name}\0`));
    if (status !== 0) this.#fail(status, `hipModuleGetFunction of ${name} in ${file}`);
    return this.#out[0];
  }

  /** @param attribute `HEADER.HIP_FUNC_ATTRIBUTE_...` */
  funcGetAttribute(attribute: number, kernel: bigint): number {
    this.enter();
    this.#check(this.#hip.hipFuncGetAttribute(this.#int, attribute, kernel), "hipFuncGetAttribute");
    return this.#int[0];
  }

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
    const status = this.#hip.hipModuleLaunchKernel(
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
    if (status !== 0) this.#fail(status, `hipModuleLaunchKernel of ${name}`);
  }

  // -- graphs --

  streamBeginCapture(stream: bigint): void {
    this.enter();
    this.#check(
      this.#hip.hipStreamBeginCapture(stream, HEADER.hipStreamCaptureModeRelaxed),
      "hipStreamBeginCapture",
    );
  }

  streamEndCapture(stream: bigint): bigint {
    this.enter();
    this.#out[0] = 0n;
    this.#check(this.#hip.hipStreamEndCapture(stream, this.#out), "hipStreamEndCapture");
    return this.#out[0];
  }

  graphInstantiate(graph: bigint): bigint {
    this.enter();
    this.#check(
      this.#hip.hipGraphInstantiateWithFlags(this.#out, graph, 0n),
      "hipGraphInstantiateWithFlags",
    );
    return this.#out[0];
  }

  graphLaunch(executable: bigint, stream: bigint): void {
    this.enter();
    this.#check(this.#hip.hipGraphLaunch(executable, stream), "hipGraphLaunch");
  }

  graphExecDestroy(executable: bigint): void {
    this.enter();
    this.#check(this.#hip.hipGraphExecDestroy(executable), "hipGraphExecDestroy");
  }

  graphDestroy(graph: bigint): void {
    this.enter();
    this.#check(this.#hip.hipGraphDestroy(graph), "hipGraphDestroy");
  }

  /** Closes the library. The device stays as the process has it: HIP has one context for all of a process. */
  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    if (entered === this) entered = undefined;
    this.#device = undefined;
    this.#library.close();
  }

  // -- helpers --

  #copy(target: bigint, source: bigint, bytes: number, kind: number, stream: bigint): void {
    this.enter();
    this.#check(this.#hip.hipMemcpyAsync(target, source, BigInt(bytes), kind, stream), "hipMemcpyAsync");
  }

  #check(status: number, call: string): void {
    if (status !== 0) this.#fail(status, call);
  }

  #ready(status: number, call: string): boolean {
    if (status === HEADER.hipErrorNotReady) return false;
    this.#check(status, call);
    return true;
  }

  #fail(status: number, call: string): never {
    this.checkAlive();
    const [name, text] = [this.#hip.hipGetErrorName(status), this.#hip.hipGetErrorString(status)].map(textAt);
    const message = `hip: ${call} failed: ${name ?? "error"} (${status})${
      text === undefined ? "" : `, ${text}`
    }`;
    if (FATAL.has(status)) {
      this.#failure = new FfiError(message, { hint: LOST });
      throw this.#failure;
    }
    const hint = HINTS[status];
    const ErrorClass = status === HEADER.hipErrorOutOfMemory ? OutOfMemoryError : FfiError;
    throw new ErrorClass(message, hint === undefined ? {} : { hint });
  }
}

function textOf(bytes: Uint8Array): string {
  return new TextDecoder().decode(bytes.subarray(0, bytes.indexOf(0)));
}
