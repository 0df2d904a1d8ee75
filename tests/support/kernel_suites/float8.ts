/** Matrix products with an activation or of float8 on a GPU, and what makes float8 of activations and weights. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../../ffi/errors.ts";
import { float32ToFloat8, float8ToFloat32 } from "../../../ffi/float8.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { geluTanh, noise } from "../providers.ts";
import { check, type Float, property, sample } from "./norms.ts";

/**
 * What a sum may lose, as a part of the sum of its terms' absolute values: matrix units add float8 products with some 13
 * bits after the leading one.
 */
const F32_SUMS = 2e-6;
const FLOAT8_SUMS = 2 ** -10;

/** A dense tensor of `value(i)` rounded to E4M3, and its values as they are stored. */
function float8Sample(device: GpuDevice, shape: readonly [number, number], value: (i: number) => number) {
  const values = Float32Array.from({ length: shape[0] * shape[1] }, (_, i) => value(i));
  const codes = new Uint8Array(values.length);
  float32ToFloat8(values, codes);
  float8ToFloat32(codes, values, "f8e4m3");
  return { tensor: Tensor.fromBytes(device, codes, shape, "f8e4m3"), values };
}

interface Product {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly x: Float32Array;
  readonly w: Float32Array;
  readonly bias: Float32Array | undefined;
  readonly gelu: boolean;
  /** What the sum of row i and column j is multiplied by. */
  readonly scale: (i: number, j: number) => number;
}

/** `x @ w^T` in double precision, and the sums of its terms' absolute values. */
function productReference({ m, n, k, x, w, bias, gelu, scale }: Product) {
  const expected = new Float32Array(m * n);
  const magnitude = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      let sum = 0;
      let size = 0;
      for (let l = 0; l < k; l++) {
        const term = x[i * k + l] * w[j * k + l] * scale(i, j);
        sum += term;
        size += Math.abs(term);
      }
      sum += bias?.[j] ?? 0;
      magnitude[i * n + j] = size + Math.abs(bias?.[j] ?? 0);
      expected[i * n + j] = gelu ? geluTanh(sum) : sum;
    }
  }
  return { expected, magnitude };
}

const dtypes = fc.constantFrom<Float>("f32", "bf16");

