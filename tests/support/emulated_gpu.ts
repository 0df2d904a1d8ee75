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
import { columnMajorGemm } from "../../ffi/column_major_gemm.ts";
import { flashAttention3TakesPlan } from "../../ffi/cuda/flash_attn3.ts";
import { aiterTakesPlan } from "../../ffi/hip/aiter.ts";
import { type Float8Format, float8FormatOf } from "../../ffi/float8.ts";
import { type DType, dtypeBytes } from "../../ffi/dtype.ts";
import { checkDownload } from "../../ffi/download.ts";
import { FfiError, OutOfMemoryError } from "../../ffi/errors.ts";
import type {
  AttentionPlan,
  ConvAddPlan,
  Deposit,
  Dim3,
  GpuActivity,
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
import { type OpenedLibrary, openLibrary } from "../../ffi/library.ts";
import { MemoryScopes } from "../../ffi/scope.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { addressOf, packArguments } from "./emulated_arguments.ts";
import { adoptKernels, type Architecture, compiledKernel, gpp, runtimeLibrary } from "./emulated_compiler.ts";

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

/** Why the emulated GPU does not run here, or undefined where it does. */
export function missingCompiler(): string | undefined {
  if (Deno.build.os !== "linux") return "the emulated GPU runs on Linux only";
  try {
    const { success } = gpp(["--version"]);
    return success ? undefined : "g++ does not start";
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return "no g++";
    if (error instanceof Deno.errors.NotCapable) return "this process may not run g++";
    throw error;
  }
}

/** NaN in every float dtype, -1 as an integer. */
const POISON = 0xff;
/** Bytes of poison in front of and behind each allocation. */
const GUARD = 256;
/** As a GPU aligns what it allocates. */
const ALIGNMENT = 256;

/** What {@link GpuDevice.alloc} gives: host bytes between guards. */
interface EmulatedMemory extends Memory {
  readonly purpose: MemoryPurpose | "deposited";
  /** The bytes with their guards. */
  readonly guarded: Uint8Array<ArrayBuffer>;
}

interface EmulatedKernel extends GpuKernel {
  readonly library: OpenedLibrary<typeof KERNEL>;
  readonly parameters: Int32Array;
  readonly staticSharedBytes: number;
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
  readonly #runtime: OpenedLibrary<typeof RUNTIME>;
  readonly #kernels = new Map<string, EmulatedKernel>();
  readonly #scopes = new MemoryScopes((memory) => this.free(memory));
  readonly #live = new WeakSet<Memory>();
  /** Weights go when nothing refers to them any more. */
  readonly #collected = new FinalizationRegistry<number>((byteLength) => this.#weights -= byteLength);
  /** What takes a memory out of its deposit; false where it is not there any more. */
  readonly #depositedMemory = new WeakMap<Memory, () => boolean>();
  #closed = false;
  #current = 0;
  #peak = 0;
  #weights = 0;
  /** Work that {@link record} collects now, and memory that was freed meanwhile: the graph still uses it. */
  #recording: { readonly work: (() => void)[]; readonly freed: Set<Memory> } | undefined;
  /** What a profiler has seen so far. */
  #seen: GpuActivity[] | undefined;

  constructor(private readonly options: EmulatedGpuOptions) {
    const missing = missingCompiler();
    if (missing !== undefined) throw new FfiError(`emulated GPU: ${missing}`, { hint: "install g++" });
    const { architecture = "emulated" } = options;
    this.limits = LIMITS[architecture];
    this.kind = architecture === "emulated" ? "cuda" : "hip";
    this.name = architecture === "emulated" ? "cuda:emulated" : `hip:${architecture} emulated`;
    this.#runtime = open(runtimeLibrary(architecture), RUNTIME);
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
    const reserved = this.#current + this.#weights;
    return { current: this.#current, peak: this.#peak, reserved, weights: this.#weights };
  }

  alloc(byteLength: number, purpose: MemoryPurpose = "activations"): Memory {
    this.#requireOpen();
    this.#requireRoom(byteLength);
    const bytes = new Uint8Array(byteLength + 2 * GUARD + ALIGNMENT).fill(POISON);
    const address = addressOf(bytes);
    const lead = Number(-address & BigInt(ALIGNMENT - 1));
    const memory: EmulatedMemory = {
      device: this,
      pointer: address + BigInt(lead + GUARD),
      byteLength,
      purpose,
      guarded: bytes.subarray(lead, lead + byteLength + 2 * GUARD),
    };
    this.#live.add(memory);
    if (purpose === "weights") {
      this.#weights += byteLength;
      this.#collected.register(memory, byteLength, memory);
    } else {
      this.#current += byteLength;
      this.#peak = Math.max(this.#peak, this.#current);
      this.#scopes.add(memory);
    }
    return memory;
  }

  #requireRoom(byteLength: number): void {
    const limit = this.options.memoryBytes ?? 2 ** 31;
    if (this.#current + this.#weights + byteLength <= limit) return;
    throw new OutOfMemoryError(
      `${this.name}: out of memory: asked for ${byteLength} bytes, ${
        this.#current + this.#weights
      } of ${limit} are used`,
    );
  }

  free(memory: Memory): void {
    const { purpose, byteLength, guarded } = memory as EmulatedMemory;
    if (purpose === "deposited") {
      if (!this.#depositedMemory.get(memory)?.()) throw new FfiError(`${this.name}: memory was freed twice`);
      if (this.#live.delete(memory)) this.#weights -= byteLength;
      return;
    }
    if (!this.#live.delete(memory)) throw new FfiError(`${this.name}: memory was freed twice`);
    this.#scopes.remove(memory);
    if (purpose === "weights") {
      this.#weights -= byteLength;
      this.#collected.unregister(memory);
    } else this.#current -= byteLength;
    if (this.#recording !== undefined) this.#recording.freed.add(memory);
    else guarded.buffer.transfer(0); // gives the bytes back now
  }

  scope<T>(body: () => T): T {
    return this.#scopes.run(body);
  }

  deposit(): Deposit {
    const held = new Map<Memory, Uint8Array>();
    let present = false;
    return {
      add: (memory) => {
        this.#requireLive(memory, "deposit");
        this.#requireNotRecording("deposit");
        if (present) throw new FfiError(`${this.name}: weights are added to a deposit that is on the GPU`);
        const bytes = bytesOf(memory);
        const moved = { ...memory as EmulatedMemory, purpose: "deposited" as const };
        held.set(moved, bytes.slice());
        this.#depositedMemory.set(moved, () => held.delete(moved));
        this.#live.delete(memory);
        this.#weights -= memory.byteLength;
        this.#collected.unregister(memory);
        bytes.fill(POISON);
        return moved;
      },
      bring: () => {
        this.#requireNotRecording("bringing weights");
        if (present) return;
        const all = held.keys().reduce((sum, { byteLength }) => sum + byteLength, 0);
        this.#requireRoom(all);
        this.#weights += all;
        for (const [memory, bytes] of held) {
          this.#live.add(memory);
          bytesOf(memory).set(bytes);
        }
        present = true;
      },
      leave: () => {
        this.#requireNotRecording("offloading");
        if (!present) return;
        for (const memory of held.keys()) {
          this.#live.delete(memory);
          this.#weights -= memory.byteLength;
          bytesOf(memory).fill(POISON);
        }
        present = false;
      },
    };
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
    this.#requireLive(memory, "upload");
    this.#requireNotRecording("upload");
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
    this.#requireLive(tensor.memory, "download");
    this.#requireNotRecording("download");
    checkDownload(this.name, tensor, into);
    const start = tensor.offset * dtypeBytes(tensor.dtype);
    into.set(bytesOf(tensor.memory).subarray(start, start + tensor.byteLength));
    return Promise.resolve(into);
  }

  matmul(plan: MatmulPlan): void {
    if (columnMajorGemm(plan) === undefined) return; // throws for what cuBLASLt would not take
    const { a, b, bias, out, alpha = 1, activation, scaleA, scaleB } = plan;
    const batched = (x: Tensor) =>
      x.rank === 3 ? x : new Tensor(x.memory, x.dtype, [1, ...x.shape], [0, ...x.strides], x.offset);
    this.#library(
      "matmul",
      [batched(a), batched(b), bias, scaleA, scaleB, batched(out)],
      ([a, b, bias, scaleA, scaleB, out]) => {
        const gelu = activation === undefined ? 0 : 1;
        this.#runtime.symbols.simtMatmul(a, b, bias, scaleA, scaleB, out, alpha, gelu);
      },
    );
  }

  conv(plan: ConvPlan): void {
    this.#conv("conv", plan, undefined);
  }

  /** As cuDNN: not in f32. */
  convAdd(plan: ConvAddPlan): boolean {
    if (this.kind !== "cuda" || plan.x.dtype === "f32") return false;
    this.#conv("convAdd", plan, plan.residual);
    return true;
  }

  #conv(
    what: string,
    { x, weight, bias, out, stride, padding }: ConvPlan,
    residual: Tensor | undefined,
  ): void {
    const [images, channels, height, width] = x.shape;
    const [filters, , rows, columns] = weight.shape;
    const [top, left, bottom, right] = padding;
    // cuDNN takes all of them NCHW or all of them NHWC.
    const pictures = [x, weight, out, ...(residual === undefined ? [] : [residual])];
    const inOneOrder = (order: readonly number[]) =>
      pictures.every((tensor) => tensor.permute(order).isContiguous);
    if (!inOneOrder([0, 1, 2, 3]) && !inOneOrder([0, 2, 3, 1])) {
      throw new FfiError(`${this.name}: ${what}: ${pictures.join(", ")} differ in layout`);
    }
    requireShape(what, "weight", weight, [filters, channels, rows, columns]);
    if (bias !== undefined) requireShape(what, "bias", bias, [filters]);
    if (bias !== undefined && this.limits.convAddsBias === false) {
      throw new FfiError(`${this.name}: ${what}: there is no bias here`);
    }
    for (const other of [...pictures, bias ?? x]) {
      if (other.dtype !== x.dtype) {
        throw new FfiError(`${this.name}: ${what}: x is ${x}, another tensor ${other}`);
      }
    }
    requireShape(what, "out", out, [
      images,
      filters,
      Math.floor((height + top + bottom - rows) / stride) + 1,
      Math.floor((width + left + right - columns) / stride) + 1,
    ]);
    if (residual !== undefined) requireShape(what, "residual", residual, out.shape);
    this.#library(
      what,
      [x, weight, bias, residual, out],
      ([x, weight, bias, residual, out]) =>
        this.#runtime.symbols.simtConv(x, weight, bias, residual, out, stride, top, left),
    );
  }

  attention(plan: AttentionPlan): boolean {
    const { library, q, k, v, out, scale } = plan;
    if (library === "fa3" && !(this.kind === "cuda" && flashAttention3TakesPlan(plan))) return false;
    if (library === "aiter" && !(this.kind === "hip" && aiterTakesPlan(plan))) return false;
    if (library === undefined && !this.options.attention) return false;
    const [batch, , heads, dim] = q.shape;
    requireShape("attention", "k", k, [batch, k.shape[1], heads, dim]);
    requireShape("attention", "v", v, k.shape);
    requireShape("attention", "out", out, q.shape);
    this.#library(
      "attention",
      [q, k, v, out],
      ([q, k, v, out]) => this.#runtime.symbols.simtAttention(q, k, v, out, scale),
    );
    return true;
  }

  synchronize(): Promise<void> {
    this.#requireNotRecording("synchronize");
    return Promise.resolve(); // every call returns when its work is done
  }

  kernel(source: KernelSource, entry: string): GpuKernel {
    this.#requireOpen();
    const path = compiledKernel(source, entry, this.options.architecture ?? "emulated");
    let kernel = this.#kernels.get(path);
    if (kernel === undefined) {
      const library = open(path, KERNEL);
      const parameters = new Int32Array(MOST_PARAMETERS);
      const count = library.symbols.simtParameters(parameters);
      kernel = {
        name: `${source.name}:${entry}`,
        library,
        parameters: parameters.slice(0, count),
        staticSharedBytes: library.symbols.simtSharedBytes(),
      };
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

  launch(kernel: GpuKernel, launch: Launch, args: readonly KernelArgument[]): void {
    const { name, library, parameters, staticSharedBytes } = kernel as EmulatedKernel;
    const [grid, block] = [dim3(launch.grid), dim3(launch.block)];
    const shared = launch.shared ?? 0;
    this.#checkSizes(name, grid, block, shared, staticSharedBytes);
    const packed = packArguments(name, args, parameters);
    const header = new DataView(new ArrayBuffer(40));
    [...grid, ...block, shared].forEach((value, i) => header.setInt32(4 * i, value, true));
    header.setBigUint64(32, addressOf(packed.pointers), true);
    const sizes = { grid: grid.join("x"), block: block.join("x"), "dynamic shared memory": shared };
    this.#run(name, args.filter((arg) => arg instanceof Tensor), sizes, () => {
      const fault = new Int32Array(7);
      library.symbols.simtLaunch(header.buffer, fault);
      const [code, bx, by, bz, tx, ty, tz] = fault;
      if (code !== 0) {
        throw new FfiError(
          `${name}: ${FAULTS[code]} (block ${bx}, ${by}, ${bz}; thread ${tx}, ${ty}, ${tz})`,
        );
      }
      void packed; // the header points at it
    });
  }

  takesMatmul(): boolean {
    return true;
  }

  fastest(): number {
    return 0;
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
    this.#requireNotRecording("event");
    return new EmulatedEvent();
  }

  record(body: () => void): Graph {
    this.#requireNotRecording("record");
    const recording = { work: [] as (() => void)[], freed: new Set<Memory>() };
    this.#recording = recording;
    try {
      body();
    } finally {
      this.#recording = undefined;
    }
    let disposed = false;
    return {
      replay: () => {
        if (disposed) throw new FfiError(`${this.name}: the graph was disposed`);
        this.#requireNotRecording("replay");
        // What was freed while recording belongs to the graph.
        for (const memory of recording.freed) this.#live.add(memory);
        try {
          for (const work of recording.work) work();
        } finally {
          for (const memory of recording.freed) this.#live.delete(memory);
        }
      },
      [Symbol.dispose]: () => {
        disposed = true;
        for (const memory of recording.freed) (memory as EmulatedMemory).guarded.buffer.transfer(0);
        recording.freed.clear();
      },
    };
  }

  openProfiler(): Promise<GpuProfiler> {
    if (this.options.profiler === false) {
      return Promise.reject(
        new FfiError(`${this.name}: no profiler. Searched: nowhere.`, { hint: "install one" }),
      );
    }
    return Promise.resolve({
      profile: async (body) => {
        const activities: GpuActivity[] = this.#seen = [];
        try {
          await body();
        } finally {
          this.#seen = undefined;
        }
        return { activities, lost: 0 };
      },
      [Symbol.asyncDispose]: () => Promise.resolve(),
    });
  }

  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const { library } of this.#kernels.values()) library.close();
    this.#runtime.close();
  }

  /** Runs or records work on tensors, and looks at what lies around them afterwards. */
  #run(what: string, tensors: readonly Tensor[], details: GpuActivity["details"], work: () => void): void {
    this.#requireOpen();
    const checked = () => {
      for (const tensor of tensors) {
        this.#requireLive(tensor.memory, what);
        requireInside(what, tensor);
      }
      const start = performance.now();
      work();
      const name = what.split(":").at(-1)!.trim(); // a GPU knows no files
      this.#seen?.push({ kind: "kernel", name, stream: 1, start, end: performance.now(), details });
      for (const { memory } of tensors) requireGuards(what, memory);
    };
    if (this.#recording === undefined) return checked();
    for (const tensor of tensors) this.#requireLive(tensor.memory, what);
    this.#recording.work.push(checked);
  }

  /** Calls a function of the runtime with its tensors as Views. */
  #library(
    what: string,
    tensors: readonly (Tensor | undefined)[],
    call: (views: readonly BigInt64Array<ArrayBuffer>[]) => void,
  ): void {
    const name = `${this.name}: ${what}`;
    const format = float8FormatOf(this.limits.architecture);
    const views = tensors.map((tensor) => viewOf(name, tensor, format));
    this.#run(name, tensors.filter((tensor) => tensor !== undefined), {}, () => call(views));
  }

  #checkSizes(name: string, grid: Sizes, block: Sizes, shared: number, staticShared: number): void {
    const threads = block[0] * block[1] * block[2];
    const sizes = [...grid, ...block];
    const fits = sizes.every((size) => Number.isInteger(size) && size > 0) &&
      grid[0] < 2 ** 31 && grid[1] < 65536 && grid[2] < 65536 && threads <= 1024 && block[2] <= 64;
    if (!fits) {
      throw new FfiError(`${name}: no GPU launches grid ${grid.join(" x ")}, block ${block.join(" x ")}`);
    }
    const limit = this.limits.sharedBytesPerBlock;
    // Without being asked for more, a block gets 48 KiB of static shared memory.
    if (!Number.isInteger(shared) || shared < 0 || shared + staticShared > limit || staticShared > 49152) {
      throw new FfiError(
        `${name}: ${shared} bytes of dynamic and ${staticShared} of static shared memory, a block has ${limit}`,
      );
    }
  }

  #requireOpen(): void {
    if (this.#closed) throw new FfiError(`${this.name}: the device was closed`);
  }

  #requireLive(memory: Memory, what: string): void {
    this.#requireOpen();
    if (memory.device !== this) throw new FfiError(`${what}: a tensor lies on ${memory.device.name}`);
    if (!this.#live.has(memory)) throw new FfiError(`${what}: a tensor's memory was freed`);
  }

  #requireNotRecording(what: string): void {
    if (this.#recording !== undefined) throw new FfiError(`${this.name}: ${what} cannot be recorded`);
  }
}

