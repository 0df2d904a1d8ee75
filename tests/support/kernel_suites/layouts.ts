/** Tensors that lie in many ways, and how results are compared with what they should be, bit by bit where that is so. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { type DType, dtypeBytes } from "../../../ffi/dtype.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { elementCount, Tensor } from "../../../ffi/tensor.ts";
import { bfloat16ToFloat32, float32ToBfloat16 } from "../../../ffi/bfloat16.ts";
import { float8ToFloat32 } from "../../../ffi/float8.ts";
import { noise } from "../providers.ts";

export type Float = "f32" | "bf16" | "f16";

/** How a tensor of a test lies in memory. */
export interface Layout {
  /** Order of the dimensions from the outermost to the innermost; row-major when left out. */
  readonly order?: readonly number[];
  /** Elements in front of the first one. */
  readonly start?: number;
  /** Elements left unused behind each run of the innermost dimension. */
  readonly gap?: number;
}

/** A tensor on the GPU, and its elements in row-major order on the host. */
export interface Sample {
  readonly tensor: Tensor;
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly values: Float32Array;
}

/** Floats of a dtype that kernels compute in, as they are stored. */
export function encode(values: Float32Array, dtype: Float): Uint8Array<ArrayBuffer> {
  if (dtype === "f32") return new Uint8Array(values.slice().buffer);
  if (dtype === "f16") return new Uint8Array(Float16Array.from(values).buffer);
  const bits = new Uint16Array(values.length);
  float32ToBfloat16(values, bits);
  return new Uint8Array(bits.buffer);
}

export function decode(bytes: Uint8Array<ArrayBuffer>, dtype: DType): Float32Array {
  const values = new Float32Array(bytes.length / dtypeBytes(dtype));
  switch (dtype) {
    case "f32":
      return new Float32Array(bytes.slice().buffer);
    case "f16":
      return Float32Array.from(new Float16Array(bytes.slice().buffer));
    case "bf16":
      bfloat16ToFloat32(new Uint16Array(bytes.slice().buffer), values);
      return values;
    case "f8e4m3":
    case "f8e5m2":
      float8ToFloat32(bytes, values, dtype);
      return values;
    case "i32":
      return Float32Array.from(new Int32Array(bytes.slice().buffer));
    default:
      return Float32Array.from(bytes);
  }
}

/** Row-major elements in `layout`. */
export function placed(
  device: GpuDevice,
  bytes: Uint8Array<ArrayBuffer>,
  shape: readonly number[],
  dtype: DType,
  layout: Layout = {},
): Sample {
  const { order = shape.map((_, dim) => dim), start = 0, gap = 0 } = layout;
  const strides = new Array<number>(shape.length).fill(1);
  let step = 1;
  for (const [i, dim] of order.toReversed().entries()) {
    strides[dim] = step;
    step = step * shape[dim] + (i === 0 ? gap : 0);
  }
  const size = dtypeBytes(dtype);
  const memory = new Uint8Array((start + step) * size).fill(0xff);
  forEachPlace(
    shape,
    strides,
    (i, at) => memory.set(bytes.subarray(i * size, (i + 1) * size), (start + at) * size),
  );
  const whole = Tensor.fromBytes(device, memory, [start + step], dtype);
  return {
    tensor: new Tensor(whole.memory, dtype, shape, strides, start),
    bytes,
    values: decode(bytes, dtype),
  };
}

export function forEachPlace(
  shape: readonly number[],
  strides: readonly number[],
  visit: (i: number, at: number) => void,
) {
  let i = 0;
  const walk = (dim: number, at: number): void => {
    if (dim === shape.length) return visit(i++, at);
    for (let j = 0; j < shape[dim]; j++) walk(dim + 1, at + j * strides[dim]);
  };
  walk(0, 0);
}

/** What breaks arithmetic first. */
export const ODD_VALUES = [
  NaN,
  Infinity,
  -Infinity,
  0,
  -0,
  1e-40,
  -3e-39,
  3.3e38,
  -3.3e38,
  1e20,
  -1e20,
  2 ** -24,
  65519,
  88,
  -88,
];

/** Pseudo-random floats of moderate size, and some odd ones among them where `wild`. */
export function floats(
  device: GpuDevice,
  shape: readonly number[],
  dtype: Float,
  seed: number,
  { wild = false, ...layout }: Layout & { wild?: boolean } = {},
): Sample {
  const [value, choice] = [noise(seed), noise(seed + 1000)];
  const values = Float32Array.from({ length: elementCount(shape) }, (_, i) => {
    const pick = Math.floor((choice(i) + 1) * 64);
    return wild && pick < ODD_VALUES.length ? ODD_VALUES[pick] : value(i) * 6;
  });
  return placed(device, encode(values, dtype), shape, dtype, layout);
}

/** Pseudo-random bytes. */
export function bits(
  device: GpuDevice,
  shape: readonly number[],
  dtype: DType,
  seed: number,
  layout?: Layout,
): Sample {
  const byte = noise(seed);
  const bytes = new Uint8Array(elementCount(shape) * dtypeBytes(dtype)).map((_, i) => (byte(i) + 1) * 128);
  return placed(device, bytes, shape, dtype, layout);
}

