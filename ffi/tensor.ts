import type { Device, Memory, MemoryPurpose } from "./device.ts";
import { type DType, dtypeBytes } from "./dtype.ts";
import { FfiError } from "./errors.ts";
import { float8FormatOf } from "./float8.ts";
import { isGpu } from "./gpu.ts";
import { displayTensor, JUPYTER_DISPLAY } from "./tensor_display.ts";
import { gatherValues, valuesFromBytes } from "./values.ts";

/** Strides, in elements, of a dense row-major tensor. */
export function contiguousStrides(shape: readonly number[]): number[] {
  const strides = new Array<number>(shape.length);
  let step = 1;
  for (let dim = shape.length - 1; dim >= 0; dim--) {
    strides[dim] = step;
    step *= shape[dim];
  }
  return strides;
}

/** Number of elements of a shape. */
export function elementCount(shape: readonly number[]): number {
  return shape.reduce((product, size) => product * size, 1);
}

/**
 * An n-dimensional view of device memory: dtype, shape, strides in elements and an offset. Views (`reshape`,
 * `permute`, `narrow`) cost nothing and share memory. A tensor never moves between devices by itself.
 */
export class Tensor {
  /** A view of `memory`: strides and offset in elements, dense and from its start when left out. */
  constructor(
    readonly memory: Memory,
    readonly dtype: DType,
    readonly shape: readonly number[],
    readonly strides: readonly number[] = contiguousStrides(shape),
    /** First element, in elements from the start of the memory. */
    readonly offset: number = 0,
  ) {}

  /** Uninitialized dense tensor. @param purpose of its memory, activations when left out. */
  static empty(device: Device, shape: readonly number[], dtype: DType, purpose?: MemoryPurpose): Tensor {
    return new Tensor(device.alloc(elementCount(shape) * dtypeBytes(dtype), purpose), dtype, shape);
  }

  /** Dense f32 tensor with the given values; the cast operator makes other dtypes of it. */
  static fromFloat32(
    device: Device,
    values: Float32Array | readonly number[],
    shape: readonly number[],
  ): Tensor {
    const data = new Float32Array(values);
    return Tensor.fromBytes(device, new Uint8Array(data.buffer), shape, "f32");
  }

  /** Dense i32 tensor with the given values. */
  static fromInt32(device: Device, values: Int32Array | readonly number[], shape: readonly number[]): Tensor {
    const data = Int32Array.from(values);
    return Tensor.fromBytes(device, new Uint8Array(data.buffer), shape, "i32");
  }

  /** Dense tensor that holds a copy of the little-endian `bytes`. Throws {@link FfiError} if the sizes differ. */
  static fromBytes(
    device: Device,
    bytes: Uint8Array,
    shape: readonly number[],
    dtype: DType,
    purpose?: MemoryPurpose,
  ): Tensor {
    const needed = elementCount(shape) * dtypeBytes(dtype);
    if (bytes.byteLength !== needed) {
      throw new FfiError(
        `${dtype} [${shape.join(", ")}] takes ${needed} bytes, ${bytes.byteLength} were given`,
      );
    }
    const memory = device.alloc(needed, purpose);
    device.upload(bytes, memory);
    return new Tensor(memory, dtype, shape);
  }

  /** Where it lives. */
  get device(): Device {
    return this.memory.device;
  }

  /** Number of dimensions. */
  get rank(): number {
    return this.shape.length;
  }

  /** Number of elements. */
  get size(): number {
    return elementCount(this.shape);
  }

  /** Bytes of its elements, without gaps between them. */
  get byteLength(): number {
    return this.size * dtypeBytes(this.dtype);
  }

  /** Address of the first element. */
  get pointer(): bigint {
    return this.memory.pointer + BigInt(this.offset * dtypeBytes(this.dtype));
  }

  /** Whether the elements lie densely in row-major order. */
  get isContiguous(): boolean {
    let step = 1;
    for (let dim = this.rank - 1; dim >= 0; dim--) {
      if (this.shape[dim] !== 1 && this.strides[dim] !== step) return false;
      step *= this.shape[dim];
    }
    return true;
  }

