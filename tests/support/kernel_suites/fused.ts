/** The fused kernels on a GPU against compositions of the TypeScript references of what they fuse. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../../ffi/errors.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { elementCount, Tensor } from "../../../ffi/tensor.ts";
import { adaLayerNormFused } from "../../../kernels/ada_layer_norm.ts";
import { addReference } from "../../../kernels/add.ts";
import { addRmsNormFused } from "../../../kernels/add_rms_norm.ts";
import { gatedAdaLayerNormFused, type Normed } from "../../../kernels/gated_ada_layer_norm.ts";
import { gatedResidualReference } from "../../../kernels/gated_residual.ts";
import { layerNormReference } from "../../../kernels/layer_norm.ts";
import { modulateReference } from "../../../kernels/modulate.ts";
import { rmsNormReference } from "../../../kernels/rms_norm.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import {
  around,
  check,
  columns,
  dtypes,
  EPS,
  type Float,
  hiddens,
  lostBy,
  means,
  NONE,
  property,
  type Result,
  type Sample,
  sample,
  seeds,
} from "./samples.ts";

/** How `[batch, tokens, hidden]` lies in memory; only the last one has no dense rows. */
const layouts = fc.constantFrom("dense", "odd", "columns", "tokens", "transposed");
type Layout = typeof layouts extends fc.Arbitrary<infer L> ? L : never;

function laidOut(
  device: GpuDevice,
  shape: readonly number[],
  dtype: Float,
  value: (i: number) => number,
  layout: Layout,
): Sample {
  const [batch, tokens, hidden] = shape;
  if (layout === "columns") return columns(device, shape, dtype, value, 8);
  if (layout === "tokens") {
    const inner = tokens * hidden;
    const rows = columns(device, [batch, inner], dtype, value, 2 * hidden);
    const { memory, strides, offset } = rows.tensor;
    return { tensor: new Tensor(memory, dtype, shape, [strides[0], hidden, 1], offset), values: rows.values };
  }
  if (layout === "transposed") {
    const at = (i: number) => i % (batch * tokens) * hidden + Math.floor(i / (batch * tokens));
    const turned = sample(device, [hidden, batch, tokens], dtype, (i) => value(at(i)));
    const values = new Float32Array(turned.values.length);
    turned.values.forEach((x, i) => values[at(i)] = x);
    return { tensor: turned.tensor.permute([1, 2, 0]), values };
  }
  return sample(device, shape, dtype, value, layout === "odd" ? 1 : 0);
}

/** A part of each sample's modulation, `[batch, hidden]` inside of a wider tensor. */
function modulation(device: GpuDevice, batch: number, hidden: number, dtype: Float, seed: number): Sample {
  return columns(device, [batch, hidden], dtype, noise(seed), hidden);
}

/** How many kernels `body` launches. */
function launchesOf(device: GpuDevice, body: () => void): number {
  let launches = 0;
  const { launch } = device;
  device.launch = (...args) => (launches++, launch.apply(device, args));
  try {
    device.scope(body);
  } finally {
    device.launch = launch;
  }
  return launches;
}

function adaLayerNormReference(
  x: Float32Array,
  scale: Float32Array,
  shift: Float32Array,
  tokens: number,
  hidden: number,
): Float32Array {
  const [normal, expected] = [new Float32Array(x.length), new Float32Array(x.length)];
  layerNormReference(normal, x, NONE, NONE, hidden, EPS);
  modulateReference(expected, normal, scale, shift, tokens, hidden);
  return expected;
}

/** Few rows and such that share a block with the next sample's, one sample and two. */
const rows = { batch: fc.integer({ min: 1, max: 2 }), tokens: fc.integer({ min: 1, max: 9 }) };
/** Row lengths of which several share a block, and one that takes a block. */
const ROW_LENGTHS = [24, 128, 3072];

