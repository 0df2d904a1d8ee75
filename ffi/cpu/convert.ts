import { dtypeBytes } from "../dtype.ts";
import { FfiError } from "../errors.ts";
import { Tensor } from "../tensor.ts";
import CONVERT_WAT from "./convert.wat" with { type: "text" };
import type { CpuDevice, CpuMemory } from "./device.ts";
import type { Kernel, WasmRunner } from "./runner.ts";

/** Elements per job. */
const SHARE = 16384;
/** Bytes that are brought from a mapped file into reach at a time. */
const PIECE_BYTES = 8 * 2 ** 20;

/** Hands out memory that the caller gives back when its work is done. */
export type Allocate = (byteLength: number) => CpuMemory;

/** Address of a tensor's first element in WebAssembly memory; undefined for one that lies elsewhere (a weight). */
export function wasmAddress(tensor: Tensor): number | undefined {
  const { wasmOffset } = tensor.memory as CpuMemory;
  return wasmOffset === undefined ? undefined : wasmOffset + tensor.offset * dtypeBytes(tensor.dtype);
}

/** Elements from a tensor's first one to its last one. */
export function extentOf(tensor: Tensor): number {
  return tensor.shape.reduce((last, size, dim) => last + (size - 1) * tensor.strides[dim], 1);
}

/** Copies `count` elements of `tensor`'s memory from its element `first` on into WebAssembly memory at `to`. */
export function copyRange(
  tensor: Tensor,
  first: number,
  count: number,
  to: number,
  memory: WebAssembly.Memory,
): void {
  const size = dtypeBytes(tensor.dtype);
  const { buffer, byteOffset } = tensor.memory as CpuMemory;
  const source = new Uint8Array(buffer, byteOffset + (tensor.offset + first) * size, count * size);
  new Uint8Array(memory.buffer, to, count * size).set(source);
}

/** Conversions between f32 and bf16 on all cores, and copies of what WebAssembly cannot reach. */
export class Converter {
  readonly #widen: Kernel;
  readonly #store: Kernel;

  constructor(private readonly device: CpuDevice, private readonly runner: WasmRunner) {
    const { widen, store } = runner.module("convert.wat", CONVERT_WAT);
    this.#widen = widen;
    this.#store = store;
  }

  /**
   * `tensor` as f32 in WebAssembly memory, with the same shape (f32 and bf16 only): itself, or a copy. A copy has the
   * same strides, and so copies what lies between the elements too; only where the elements are dense rows with gaps
   * between them (a band of a picture, a head's columns) it leaves the gaps out.
   */
  float32(tensor: Tensor, allocate: Allocate): Tensor {
    const address = wasmAddress(tensor);
    if (tensor.dtype === "f32" && address !== undefined) return tensor;
    const rows = address === undefined ? undefined : rowsWithGaps(tensor);
    if (rows !== undefined) {
      const memory = allocate(tensor.size * 4);
      this.#widenRows(address!, memory.byteOffset, rows.count, rows.length, rows.stride);
      return new Tensor(memory, "f32", tensor.shape, rows.denseStrides);
    }
    const extent = extentOf(tensor);
    const memory = allocate(extent * 4);
    const to = memory.byteOffset;
    if (tensor.dtype === "f32") {
      copyRange(tensor, 0, extent, to, this.device.wasmMemory);
    } else if (address !== undefined) {
      this.#widenAll(address, to, extent);
    } else {
      const piece = Math.min(extent, PIECE_BYTES / 2);
      const raw = this.device.reserve(piece * 2);
      try {
        for (let done = 0; done < extent; done += piece) {
          const count = Math.min(piece, extent - done);
          copyRange(tensor, done, count, raw.byteOffset, this.device.wasmMemory);
          this.#widenAll(raw.byteOffset, to + done * 4, count);
        }
      } finally {
        this.device.free(raw);
      }
    }
    return new Tensor(memory, "f32", tensor.shape, tensor.strides);
  }

  /** Stores the dense f32 `[rows, cols]` at `from` into `out`, whose strides for them are given in elements. */
  store(from: number, rows: number, cols: number, out: Tensor, rowStride: number, colStride: number): void {
    const to = wasmAddress(out);
    if (to === undefined) throw new FfiError(`cpu: ${out} lies in memory that cannot be written`);
    const size = dtypeBytes(out.dtype);
    if (rows === 1 && colStride === 1 && cols > SHARE) {
      // One long row: as many shorter ones, so that all threads take part, and what is left.
      const whole = Math.floor(cols / SHARE);
      this.store(from, whole, SHARE, out, SHARE, 1);
      const rest = cols - whole * SHARE;
      const last = new Tensor(out.memory, out.dtype, [rest], [1], out.offset + whole * SHARE);
      if (rest > 0) this.store(from + whole * SHARE * 4, 1, rest, last, rest, 1);
      return;
    }
    const perJob = Math.max(1, Math.floor(SHARE / cols));
    this.runner.run(
      this.#store,
      Math.ceil(rows / perJob),
      [from, to, rows, cols, rowStride * size, colStride * size, out.dtype === "bf16" ? 1 : 0, perJob],
    );
  }

  #widenAll(from: number, to: number, count: number): void {
    const whole = Math.floor(count / SHARE);
    const rest = count - whole * SHARE;
    if (whole > 0) this.#widenRows(from, to, whole, SHARE, SHARE);
    if (rest > 0) this.#widenRows(from + whole * SHARE * 2, to + whole * SHARE * 4, 1, rest, rest);
  }

  #widenRows(from: number, to: number, rows: number, cols: number, stride: number): void {
    const perJob = Math.max(1, Math.floor(SHARE / cols));
    this.runner.run(this.#widen, Math.ceil(rows / perJob), [from, to, rows, cols, stride * 2, perJob]);
  }
}

/** Equally long dense rows of elements, equally far apart. */
interface Rows {
  readonly count: number;
  readonly length: number;
  readonly stride: number;
  /** The tensor's strides once there are no gaps between the rows. */
  readonly denseStrides: readonly number[];
}

/** A tensor's memory as rows, in whatever order its dimensions lie; undefined where it has no gaps or is no such. */
function rowsWithGaps({ shape, strides }: Tensor): Rows | undefined {
  const order = shape.map((_, dim) => dim).filter((dim) => shape[dim] > 1).sort((a, b) =>
    strides[a] - strides[b]
  );
  const denseStrides = [...strides];
  let [length, count, stride] = [1, 1, 0];
  for (const dim of order) {
    denseStrides[dim] = length * count;
    if (count === 1 && strides[dim] === length) length *= shape[dim];
    else if (count === 1) [count, stride] = [shape[dim], strides[dim]];
    else if (strides[dim] === stride * count) count *= shape[dim];
    else return undefined;
  }
  return count > 1 && stride > length ? { count, length, stride, denseStrides } : undefined;
}
