/** Matrix products with an activation or of float8 on a GPU, and what makes float8 of activations and weights. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../../ffi/errors.ts";
import { float32ToFloat8, FLOAT8_LARGEST, float8ToFloat32 } from "../../../ffi/float8.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import type { Float8Tensor } from "../../../kernels/float8_tensor.ts";
import { linearFloat8, linearQuantized, quantizeAs } from "../../../kernels/linear_float8.ts";
import {
  FLOAT8_ROW_LARGEST,
  quantizeReference,
  quantizeRows,
  quantizeTensor,
} from "../../../kernels/quantize_float8.ts";
import { CANDIDATES, firstScale, quantizeWeightRows } from "../../../kernels/quantize_weight_rows.ts";
import { valuesOf } from "../golden.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { geluTanh, noise } from "../providers.ts";
import { check, columns, type Float, property, roundings, type Sample, sample } from "./samples.ts";

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
        const again = dtype === "bf16" ? (roundings(device) - 1) * 2 ** -8 : 0;
        const slack = (i: number) => (F32_SUMS + 2 ** -10) * magnitude[i] + again * Math.abs(expected[i]);
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

/** Fails unless a result's codes and scales are the reference's, bit for bit; NaNs may have either sign. */
async function assertQuantized(
  quantized: Float8Tensor,
  x: Float32Array,
  shape: readonly number[],
  rowwise: boolean,
): Promise<void> {
  const { values, scales } = quantized;
  assert.deepEqual([quantized.dtype, values.dtype, scales.dtype], ["f8e4m3", "f8e4m3", "f32"]);
  assert.deepEqual([quantized.shape, values.shape], [shape, shape]);
  assert.equal(quantized.rowwise, rowwise);
  const k = rowwise ? shape.at(-1)! : x.length;
  const codes = new Uint8Array(x.length);
  const expected = new Float32Array(rowwise ? x.length / k : 1);
  quantizeReference(codes, expected, x, k, rowwise ? FLOAT8_ROW_LARGEST : FLOAT8_LARGEST.ocp);
  assert.deepEqual(await valuesOf(scales), expected);
  assertCodes(await values.device.download(values), codes, x, expected);
}

/** Fails unless E4M3 codes are the expected ones; NaNs may have either sign. @param scales of the rows of `x`. */
function assertCodes(got: Uint8Array, codes: Uint8Array, x: Float32Array, scales: Float32Array): void {
  for (let i = 0; i < codes.length; i++) {
    if (got[i] === codes[i] || (codes[i] === 0x7f && got[i] === 0xff)) continue;
    const scale = scales[Math.floor(i * scales.length / x.length)];
    assert.fail(`element ${i}, of ${x[i]} with scale ${scale}: ${got[i]}, not ${codes[i]}`);
  }
}

/** What a row becomes with each scale that quantizeWeightRows tries. */
function candidatesOf(row: Float32Array) {
  const first = firstScale(row);
  return Array.from({ length: CANDIDATES }, (_, c) => {
    const scale = Math.fround(first * (1 + c / CANDIDATES));
    const factor = Math.fround(1 / scale);
    const scaled = row.map((x) => x * factor);
    const [codes, rounded] = [new Uint8Array(row.length), new Float32Array(row.length)];
    float32ToFloat8(scaled, codes);
    float8ToFloat32(codes, rounded, "f8e4m3");
    return {
      scale,
      codes,
      error: scaled.reduce((sum, x, i) => sum + ((rounded[i] - x) * scale / first) ** 2, 0),
    };
  });
}

