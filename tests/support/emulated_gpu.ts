/**
 * A GPU for tests on machines without one: it runs the text of the project's own .cu files on the CPU, compiled by g++
 * behind an emulation of CUDA's built-ins (simt.hpp), with threads as fibers (simt_runtime.cpp).
 *
 * ```ts
 * import { forEachGpu } from "../gpu_devices.ts"; // the emulated GPU in tests/cpu, the real one in tests/gpu
 *
 * export function layerNormSuite(): void {
 *   forEachGpu("layerNorm", (test) => {
 *     test("equals its reference", async (device) => {
 *       const x = Tensor.fromFloat32(device, values, [4, 768]);
 *       const expected = new Float32Array(x.size);
 *       layerNormReference(expected, values, NONE, NONE, 768, 1e-5);
 *       assertClose(await valuesOf(layerNorm(x, 1e-5)), expected, 1e-6, "layer norm");
 *     });
 *   });
 * }
 * ```
 *
 * It is stricter than a GPU. A launch throws an {@link FfiError} that names the kernel, the block and the thread for:
 * arguments that differ from the kernel's parameters in number, type or element size; a barrier or a shuffle that only
 * a part of the block or warp reaches; writes beside a tensor's memory or beyond the shared memory; misaligned vector
 * accesses; an index outside of a plain array; an overflow of signed integers; memory that was freed. Fresh memory and
 * shared memory are all ones (NaN), so that what nobody wrote shows; so is what lies around each allocation. Odd blocks
 * run their threads backwards, so that a missing barrier gives wrong numbers. Matrix products that cuBLASLt would not take
 * are refused.
 *
 * Not emulated: PTX (`asm`), textures, cooperative groups, blocks that wait for other blocks (they run one by one).
 */
import { basename } from "node:path";
import type {
  ConvPlan,
  DeviceProperties,
  MatmulPlan,
  Memory,
  MemoryPurpose,
  MemoryUse,
} from "../../ffi/device.ts";
import { checkDownload } from "../../ffi/download.ts";
import { dtypeBytes } from "../../ffi/dtype.ts";
import { FfiError } from "../../ffi/errors.ts";
import type {
  AttentionPlan,
  ConvAddPlan,
  Deposit,
  GpuDevice,
  GpuEvent,
  GpuKernel,
  GpuLimits,
  GpuProfiler,
  Graph,
  KernelArgument,
  KernelSource,
  Launch,
  PowerMeter,
  TensorMap,
} from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { adoptKernels, type Architecture, compiledKernel, missingCompiler } from "./emulated_compiler.ts";
import { EmulatedHeap } from "./emulated_heap.ts";
import { type EmulatedKernel, loadKernel, prepareLaunch } from "./emulated_kernel.ts";
import { EmulatedLibraries } from "./emulated_libraries.ts";
import { bytesOf } from "./emulated_memory.ts";
import { EmulatedStream } from "./emulated_stream.ts";

/** What tests choose. */
export interface EmulatedGpuOptions {
  /** Whose it is: NVIDIA's when left out. AMD's have 64 threads in step, and gfx942 another E4M3. */
  readonly architecture?: Architecture;
  /**
   * Whether {@link GpuDevice.attention} computes by the vendor's library; by default it returns false, as without one that
   * can. FlashAttention-3 is always there.
   */
  readonly attention?: boolean;
  /** False: {@link GpuDevice.openProfiler} throws, as without the library. */
  readonly profiler?: boolean;
  /** Bytes of its memory; 2 GiB when left out. */
  readonly memoryBytes?: number;
}

/** Opens an emulated GPU. Throws {@link FfiError} where {@link missingCompiler} has something to say. */
export function openEmulatedGpu(options: EmulatedGpuOptions = {}): GpuDevice {
  return new EmulatedGpu(options);
}

/** What such GPUs say of themselves. */
const LIMITS: Readonly<Record<Architecture, GpuLimits>> = {
  emulated: {
    architecture: "emulated",
    multiprocessors: 132,
    warpSize: 32,
    sharedBytesPerBlock: 227 * 1024,
  },
  gfx942: {
    architecture: "gfx942",
    multiprocessors: 304,
    warpSize: 64,
    sharedBytesPerBlock: 64 * 1024,
    convAddsBias: false,
  },
  gfx950: {
    architecture: "gfx950",
    multiprocessors: 256,
    warpSize: 64,
    sharedBytesPerBlock: 160 * 1024,
    convAddsBias: false,
  },
};

class EmulatedGpu implements GpuDevice {
  readonly kind: GpuDevice["kind"];
  readonly name: string;
  readonly limits: GpuLimits;
  readonly #architecture: Architecture;
  readonly #heap: EmulatedHeap;
  readonly #stream: EmulatedStream;
  readonly #libraries: EmulatedLibraries;
  /** By the paths of their libraries. */
  readonly #kernels = new Map<string, EmulatedKernel>();
  #closed = false;

  constructor(private readonly options: EmulatedGpuOptions) {
    const missing = missingCompiler();
    if (missing !== undefined) throw new FfiError(`emulated GPU: ${missing}`, { hint: "install g++" });
    const { architecture = "emulated", attention = false, memoryBytes = 2 ** 31 } = options;
    this.#architecture = architecture;
    this.limits = LIMITS[architecture];
    this.kind = architecture === "emulated" ? "cuda" : "hip";
    this.name = architecture === "emulated" ? "cuda:emulated" : `hip:${architecture} emulated`;
    const requireOpen = () => this.#requireOpen();
    this.#heap = new EmulatedHeap(this, memoryBytes, requireOpen);
    this.#stream = new EmulatedStream(this.name, this.#heap, requireOpen);
    this.#libraries = new EmulatedLibraries(this, this.#stream, architecture, attention);
  }