  /**
   * The same elements under another shape; one size may be -1. Throws {@link FfiError} where strides forbid it
   * (dimensions that are merged must lie densely behind one another).
   */
  reshape(shape: readonly number[]): Tensor {
    const known = shape.reduce((product, size) => size === -1 ? product : product * size, 1);
    const resolved = shape.map((size) => size === -1 ? this.size / known : size);
    if (elementCount(resolved) !== this.size || resolved.some((size) => !Number.isInteger(size))) {
      throw new FfiError(`cannot reshape ${this} to [${shape.join(", ")}]`);
    }
    const strides = this.isContiguous ? contiguousStrides(resolved) : restride(this, resolved);
    if (strides === undefined) {
      throw new FfiError(`cannot view strided ${this} as [${shape.join(", ")}]; copy it first`);
    }
    return new Tensor(this.memory, this.dtype, resolved, strides, this.offset);
  }

  /** Dimensions in another order: result dimension `i` is this tensor's dimension `order[i]`. */
  permute(order: readonly number[]): Tensor {
    return new Tensor(
      this.memory,
      this.dtype,
      order.map((dim) => this.shape[dim]),
      order.map((dim) => this.strides[dim]),
      this.offset,
    );
  }

  /** `length` entries of dimension `dim` (negative counts from the end) from `start` on. */
  narrow(dim: number, start: number, length: number): Tensor {
    const at = dim < 0 ? this.rank + dim : dim;
    if (start < 0 || length < 0 || start + length > this.shape[at]) {
      throw new FfiError(`narrow(${dim}, ${start}, ${length}) leaves ${this}`);
    }
    return new Tensor(
      this.memory,
      this.dtype,
      this.shape.with(at, length),
      this.strides,
      this.offset + start * this.strides[at],
    );
  }

  /** `parts` equal views along dimension `dim`. */
  chunk(parts: number, dim: number): Tensor[] {
    const at = dim < 0 ? this.rank + dim : dim;
    const length = this.shape[at] / parts;
    if (!Number.isInteger(length)) throw new FfiError(`${this} does not split into ${parts} along ${dim}`);
    return Array.from({ length: parts }, (_, part) => this.narrow(at, part * length, length));
  }

  /** Waits for the work so far and copies the elements to the host, row by row, as f32; those of any dtype and strides. */
  async toFloat32(): Promise<Float32Array> {
    // From the first element to the last one that the strides reach, as bytes: any device copies those as they are.
    const extent = this.size === 0
      ? 0
      : this.shape.reduce((last, size, dim) => last + (size - 1) * this.strides[dim], 1);
    const width = dtypeBytes(this.dtype);
    const bytes = new Tensor(this.memory, "u8", [extent * width], [1], this.offset * width);
    const float8 = isGpu(this.device) ? float8FormatOf(this.device.limits.architecture) : "ocp";
    const values = valuesFromBytes(await this.device.download(bytes), this.dtype, float8);
    return this.isContiguous ? values : gatherValues(values, this.shape, this.strides);
  }

  /** What a notebook shows of it (Deno's `Jupyter.display`): dtype, shape, device, statistics, a heat map. */
  [JUPYTER_DISPLAY](): Promise<Record<string, string>> {
    return displayTensor(this);
  }

  /** Frees the memory behind this tensor (and so behind every view of it). */
  dispose(): void {
    this.device.free(this.memory);
  }

  /** Dtype and shape for messages, e.g. `"bf16 [1, 256, 64]"`. */
  toString(): string {
    return `${this.dtype} [${this.shape.join(", ")}]`;
  }
}

/** Strides of `tensor` under `shape`, or undefined where a merged dimension is not dense. */
function restride(tensor: Tensor, shape: readonly number[]): number[] | undefined {
  // Dimensions of size 1 are never walked, so their strides say nothing.
  const source = tensor.shape.map((size, dim) => ({ size, stride: tensor.strides[dim] })).filter(({ size }) =>
    size > 1
  );
  const strides = new Array<number>(shape.length).fill(1);
  // Both shapes are walked from the back in groups of dimensions of equal product; within a group of the source each
  // stride must be the next one times its size.
  let dim = shape.length - 1;
  for (let from = source.length - 1; from >= 0; from--) {
    const { stride: step } = source[from];
    let product = source[from].size;
    let covered = 1;
    while (covered !== product) {
      if (dim >= 0 && covered < product) {
        strides[dim] = step * covered;
        covered *= shape[dim--];
      } else {
        const outer = source[--from];
        if (outer === undefined || outer.stride !== step * product) return undefined;
        product *= outer.size;
      }
    }
  }
  return strides;
}
