import type { DiskCache } from "../cache.ts";
import type { ConvPlan, DeviceProperties } from "../device.ts";
import { FfiError } from "../errors.ts";
import type { AttentionPlan, GpuProfiler, TensorMap } from "../gpu.ts";
import {
  gibibytes,
  type Hardware,
  inOneLine,
  RuntimeDevice,
  RuntimeKernel,
  versionOr,
} from "../gpu_device.ts";
import { Aiter } from "./aiter.ts";
import type { HipContext } from "./context.ts";
import { HipblasLt } from "./hipblaslt.ts";
import { Hiprtc } from "./hiprtc.ts";
import { Miopen } from "./miopen.ts";
import type { HipRuntime } from "./runtime.ts";
import { HEADER, NEWER_HEADER } from "./runtime_header.ts";
import { hipVersion, INSTALL_ROCM } from "./versions.ts";

/** One AMD GPU: HIP's runtime, and AMD's libraries. */
export class HipDevice extends RuntimeDevice<HipRuntime> {
  readonly kind = "hip";
  readonly context: HipContext;
  #hiprtc: Hiprtc | undefined;
  #hipblasLt: HipblasLt | undefined;
  #miopen: Miopen | undefined;
  readonly #aiter: Aiter;
  /** Whether attention is known not to be AITER's; there was a warning then. */
  #withoutAiter = false;

  /**
   * Takes the GPU with this index; the device owns the runtime from here on.
   *
   * @param cache keeps compiled kernels from run to run. @param onWarning gets a line where AITER is missing.
   * @throws {FfiError} for a GPU that cannot be used
   */
  constructor(
    runtime: HipRuntime,
    index: number,
    cache?: DiskCache,
    onMeasured: (count: number) => void = () => {},
    private readonly onWarning: (message: string) => void = () => {},
  ) {
    const hardware = takeGpu(runtime, index);
    super(runtime, hardware, cache, onMeasured);
    const { architecture, multiprocessors } = this.limits;
    this.context = { ...this.baseContext(), architecture, multiprocessors };
    this.#aiter = new Aiter(this.context, hardware.launchMarkers);
  }

  /** Opens the libraries that it names, to ask for their versions. */
  properties(): DeviceProperties {
    this.checkOpen();
    const compiler = this.#hiprtc === undefined && this.hasPrepared
      ? "an earlier process"
      : versionOr(() => `hipRTC ${this.compiler.version.join(".")} for ${this.limits.architecture}`);
    const { gpuName, totalBytes, driverVersion } = this.hardware;
    return {
      description: `${gpuName}, ${gibibytes(totalBytes)}, ${this.limits.architecture}`,
      providers: {
        matmul: versionOr(() => `hipBLASLt ${this.matmuls.version}`),
        convolution: versionOr(() => `MIOpen ${this.#convolutions.version}`),
        attention: versionOr(() => `AITER ${this.#aiter.version ?? "of unknown version"}`),
        other: `HIP kernels, compiled by ${compiler}`,
        driver: `HIP ${driverVersion}, ${this.driver.path}`,
      },
      nativeBfloat16: true,
    };
  }

