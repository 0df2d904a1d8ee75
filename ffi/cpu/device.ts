import type {
  ConvPlan,
  Device,
  DeviceProperties,
  MatmulPlan,
  Memory,
  MemoryPurpose,
  MemoryUse,
} from "../device.ts";
import type { DType } from "../dtype.ts";
import { checkDownload } from "../download.ts";
import { FfiError, OutOfMemoryError, ShapeError } from "../errors.ts";
import { MemoryScopes } from "../scope.ts";
import { Arena } from "../arena.ts";
import { convBands } from "./bands.ts";
import { composedMatmul, isComposed } from "./composed_matmul.ts";
import { Tensor } from "../tensor.ts";
import { ffiAllowed } from "../library.ts";
import { scalingOf } from "../matmul_plan.ts";
import { Converter } from "./convert.ts";
import { type CpuProvider, requireFloat } from "./provider.ts";
import type { WasmRunner } from "./runner.ts";

const PAGE = 65536;
/** 4 GiB: what 32-bit WebAssembly can address. Weights do not live here, only activations and providers' scratch. */
const MAX_PAGES = 65536;
/** Cache line; also enough for every SIMD load and for oneDNN. */
const ALIGNMENT = 64;

/** Host memory: an address for native libraries and the buffer behind it for TypeScript and WebAssembly. */
export interface CpuMemory extends Memory {
  readonly buffer: ArrayBufferLike;
  readonly byteOffset: number;
  /** Offset in the device's WebAssembly memory, or undefined for memory that lies elsewhere: weights. */
  readonly wasmOffset: number | undefined;
}

/**
 * The CPU as a device. Activations lie in one shared WebAssembly memory, so that WebAssembly kernels, worker threads,
 * native libraries and TypeScript all see them without a copy. Weights stay where they were mapped; those that a recipe
 * makes get buffers of their own, so that they are limited by the machine's memory and not by WebAssembly's.
 */
export class CpuDevice implements Device {
  readonly kind = "cpu";
  readonly name = "cpu";
  readonly wasmMemory: WebAssembly.Memory;
  readonly #base: bigint;
  readonly #scopes = new MemoryScopes((memory) => this.free(memory));
  readonly #arena = new Arena(ALIGNMENT, MAX_PAGES * PAGE, ALIGNMENT); // offset 0 stays unused: no pointer is null
  /** What was allocated and not yet freed by hand; and all memory for weights, freed or not. */
  readonly #live = new WeakSet<Memory>();
  readonly #weights = new WeakSet<Memory>();
  readonly #collected = new FinalizationRegistry<number>((byteLength) => this.#weightBytes -= byteLength);
  #weightBytes = 0;
  /** Bytes taken from the arena now, and the most that ever were. */
  #current = 0;
  #peak = 0;
  /** What {@link reserve} gave out. */
  readonly #reserved = new WeakSet<Memory>();
  #reservedBytes = 0;
  #provider: CpuProvider | undefined;
  /** Runs WebAssembly kernels on all cores over this device's memory; without it, references in TypeScript run. */
  readonly runner: WasmRunner | undefined;
  /** Conversions between f32 and bf16 by that runner. */
  readonly converter: Converter | undefined;

  /**
   * `openProvider` chooses what computes matrix products and convolutions; it gets the finished device, with the
   * runner that `openRunner` made for its memory.
   */
  constructor(
    openProvider: (device: CpuDevice) => CpuProvider,
    openRunner?: (device: CpuDevice) => WasmRunner,
  ) {
    this.wasmMemory = new WebAssembly.Memory({ initial: 16, maximum: MAX_PAGES, shared: true });
    this.#base = addressOf(new Uint8Array(this.wasmMemory.buffer, 0, 1));
    this.runner = openRunner?.(this);
    this.converter = this.runner && new Converter(this, this.runner);
    this.#provider = openProvider(this);
  }

  properties(): DeviceProperties {
    const { providers, ...properties } = this.#open.properties();
    const { runner } = this;
    const simd = runner && runner.description + (runner.problem === undefined ? "" : ` (${runner.problem})`);
    return {
      ...properties,
      providers: {
        ...providers,
        ...(simd === undefined ? {} : { "softmax, group norm, activations": simd }),
        other: "TypeScript",
      },
    };
  }

  memoryUse(): MemoryUse {
    return {
      current: this.#current - this.#reservedBytes,
      peak: this.#peak,
      reserved: this.wasmMemory.buffer.byteLength,
      weights: this.#weightBytes + (this.#provider?.packedBytes?.() ?? 0),
    };
  }

  alloc(byteLength: number, purpose: MemoryPurpose = "activations"): CpuMemory {
    if (purpose === "weights") return this.#allocWeights(byteLength);
    const memory = this.#withRoom(() => this.#take(byteLength));
    this.#scopes.add(memory);
    return memory;
  }

  /**
   * Like {@link alloc}, but no scope frees it and it is not counted as in use: for what stays from call to call, such
   * as packed weights.
   */
  reserve(byteLength: number): CpuMemory {
    const memory = this.#take(byteLength);
    this.#reserved.add(memory);
    this.#reservedBytes += this.#arena.blockSize(byteLength);
    return memory;
  }