/** A result on the GPU, and what has to hold for its bytes. */
export interface Result {
  readonly actual: Tensor;
  readonly check: (bytes: Uint8Array<ArrayBuffer>) => void;
}

/** Relative spacing of a dtype's values, halved, and the smallest absolute one. */
export const ROUNDING = {
  f32: [2 ** -24, 2 ** -150],
  bf16: [2 ** -8, 2 ** -134],
  f16: [2 ** -11, 2 ** -25],
} as const;

/**
 * Each element is the reference rounded to the dtype. With `slack` it may also be as close to the reference as that
 * rounding and an error of `slack(i)` before it allow.
 */
export function rounded(
  actual: Tensor,
  dtype: Float,
  shape: readonly number[],
  reference: Float32Array,
  slack?: (i: number) => number,
): Result {
  assert.equal(actual.dtype, dtype);
  assert.deepEqual(actual.shape, shape);
  const want = decode(encode(reference, dtype), dtype);
  const [relative, absolute] = ROUNDING[dtype];
  const check = (bytes: Uint8Array<ArrayBuffer>) => {
    const got = decode(bytes, dtype);
    for (let i = 0; i < want.length; i++) {
      if (Object.is(got[i], want[i])) continue;
      assert.ok(slack !== undefined, `element ${i} is ${got[i]}, not ${want[i]}`);
      const error = Math.abs(got[i] - reference[i]);
      const allowed = Math.max(relative * Math.abs(got[i]), absolute) + slack(i);
      const message = `element ${i} is ${got[i]}, not ${reference[i]}: error ${error}, allowed ${allowed}`;
      assert.ok(Number.isFinite(error) && error <= allowed, message);
    }
  };
  return { actual, check };
}

/** A slack of some f32 roundings of terms whose absolute values add up to `magnitude`, subnormal ones too. */
export const roundings = (magnitude: Float32Array) => (i: number) => magnitude[i] * 2 ** -22 + 2 ** -147;

/** The bytes are equal. */
export function same(actual: Tensor, dtype: DType, shape: readonly number[], expected: Uint8Array): Result {
  assert.equal(actual.dtype, dtype);
  assert.deepEqual(actual.shape, shape);
  const check = (bytes: Uint8Array<ArrayBuffer>) => {
    assert.equal(bytes.length, expected.length);
    // deepEqual would print both, and takes gigabytes for that.
    const wrong = bytes.findIndex((byte, i) => byte !== expected[i]);
    assert.equal(wrong, -1, `byte ${wrong} is ${bytes[wrong]}, not ${expected[wrong]}`);
  };
  return { actual, check };
}

/** Row-major bytes of a view of a tensor that was uploaded from `dense` bytes. */
export function viewBytes(dense: Uint8Array<ArrayBuffer>, view: Tensor): Uint8Array<ArrayBuffer> {
  const size = dtypeBytes(view.dtype);
  const bytes = new Uint8Array(view.byteLength);
  forEachPlace(view.shape, view.strides, (i, at) => {
    const from = (view.offset + at) * size;
    bytes.set(dense.subarray(from, from + size), i * size);
  });
  return bytes;
}

/** Runs `body`, looks at its results and gives all memory back. */
export async function check(device: GpuDevice, body: () => Result[]): Promise<void> {
  const before = device.memoryUse().current;
  const results = device.scope(body);
  try {
    for (const { actual, check } of results) check(await device.download(actual));
  } finally {
    for (const memory of new Set(results.map(({ actual }) => actual.memory))) device.free(memory);
  }
  assert.equal(device.memoryUse().current, before, "memory was not given back");
}

/** As {@link check}, for drawn arguments. */
export async function property<A extends unknown[]>(
  device: GpuDevice,
  arbitraries: { [K in keyof A]: fc.Arbitrary<A[K]> },
  body: (...drawn: A) => Result[],
  numRuns = 40,
): Promise<void> {
  const all = fc.tuple(...arbitraries) as fc.Arbitrary<A>;
  await fc.assert(fc.asyncProperty(all, (drawn) => check(device, () => body(...drawn))), { numRuns });
}

export const floatTypes = fc.constantFrom<Float>("f32", "bf16");
export const seeds = fc.nat(10000);
/** Sizes in which all elements move by vectors, and such in which none do. */
export const sizes = fc.oneof(
  fc.integer({ min: 1, max: 300 }).map((n) => 8 * n),
  fc.integer({ min: 1, max: 3000 }),
);
/** First elements on and off a vector's boundary. */
export const starts = fc.constantFrom(0, 8, 1);
/** Shapes of pictures, `[batch, channels, height, width]`. */
export const pictures = fc.tuple(
  fc.integer({ min: 1, max: 2 }),
  fc.constantFrom(1, 3, 8, 40),
  fc.integer({ min: 1, max: 9 }),
  fc.integer({ min: 1, max: 70 }),
);
export const range = (length: number) => Array.from({ length }, (_, i) => i);