function productSuite(): void {
  forEachGpu("matmul", (test) => {
    test("GELU follows alpha and bias, in a batch and alone", async (device) => {
      const drawn = fc.record({
        batch: fc.constantFrom(undefined, 2),
        m: fc.integer({ min: 1, max: 20 }),
        n: fc.integer({ min: 1, max: 20 }),
        k: fc.integer({ min: 1, max: 40 }),
        dtype: dtypes,
        bias: fc.boolean(),
        alpha: fc.constantFrom(1, -2),
        seed: fc.nat(1000),
      });
      await property(device, drawn, 40, ({ batch, m, n, k, dtype, bias, alpha, seed }) => {
        const lead = batch === undefined ? [] : [batch];
        const x = sample(device, [...lead, m, k], dtype, noise(seed));
        const w = sample(device, [...lead, n, k], dtype, noise(seed + 1));
        const shift = bias ? sample(device, [n], dtype, noise(seed + 2)) : undefined;
        const out = Tensor.empty(device, [...lead, m, n], dtype);
        device.matmul({
          a: x.tensor,
          b: w.tensor,
          bias: shift?.tensor,
          out,
          alpha,
          activation: "geluTanh",
        });
        const parts = Array.from({ length: batch ?? 1 }, (_, part) =>
          productReference({
            m,
            n,
            k,
            x: x.values.subarray(part * m * k),
            w: w.values.subarray(part * n * k),
            bias: shift?.values,
            gelu: true,
            scale: () => alpha,
          }));
        const expected = Float32Array.from(parts.flatMap((part) => [...part.expected]));
        const magnitude = parts.flatMap((part) => [...part.magnitude]);
        // A GPU's tanh is an approximation.
        const slack = (i: number) => (F32_SUMS + 2 ** -10) * magnitude[i];
        return [{ actual: out, dtype, shape: [...lead, m, n], expected, slack }];
      });
    });

    test("float8 with one scale or with one a row, bias and GELU", async (device) => {
      const drawn = fc.record({
        m: fc.integer({ min: 1, max: 40 }),
        n: fc.constantFrom(16, 48, 128),
        k: fc.constantFrom(16, 64, 256),
        rowwise: fc.boolean(),
        bias: fc.boolean(),
        activation: fc.constantFrom(undefined, "geluTanh" as const),
        seed: fc.nat(1000),
      });
      await property(device, drawn, 40, ({ m, n, k, rowwise, bias, activation, seed }) => {
        const x = float8Sample(device, [m, k], (i) => 8 * noise(seed)(i));
        const w = float8Sample(device, [n, k], (i) => 300 * noise(seed + 1)(i));
        const scales = (size: number, seed: number) =>
          sample(device, [rowwise ? size : 1], "f32", (i) => 0.01 * (1.5 + noise(seed)(i)));
        const [scaleA, scaleB] = [scales(m, seed + 2), scales(n, seed + 3)];
        const shift = bias ? sample(device, [n], "bf16", noise(seed + 4)) : undefined;
        const actual = Tensor.empty(device, [m, n], "bf16");
        device.matmul({
          a: x.tensor,
          b: w.tensor,
          bias: shift?.tensor,
          out: actual,
          activation,
          scaleA: scaleA.tensor,
          scaleB: scaleB.tensor,
        });
        const { expected, magnitude } = productReference({
          m,
          n,
          k,
          x: x.values,
          w: w.values,
          bias: shift?.values,
          gelu: activation !== undefined,
          scale: (i, j) => scaleA.values[rowwise ? i : 0] * scaleB.values[rowwise ? j : 0],
        });
        const slack = (i: number) => FLOAT8_SUMS * magnitude[i];
        return [{ actual, dtype: "bf16", shape: [m, n], expected, slack }];
      });
    });

    test("a NaN of float8 spoils its row of the result only", (device) =>
      check(device, () => {
        const x = float8Sample(device, [3, 32], (i) => i === 40 ? NaN : noise(1)(i));
        const w = float8Sample(device, [16, 32], noise(2));
        const one = sample(device, [1], "f32", () => 1).tensor;
        const actual = Tensor.empty(device, [3, 16], "bf16");
        device.matmul({ a: x.tensor, b: w.tensor, out: actual, scaleA: one, scaleB: one });
        const sizes = { m: 3, n: 16, k: 32, bias: undefined, gelu: false, scale: () => 1 };
        const { expected, magnitude } = productReference({ ...sizes, x: x.values, w: w.values });
        assert.equal(expected.filter(Number.isNaN).length, 16);
        const slack = (i: number) => FLOAT8_SUMS * magnitude[i];
        return [{ actual, dtype: "bf16", shape: [3, 16], expected, slack }];
      }));

    test("refuses float8 in sizes that matrix units do not read", (device) =>
      device.scope(() => {
        const one = sample(device, [1], "f32", () => 1).tensor;
        const plan = (n: number, k: number) => ({
          a: float8Sample(device, [3, k], noise(1)).tensor,
          b: float8Sample(device, [n, k], noise(2)).tensor,
          out: Tensor.empty(device, [3, n], "bf16"),
          scaleA: one,
          scaleB: one,
        });
        assert.throws(() => device.matmul(plan(24, 32)), ShapeError);
        assert.throws(() => device.matmul(plan(32, 24)), ShapeError);
        assert.throws(() => device.matmul({ ...plan(32, 32), scaleB: undefined }), ShapeError);
      }));
  });
}

/** All tests of float8 on the GPU of this process's tests. */
export function float8Suite(): void {
  productSuite();
}
