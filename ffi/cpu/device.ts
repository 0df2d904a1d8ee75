import type { ConvPlan, Device, DeviceProperties, MatmulPlan, Memory, MemoryUse } from "../device.ts";
import type { DType } from "../dtype.ts";
import { FfiError, OutOfMemoryError } from "../errors.ts";
import { MemoryScopes } from "../scope.ts";
import type { Tensor } from "../tensor.ts";
import { ffiAllowed } from "../library.ts";
import { Converter } from "./convert.ts";
import type { CpuProvider } from "./provider.ts";
import type { WasmRunner } from "./runner.ts";

const PAGE = 65536;
/** 4 GiB: what 32-bit WebAssembly can address. Weights do not live here, only activations. */
const MAX_PAGES = 65536;
/** Cache line; also enough for every SIMD load and for oneDNN. */
const ALIGNMENT = 64;

/** Host memory: an address for native libraries and the buffer behind it for TypeScript and WebAssembly. */
export interface CpuMemory extends Memory {
  readonly buffer: ArrayBufferLike;
  readonly byteOffset: number;
  /** Offset in the device's WebAssembly memory, or undefined for memory that lies elsewhere (mapped weights). */
  readonly wasmOffset: number | undefined;
}

/**
 * The CPU as a device. Tensors that it allocates lie in one shared WebAssembly memory, so that WebAssembly kernels,
 * worker threads, native libraries and TypeScript all see them without a copy; weights stay where they were mapped.
 */
export class CpuDevice implements Device {
  readonly kind = "cpu";
  readonly name = "cpu";
  readonly wasmMemory: WebAssembly.Memory;
  readonly #base: bigint;
  readonly #scopes = new MemoryScopes((memory) => this.free(memory));
  /** Free blocks by size, and the sizes of the blocks in use by offset. */
  readonly #freeBlocks = new Map<number, number[]>();
  readonly #usedBlocks = new Map<number, number>();
  #top = ALIGNMENT; // offset 0 stays unused, so that no pointer is null
  #current = 0;
  #peak = 0;
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
    return this.#open.properties();
  }

  memoryUse(): MemoryUse {
    return { current: this.#current, peak: this.#peak };
  }

  alloc(byteLength: number): CpuMemory {
    const memory = this.reserve(byteLength);
    this.#scopes.add(memory);
    return memory;
  }

  /** Like {@link alloc}, but no scope frees it: for providers' scratch and packed weights. */
  reserve(byteLength: number): CpuMemory {
    const size = blockSize(byteLength);
    const offset = this.#freeBlocks.get(size)?.pop() ?? this.#extend(size);
    this.#usedBlocks.set(offset, size);
    this.#current += size;
    this.#peak = Math.max(this.#peak, this.#current);
    const memory: CpuMemory = {
      device: this,
      pointer: this.#base + BigInt(offset),
      byteLength,
      buffer: this.wasmMemory.buffer,
      byteOffset: offset,
      wasmOffset: offset,
    };
    return memory;
  }

  free(memory: Memory): void {
    this.#provider?.forget?.(memory);
    const { wasmOffset } = memory as CpuMemory;
    if (wasmOffset === undefined) return; // placed: the mapping belongs to the checkpoint
    const size = this.#usedBlocks.get(wasmOffset);
    if (size === undefined) throw new FfiError("cpu: memory was freed twice");
    this.#usedBlocks.delete(wasmOffset);
    this.#scopes.remove(memory);
    this.#current -= size;
    const blocks = this.#freeBlocks.get(size);
    if (blocks === undefined) this.#freeBlocks.set(size, [wasmOffset]);
    else blocks.push(wasmOffset);
  }

  scope<T>(body: () => T): T {
    return this.#scopes.run(body);
  }

  place(bytes: Uint8Array): CpuMemory {
    return {
      device: this,
      pointer: addressOf(bytes),
      byteLength: bytes.byteLength,
      buffer: bytes.buffer,
      byteOffset: bytes.byteOffset,
      wasmOffset: undefined,
    };
  }

  upload(bytes: Uint8Array, memory: Memory): void {
    const { buffer, byteOffset, byteLength } = memory as CpuMemory;
    if (bytes.byteLength > byteLength) {
      throw new FfiError(`cpu: ${bytes.byteLength} bytes do not fit into ${byteLength} of memory`);
    }
    new Uint8Array(buffer, byteOffset, byteLength).set(bytes);
  }

  download(tensor: Tensor): Promise<Uint8Array<ArrayBuffer>> {
    if (!tensor.isContiguous) {
      throw new FfiError(`cpu: download takes a contiguous tensor, not strided ${tensor}`);
    }
    const view = viewOf(tensor, "u8", tensor.byteLength);
    return Promise.resolve(new Uint8Array(view)); // copies: a shared buffer cannot leave for web APIs
  }

  matmul(plan: MatmulPlan): void {
    this.#open.matmul(plan);
  }

  conv(plan: ConvPlan): void {
    this.#open.conv(plan);
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

  /** Takes a fresh block from the top of the WebAssembly memory, growing it where needed. */
  #extend(size: number): number {
    const offset = this.#top;
    const end = offset + size;
    const missing = end - this.wasmMemory.buffer.byteLength;
    if (missing > 0) {
      try {
        this.wasmMemory.grow(Math.ceil(missing / PAGE));
      } catch (cause) {
        throw new OutOfMemoryError(
          `cpu: out of memory: asked for ${mebibytes(size)}, ${
            mebibytes(this.#current)
          } are in use of at most ` +
            `${mebibytes(MAX_PAGES * PAGE)}`,
          { cause, hint: "A smaller --height and --width, or bfloat16 (without --disable_bf16), need less." },
        );
      }
    }
    this.#top = end;
    return offset;
  }
}

/** Address of the first byte; 0 where native code may not be called, since then nobody asks. */
function addressOf(bytes: Uint8Array): bigint {
  if (!ffiAllowed()) return 0n;
  return Deno.UnsafePointer.value(Deno.UnsafePointer.of(bytes as Uint8Array<ArrayBuffer>));
}

/**
 * Blocks come in eighths of powers of two, so that a freed block serves requests of about its size and at most an
 * eighth is wasted.
 */
function blockSize(byteLength: number): number {
  const size = Math.max(byteLength, ALIGNMENT);
  const step = Math.max(ALIGNMENT, 2 ** (Math.floor(Math.log2(size)) - 3));
  return Math.ceil(size / step) * step;
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