class EmulatedEvent implements GpuEvent {
  readonly reached = true; // its work is done when it was issued
  readonly #time = performance.now();

  since(earlier: GpuEvent): number {
    return this.#time - (earlier as EmulatedEvent).#time;
  }

  [Symbol.dispose](): void {}
}

// -- memory ------------------------------------------------------------------------------------------------------

/** An allocation's bytes, without its guards. */
function bytesOf(memory: Memory): Uint8Array<ArrayBuffer> {
  return (memory as EmulatedMemory).guarded.subarray(GUARD, GUARD + memory.byteLength);
}

/** Fails where a guard was written, and repairs it, so that the next launch is not blamed. */
function requireGuards(what: string, memory: Memory): void {
  const { guarded } = memory as EmulatedMemory;
  const [before, after] = [guarded.subarray(0, GUARD), guarded.subarray(guarded.length - GUARD)];
  const low = before.findLastIndex((byte) => byte !== POISON);
  const high = after.findIndex((byte) => byte !== POISON);
  if (low < 0 && high < 0) return;
  before.fill(POISON);
  after.fill(POISON);
  const where = low >= 0 ? `${GUARD - low} bytes before the start` : `${high} bytes behind the end`;
  throw new FfiError(`${what} wrote ${where} of a tensor's memory (${memory.byteLength} bytes)`);
}