  /** Opens the libraries that it names. */
  environment(): Readonly<Record<string, string>> {
    this.checkOpen();
    return {
      GPU: this.hardware.gpuName,
      architecture: this.limits.architecture,
      multiprocessors: String(this.limits.multiprocessors),
      HIP: this.hardware.driverVersion,
      hipBLASLt: versionOr(() => this.matmuls.version),
      MIOpen: versionOr(() => this.#convolutions.version),
    };
  }

  conv(plan: ConvPlan): void {
    this.checkOpen();
    this.#convolutions.conv(plan);
  }

  convAdd(): boolean {
    return false; // MIOpen's immediate mode adds nothing
  }

  /**
   * By AITER, where it is installed and has kernels that are known. The first attention that it would be good for without it
   * is a warning, where it was not asked for by name; then that is an error.
   */
  attention(plan: AttentionPlan): boolean {
    this.checkOpen();
    if (plan.library === "aiter") return this.#aiter.attention(plan);
    if (plan.library !== undefined || this.#withoutAiter) return false;
    try {
      return this.#aiter.attention(plan);
    } catch (error) {
      if (!(error instanceof FfiError) || this.driver.isLost) throw error;
      this.#withoutAiter = true;
      this.onWarning(`attention is our own kernel's, AITER's is faster: ${inOneLine(error)}`);
      return false;
    }
  }

  tensorMap(): TensorMap {
    throw new FfiError(`${this.name}: AMD GPUs have no bulk copies of tiles, which are Hopper's`);
  }

  powerMeter(): undefined {}

  openProfiler(): Promise<GpuProfiler> {
    return Promise.reject(
      new FfiError(`${this.name}: kernels in traces are for NVIDIA GPUs so far`, {
        hint: "rocprofv3 --kernel-trace -- deno task generate ... shows them; leave out --trace-file",
      }),
    );
  }

  protected get compiler(): Hiprtc {
    return this.#hiprtc ??= new Hiprtc();
  }

  protected get matmuls(): HipblasLt {
    return this.#hipblasLt ??= new HipblasLt(this.context);
  }

  /** All shared memory may be dynamic, without asking. */
  protected loaded(handle: bigint, name: string): RuntimeKernel {
    const declared = this.driver.funcGetAttribute(HEADER.HIP_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, handle);
    return new RuntimeKernel(this, name, handle, declared, this.limits.sharedBytesPerBlock - declared);
  }

  protected libraries(): readonly (Disposable | undefined)[] {
    return [this.#aiter, this.#miopen, this.#hipblasLt, this.#hiprtc];
  }

  get #convolutions(): Miopen {
    return this.#miopen ??= new Miopen(this.context);
  }
}

/** Asks for all that the device has to know of a GPU, and makes it current. */
function takeGpu(runtime: HipRuntime, index: number): Hardware {
  const attribute = (which: number) => runtime.deviceGetAttribute(which, index);
  const gpuName = runtime.deviceGetName(index);
  // Older versions know no such attribute.
  const version = runtime.runtimeGetVersion();
  const mapsMemory = version >= 60_100_000 &&
    attribute(NEWER_HEADER.hipDeviceAttributeVirtualMemoryManagementSupported) === 1;
  if (!mapsMemory) {
    throw new FfiError(
      `hip:${index}: ${gpuName} has no virtual memory management under HIP ${hipVersion(version)}`,
      {
        hint: INSTALL_ROCM,
      },
    );
  }
  const hardware = {
    kind: "hip",
    index,
    gpuName,
    driverVersion: hipVersion(version),
    totalBytes: runtime.deviceTotalMem(index),
    limits: {
      architecture: runtime.deviceArchitecture(index),
      multiprocessors: attribute(HEADER.hipDeviceAttributeMultiprocessorCount),
      warpSize: attribute(HEADER.hipDeviceAttributeWarpSize),
      sharedBytesPerBlock: attribute(HEADER.hipDeviceAttributeMaxSharedMemoryPerBlock),
      convAddsBias: false,
    },
    mostThreads: attribute(HEADER.hipDeviceAttributeMaxThreadsPerBlock),
    mostGrid: [
      attribute(HEADER.hipDeviceAttributeMaxGridDimX),
      attribute(HEADER.hipDeviceAttributeMaxGridDimY),
      attribute(HEADER.hipDeviceAttributeMaxGridDimZ),
    ],
    mostBlock: [
      attribute(HEADER.hipDeviceAttributeMaxBlockDimX),
      attribute(HEADER.hipDeviceAttributeMaxBlockDimY),
      attribute(HEADER.hipDeviceAttributeMaxBlockDimZ),
    ],
    launchMarkers: [
      HEADER["(long)HIP_LAUNCH_PARAM_BUFFER_POINTER"],
      HEADER["(long)HIP_LAUNCH_PARAM_BUFFER_SIZE"],
      HEADER["(long)HIP_LAUNCH_PARAM_END"],
    ],
    tool: "rocm-smi",
    code: "code object",
  } as const;
  runtime.useDevice(index);
  return hardware;
}