  properties(): DeviceProperties {
    return {
      description: "emulated GPU",
      providers: {
        matmul: "C++",
        conv: "C++",
        attention: this.options.attention ? "C++" : "none",
        other: "g++",
      },
      nativeBfloat16: true,
    };
  }

  memoryUse(): MemoryUse {
    return this.#heap.use();
  }

  alloc(byteLength: number, purpose: MemoryPurpose = "activations"): Memory {
    return this.#heap.alloc(byteLength, purpose);
  }

  free(memory: Memory): void {
    this.#heap.free(memory);
  }

  scope<T>(body: () => T): T {
    return this.#heap.scope(body);
  }

  deposit(): Deposit {
    return this.#heap.deposit((what) => this.#stream.requireNotRecording(what));
  }

  placeAll(parts: readonly Uint8Array[], onBytes?: (bytes: number) => void): Promise<Memory[]> {
    const placed: Memory[] = [];
    let done = 0;
    try {
      for (const part of parts) {
        placed.push(this.alloc(part.byteLength, "weights"));
        this.upload(part, placed.at(-1)!);
        onBytes?.(done += part.byteLength);
      }
    } catch (error) {
      for (const memory of placed) this.free(memory);
      return Promise.reject(error);
    }
    return Promise.resolve(placed);
  }

  changed(): void {}

  upload(bytes: Uint8Array, memory: Memory): void {
    this.#heap.requireLive(memory, "upload");
    this.#stream.requireNotRecording("upload");
    if (bytes.byteLength > memory.byteLength) {
      throw new FfiError(
        `${this.name}: ${bytes.byteLength} bytes do not fit into ${memory.byteLength} of memory`,
      );
    }
    bytesOf(memory).set(bytes);
  }

  download(
    tensor: Tensor,
    into: Uint8Array<ArrayBuffer> = new Uint8Array(tensor.byteLength),
  ): Promise<Uint8Array<ArrayBuffer>> {
    this.#heap.requireLive(tensor.memory, "download");
    this.#stream.requireNotRecording("download");
    checkDownload(this.name, tensor, into);
    const start = tensor.offset * dtypeBytes(tensor.dtype);
    into.set(bytesOf(tensor.memory).subarray(start, start + tensor.byteLength));
    return Promise.resolve(into);
  }

  matmul(plan: MatmulPlan): void {
    this.#libraries.matmul(plan);
  }

  conv(plan: ConvPlan): void {
    this.#libraries.conv(plan);
  }

  convAdd(plan: ConvAddPlan): boolean {
    return this.#libraries.convAdd(plan);
  }

  attention(plan: AttentionPlan): boolean {
    return this.#libraries.attention(plan);
  }

  synchronize(): Promise<void> {
    this.#stream.requireNotRecording("synchronize");
    return Promise.resolve(); // every call returns when its work is done
  }

  kernel(source: KernelSource, entry: string): GpuKernel {
    this.#requireOpen();
    const path = compiledKernel(source, entry, this.#architecture);
    let kernel = this.#kernels.get(path);
    if (kernel === undefined) {
      kernel = loadKernel(path, `${source.name}:${entry}`);
      this.#kernels.set(path, kernel);
    }
    return kernel;
  }

  tensorMap(): TensorMap {
    throw new FfiError(`${this.name} has no copies of tiles`);
  }

  powerMeter(): PowerMeter | undefined {
    return undefined;
  }

  /** A text is compiled for each of its kernels, whose names are not known before they are asked for. */
  compileAhead(): Promise<void> {
    return Promise.resolve();
  }

  launch(kernel: GpuKernel, launch: Launch, args: readonly KernelArgument[]): void {
    const { sharedBytesPerBlock } = this.limits;
    const { details, work } = prepareLaunch(kernel as EmulatedKernel, launch, args, sharedBytesPerBlock);
    this.#stream.run(kernel.name, args.filter((arg) => arg instanceof Tensor), details, work);
  }

  takesMatmul(): boolean {
    return true;
  }

  fastest(): number {
    return 0;
  }

  amongRecordings<T>(body: () => T): T {
    return body();
  }

  measuring<T>(body: () => T): T {
    return body(); // there is one way to do everything
  }

  environment(): Readonly<Record<string, string>> {
    return { GPU: "emulated GPU" };
  }

  /** The compiled kernels, by the names of their files. */
  prepared(): ReadonlyMap<string, Uint8Array<ArrayBuffer>> {
    return new Map(Array.from(this.#kernels.keys(), (path) => [basename(path), Deno.readFileSync(path)]));
  }

  adopt(prepared: ReadonlyMap<string, Uint8Array<ArrayBuffer>>): void {
    adoptKernels(prepared);
  }

  event(): GpuEvent {
    return this.#stream.event();
  }

  record(body: () => void): Graph {
    return this.#stream.record(body);
  }

  openProfiler(): Promise<GpuProfiler> {
    if (this.options.profiler === false) {
      return Promise.reject(
        new FfiError(`${this.name}: no profiler. Searched: nowhere.`, { hint: "install one" }),
      );
    }
    return Promise.resolve(this.#stream.profiler());
  }

  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const { library } of this.#kernels.values()) library.close();
    this.#libraries[Symbol.dispose]();
  }

  #requireOpen(): void {
    if (this.#closed) throw new FfiError(`${this.name}: the device was closed`);
  }
}
