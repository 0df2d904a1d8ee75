/**
 * What a GPU has beyond a {@link Device}: modules of compiled kernels, launches, library attention, events and recorded
 * graphs. CUDA and HIP have the same verbs; kernels/ and recipes/ know this interface only.
 */
import type { ConvPlan, Device, MatmulPlan, Memory } from "./device.ts";
import type { Tensor } from "./tensor.ts";

/** A kernel file: its name for messages and cache entries, and its text. */
export interface KernelSource {
  readonly name: string;
  readonly text: string;
}

/** A compiled `extern "C" __global__` function. */
export interface GpuKernel {
  /** `"file.cu:entry"`, for messages. */
  readonly name: string;
}

/** An argument that C sees as `float`; plain numbers are `int`s. */
export class Float {
  constructor(readonly value: number) {}
}

/** How a matrix lies in memory, for kernels that copy tiles of it: see {@link GpuDevice.tensorMap}. */
export class TensorMap {
  /** @param matrix that it describes, which has to live as long. @param bytes as the GPU reads them. */
  constructor(readonly matrix: Tensor, readonly bytes: Uint8Array<ArrayBuffer>) {}
}

/**
 * A kernel's argument: a tensor is the address of its first element, undefined a null pointer, a whole number an `int`,
 * a bigint a `long long`, a {@link Float} a `float`, a {@link TensorMap} itself, a list of tensors and bigints a struct of
 * them.
 */
export type KernelArgument =
  | Tensor
  | undefined
  | number
  | bigint
  | Float
  | TensorMap
  | readonly (Tensor | undefined | bigint)[];

/** Blocks of a grid or threads of a block: x, or x and more. */
export type Dim3 = number | readonly [number, number] | readonly [number, number, number];

export interface Launch {
  readonly grid: Dim3;
  readonly block: Dim3;
  /** Bytes of dynamic shared memory; none when left out. */
  readonly shared?: number;
}

/**
 * A library with attention that takes f8e4m3, too, and gives bf16: FlashAttention-3 on NVIDIA GPUs, beside the vendor's own;
 * AITER on AMD's, whose bf16 is also what is taken when none is named.
 */
export type AttentionLibrary = "fa3" | "aiter";

/**
 * Attention by a library: `softmax(scale * q k^T) v` per head. `q` and `out` are `[batch, queries, heads,
 * headDim]`, `k` and `v` `[batch, keys, heads, headDim]`; the last dimension is dense, the others may be strided.
 */
export interface AttentionPlan {
  /** Which one; the vendor's own when left out. */
  readonly library?: AttentionLibrary;
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly out: Tensor;
  readonly scale: number;
}

/** A convolution that ends a residual block: bias and `residual` are added to its sums, which are then rounded once. */
export interface ConvAddPlan extends ConvPlan {
  /** `[o]`. */
  readonly bias: Tensor;
  /** As `out`, whose memory it does not share. */
  readonly residual: Tensor;
}

/** A mark in the order of the work. */
export interface GpuEvent extends Disposable {
  /** Whether the work before it is done. */
  readonly reached: boolean;
  /** Milliseconds on the device from `earlier` to this one; waits for both. */
  since(earlier: GpuEvent): number;
}

/** Recorded work. Replaying runs the same kernels on the same addresses. */
export interface Graph extends Disposable {
  replay(): void;
}

/**
 * Weights that lie in page-locked memory of the host, and on the GPU from {@link bring} to {@link leave} only: at the same
 * addresses each time, so that graphs that were recorded with them stay good.
 */
export interface Deposit {
  /**
   * Takes a weight's memory over: its bytes go to the host, and its place on the GPU is free. Not between `bring` and `leave`.
   *
   * @returns the memory from now on: what frees it frees it here, and with the last one all that the deposit has.
   * @throws OutOfMemoryError where the host has not enough
   */
  add(memory: Memory): Memory;
  /**
   * Copies all to the GPU: work that is issued from now on may use it. Does nothing where it is there.
   *
   * @throws OutOfMemoryError
   */
  bring(): void;
  /** Waits for the work so far, and gives the GPU's memory back. Does nothing where that was done. */
  leave(): void;
}

/** Something that a GPU did, as its own clock has timed it. */
export interface GpuActivity {
  readonly kind: "kernel" | "copy" | "fill";
  /** A kernel's name, readable where that can be had; `"copy host to device"` and the like for the others. */
  readonly name: string;
  /** The number of the stream that it ran in, as the profiler counts them. */
  readonly stream: number;
  /** In milliseconds on the clock of `performance.now()`. */
  readonly start: number;
  readonly end: number;
  /** What else is known of it, for people to read: grid, block, registers, shared memory, bytes, ... */
  readonly details: Readonly<Record<string, string | number>>;
}

/** What a profiler has seen. */
export interface GpuProfile {
  /** In the order of their starts. */
  readonly activities: readonly GpuActivity[];
  /** How many more there were, at least, that it has no times of. */
  readonly lost: number;
}

/** Watches a GPU until it is disposed. Work is somewhat slower meanwhile. */
export interface GpuProfiler extends AsyncDisposable {
  /**
   * Runs `body`, waits for the device, and returns what the device did from the beginning of `body` on. Of a graph the
   * kernels are seen that was recorded since the profiler was opened; older graphs are not to be replayed meanwhile,
   * since not every driver survives it.
   *
   * @throws what `body` throws
   */
  profile(body: () => void | Promise<void>): Promise<GpuProfile>;
}

