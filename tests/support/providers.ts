import { load } from "../../ffi/cpu/assembler.ts";
import { CpuDevice, type CpuMemory } from "../../ffi/cpu/device.ts";
import { OneDnn } from "../../ffi/cpu/onednn.ts";
import { openCpu } from "../../ffi/cpu/open.ts";
import { SCRATCH_BYTES, WasmRunner } from "../../ffi/cpu/runner.ts";
import { WasmProvider } from "../../ffi/cpu/wasm.ts";
import { dtypeBytes } from "../../ffi/dtype.ts";
import { FfiError } from "../../ffi/errors.ts";
import { float32ToFloat8, float8ToFloat32 } from "../../ffi/float8.ts";
import { Tensor } from "../../ffi/tensor.ts";

/** Why oneDNN cannot be tested here, or undefined where it can. */
export function missingOneDnn(): string | undefined {
  try {
    new OneDnn(1)[Symbol.dispose]();
    return undefined;
  } catch (error) {
    if (error instanceof FfiError) return error.message;
    throw error;
  }
}

/** Ways to compute on the CPU, each with how to open it. */
export const PROVIDERS: readonly {
  name: string;
  skip: string | undefined;
  open: () => Promise<CpuDevice>;
}[] = [
  { name: "oneDNN", skip: missingOneDnn(), open: () => openCpu({ provider: "onednn" }) },
  { name: "WebAssembly, 1 thread", skip: undefined, open: () => openCpu({ provider: "wasm", threads: 1 }) },
  { name: "WebAssembly, 3 threads", skip: undefined, open: openWarm },
  { name: "WebAssembly without relaxed SIMD", skip: undefined, open: openPlainSimd },
];

/** Defines a test `<op>, <provider>: <title>` for a provider; skipped, with a word, where it is not installed. */
export type DefineTest = (title: string, body: (device: CpuDevice) => void) => void;

/** Calls `define` for every provider, with how to define a test of `op` on it. */
export function forEachProvider(op: string, define: (test: DefineTest) => void): void {
  for (const { name, skip, open } of PROVIDERS) {
    define((title, body) =>
      Deno.test({
        name: `${op}, ${name}: ${title}${skip === undefined ? "" : ` (skipped: ${skip})`}`,
        ignore: skip !== undefined,
        fn: async () => {
          using device = await open();
          body(device);
        },
      })
    );
  }
}

async function openWarm(): Promise<CpuDevice> {
  const device = await openCpu({ provider: "wasm", threads: 3 });
  await device.runner?.warm();
  return device;
}

async function openPlainSimd(): Promise<CpuDevice> {
  const assembler = await load(false);
  return new CpuDevice(
    (device) => new WasmProvider(device, device.runner!),
    (device) => {
      const scratch = device.reserve(SCRATCH_BYTES).byteOffset;
      return new WasmRunner(device.wasmMemory, assembler, { threads: 1, scratch });
    },
  );
}

/** How a tensor of a test lies in memory. */
export interface Placement {
  /** Order of the dimensions from the outermost to the innermost, e.g. `[0, 2, 3, 1]` for NHWC. */
  readonly order: readonly number[];
  /** Elements left unused at the end of each run of the innermost dimension, and in front of the first one. */
  readonly gap: number;
  /** In device memory, or placed outside of it at an odd address, as a mapped weight may be. */
  readonly where: "device" | "placed";
}

/** A tensor with its values as f64, exactly as they are stored. */
export interface Sample {
  readonly tensor: Tensor;
  /** Row-major values. */
  readonly values: Float64Array;
}

/** A tensor of the given form, with `value(i)` rounded to `dtype` as its row-major element i; gaps are NaN. */
export function sample(
  device: CpuDevice,
  shape: readonly number[],
  dtype: "f32" | "bf16" | "f8e4m3",
  placement: Placement,
  value: (i: number) => number,
): Sample {
  const { order, gap, where } = placement;
  const strides = new Array<number>(shape.length);
  let step = 1;
  for (const [i, dim] of order.toReversed().entries()) {
    strides[dim] = step;
    step = step * shape[dim] + (i === 0 ? gap : 0);
  }
  const length = gap + step;
  const size = dtypeBytes(dtype);
  const lead = where === "placed" ? 1 : 0; // an odd address
  const bytes = new Uint8Array(lead + length * size).fill(0xff);
  const view = new DataView(bytes.buffer, lead);
  const count = shape.reduce((product, dim) => product * dim, 1);
  const values = new Float64Array(count);
  forEachIndex(shape, strides, gap, (i, at) => {
    if (dtype === "f32") {
      values[i] = Math.fround(value(i));
      view.setFloat32(at * 4, values[i], true);
    } else if (dtype === "f8e4m3") {
      const one = Float32Array.of(value(i));
      const code = new Uint8Array(1);
      float32ToFloat8(one, code);
      float8ToFloat32(code, one, dtype);
      values[i] = one[0];
      view.setUint8(at, code[0]);
    } else {
      values[i] = roundToBfloat16(value(i));
      view.setUint16(at * 2, bits(values[i]) >>> 16, true);
    }
  });
  const contents = bytes.subarray(lead);
  const memory = where === "placed" ? device.place(contents) : device.alloc(contents.byteLength);
  if (where === "device") device.upload(contents, memory);
  return { tensor: new Tensor(memory, dtype, shape, strides, gap), values };
}