function requireInside(what: string, tensor: Tensor): void {
  const last = tensor.shape.reduce((sum, size, dim) => sum + (size - 1) * tensor.strides[dim], tensor.offset);
  if (tensor.size > 0 && (last + 1) * dtypeBytes(tensor.dtype) > tensor.memory.byteLength) {
    throw new FfiError(`${what}: ${tensor} reaches beyond its memory of ${tensor.memory.byteLength} bytes`);
  }
}

function requireShape(op: string, what: string, tensor: Tensor, shape: readonly number[]): void {
  if (tensor.rank === shape.length && shape.every((size, dim) => size === tensor.shape[dim])) return;
  throw new FfiError(`emulated GPU: ${op}: ${what} is ${tensor}, expected [${shape.join(", ")}]`);
}

// -- library work ------------------------------------------------------------------------------------------------

/** The types that simt_runtime.cpp loads and stores, by their numbers there. */
const DTYPES: readonly DType[] = ["f32", "bf16", "f16", "f8e4m3"];

/** A tensor as simt_runtime.cpp's View: address, type, four sizes, four strides. */
function viewOf(what: string, tensor: Tensor | undefined, float8: Float8Format): BigInt64Array<ArrayBuffer> {
  const view = new BigInt64Array(10);
  if (tensor === undefined) return view;
  const type = DTYPES.indexOf(tensor.dtype);
  if (type < 0) throw new FfiError(`${what}: no library takes ${tensor}`);
  view[0] = tensor.pointer;
  view[1] = BigInt(type + Number(tensor.dtype === "f8e4m3" && float8 === "fnuz"));
  view.set(tensor.shape.map(BigInt), 2);
  view.set(tensor.strides.map(BigInt), 6);
  return view;
}