  #take(byteLength: number): CpuMemory {
    const offset = this.#arena.alloc(byteLength);
    if (offset === undefined) throw this.#outOfMemory(byteLength);
    const missing = this.#arena.end - this.wasmMemory.buffer.byteLength;
    if (missing > 0) {
      try {
        this.wasmMemory.grow(Math.ceil(missing / PAGE));
      } catch (cause) {
        this.#arena.free(offset);
        throw this.#outOfMemory(byteLength, cause);
      }
    }
    this.#current += this.#arena.blockSize(byteLength);
    this.#peak = Math.max(this.#peak, this.#current);
    const memory: CpuMemory = {
      device: this,
      pointer: this.#base + BigInt(offset),
      byteLength,
      buffer: this.wasmMemory.buffer,
      byteOffset: offset,
      wasmOffset: offset,
    };
    this.#live.add(memory);
    return memory;
  }

  /** Runs a provider's work with an allocator whose memory is given back afterwards, whatever scope is open. */
  withScratch(body: (scratch: (byteLength: number) => CpuMemory) => void): void {
    const taken: CpuMemory[] = [];
    try {
      body((byteLength) => {
        const memory = this.#take(byteLength);
        taken.push(memory);
        return memory;
      });
    } finally {
      for (const memory of taken) this.free(memory);
    }
  }

  free(memory: Memory): void {
    this.#provider?.forget?.(memory);
    const { wasmOffset, buffer } = memory as CpuMemory;
    const isWeight = this.#weights.has(memory);
    if (wasmOffset === undefined && !isWeight) return; // placed: the mapping belongs to the checkpoint
    if (!this.#live.delete(memory)) throw new FfiError("cpu: memory was freed twice");
    if (isWeight) {
      this.#collected.unregister(memory);
      this.#weightBytes -= memory.byteLength;
      (buffer as ArrayBuffer).transfer(0); // gives the bytes back now; what still looks at them finds nothing
    } else {
      const bytes = this.#arena.free(wasmOffset!);
      this.#current -= bytes;
      if (this.#reserved.delete(memory)) this.#reservedBytes -= bytes;
      else this.#scopes.remove(memory);
    }
  }

  scope<T>(body: () => T): T {
    return this.#scopes.run(body);
  }

  placeAll(parts: readonly Uint8Array[], onBytes?: (bytes: number) => void): Promise<CpuMemory[]> {
    const memories = parts.map((bytes) => this.place(bytes));
    onBytes?.(parts.reduce((sum, { byteLength }) => sum + byteLength, 0));
    return Promise.resolve(memories);
  }

  /** Host bytes as memory of this device, where they are. */
  place(bytes: Uint8Array, readOnly = true): CpuMemory {
    return {
      device: this,
      pointer: addressOf(bytes),
      byteLength: bytes.byteLength,
      readOnly,
      buffer: bytes.buffer,
      byteOffset: bytes.byteOffset,
      wasmOffset: undefined,
    };
  }

  changed(memory: Memory): void {
    this.#provider?.forget?.(memory);
  }

  upload(bytes: Uint8Array, memory: Memory): void {
    const { buffer, byteOffset, byteLength } = memory as CpuMemory;
    if (bytes.byteLength > byteLength) {
      throw new FfiError(`cpu: ${bytes.byteLength} bytes do not fit into ${byteLength} of memory`);
    }
    new Uint8Array(buffer, byteOffset, byteLength).set(bytes);
  }

  download(
    tensor: Tensor,
    into: Uint8Array<ArrayBuffer> = new Uint8Array(tensor.byteLength),
  ): Promise<Uint8Array<ArrayBuffer>> {
    checkDownload("cpu", tensor, into);
    into.set(viewOf(tensor, "u8", tensor.byteLength)); // a shared buffer cannot leave for web APIs
    return Promise.resolve(into);
  }

  matmul(plan: MatmulPlan): void {
    scalingOf(plan); // throws for scales that do not fit
    for (const one of matricesOf(plan)) this.#withRoom(() => this.#matmul(one));
  }

  #matmul(plan: MatmulPlan): void {
    const provider = this.#open;
    if (!isComposed(plan)) return provider.matmul(plan);
    requireFloat("matmul", plan.out, plan.bias);
    this.withScratch((scratch) => composedMatmul(plan, scratch, (plain) => provider.matmul(plain)));
  }

  conv(plan: ConvPlan): void {
    for (const band of convBands(plan)) this.#withRoom(() => this.#open.conv(band));
  }

  synchronize(): Promise<void> {
    return Promise.resolve(); // every call above returns when its work is done
  }

  [Symbol.dispose](): void {
    this.#provider?.[Symbol.dispose]();
    this.#provider = undefined;
    this.runner?.[Symbol.dispose]();
  }

  get #open(): CpuProvider {
    if (this.#provider === undefined) throw new FfiError("cpu: the device was closed");
    return this.#provider;
  }

  /** Runs `body`, and once more without the provider's packed weights where memory ran out. */
  #withRoom<T>(body: () => T): T {
    try {
      return body();
    } catch (error) {
      if (!(error instanceof OutOfMemoryError) || this.#provider?.trim?.() !== true) throw error;
      return body();
    }
  }

  /** A buffer of its own, which goes when nothing refers to it any more. */
  #allocWeights(byteLength: number): CpuMemory {
    let bytes: Uint8Array<ArrayBuffer>;
    try {
      bytes = new Uint8Array(byteLength + ALIGNMENT);
    } catch (cause) {
      throw new OutOfMemoryError(
        `cpu: out of memory: asked for a weight of ${mebibytes(byteLength)}, weights take ` +
          `${mebibytes(this.#weightBytes)} already`,
        {
          cause,
          hint:
            "bfloat16 weights take half of float32's; a checkpoint in the chosen dtype is mapped and takes none.",
        },
      );
    }
    const address = addressOf(bytes);
    const memory = this.place(
      bytes.subarray(Number(-address & BigInt(ALIGNMENT - 1))).subarray(0, byteLength),
      false,
    );
    this.#weights.add(memory);
    this.#live.add(memory);
    this.#collected.register(memory, byteLength, memory);
    this.#weightBytes += byteLength;
    return memory;
  }

  #outOfMemory(byteLength: number, cause?: unknown): OutOfMemoryError {
    return new OutOfMemoryError(
      `cpu: out of memory: asked for ${mebibytes(byteLength)}, ${
        mebibytes(this.#current)
      } are in use of at most ` +
        mebibytes(MAX_PAGES * PAGE),
      {
        cause,
        hint:
          "A smaller --height and --width, fewer pictures at a time, or bfloat16 instead of float32 need less.",
      },
    );
  }
}