/** A poisoned result tensor: every byte is 0xff, so that every element is NaN. */
export function poisoned(
  device: CpuDevice,
  shape: readonly number[],
  dtype: "f32" | "bf16",
  placement: Placement,
): Tensor {
  return sample(device, shape, dtype, { ...placement, where: "device" }, () => NaN).tensor;
}

/** A result's values in row-major order. Throws when something outside of its elements was written. */
export function readBack(tensor: Tensor): Float64Array {
  const { buffer, byteOffset, byteLength } = tensor.memory as CpuMemory;
  const view = new DataView(buffer, byteOffset, byteLength);
  const values = new Float64Array(tensor.size);
  const size = dtypeBytes(tensor.dtype);
  const written = new Uint8Array(byteLength / size);
  forEachIndex(tensor.shape, tensor.strides, tensor.offset, (i, at) => {
    written[at] = 1;
    values[i] = tensor.dtype === "f32"
      ? view.getFloat32(at * 4, true)
      : fromBits(view.getUint16(at * 2, true) << 16);
  });
  for (const [at, hit] of written.entries()) {
    if (hit) continue;
    for (let byte = 0; byte < size; byte++) {
      if (view.getUint8(at * size + byte) !== 0xff) {
        throw new Error(`element ${at} beside ${tensor} was written`);
      }
    }
  }
  return values;
}

/**
 * Fails unless each value is within what rounding explains: `magnitude[i]` is the sum of the absolute values of the
 * terms of result i. A NaN fails.
 */
export function assertAccurate(
  actual: Float64Array,
  expected: Float64Array,
  magnitude: Float64Array,
  dtype: "f32" | "bf16",
): void {
  for (let i = 0; i < expected.length; i++) {
    const tolerance = 2e-6 * magnitude[i] + (dtype === "bf16" ? 2 ** -8 * Math.abs(expected[i]) : 0) + 1e-30;
    const error = Math.abs(actual[i] - expected[i]);
    if (!(error <= tolerance)) {
      throw new Error(
        `element ${i} is ${actual[i]}, not ${expected[i]}: error ${error}, allowed ${tolerance}`,
      );
    }
  }
}

/** GELU in its tanh form, in double precision. */
export function geluTanh(x: number): number {
  return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
}

/** Fixed pseudo-random values in [-1, 1). */
export function noise(seed: number): (i: number) => number {
  return (i) => {
    let h = Math.imul(i + 1, 0x9e3779b1) ^ Math.imul(seed + 1, 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 15), 0x2c1b3c6d);
    h = Math.imul(h ^ (h >>> 12), 0x297a2d39);
    return ((h ^ (h >>> 15)) >>> 0) / 2 ** 31 - 1;
  };
}

function forEachIndex(
  shape: readonly number[],
  strides: readonly number[],
  offset: number,
  visit: (index: number, at: number) => void,
): void {
  let index = 0;
  const walk = (dim: number, at: number): void => {
    if (dim === shape.length) return visit(index++, at);
    for (let i = 0; i < shape[dim]; i++) walk(dim + 1, at + i * strides[dim]);
  };
  walk(0, offset);
}

const word = new DataView(new ArrayBuffer(4));

function bits(value: number): number {
  word.setFloat32(0, value);
  return word.getUint32(0);
}

function fromBits(value: number): number {
  word.setInt32(0, value);
  return word.getFloat32(0);
}

function roundToBfloat16(value: number): number {
  if (Number.isNaN(value)) return value;
  const raw = bits(value);
  return fromBits((raw + 0x7fff + ((raw >>> 16) & 1)) & 0xffff0000);
}
