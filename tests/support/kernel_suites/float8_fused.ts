/** What gives E4M3 with a scale for each row, on a GPU, against the TypeScript references of what it is made of. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../../ffi/errors.ts";
import { float8ToFloat32 } from "../../../ffi/float8.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { adaLayerNormFloat8 } from "../../../kernels/ada_layer_norm.ts";
import type { Float8Tensor } from "../../../kernels/float8_tensor.ts";
import { gatedAdaLayerNormFloat8 } from "../../../kernels/gated_ada_layer_norm.ts";
import { gatedResidualReference } from "../../../kernels/gated_residual.ts";
import { geluTanhFloat8 } from "../../../kernels/gelu_float8.ts";
import { geluTanhReference } from "../../../kernels/gelu_tanh.ts";
import { linearFloat8 } from "../../../kernels/linear_float8.ts";
import { FLOAT8_ROW_LARGEST, quantizeReference, quantizeRows } from "../../../kernels/quantize_float8.ts";
import { eagerOps } from "../../../recipes/base/ops.ts";
import { valuesOf } from "../golden.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import {
  adaLayerNormReference,
  laidOut,
  launchesOf,
  layouts,
  modulated,
  modulation,
  ROW_LENGTHS,
  rows,
  sums,
} from "./fused.ts";
import { around, columns, dtypes, EPS, type Float, lostBy, type Sample, sample, seeds } from "./samples.ts";

/** E4M3's smallest step, and half a step as a part of a value that is no subnormal number. */
const SMALLEST_STEP = 2 ** -9;
const HALF_STEP = 2 ** -4;

/**
 * Fails unless a result is the quantized `expected`, of which a kernel may have had each value up to `slack` off: then
 * scales are off by as much, and values are rounded to one of the nearest.
 */
async function assertQuantized(
  quantized: Float8Tensor,
  expected: Float32Array,
  shape: readonly number[],
  source: Float,
  slack: number,
): Promise<void> {
  const { values, scales } = quantized;
  assert.deepEqual([values.shape, values.dtype, quantized.source], [shape, "f8e4m3", source]);
  const k = shape.at(-1)!;
  const [codes, expectedScales] = [new Uint8Array(expected.length), new Float32Array(expected.length / k)];
  quantizeReference(codes, expectedScales, expected, k);
  const gotScales = await valuesOf(scales);
  const got = new Float32Array(expected.length);
  float8ToFloat32(await values.device.download(values), got, "f8e4m3");
  let moved = 0;
  for (const [row, scale] of expectedScales.entries()) {
    const off = Math.abs(gotScales[row] - scale);
    assert.ok(
      Object.is(gotScales[row], scale) || off <= slack / FLOAT8_ROW_LARGEST + scale * 2 ** -21,
      `scale ${row} is ${gotScales[row]}, not ${scale}`,
    );
  }
  const lengths = quantized.lengths === undefined ? [] : await valuesOf(quantized.lengths);
  for (const [row, length] of lengths.entries()) {
    const wanted = Math.hypot(...expected.subarray(row * k, row * k + k));
    const off = Math.abs(length - wanted);
    assert.ok(
      Object.is(length, wanted) || off <= slack * Math.sqrt(k) + 1e-5 * wanted,
      `length ${row} is ${length}, not ${wanted}`,
    );
  }
  const nearest = new Float32Array(expected.length);
  float8ToFloat32(codes, nearest, "f8e4m3");
  for (let i = 0; i < got.length; i++) {
    if (Object.is(got[i], nearest[i])) continue;
    moved++;
    const scale = gotScales[Math.floor(i / k)];
    const allowed = Math.max(Math.abs(expected[i]) * HALF_STEP, scale * SMALLEST_STEP / 2);
    const error = Math.abs(got[i] * scale - expected[i]);
    // A scale that is off by a part moves every value by that part.
    const lost = slack + Math.abs(expected[i]) * (slack / FLOAT8_ROW_LARGEST / scale + 2 ** -20);
    assert.ok(error <= allowed + 2 * lost, `element ${i} is ${got[i]} * ${scale}, not ${expected[i]}`);
  }
  // Between two codes only what lies next to their middle may go either way.
  assert.ok(moved <= Math.max(2, 0.01 * got.length), `${moved} of ${got.length} codes are others`);
}