function adaLayerNormSuite(): void {
  forEachGpu("adaLayerNormFused", (test) => {
    test("equals layer norm and modulation: row lengths, views, dtypes, large means", (device) => {
      const drawn = fc.record({
        ...rows,
        hidden: hiddens,
        layout: layouts,
        dtype: dtypes,
        other: dtypes,
        mean: means,
        seed: seeds,
      });
      return property(device, drawn, 50, ({ batch, tokens, hidden, layout, dtype, other, mean, seed }) => {
        const shape = [batch, tokens, hidden];
        const x = laidOut(device, shape, dtype, around(mean, seed), layout);
        const [scale, shift] = [1, 2].map((i) => modulation(device, batch, hidden, other, seed + i));
        const expected = adaLayerNormReference(x.values, scale.values, shift.values, tokens, hidden);
        const actual = adaLayerNormFused(x.tensor, scale.tensor, shift.tensor, EPS);
        return [{ actual, dtype, shape, expected, slack: () => 2 * lostBy(mean) }];
      });
    });

    test("a NaN or an infinity spoils its own row, whatever shares its block", (device) =>
      check(device, () =>
        ROW_LENGTHS.map((hidden) => {
          const shape = [2, 3, hidden];
          const odd = new Map([[0, NaN], [2 * hidden + 5, Infinity], [6 * hidden - 1, NaN]]);
          const x = sample(device, shape, "bf16", (i) => odd.get(i) ?? noise(1)(i));
          const [scale, shift] = [2, 3].map((seed) => modulation(device, 2, hidden, "bf16", seed));
          const expected = adaLayerNormReference(x.values, scale.values, shift.values, 3, hidden);
          assert.equal(expected.filter(Number.isNaN).length, 3 * hidden);
          const actual = adaLayerNormFused(x.tensor, scale.tensor, shift.tensor, EPS);
          return { actual, dtype: "bf16", shape, expected, slack: () => 1e-5 };
        })));

    test("is one launch, and refuses what does not fit", (device) =>
      device.scope(() => {
        const x = Tensor.empty(device, [2, 4, 24], "bf16").narrow(1, 1, 3);
        const [scale, shift] = Tensor.empty(device, [2, 48], "bf16").chunk(2, 1);
        assert.equal(launchesOf(device, () => adaLayerNormFused(x, scale, shift, EPS)), 1);
        assert.throws(() => adaLayerNormFused(x, scale.narrow(0, 0, 1), shift, EPS), ShapeError);
        assert.throws(() => adaLayerNormFused(x, scale, shift.narrow(1, 0, 8), EPS), ShapeError);
      }));
  });
}

/** The sum, and the norm of it as the GPU rounded it. */
function bothOf(
  { sum, normed }: Normed,
  shape: readonly number[],
  dtype: Float,
  expectedSum: Float32Array,
  sumSlack: (i: number) => number,
  expectedNormed: (sum: Float32Array) => Float32Array,
  slack: number,
): Result[] {
  return [
    { actual: sum, dtype, shape, expected: expectedSum, slack: sumSlack },
    { actual: normed, dtype, shape, expected: expectedNormed, slack: () => slack },
  ];
}

function gatedAdaLayerNormSuite(): void {
  /** Residual and branch in their layouts, and both results. */
  const run = (
    device: GpuDevice,
    shape: readonly number[],
    [residual, x]: readonly Sample[],
    dtype: Float,
    other: Float,
    seed: number,
    slack: number,
  ): Result[] => {
    const [batch, tokens, hidden] = shape;
    const parts = [1, 2, 3].map((i) => modulation(device, batch, hidden, other, seed + i));
    const [gate, scale, shift] = parts.map(({ tensor }) => tensor);
    const values = parts.map((part) => part.values);
    const sum = new Float32Array(x.values.length);
    gatedResidualReference(sum, residual.values, x.values, values[0], tokens, hidden);
    return bothOf(
      gatedAdaLayerNormFused(residual.tensor, x.tensor, gate, scale, shift, EPS),
      shape,
      dtype,
      sum,
      (i) => (Math.abs(residual.values[i]) + Math.abs(x.values[i])) * 2 ** -22,
      (rounded) => adaLayerNormReference(rounded, values[1], values[2], tokens, hidden),
      slack,
    );
  };

  forEachGpu("gatedAdaLayerNormFused", (test) => {
    test("equals gated residual, layer norm and modulation: row lengths, views, dtypes, large means", (device) => {
      const drawn = fc.record({
        ...rows,
        hidden: hiddens,
        layouts: fc.tuple(layouts, layouts),
        dtypes: fc.tuple(dtypes, dtypes, dtypes),
        mean: means,
        seed: seeds,
      });
      return property(device, drawn, 50, ({ batch, tokens, hidden, layouts, dtypes, mean, seed }) => {
        const shape = [batch, tokens, hidden];
        const [dtype, xDtype, other] = dtypes;
        const residual = laidOut(device, shape, dtype, around(mean, seed), layouts[0]);
        const x = laidOut(device, shape, xDtype, noise(seed + 9), layouts[1]);
        return run(device, shape, [residual, x], dtype, other, seed, 2 * lostBy(mean));
      });
    });

    test("a NaN or an infinity spoils its own row, whatever shares its block", (device) =>
      check(device, () =>
        ROW_LENGTHS.flatMap((hidden) => {
          const shape = [2, 3, hidden];
          const odd = (places: Map<number, number>, seed: number) =>
            sample(device, shape, "bf16", (i) => places.get(i) ?? noise(seed)(i));
          const residual = odd(new Map([[0, NaN], [2 * hidden + 5, Infinity]]), 1);
          const x = odd(new Map([[6 * hidden - 1, NaN]]), 2);
          const results = run(device, shape, [residual, x], "bf16", "bf16", 3, 1e-5);
          const { expected } = results[1];
          assert.ok(typeof expected === "function");
          const spoilt = (sum: Float32Array) => {
            const normed = expected(sum);
            assert.equal(normed.filter(Number.isNaN).length, 3 * hidden);
            return normed;
          };
          return [results[0], { ...results[1], expected: spoilt }];
        })));

    test("is one launch, and refuses what does not fit", (device) =>
      device.scope(() => {
        const [residual, x] = Tensor.empty(device, [2, 3, 48], "bf16").chunk(2, 2);
        const [gate, scale, shift] = Tensor.empty(device, [2, 72], "bf16").chunk(3, 1);
        const run = (x: Tensor, gate: Tensor) => gatedAdaLayerNormFused(residual, x, gate, scale, shift, EPS);
        assert.equal(launchesOf(device, () => run(x, gate)), 1);
        assert.throws(() => run(x.narrow(1, 0, 2), gate), ShapeError);
        assert.throws(() => run(x, gate.narrow(0, 0, 1)), ShapeError);
      }));
  });
}

