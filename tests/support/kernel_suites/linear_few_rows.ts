/** Linear layers of a few rows by float8 weights, on a GPU against their TypeScript reference. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../../ffi/errors.ts";
import { float32ToFloat8, float8ToFloat32 } from "../../../ffi/float8.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import type { Float8Matrix } from "../../../kernels/float8_tensor.ts";
import { linearFloat8Weight } from "../../../kernels/linear_float8_weight.ts";
import { FEW_ROWS, linearFewRows, linearFewRowsReference } from "../../../kernels/linear_few_rows.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import { check, columns, dtypes, NONE, property, sample, starts } from "./samples.ts";
import { watchLaunches } from "../watch_launches.ts";

/** What a sum in f32 may lose, as a part of the sum of its terms' absolute values. */
const F32_SUMS = 2e-6;

/** A weight of `value(i)`, rounded to E4M3 behind `start` unused bytes, and its numbers for the reference. */
function float8Weight(
  device: GpuDevice,
  [features, k]: readonly [number, number],
  rowwise: boolean,
  value: (i: number) => number,
  start: number,
) {
  const codes = new Uint8Array(start + features * k);
  float32ToFloat8(Float32Array.from(codes, (_, i) => i < start ? NaN : value(i - start)), codes);
  const values = Tensor.fromBytes(device, codes, [codes.length], "f8e4m3").narrow(0, start, features * k);
  const scales = sample(device, [rowwise ? features : 1], "f32", (i) => 0.01 * (1.5 + noise(7)(i)));
  const matrix: Float8Matrix = { values: values.reshape([features, k]), scales: scales.tensor, rowwise };
  return { matrix, codes: codes.subarray(start), scales: scales.values };
}

/** Sums of the absolute values of each result's terms. */
function magnitudes(x: Float32Array, codes: Uint8Array, scales: Float32Array, bias: Float32Array, k: number) {
  const sizes = new Float32Array((x.length / k) * (codes.length / k));
  // The sign is a code's first bit.
  linearFewRowsReference(
    sizes,
    x.map(Math.abs),
    codes.map((code) => code & 0x7f),
    scales,
    bias.map(Math.abs),
    k,
  );
  return sizes;
}

export function linearFewRowsSuite(): void {
  forEachGpu("linearFewRows", (test) => {
    test("equals its reference: rows, odd sizes and addresses, dtypes, scales, views", async (device) => {
      const drawn = fc.record({
        lead: fc.oneof(fc.integer({ min: 1, max: 2 * FEW_ROWS }).map((rows) => [rows]), fc.constant([2, 3])),
        features: fc.integer({ min: 1, max: 70 }),
        k: fc.constantFrom(1, 7, 16, 48, 256, 528, 777, 1040),
        dtype: dtypes,
        rowwise: fc.boolean(),
        bias: fc.boolean(),
        weightStart: starts,
        place: fc.constantFrom("dense", "odd", "columns", "aligned columns"),
        seed: fc.nat(1000),
      });
      await property(device, drawn, 60, (one) => {
        const { lead, features, k, dtype, rowwise, bias, weightStart, place, seed } = one;
        const margin = { dense: 0, odd: 0, columns: 3, "aligned columns": 16 }[place];
        const x = margin > 0
          ? columns(device, [...lead, k], dtype, noise(seed), margin)
          : sample(device, [...lead, k], dtype, noise(seed), place === "odd" ? 1 : 0);
        // Numbers of every size that E4M3 has.
        const value = (i: number) => 448 * noise(seed + 1)(i) * 2 ** (8 * noise(seed + 2)(i) - 8);
        const { matrix, codes, scales } = float8Weight(device, [features, k], rowwise, value, weightStart);
        const shift = bias ? sample(device, [features], dtype, noise(seed + 3)) : undefined;
        const expected = new Float32Array((x.values.length / k) * features);
        linearFewRowsReference(expected, x.values, codes, scales, shift?.values ?? NONE, k);
        const sizes = magnitudes(x.values, codes, scales, shift?.values ?? NONE, k);
        const actual = linearFewRows(x.tensor, matrix, shift?.tensor);
        return [{ actual, dtype, shape: [...lead, features], expected, slack: (i) => F32_SUMS * sizes[i] }];
      });
    });

    test("takes all codes of E4M3 for what they are", (device) =>
      check(device, () => {
        const [features, k] = [256, 16];
        const codes = Uint8Array.from(
          { length: features * k },
          (_, i) => i % k === 3 ? Math.floor(i / k) : 0,
        );
        const x = sample(device, [1, k], "f32", () => 1);
        const values = Tensor.fromBytes(device, codes, [features, k], "f8e4m3");
        const scales = sample(device, [1], "f32", () => 1).tensor;
        const expected = new Float32Array(256);
        float8ToFloat32(Uint8Array.from(expected, (_, i) => i), expected, "f8e4m3");
        const actual = linearFewRows(x.tensor, { values, scales, rowwise: false });
        // A sum that begins with zero is never -0.
        const zero = expected.map((value) => value + 0);
        return [{ actual, dtype: "f32", shape: [1, features], expected: zero, slack: () => 0 }];
      }));

    test("a NaN of the weight spoils its feature only, one of x its row only", (device) =>
      check(device, () => {
        const [rows, features, k] = [3, 9, 32];
        const x = sample(device, [rows, k], "bf16", (i) => i === 40 ? NaN : noise(1)(i));
        const { matrix, codes, scales } = float8Weight(
          device,
          [features, k],
          true,
          (i) => i === 70 ? NaN : noise(2)(i),
          0,
        );
        const expected = new Float32Array(rows * features);
        linearFewRowsReference(expected, x.values, codes, scales, NONE, k);
        assert.equal(expected.filter(Number.isNaN).length, rows + features - 1);
        const sizes = magnitudes(x.values, codes, scales, NONE, k);
        const actual = linearFewRows(x.tensor, matrix);
        return [{
          actual,
          dtype: "bf16",
          shape: [rows, features],
          expected,
          slack: (i) => F32_SUMS * sizes[i],
        }];
      }));

    test("linearFloat8Weight is that for a few rows, and a product of the wide weight for more", (device) =>
      device.scope(() => {
        const { matrix } = float8Weight(device, [32, 64], true, noise(1), 0);
        const launched: string[] = [];
        using _ = watchLaunches(device, ({ name }) => launched.push(name.split(":").at(-1)!));
        for (const rows of [FEW_ROWS, FEW_ROWS + 1]) {
          linearFloat8Weight(sample(device, [rows, 64], "bf16", noise(2)).tensor, matrix);
        }
        linearFloat8Weight(sample(device, [1, 64], "bf16", noise(2)).tensor, matrix, undefined, "geluTanh");
        assert.deepEqual(launched, ["linearFewRows", "dequantize", "dequantize"]);
      }));

    test("refuses what does not fit together", (device) =>
      device.scope(() => {
        const { matrix } = float8Weight(device, [16, 32], true, noise(1), 0);
        const of = (shape: number[]) => sample(device, shape, "bf16", noise(1)).tensor;
        assert.throws(() => linearFewRows(of([3, 16]), matrix), ShapeError);
        assert.throws(() => linearFewRows(of([3, 32]), matrix, of([32])), ShapeError);
        assert.throws(() => linearFewRows(Tensor.empty(device, [3, 32], "f16"), matrix), ShapeError);
      }));
  });
}