/** Runs `make`, compares what it made, and gives all memory back. */
async function compare(
  device: GpuDevice,
  make: () => {
    actual: Float8Tensor;
    expected: Float32Array;
    shape: readonly number[];
    dtype: Float;
    slack: number;
  },
): Promise<void> {
  const used = device.memoryUse().current;
  let wanted: Omit<ReturnType<typeof make>, "actual">;
  const actual = device.scope(() => {
    const { actual, ...rest } = make();
    wanted = rest;
    return actual;
  });
  const { expected, shape, dtype, slack } = wanted!;
  await assertQuantized(actual, expected, shape, dtype, slack);
  actual.dispose();
  assert.equal(device.memoryUse().current, used, "memory was not given back");
}

function float8TensorSuite(): void {
  forEachGpu("Float8Tensor", (test) => {
    test("keeps its scales through a scope, gives all back at once, and has no views", async (device) => {
      const used = device.memoryUse().current;
      const kept = device.scope(() => {
        const x = sample(device, [3, 2, 24], "bf16", (i) => 2 ** Math.floor(i / 24)).tensor;
        return { inside: [quantizeRows(x)] };
      });
      const [quantized] = kept.inside;
      const scales = [0, 1, 2, 3, 4, 5].map((row) => Math.fround(2 ** row / FLOAT8_ROW_LARGEST));
      assert.deepEqual(await valuesOf(quantized.scales), Float32Array.from(scales));
      assert.ok((await device.download(quantized.values)).every((code) => code === 0x5e)); // 28
      assert.equal(quantized.scales.pointer % 256n, 0n);
      for (
        const view of [
          () => quantized.narrow(),
          () => quantized.reshape(),
          () => quantized.permute(),
          () => quantized.chunk(2, 1),
        ]
      ) {
        assert.throws(view, { name: "ShapeError", message: /scales would not follow/ });
      }
      device.scope(() => {
        const plain = sample(device, [16, 24], "bf16", noise(1)).tensor;
        const weight = quantizeRows(plain);
        assert.throws(() => linearFloat8(quantized.values, weight), {
          name: "ShapeError",
          message: /takes f32 and bf16, not f8e4m3/,
        });
        assert.throws(() => eagerOps.linear(quantized, plain), {
          name: "ShapeError",
          message: /x is f8e4m3/,
        });
      });
      quantized.dispose();
      assert.equal(device.memoryUse().current, used, "memory was not given back");
    });
  });
}