const RUNTIME = {
  // void simtMatmul(const View *a, const View *b, const View *bias, const View *scaleA, const View *scaleB,
  //     const View *out, float alpha, int gelu)
  simtMatmul: {
    parameters: ["buffer", "buffer", "buffer", "buffer", "buffer", "buffer", "f32", "i32"],
    result: "void",
  },
  // void simtConv(const View *x, const View *weight, const View *bias, const View *residual, const View *out, int stride,
  //     int top, int left)
  simtConv: {
    parameters: ["buffer", "buffer", "buffer", "buffer", "buffer", "i32", "i32", "i32"],
    result: "void",
  },
  // void simtAttention(const View *q, const View *k, const View *v, const View *out, float scale)
  simtAttention: { parameters: ["buffer", "buffer", "buffer", "buffer", "f32"], result: "void" },
} as const satisfies Deno.ForeignLibraryInterface;

// -- kernels -----------------------------------------------------------------------------------------------------

const KERNEL = {
  // int simtParameters(int *codes)
  simtParameters: { parameters: ["buffer"], result: "i32" },
  // int simtSharedBytes(void)
  simtSharedBytes: { parameters: [], result: "i32" },
  // void simtLaunch(const SimtLaunch *launch, SimtFault *fault)
  simtLaunch: { parameters: ["buffer", "buffer"], result: "void" },
} as const satisfies Deno.ForeignLibraryInterface;

/** What {@link KERNEL}'s simtParameters has room for. */
const MOST_PARAMETERS = 64;

/** What a launch may end with, by simt_runtime.cpp's enum Fault. */
const FAULTS: readonly string[] = [
  "",
  "only a part of the block reaches a barrier",
  "only a part of the warp takes part in a shuffle, a vote or a warp barrier",
  "wrote beyond the dynamic shared memory that the launch asked for",
  "accessed memory that is not there",
  "misaligned access, index outside of an array, overflow of a signed integer, or division by zero",
];

type Sizes = readonly [number, number, number];

function dim3(size: Dim3): Sizes {
  if (typeof size === "number") return [size, 1, 1];
  return [size[0], size[1], size[2] ?? 1];
}

function open<const S extends Deno.ForeignLibraryInterface>(path: string, symbols: S): OpenedLibrary<S> {
  return openLibrary("emulated GPU", symbols, { sonames: [path], search: "system" });
}