function quantizeSuite(): void {
  /** Runs a quantization, compares, and gives all memory back. */
  const compare = async (device: GpuDevice, rowwise: boolean, make: () => Sample) => {
    const before = device.memoryUse().current;
    const { tensor, values } = make();
    const quantized = rowwise ? quantizeRows(tensor) : quantizeTensor(tensor);
    await assertQuantized(quantized, values, tensor.shape, rowwise);
    for (const { memory } of [tensor, quantized]) device.free(memory);
    assert.equal(device.memoryUse().current, before, "memory was not given back");
  };
  // Values of every size that E4M3 has, its subnormal numbers and zero too.
  const spread = (seed: number, size: number) => (i: number) =>
    size * noise(seed)(i) * 2 ** (9 * noise(seed + 1)(i));

  forEachGpu("quantizeRows", (test) => {
    test("equals its reference bit for bit: row lengths, dtypes, sizes, views, odd addresses", async (device) => {
      const drawn = fc.record({
        batch: fc.integer({ min: 1, max: 2 }),
        rows: fc.integer({ min: 1, max: 9 }),
        k: fc.constantFrom(1, 7, 16, 24, 128, 768, 777, 3072, 12288),
        dtype: dtypes,
        size: fc.constantFrom(1, 1e-13, 1e-6, 1e30),
        place: fc.constantFrom("dense", "odd", "columns"),
        seed: fc.nat(1000),
      });
      await fc.assert(
        fc.asyncProperty(
          drawn,
          ({ batch, rows, k, dtype, size, place, seed }) =>
            compare(device, true, () => {
              const shape = [batch, rows, k];
              const value = spread(seed, size);
              if (place === "columns") return columns(device, shape, dtype, value, k);
              return sample(device, shape, dtype, value, place === "odd" ? 1 : 0);
            }),
        ),
        { numRuns: 60 },
      );
    });

    test("NaN stays NaN, infinities and zeros have their scales, whatever shares their block", (device) =>
      compare(device, true, () => {
        const odd = new Map([[0, NaN], [30, NaN], [49, Infinity], [75, -Infinity], [76, NaN]]);
        const value = (i: number) => Math.floor(i / 24) === 5 ? 0 : odd.get(i) ?? noise(1)(i);
        return sample(device, [7, 24], "bf16", value);
      }));

    test("refuses what is not f32 or bf16", (device) =>
      device.scope(() => {
        assert.throws(() => quantizeRows(Tensor.empty(device, [2, 4], "f16")), ShapeError);
        assert.throws(() => quantizeTensor(Tensor.empty(device, [2, 4], "i32")), ShapeError);
      }));
  });

  forEachGpu("quantizeWeightRows", (test) => {
    test("takes the best of its scales, and rounds by it: row lengths, dtypes, sizes, views, NaN and zeros", async (device) => {
      const drawn = fc.record({
        rows: fc.integer({ min: 1, max: 9 }),
        k: fc.constantFrom(1, 7, 16, 24, 128, 768, 777, 3072, 15360),
        dtype: dtypes,
        size: fc.constantFrom(1, 1e-13, 1e-6, 1e30),
        odd: fc.constantFrom(undefined, NaN, Infinity, 0),
        place: fc.constantFrom("dense", "odd", "columns"),
        seed: fc.nat(1000),
      });
      await fc.assert(
        fc.asyncProperty(drawn, async ({ rows, k, dtype, size, odd, place, seed }) => {
          const value = spread(seed, size);
          const filled = (i: number) =>
            odd === undefined || i >= k ? value(i) : odd === 0 || i === k >> 1 ? odd : value(i);
          const { tensor, values } = place === "columns"
            ? columns(device, [rows, k], dtype, filled, k)
            : sample(device, [rows, k], dtype, filled, place === "odd" ? 1 : 0);
          const quantized = quantizeWeightRows(tensor);
          const [codes, scales] = [await device.download(quantized.values), await valuesOf(quantized.scales)];
          for (const [row, scale] of scales.entries()) {
            const own = values.subarray(row * k, (row + 1) * k);
            const tried = candidatesOf(own);
            const taken = tried.find((candidate) => Object.is(candidate.scale, scale));
            assert.ok(taken, `row ${row} has scale ${scale}, not one of ${tried.map(({ scale }) => scale)}`);
            const least = Math.min(...tried.map(({ error }) => error));
            if (Number.isNaN(least)) assert.equal(scale, tried[0].scale);
            else assert.ok(taken.error <= least * (1 + 1e-4), `row ${row}: ${taken.error}, not ${least}`);
            assertCodes(codes.subarray(row * k, (row + 1) * k), taken.codes, own, Float32Array.of(scale));
          }
          for (const { memory } of [tensor, quantized]) device.free(memory);
        }),
        { numRuns: 60 },
      );
    });
  });

  forEachGpu("quantizeTensor", (test) => {
    test("equals its reference bit for bit: sizes, dtypes, views, odd addresses", async (device) => {
      const drawn = fc.record({
        rows: fc.integer({ min: 0, max: 40 }),
        k: fc.constantFrom(1, 7, 24, 777, 3072),
        dtype: dtypes,
        size: fc.constantFrom(1, 1e-13, 1e-6, 1e30),
        place: fc.constantFrom("dense", "odd", "columns"),
        seed: fc.nat(1000),
      });
      await fc.assert(
        fc.asyncProperty(drawn, ({ rows, k, dtype, size, place, seed }) =>
          compare(device, false, () => {
            const value = spread(seed, size);
            if (place === "columns") return columns(device, [rows, k], dtype, value, k);
            return sample(device, [rows, k], dtype, value, place === "odd" ? 1 : 0);
          })),
        { numRuns: 40 },
      );
    });

    test("more elements than blocks take at a time, the largest anywhere", async (device) => {
      const size = 132 * 2048 * 32 + 40;
      for (const at of [0, size - 1, size >> 1]) {
        await compare(device, false, () => sample(device, [size], "bf16", (i) => i === at ? -5 : 1));
      }
    });

    test("NaN stays NaN and does not count", (device) =>
      compare(device, false, () => sample(device, [5, 30], "f32", (i) => i % 50 === 3 ? NaN : noise(1)(i))));

    test("a recorded run finds the largest of new values", async (device) => {
      const x = Tensor.fromFloat32(device, new Float32Array(3000).fill(1), [3, 1000]);
      quantizeTensor(x); // compiles its kernels
      let out: Float8Tensor | undefined;
      using graph = device.record(() => {
        out = quantizeTensor(x);
      });
      for (const largest of [100, 2]) {
        const values = Float32Array.from({ length: 3000 }, (_, i) => i === 1234 ? largest : noise(1)(i));
        device.upload(new Uint8Array(values.buffer), x.memory);
        graph.replay();
        await assertQuantized(out!, values, [3, 1000], false);
      }
    });
  });
}