/** What a GPU says of itself that launches depend on. */
export interface GpuLimits {
  /** What its compiler calls it, e.g. `"sm_90a"`, `"gfx942"`: for kernels with instructions that only some GPUs have. */
  readonly architecture: string;
  readonly multiprocessors: number;
  /** Threads that run in step: 32 on NVIDIA GPUs, 64 on AMD's compute GPUs. */
  readonly warpSize: number;
  /** Bytes of shared memory that one block can have at most. */
  readonly sharedBytesPerBlock: number;
  /** False where the library adds no bias to a convolution, so that it is to be added behind it; true when left out. */
  readonly convAddsBias?: boolean;
}

/** What a GPU says of itself while it works; NaN for what it does not tell. */
export interface PowerMeter extends Disposable {
  /** What it has taken since its driver was loaded; the number changes some ten times a second. */
  joules(): number;
  /** The multiprocessors' clock now. */
  megahertz(): number;
}

export interface GpuDevice extends Device {
  readonly kind: "cuda" | "hip";
  readonly limits: GpuLimits;

  /**
   * One kernel of a file, compiled at its first use and kept on the disk. Throws {@link FfiError} with the compiler's
   * log.
   */
  kernel(source: KernelSource, entry: string): GpuKernel;
  /**
   * Compiles files side by side on other threads, so that {@link kernel} finds them compiled. What does not compile is left out:
   * `kernel` says why, if it is asked for.
   *
   * @param signal no more are begun when it aborts.
   */
  compileAhead(sources: readonly KernelSource[], signal?: AbortSignal): Promise<void>;
  launch(kernel: GpuKernel, launch: Launch, args: readonly KernelArgument[]): void;

  /**
   * For a kernel that copies tiles of `rows` rows and 128 bytes of a matrix to shared memory, swizzled for the matrix units
   * (Hopper's bulk tensor copies).
   *
   * @param matrix `[m, n]` with dense rows that start at multiples of 16 bytes. @param rows at most 256.
   * @throws FfiError where the driver refuses it
   */
  tensorMap(matrix: Tensor, rows: number): TensorMap;

  /** Whether the library has an algorithm for this product of float8 matrices; what is not float8 it takes always. */
  takesMatmul(plan: MatmulPlan): boolean;

  /**
   * Issues the plan to a library and returns true, or returns false where it has no kernel that does all of it, and in f32. Throws
   * {@link FfiError} where something goes wrong.
   */
  convAdd(plan: ConvAddPlan): boolean;

  /**
   * Runs the plan in a library and returns true, or returns false where none takes these dtypes and sizes. Throws
   * {@link FfiError} where the library that the plan names is not installed.
   */
  attention(plan: AttentionPlan): boolean;

  /** Undefined where nothing measures it. */
  powerMeter(): PowerMeter | undefined;

  /**
   * Runs `body`. Where a library proposes several algorithms for work that it has not done before, they are timed on the
   * work's own memory and the fastest is kept, in the cache too; outside of this the library's own guess is taken.
   */
  measuring<T>(body: () => T): T;

  /**
   * Which of several ways to do the same work is the fastest: inside of {@link measuring} it is timed once, and kept in
   * the cache under `key`; elsewhere it is the first.
   *
   * @param key what the work depends on. @param ways each issues the work.
   */
  fastest(key: string, ways: readonly (() => void)[]): number;

  /** What {@link prepared} work is good for beside what its keys say: this GPU, its driver and libraries, by version. */
  environment(): Readonly<Record<string, string>>;
  /**
   * What took this device time to find out, for {@link adopt} in another process: compiled kernels, chosen algorithms,
   * planned operations, and how much memory all of it takes; by keys that say of what.
   */
  prepared(): ReadonlyMap<string, Uint8Array<ArrayBuffer>>;
  /**
   * Takes what was {@link prepared} in an equal {@link environment}: it is not found out again. Anything else still is.
   */
  adopt(prepared: ReadonlyMap<string, Uint8Array<ArrayBuffer>>): void;

  /** An empty place for weights that are not always on the GPU. */
  deposit(): Deposit;

  /** Marks the end of the work issued so far. */
  event(): GpuEvent;
  /**
   * Records the work that `body` issues instead of running it. What it allocates for activations may be freed when it
   * is recorded: it stays the graph's, and holds what a replay left there until any graph is replayed next, or work is done
   * {@link amongRecordings}. Other memory that it uses must not be freed while the graph is in use.
   */
  record(body: () => void): Graph;
  /**
   * Runs `body`, whose activations lie where recordings have theirs: who runs work once and records it then needs memory for it
   * once. What `body` returns is to be copied before any graph is replayed.
   */
  amongRecordings<T>(body: () => T): T;

  /**
   * Opens the vendor's profiler, of which there is one at a time in a process.
   *
   * @throws FfiError where its library is not installed, or another program is profiling this one
   */
  openProfiler(): Promise<GpuProfiler>;
}

/** Whether kernels are launched on this device (else it is the CPU). */
export function isGpu(device: Device): device is GpuDevice {
  return device.kind !== "cpu";
}