function adaLayerNormSuite(): void {
  forEachGpu("adaLayerNormFloat8", (test) => {
    test("equals norm, modulation and cast: row lengths, views, dtypes, large means", async (device) => {
      await fc.assert(
        fc.asyncProperty(
          modulated,
          ({ batch, tokens, hidden, layout, dtype, other, mean, seed }) =>
            compare(device, () => {
              const shape = [batch, tokens, hidden];
              const x = laidOut(device, shape, dtype, around(mean, seed), layout);
              const [scale, shift] = [1, 2].map((i) => modulation(device, batch, hidden, other, seed + i));
              return {
                actual: adaLayerNormFloat8(x.tensor, scale.tensor, shift.tensor, EPS, seed % 2 === 1),
                expected: adaLayerNormReference(x.values, scale.values, shift.values, tokens, hidden),
                shape,
                dtype,
                slack: 2 * lostBy(mean),
              };
            }),
        ),
        { numRuns: 50 },
      );
    });

    test("a NaN or an infinity spoils its own row, zeros and equal values give zeros", async (device) => {
      for (const hidden of ROW_LENGTHS) {
        await compare(device, () => {
          const shape = [2, 3, hidden];
          const odd = new Map([[0, NaN], [2 * hidden + 5, Infinity], [6 * hidden - 1, NaN]]);
          const value = (i: number) => Math.floor(i / hidden) === 1 ? 0 : odd.get(i) ?? noise(1)(i);
          const x = sample(device, shape, "bf16", value);
          const scale = modulation(device, 2, hidden, "bf16", 2);
          const shift = columns(device, [2, hidden], "bf16", () => 0, hidden);
          const expected = adaLayerNormReference(x.values, scale.values, shift.values, 3, hidden);
          assert.equal(expected.filter(Number.isNaN).length, 3 * hidden);
          assert.ok(expected.subarray(hidden, 2 * hidden).every((one) => one === 0));
          const actual = adaLayerNormFloat8(x.tensor, scale.tensor, shift.tensor, EPS);
          return { actual, expected, shape, dtype: "bf16", slack: 1e-5 };
        });
      }
    });

    test("is one launch, and refuses what does not fit", (device) =>
      device.scope(() => {
        const x = Tensor.empty(device, [2, 4, 24], "bf16").narrow(1, 1, 3);
        const [scale, shift] = Tensor.empty(device, [2, 48], "bf16").chunk(2, 1);
        assert.equal(launchesOf(device, () => adaLayerNormFloat8(x, scale, shift, EPS)), 1);
        assert.throws(() => adaLayerNormFloat8(x, scale.narrow(0, 0, 1), shift, EPS), ShapeError);
        assert.throws(() => adaLayerNormFloat8(x, scale, shift.narrow(1, 0, 8), EPS), ShapeError);
      }));
  });

  forEachGpu("gatedAdaLayerNormFloat8", (test) => {
    test("equals gated residual, and norm, modulation and cast of its sum as it was rounded", async (device) => {
      await fc.assert(
        fc.asyncProperty(sums, async ({ batch, tokens, hidden, layouts, dtypes, mean, seed }) => {
          const shape = [batch, tokens, hidden];
          const [dtype, xDtype, other] = dtypes;
          const used = device.memoryUse().current;
          let parts: readonly Sample[] = [];
          let vectors: readonly Sample[] = [];
          const { sum, normed } = device.scope(() => {
            parts = [
              laidOut(device, shape, dtype, around(mean, seed), layouts[0]),
              laidOut(device, shape, xDtype, noise(seed + 9), layouts[1]),
            ];
            vectors = [1, 2, 3].map((i) => modulation(device, batch, hidden, other, seed + i));
            const [residual, x, gate, scale, shift] = [...parts, ...vectors].map(({ tensor }) => tensor);
            return gatedAdaLayerNormFloat8(residual, x, gate, scale, shift, EPS, seed % 2 === 1);
          });
          const [residual, x, gate, scale, shift] = [...parts, ...vectors].map(({ values }) => values);
          const expectedSum = new Float32Array(x.length);
          gatedResidualReference(expectedSum, residual, x, gate, tokens, hidden);
          const rounded = await valuesOf(sum);
          assert.deepEqual([sum.dtype, sum.shape], [dtype, shape]);
          expectedSum.forEach((value, i) => {
            const slack = (Math.abs(residual[i]) + Math.abs(x[i])) * 2 ** -22;
            const rounding = (dtype === "bf16" ? 2 ** -8 : 2 ** -22) * Math.abs(value);
            assert.ok(
              Math.abs(rounded[i] - value) <= slack + rounding,
              `sum ${i} is ${rounded[i]}, not ${value}`,
            );
          });
          const expected = adaLayerNormReference(rounded, scale, shift, tokens, hidden);
          await assertQuantized(normed, expected, shape, dtype, 2 * lostBy(mean));
          for (const tensor of [sum, normed]) tensor.dispose();
          assert.equal(device.memoryUse().current, used, "memory was not given back");
        }),
        { numRuns: 50 },
      );
    });

    test("a NaN spoils its own row only; is one launch, and refuses what does not fit", async (device) => {
      await compare(device, () => {
        const shape = [2, 3, 128];
        const residual = sample(device, shape, "f32", (i) => i === 300 ? NaN : noise(1)(i));
        const x = sample(device, shape, "bf16", noise(2));
        const vectors = [3, 4, 5].map((seed) => modulation(device, 2, 128, "bf16", seed));
        const [gate, scale, shift] = vectors.map(({ tensor }) => tensor);
        const sum = new Float32Array(x.values.length);
        gatedResidualReference(sum, residual.values, x.values, vectors[0].values, 3, 128);
        const expected = adaLayerNormReference(sum, vectors[1].values, vectors[2].values, 3, 128);
        assert.equal(expected.filter(Number.isNaN).length, 128);
        const actual = gatedAdaLayerNormFloat8(residual.tensor, x.tensor, gate, scale, shift, EPS).normed;
        return { actual, expected, shape, dtype: "f32", slack: 1e-5 };
      });
      device.scope(() => {
        const [residual, x] = Tensor.empty(device, [2, 3, 48], "bf16").chunk(2, 2);
        const [gate, scale, shift] = Tensor.empty(device, [2, 72], "bf16").chunk(3, 1);
        const run = (x: Tensor, gate: Tensor) =>
          gatedAdaLayerNormFloat8(residual, x, gate, scale, shift, EPS);
        assert.equal(launchesOf(device, () => run(x, gate)), 1);
        assert.throws(() => run(x.narrow(1, 0, 2), gate), ShapeError);
        assert.throws(() => run(x, gate.narrow(0, 0, 1)), ShapeError);
      });
    });
  });
}