/** The single products of a plan. Throws {@link ShapeError} where only some operands are batches, or of other sizes. */
function matricesOf(plan: MatmulPlan): readonly MatmulPlan[] {
  const { a, b, out } = plan;
  if (a.rank === 2 && b.rank === 2 && out.rank === 2) return [plan];
  const [batch] = out.shape;
  if ([a, b, out].some(({ rank, shape }) => rank !== 3 || shape[0] !== batch)) {
    throw new ShapeError(`matmul: matrices are all of rank 2, or a batch each: a ${a}, b ${b}, out ${out}`);
  }
  const entry = (tensor: Tensor, i: number) => {
    const [, rows, columns] = tensor.shape;
    const [step, ...strides] = tensor.strides;
    return new Tensor(tensor.memory, tensor.dtype, [rows, columns], strides, tensor.offset + i * step);
  };
  return Array.from(
    { length: batch },
    (_, i) => ({ ...plan, a: entry(a, i), b: entry(b, i), out: entry(out, i) }),
  );
}

/** Address of the first byte; 0 where native code may not be called, since then nobody asks. */
function addressOf(bytes: Uint8Array): bigint {
  if (!ffiAllowed()) return 0n;
  return Deno.UnsafePointer.value(Deno.UnsafePointer.of(bytes as Uint8Array<ArrayBuffer>));
}

function mebibytes(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

interface Views {
  f64: Float64Array;
  f32: Float32Array;
  bf16: Uint16Array;
  f16: Uint16Array;
  f8e4m3: Uint8Array;
  f8e5m2: Uint8Array;
  i64: BigInt64Array;
  i32: Int32Array;
  u8: Uint8Array;
}

const CONSTRUCTORS: { readonly [D in DType]: new (b: ArrayBufferLike, o: number, n: number) => Views[D] } = {
  f64: Float64Array,
  f32: Float32Array,
  bf16: Uint16Array,
  f16: Uint16Array,
  f8e4m3: Uint8Array,
  f8e5m2: Uint8Array,
  i64: BigInt64Array,
  i32: Int32Array,
  u8: Uint8Array,
};

/**
 * Typed array over `length` elements of a CPU tensor's memory from its first element on. 16- and 8-bit floats show
 * as their bit patterns. Throws {@link FfiError} for a tensor of another device, or one that is not aligned to its
 * elements (safetensors data may start anywhere; {@link isAligned} asks first).
 */
export function viewOf<D extends DType>(tensor: Tensor, dtype: D, length: number): Views[D] {
  if (tensor.device.kind !== "cpu") {
    throw new FfiError(`${tensor} lies on ${tensor.device.name}, not on the CPU`);
  }
  const memory = tensor.memory as CpuMemory;
  const bytes = memory.byteOffset + Number(tensor.pointer - memory.pointer);
  return new CONSTRUCTORS[dtype](memory.buffer, bytes, length);
}

/** Whether a CPU tensor's first element lies at a multiple of `bytes` in its buffer. */
export function isAligned(tensor: Tensor, bytes: number): boolean {
  const memory = tensor.memory as CpuMemory;
  return (memory.byteOffset + Number(tensor.pointer - memory.pointer)) % bytes === 0;
}