function addRmsNormSuite(): void {
  const run = (
    device: GpuDevice,
    residual: Sample,
    x: Sample,
    dtype: Float,
    weightDtype: Float,
    seed: number,
  ): Result[] => {
    const { shape } = residual.tensor;
    const weight = sample(device, [shape.at(-1)!], weightDtype, noise(seed));
    const sum = new Float32Array(elementCount(shape));
    addReference(sum, residual.values, x.values);
    const normedOf = (rounded: Float32Array) => {
      const normed = new Float32Array(rounded.length);
      rmsNormReference(normed, rounded, weight.values, EPS);
      return normed;
    };
    const both = addRmsNormFused(residual.tensor, x.tensor, weight.tensor, EPS);
    return bothOf(both, shape, dtype, sum, () => 0, normedOf, 2e-6);
  };

  forEachGpu("addRmsNormFused", (test) => {
    test("equals addition and RMS norm: row lengths, views, dtypes, large means", (device) => {
      const drawn = fc.record({
        ...rows,
        hidden: hiddens,
        layouts: fc.tuple(layouts, layouts),
        dtypes: fc.tuple(dtypes, dtypes, dtypes),
        mean: means,
        seed: seeds,
      });
      return property(device, drawn, 50, ({ batch, tokens, hidden, layouts, dtypes, mean, seed }) => {
        const shape = [batch, tokens, hidden];
        const [dtype, xDtype, weightDtype] = dtypes;
        const residual = laidOut(device, shape, dtype, around(mean, seed), layouts[0]);
        const x = laidOut(device, shape, xDtype, noise(seed + 1), layouts[1]);
        return run(device, residual, x, dtype, weightDtype, seed + 2);
      });
    });

    test("a NaN spoils its own row only", (device) =>
      check(device, () => {
        const x = sample(device, [33, 128], "f32", (i) => i === 128 * 9 + 77 ? NaN : noise(1)(i));
        return run(device, sample(device, [33, 128], "f32", noise(2)), x, "f32", "f32", 3);
      }));

    test("is one launch, and refuses what does not fit", (device) =>
      device.scope(() => {
        const [residual, x] = [0, 1].map(() => Tensor.empty(device, [3, 24], "bf16"));
        const weight = Tensor.empty(device, [24], "bf16");
        assert.equal(launchesOf(device, () => addRmsNormFused(residual, x, weight, EPS)), 1);
        assert.throws(() => addRmsNormFused(residual, x.narrow(0, 0, 2), weight, EPS), ShapeError);
        assert.throws(() => addRmsNormFused(residual, x, weight.narrow(0, 0, 8), EPS), ShapeError);
      }));
  });
}

/** All tests of fused kernels on the GPU of this process's tests. */
export function fusedSuite(): void {
  adaLayerNormSuite();
  gatedAdaLayerNormSuite();
  addRmsNormSuite();
}