/** `before` as it is and GELU of `x`, side by side. */
function besideReference(before: Float32Array, x: Float32Array, rows: number): Float32Array {
  const activated = new Float32Array(x.length);
  geluTanhReference(activated, x);
  const [m, n] = [before.length / rows, x.length / rows];
  return Float32Array.from({ length: before.length + x.length }, (_, i) => {
    const [row, column] = [Math.floor(i / (m + n)), i % (m + n)];
    return column < m ? before[row * m + column] : activated[row * n + column - m];
  });
}

function geluSuite(): void {
  forEachGpu("geluTanhFloat8", (test) => {
    test("equals GELU, joining and cast: sizes, views, dtypes, magnitudes", async (device) => {
      const drawn = fc.record({
        ...rows,
        counts: fc.constantFrom(
          [0, 1],
          [0, 24],
          [0, 777],
          [0, 12288],
          [7, 9],
          [7, 24],
          [16, 24],
          [24, 7],
          [128, 512],
          [768, 3072],
          [3072, 12288],
        ),
        layouts: fc.tuple(layouts, layouts),
        dtype: dtypes,
        size: fc.constantFrom(1, 4, 30, 1e-6),
        seed: seeds,
      });
      await fc.assert(
        fc.asyncProperty(
          drawn,
          ({ batch, tokens, counts: [m, n], layouts, dtype, size, seed }) =>
            compare(device, () => {
              const value = (seed: number) => (i: number) => size * noise(seed)(i);
              const x = laidOut(device, [batch, tokens, n], dtype, value(seed), layouts[0]);
              const before = m === 0
                ? undefined
                : laidOut(device, [batch, tokens, m], dtype, value(seed + 1), layouts[1]);
              const expected = besideReference(
                before?.values ?? new Float32Array(0),
                x.values,
                batch * tokens,
              );
              return {
                actual: geluTanhFloat8(x.tensor, before?.tensor),
                expected,
                shape: [batch, tokens, m + n],
                dtype,
                slack: 2e-6 * size,
              };
            }),
        ),
        { numRuns: 50 },
      );
    });

    test("NaN stays NaN and does not count, infinities and zeros have their scales", (device) =>
      compare(device, () => {
        const [m, n] = [16, 24];
        const odd = new Map([[3, NaN], [30, Infinity], [50, -1e30], [80, 1e30]]);
        const value = (i: number) => Math.floor(i / n) === 5 ? 0 : odd.get(i) ?? noise(1)(i);
        const x = sample(device, [7, n], "bf16", value);
        const before = sample(
          device,
          [7, m],
          "bf16",
          (i) => Math.floor(i / m) === 5 ? 0 : i === 100 ? NaN : noise(2)(i),
        );
        const expected = besideReference(before.values, x.values, 7);
        const actual = geluTanhFloat8(x.tensor, before.tensor);
        return { actual, expected, shape: [7, m + n], dtype: "bf16", slack: 2e-6 };
      }));

    test("is one launch on columns of a product, and refuses what does not fit", (device) =>
      device.scope(() => {
        const product = Tensor.empty(device, [2, 4, 64], "bf16");
        const [before, x] = [product.narrow(2, 0, 16), product.narrow(2, 16, 48)];
        assert.equal(launchesOf(device, () => geluTanhFloat8(x, before)), 1);
        assert.equal(launchesOf(device, () => geluTanhFloat8(x)), 1);
        assert.throws(() => geluTanhFloat8(x, before.narrow(1, 0, 3)), ShapeError);
        assert.throws(() => geluTanhFloat8(x, Tensor.empty(device, [2, 4, 16], "f32")), ShapeError);
        assert.throws(() => geluTanhFloat8(Tensor.empty(device, [2, 4, 16], "f16")), ShapeError);
      }));
  });
}

/** All tests of operators that quantize their results, on the GPU of this process's tests. */
export function float8FusedSuite(): void {
  float8TensorSuite();
  adaLayerNormSuite();
  geluSuite();
}
