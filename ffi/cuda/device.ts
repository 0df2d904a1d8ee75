import type { DiskCache } from "../cache.ts";
import type { ConvPlan, DeviceProperties } from "../device.ts";
import { dtypeBytes } from "../dtype.ts";
import { FfiError } from "../errors.ts";
import {
  type AttentionPlan,
  type ConvAddPlan,
  type GpuProfiler,
  type PowerMeter,
  TensorMap,
} from "../gpu.ts";
import { gibibytes, type Hardware, RuntimeDevice, RuntimeKernel, versionOr } from "../gpu_device.ts";
import { LibraryNotFoundError } from "../library.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext } from "./context.ts";
import { CublasLt } from "./cublaslt.ts";
import { Cudnn } from "./cudnn.ts";
import { Cupti } from "./cupti.ts";
import type { Driver } from "./driver.ts";
import { HEADER } from "./driver_header.ts";
import { FlashAttention3 } from "./flash_attn3.ts";
import { askNvml, openPowerMeter } from "./nvml.ts";
import { architecture, Nvrtc } from "./nvrtc.ts";

/** One NVIDIA GPU: the driver, and NVIDIA's libraries. */
export class CudaDevice extends RuntimeDevice<Driver> {
  readonly kind = "cuda";
  readonly context: CudaContext;
  #nvrtc: Nvrtc | undefined;
  #cublasLt: CublasLt | undefined;
  #cudnn: Cudnn | undefined;
  readonly #flashAttention3: FlashAttention3;
  #cupti: Cupti | undefined;

  /**
   * Takes the GPU with this index; the device owns the driver from here on.
   *
   * @param cache keeps compiled kernels from run to run.
   * @throws {FfiError} for a GPU that cannot be used
   */
  constructor(
    driver: Driver,
    index: number,
    cache?: DiskCache,
    onMeasured: (count: number) => void = () => {},
  ) {
    const { capability, ...hardware } = takeGpu(driver, index);
    super(driver, hardware, cache, onMeasured);
    this.context = { ...this.baseContext(), capability };
    this.#flashAttention3 = new FlashAttention3(this.context);
  }

  powerMeter(): PowerMeter | undefined {
    this.checkOpen();
    const { driver, index } = this.context;
    return unlessMissing(() => openPowerMeter(driver.deviceGetPciBusId(driver.deviceGet(index))));
  }

  /** Opens the libraries that it names, to ask for their versions; FlashAttention-3 is in it where it was opened before. */
  properties(): DeviceProperties {
    this.checkOpen();
    const [major, minor] = this.context.capability;
    // What was adopted needs no compiler, which is not opened just to be named.
    const compiler = this.#nvrtc === undefined && this.hasPrepared
      ? "an earlier process"
      : versionOr(() => `NVRTC ${this.compiler.version.join(".")} for ${this.limits.architecture}`);
    const { version: fa3 } = this.#flashAttention3;
    const { gpuName, totalBytes, driverVersion } = this.hardware;
    return {
      description: `${gpuName}, ${gibibytes(totalBytes)}, compute capability ${major}.${minor}`,
      providers: {
        matmul: versionOr(() => `cuBLASLt ${this.matmuls.version}`),
        "convolution, attention": versionOr(() => `cuDNN ${this.#convolutions.version}`),
        ...(fa3 === undefined ? {} : { "FlashAttention-3": fa3 }),
        other: `CUDA kernels, compiled by ${compiler}`,
        driver: `for CUDA ${driverVersion}, ${this.driver.path}`,
      },
      nativeBfloat16: major >= 8,
    };
  }