function linearSuite(): void {
  forEachGpu("linearFloat8", (test) => {
    test("is the product of what its quantized operands stand for", async (device) => {
      const drawn = fc.record({
        lead: fc.constantFrom([1], [5], [2, 3]),
        n: fc.constantFrom(16, 48),
        k: fc.constantFrom(16, 64),
        rowwise: fc.boolean(),
        bias: fc.boolean(),
        activation: fc.constantFrom(undefined, "geluTanh" as const),
        seed: fc.nat(1000),
      });
      await property(device, drawn, 40, ({ lead, n, k, rowwise, bias, activation, seed }) => {
        const x = sample(device, [...lead, k], "bf16", noise(seed));
        const w = sample(device, [n, k], "bf16", (i) => noise(seed + 1)(i) / (1 + i % 5));
        const shift = bias ? sample(device, [n], "bf16", noise(seed + 2)) : undefined;
        const weight = (rowwise ? quantizeRows : quantizeTensor)(w.tensor);
        const once = linearFloat8(x.tensor, weight, shift?.tensor, activation);
        const quantized = quantizeAs(weight, x.tensor);
        assert.equal(quantizeAs(weight, quantized), quantized);
        const again = linearQuantized(quantized, weight, shift?.tensor, activation);
        const restored = ({ values }: Sample) => {
          const size = rowwise ? k : values.length;
          const codes = new Uint8Array(values.length);
          const scales = new Float32Array(values.length / size);
          quantizeReference(codes, scales, values, size, rowwise ? FLOAT8_ROW_LARGEST : FLOAT8_LARGEST.ocp);
          const result = new Float32Array(values.length);
          float8ToFloat32(codes, result, "f8e4m3");
          return result.map((value, i) => value * scales[Math.floor(i / size)]);
        };
        const m = x.values.length / k;
        const gelu = activation !== undefined;
        const { expected, magnitude } = productReference({
          ...{ m, n, k, bias: shift?.values, gelu, scale: () => 1 },
          x: restored(x),
          w: restored(w),
        });
        const slack = (i: number) => FLOAT8_SUMS * magnitude[i];
        return [once, again].map((actual) => ({
          actual,
          dtype: "bf16",
          shape: [...lead, n],
          expected,
          slack,
        }));
      });
    });

    test("refuses what does not fit together", (device) =>
      device.scope(() => {
        const [x, w] = [[3, 32], [16, 32]].map((shape) => sample(device, shape, "bf16", noise(1)).tensor);
        const weight = quantizeRows(w);
        const narrow = sample(device, [3, 16], "bf16", noise(1)).tensor;
        assert.throws(() => linearFloat8(narrow, weight), ShapeError);
        assert.throws(
          () => linearFloat8(x, weight, sample(device, [32], "bf16", noise(1)).tensor),
          ShapeError,
        );
        assert.throws(() => linearQuantized(quantizeTensor(x), weight), ShapeError);
      }));
  });
}

/** All tests of float8 on the GPU of this process's tests. */
export function float8Suite(): void {
  productSuite();
  quantizeSuite();
  linearSuite();
}
