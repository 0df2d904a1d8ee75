/** Tensors on a GPU with known values, and how results are compared with what they should be. */
import assert from "node:assert/strict";
import fc from "fast-check";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { elementCount, Tensor } from "../../../ffi/tensor.ts";
import { bfloat16ToFloat32, float32ToBfloat16 } from "../../../ffi/bfloat16.ts";
import { valuesOf } from "../golden.ts";
import { noise } from "../providers.ts";

export type Float = "f32" | "bf16";

/** A tensor on the GPU, and its values in row-major order as they are stored. */
export interface Sample {
  readonly tensor: Tensor;
  readonly values: Float32Array;
}

export const NONE = new Float32Array(0);

/** A dense tensor of `value(i)`, behind `start` unused elements. */
export function sample(
  device: GpuDevice,
  shape: readonly number[],
  dtype: Float,
  value: (i: number) => number,
  start = 0,
): Sample {
  const size = elementCount(shape);
  const values = new Float32Array(start + size).map((_, i) => i < start ? NaN : value(i - start));
  let bytes = new Uint8Array(values.buffer);
  if (dtype === "bf16") {
    const bits = new Uint16Array(values.length);
    float32ToBfloat16(values, bits);
    bfloat16ToFloat32(bits, values);
    bytes = new Uint8Array(bits.buffer);
  }
  const whole = Tensor.fromBytes(device, bytes, [values.length], dtype);
  return { tensor: whole.narrow(0, start, size).reshape(shape), values: values.subarray(start) };
}

/** A view of the elements from `start` on of the last dimension of a wider tensor. */
export function columns(
  device: GpuDevice,
  shape: readonly number[],
  dtype: Float,
  value: (i: number) => number,
  start: number,
): Sample {
  const width = shape.at(-1)!;
  const whole = width + 2 * start;
  const wide = sample(device, shape.with(-1, whole), dtype, (i) => {
    const column = i % whole - start;
    return column < 0 || column >= width ? NaN : value(Math.floor(i / whole) * width + column);
  });
  const kept = wide.values.filter((_, i) => i % whole >= start && i % whole < start + width);
  return { tensor: wide.tensor.narrow(-1, start, width), values: kept };
}

/** Columns of a wider tensor of NaNs, which a kernel fills without touching what is beside them. */
export interface Frame {
  readonly whole: Tensor;
  readonly inside: Tensor;
  /** What the whole is when the columns have these values. */
  readonly filled: (values: Float32Array) => Float32Array;
}

/** A {@link Frame} around a tensor of `shape`, `margin` elements wide on both sides. */
export function frame(device: GpuDevice, shape: readonly number[], dtype: Float, margin: number): Frame {
  const width = shape.at(-1)!;
  const wide = width + 2 * margin;
  const { tensor: whole, values: nans } = sample(device, shape.with(-1, wide), dtype, () => NaN);
  const filled = (values: Float32Array) =>
    nans.map((nan, i) => {
      const column = i % wide - margin;
      return column < 0 || column >= width ? nan : values[Math.floor(i / wide) * width + column];
    });
  return { whole, inside: whole.narrow(-1, margin, width), filled };
}

/**
 * A result on the GPU, and what it should be: row-major, and how far from that it may be before it is rounded. What
 * follows from another result is computed from the one before it, as the GPU had it.
 */
export interface Result {
  readonly actual: Tensor;
  readonly dtype: Float;
  readonly shape: readonly number[];
  readonly expected: Float32Array | ((before: Float32Array) => Float32Array);
  readonly slack: (i: number) => number;
}

/** Runs `body`, compares its results, of which NaNs are where the reference has them, and gives all memory back. */
export async function check(device: GpuDevice, body: () => Result[]): Promise<void> {
  const used = device.memoryUse().current;
  const results = device.scope(body);
  try {
    let before: Float32Array = NONE;
    for (const { actual, dtype, shape, expected: reference, slack } of results) {
      assert.equal(actual.dtype, dtype);
      assert.deepEqual(actual.shape, shape);
      const got = await valuesOf(actual);
      const expected = typeof reference === "function" ? reference(before) : reference;
      before = got;
      for (let i = 0; i < expected.length; i++) {
        if (Object.is(got[i], expected[i])) continue;
        const error = Math.abs(got[i] - expected[i]);
        const allowed = slack(i) + (dtype === "bf16" ? 2 ** -8 : 2 ** -22) * Math.abs(expected[i]);
        const message = `element ${i} is ${got[i]}, not ${expected[i]}: error ${error}, allowed ${allowed}`;
        assert.ok(error <= allowed, message);
      }
    }
  } finally {
    for (const memory of new Set(results.map(({ actual }) => actual.memory))) device.free(memory);
  }
  assert.equal(device.memoryUse().current, used, "memory was not given back");
}

/** As {@link check}, for drawn arguments. */
export async function property<A>(
  device: GpuDevice,
  arbitrary: fc.Arbitrary<A>,
  numRuns: number,
  body: (drawn: A) => Result[],
): Promise<void> {
  await fc.assert(fc.asyncProperty(arbitrary, (drawn) => check(device, () => body(drawn))), { numRuns });
}

export const dtypes = fc.constantFrom<Float>("f32", "bf16");
export const seeds = fc.nat(1000);
/** Elements in front of a tensor: none, and such that vectors cannot move at once. */
export const starts = fc.constantFrom(0, 0, 1);
/** FLUX's activations have means far from zero. */
export const means = fc.constantFrom(0, 0, 40, -300);

/**
 * Rows of few and of many threads, whole vectors and single elements: short ones share a warp, FLUX's, CLIP's and T5's
 * sizes, and one that no vector divides.
 */
export const hiddens = fc.constantFrom(1, 7, 24, 128, 768, 777, 3072, 4099);

/**
 * What f32 arithmetic may lose of a normed value: about two units in the last place of the mean, since the values that
 * the tests draw have a variance above 1.
 */
export const lostBy = (mean: number) => 3e-6 + Math.abs(mean) * 2 ** -22;
export const around = (mean: number, seed: number) => (i: number) => mean + 8 * noise(seed)(i);

export const EPS = 1e-3;

/**
 * How often a library rounds a product to bfloat16, at most: cuBLASLt's kernels for odd sizes do so before they add a
 * bias or apply GELU, too, and behind a convolution the bias may come in a kernel of its own.
 */
export function roundings({ name, limits }: GpuDevice): number {
  return name.includes("emulated") && limits.convAddsBias !== false ? 1 : 2;
}