  /** Opens the libraries that it names. Without NVML the driver counts as the newest version of CUDA that it takes. */
  environment(): Readonly<Record<string, string>> {
    this.checkOpen();
    return {
      GPU: this.hardware.gpuName,
      architecture: this.limits.architecture,
      multiprocessors: String(this.limits.multiprocessors),
      driver: driverVersion() ?? `for CUDA ${this.hardware.driverVersion}`,
      cuBLASLt: versionOr(() => this.matmuls.version),
      cuDNN: versionOr(() => this.#convolutions.version),
    };
  }

  conv(plan: ConvPlan): void {
    this.checkOpen();
    this.#convolutions.conv(plan);
  }

  convAdd(plan: ConvAddPlan): boolean {
    this.checkOpen();
    return this.#convolutions.convAdd(plan);
  }

  attention(plan: AttentionPlan): boolean {
    this.checkOpen();
    if (plan.library === "fa3") return this.#flashAttention3.attention(plan);
    // cuDNN has none in float32: who computes in it needs no cuDNN for attention.
    if (plan.q.dtype === "f32") return false;
    return this.#convolutions.attention(plan);
  }

  tensorMap(matrix: Tensor, rows: number): TensorMap {
    this.checkOpen();
    const bytes = dtypeBytes(matrix.dtype);
    const [count, length] = matrix.shape;
    const stride = count === 1 ? length : matrix.strides[0];
    const map = this.driver.tensorMapEncode(
      matrix.pointer,
      count,
      length * bytes,
      stride * bytes,
      rows,
      `${matrix}`,
    );
    return new TensorMap(matrix, map);
  }

  async openProfiler(): Promise<GpuProfiler> {
    this.checkOpen();
    this.refuseRecording("opening a profiler");
    const { driver } = this;
    this.#cupti ??= new Cupti(driver.driverGetVersion()[0]);
    return await this.#cupti.openProfiler({
      get isLost() {
        return driver.isLost;
      },
      enter: () => driver.enter(),
      synchronize: () => this.synchronize(),
    });
  }

  protected get compiler(): Nvrtc {
    return this.#nvrtc ??= new Nvrtc(this.driver.driverGetVersion()[0]);
  }

  protected get matmuls(): CublasLt {
    return this.#cublasLt ??= new CublasLt(this.context);
  }

  protected loaded(handle: bigint, name: string): RuntimeKernel {
    const attribute = (which: number) => this.driver.funcGetAttribute(which, handle);
    return new RuntimeKernel(
      this,
      name,
      handle,
      attribute(HEADER.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES),
      attribute(HEADER.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES),
    );
  }

  protected override raiseShared({ handle }: RuntimeKernel, bytes: number): void {
    this.driver.funcSetAttribute(handle, HEADER.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes);
  }

  protected override preparedByLibraries(): Iterable<readonly [string, Uint8Array<ArrayBuffer>]> {
    return this.#cudnn?.serialized() ?? [];
  }

  protected override freeRecorded(): void {
    this.#flashAttention3.freeRecorded();
  }

  protected libraries(): readonly (Disposable | undefined)[] {
    return [this.#cupti, this.#flashAttention3, this.#cudnn, this.#cublasLt, this.#nvrtc];
  }

  get #convolutions(): Cudnn {
    return this.#cudnn ??= new Cudnn(this.context);
  }
}

/** Asks for all that the device has to know of a GPU, and takes its context. */
function takeGpu(
  driver: Driver,
  index: number,
): Hardware & { readonly capability: readonly [major: number, minor: number] } {
  const handle = driver.deviceGet(index);
  const attribute = (which: number) => driver.deviceGetAttribute(which, handle);
  const gpuName = driver.deviceGetName(handle);
  const capability = [
    attribute(HEADER.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
    attribute(HEADER.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
  ] as const;
  if (attribute(HEADER.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) !== 1) {
    throw new FfiError(`cuda:${index}: ${gpuName} has no virtual memory management here`, {
      hint: "Pascal and newer GPUs have it; a virtual machine's driver may hide it",
    });
  }
  const hardware = {
    kind: "cuda",
    index,
    gpuName,
    driverVersion: driver.driverGetVersion().join("."),
    totalBytes: driver.deviceTotalMem(handle),
    limits: {
      architecture: architecture(capability),
      multiprocessors: attribute(HEADER.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
      warpSize: attribute(HEADER.CU_DEVICE_ATTRIBUTE_WARP_SIZE),
      sharedBytesPerBlock: attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
    },
    mostThreads: attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK),
    mostGrid: [
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X),
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y),
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z),
    ],
    mostBlock: [
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X),
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y),
      attribute(HEADER.CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z),
    ],
    launchMarkers: [
      HEADER.CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT,
      HEADER.CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT,
      HEADER.CU_LAUNCH_PARAM_END_AS_INT,
    ],
    tool: "nvidia-smi",
    code: "cubin",
    capability,
  } as const;
  driver.retainContext(handle);
  return hardware;
}

/** The driver's version, e.g. `"580.159.04"`; undefined without NVML. */
function driverVersion(): string | undefined {
  return unlessMissing(() => askNvml().driverVersion);
}

/** What `ask` returns; undefined without the library that it opens. */
function unlessMissing<T>(ask: () => T): T | undefined {
  try {
    return ask();
  } catch (error) {
    if (!(error instanceof LibraryNotFoundError)) throw error;
    return undefined;
  }
}
