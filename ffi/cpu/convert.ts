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
   * `tensor` as f32 in WebAssembly memory, with the same shape and strides: itself, or a copy (f32 and bf16 only;
   * what lies between its elements is copied too).
   */
  float32(tensor: Tensor, allocate: Allocate): Tensor {
    const address = wasmAddress(tensor);
    if (tensor.dtype === "f32" && address !== undefined) return tensor;
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
    this.runner.run(this.#widen, Math.ceil(count / SHARE), [from, to, count, SHARE]);
  }
}
