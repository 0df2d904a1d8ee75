/** The fused kernels on a GPU against compositions of the TypeScript references of what they fuse. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { bfloat16ToFloat32 } from "../../../ffi/bfloat16.ts";
import { dtypeBytes } from "../../../ffi/dtype.ts";
import { ShapeError } from "../../../ffi/errors.ts";
import { float8ToFloat32 } from "../../../ffi/float8.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { elementCount, Tensor } from "../../../ffi/tensor.ts";
import { adaLayerNormFused } from "../../../kernels/ada_layer_norm.ts";
import { addReference } from "../../../kernels/add.ts";
import { addRmsNormFused } from "../../../kernels/add_rms_norm.ts";
import { gatedAdaLayerNormFused, type Normed } from "../../../kernels/gated_ada_layer_norm.ts";
import { gatedResidualReference } from "../../../kernels/gated_residual.ts";
import {
  jointQkNormRopeFused,
  jointQkNormRopeTiles,
  jointQkNormRopeTilesTakes,
  type QkvStream,
} from "../../../kernels/joint_qk_norm_rope.ts";
import { type AttentionDType, attentionTilesReference, TILE } from "../../../kernels/attention_tiles.ts";
import { layerNormReference } from "../../../kernels/layer_norm.ts";
import { modulateReference } from "../../../kernels/modulate.ts";
import { rmsNormReference } from "../../../kernels/rms_norm.ts";
import { ropeReference } from "../../../kernels/rope.ts";
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
import { watchLaunches } from "../watch_launches.ts";

/** How `[batch, tokens, hidden]` lies in memory; only the last one has no dense rows. */
export const layouts = fc.constantFrom("dense", "odd", "columns", "tokens", "transposed");
export type Layout = typeof layouts extends fc.Arbitrary<infer L> ? L : never;

export function laidOut(
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
export function modulation(
  device: GpuDevice,
  batch: number,
  hidden: number,
  dtype: Float,
  seed: number,
): Sample {
  return columns(device, [batch, hidden], dtype, noise(seed), hidden);
}

/** How many kernels `body` launches. */
export function launchesOf(device: GpuDevice, body: () => void): number {
  let launches = 0;
  using _ = watchLaunches(device, () => launches++);
  device.scope(body);
  return launches;
}

export function adaLayerNormReference(
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
export const rows = { batch: fc.integer({ min: 1, max: 2 }), tokens: fc.integer({ min: 1, max: 9 }) };
/** A tensor that is normalized, and its modulation. */
export const modulated = fc.record({
  ...rows,
  hidden: hiddens,
  layout: layouts,
  dtype: dtypes,
  other: dtypes,
  mean: means,
  seed: seeds,
});
/** Two tensors that are added, and what is made of the sum. */
export const sums = fc.record({
  ...rows,
  hidden: hiddens,
  layouts: fc.tuple(layouts, layouts),
  dtypes: fc.tuple(dtypes, dtypes, dtypes),
  mean: means,
  seed: seeds,
});
/** Row lengths of which several share a block, and one that takes a block. */
export const ROW_LENGTHS = [24, 128, 3072];

function adaLayerNormSuite(): void {
  forEachGpu("adaLayerNormFused", (test) => {
    test("equals layer norm and modulation: row lengths, views, dtypes, large means", (device) => {
      return property(
        device,
        modulated,
        50,
        ({ batch, tokens, hidden, layout, dtype, other, mean, seed }) => {
          const shape = [batch, tokens, hidden];
          const x = laidOut(device, shape, dtype, around(mean, seed), layout);
          const [scale, shift] = [1, 2].map((i) => modulation(device, batch, hidden, other, seed + i));
          const expected = adaLayerNormReference(x.values, scale.values, shift.values, tokens, hidden);
          const actual = adaLayerNormFused(x.tensor, scale.tensor, shift.tensor, EPS);
          return [{ actual, dtype, shape, expected, slack: () => 2 * lostBy(mean) }];
        },
      );
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
      return property(device, sums, 50, ({ batch, tokens, hidden, layouts, dtypes, mean, seed }) => {
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
      return property(device, sums, 50, ({ batch, tokens, hidden, layouts, dtypes, mean, seed }) => {
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

/** A stream's projections with their values, and its number of tokens. */
interface StreamSample {
  readonly tokens: number;
  readonly qkv: readonly Sample[];
  readonly norms: readonly Sample[];
}

/** How q, k and v lie: apart, all of them in one product, beside something else, or with strided elements. */
const projections = fc.constantFrom("dense", "odd", "product", "heads", "transposed");

/** The elements of tiles, place by place. */
function elementsOf(bytes: Uint8Array<ArrayBuffer>, dtype: AttentionDType): Float32Array {
  const values = new Float32Array(bytes.length / dtypeBytes(dtype));
  if (dtype === "bf16") bfloat16ToFloat32(new Uint16Array(bytes.buffer), values);
  else float8ToFloat32(bytes, values, dtype);
  return values;
}

function jointQkNormRopeSuite(): void {
  const streamOf = (
    device: GpuDevice,
    shape: readonly [batch: number, tokens: number, heads: number, headDim: number],
    dtype: Float,
    normDtype: Float,
    projection: string,
    value: (seed: number) => (i: number) => number,
  ): StreamSample => {
    const [batch, tokens, heads, headDim] = shape;
    const hidden = heads * headDim;
    const norms = [3, 4].map((i) => sample(device, [headDim], normDtype, value(i)));
    if (projection === "product") {
      const width = 3 * hidden + 8;
      const product = sample(device, [batch, tokens, width], dtype, value(0));
      const qkv = [0, 1, 2].map((part) => ({
        tensor: product.tensor.narrow(2, part * hidden, hidden).reshape(shape),
        values: product.values.filter((_, i) => Math.floor(i % width / hidden) === part),
      }));
      return { tokens, qkv, norms };
    }
    const qkv = [0, 1, 2].map((part) => {
      if (projection === "heads") return columns(device, shape, dtype, value(part), headDim);
      const layout = projection === "odd" || projection === "transposed" ? projection : "dense";
      const { tensor, values } = laidOut(
        device,
        [batch * tokens, heads, headDim],
        dtype,
        value(part),
        layout,
      );
      return { tensor: tensor.reshape(shape), values };
    });
    return { tokens, qkv, norms };
  };

  const asStream = ({ qkv: [q, k, v], norms: [normQ, normK] }: StreamSample): QkvStream => ({
    q: q.tensor,
    k: k.tensor,
    v: v.tensor,
    normQ: normQ.tensor,
    normK: normK.tensor,
  });

  /** Rows `[batch, tokens, width]` of the streams, sample by sample behind one another. */
  const joined = (parts: readonly Float32Array[], batch: number): Float32Array => {
    const whole = new Float32Array(parts.reduce((sum, { length }) => sum + length, 0));
    let at = 0;
    for (let b = 0; b < batch; b++) {
      for (const part of parts) {
        const length = part.length / batch;
        whole.set(part.subarray(b * length, (b + 1) * length), at);
        at += length;
      }
    }
    return whole;
  };

  /** q (0) or k (1) of all streams, normed and turned, `[batch, tokens, heads, headDim]`. */
  const turnedValues = (
    streams: readonly StreamSample[],
    [batch, heads, headDim]: readonly [number, number, number],
    [cos, sin]: readonly Sample[],
    which: 0 | 1,
  ): Float32Array => {
    const normed = streams.map(({ qkv, norms }) => {
      const { values } = qkv[which];
      const out = new Float32Array(values.length);
      rmsNormReference(out, values, norms[which].values, EPS);
      return out;
    });
    const whole = joined(normed, batch);
    const expected = new Float32Array(whole.length);
    ropeReference(expected, whole, cos.values, sin.values, heads, headDim);
    return expected;
  };

  const run = (
    streams: readonly StreamSample[],
    sizes: readonly [batch: number, heads: number, headDim: number],
    dtype: Float,
    tables: readonly Sample[],
  ): Result[] => {
    const [batch, heads, headDim] = sizes;
    const [cos, sin] = tables;
    const tokens = streams.reduce((sum, stream) => sum + stream.tokens, 0);
    const turned = (which: 0 | 1) => turnedValues(streams, sizes, tables, which);
    const { q, k, v } = jointQkNormRopeFused(streams.map(asStream), cos.tensor, sin.tensor, EPS);
    const shape = [batch, tokens, heads, headDim];
    const turnedResults = [q, k].map((actual, which) => ({
      actual,
      dtype,
      shape,
      expected: turned(which === 0 ? 0 : 1),
      slack: () => 6e-6,
    }));
    if (streams.length === 1) {
      assert.equal(v, streams[0].qkv[2].tensor, "v of a single stream is not copied");
      return turnedResults;
    }
    const expected = joined(streams.map(({ qkv }) => qkv[2].values), batch);
    return [...turnedResults, { actual: v, dtype, shape, expected, slack: () => 0 }];
  };

  const tables = (device: GpuDevice, tokens: number, headDim: number, seed: number, start = 0) =>
    [1, 2].map((i) => sample(device, [tokens, headDim], "f32", noise(seed + i), start));

  forEachGpu("jointQkNormRopeFused", (test) => {
    test("equals RMS norm and rotary embedding of each stream: heads, widths, views, dtypes", (device) => {
      const drawn = fc.record({
        batch: fc.integer({ min: 1, max: 2 }),
        lengths: fc.array(fc.integer({ min: 1, max: 5 }), { minLength: 1, maxLength: 3 }),
        heads: fc.constantFrom(1, 3, 4, 9, 24),
        headDim: fc.constantFrom(2, 6, 20, 64, 128, 640),
        dtypes: fc.tuple(dtypes, dtypes),
        projection: projections,
        tableStart: fc.constantFrom(0, 0, 1),
        seed: seeds,
      });
      return property(device, drawn, 40, (one) => {
        const { batch, lengths, heads, headDim, dtypes: [dtype, normDtype], projection, seed } = one;
        const streams = lengths.map((tokens, stream) =>
          streamOf(
            device,
            [batch, tokens, heads, headDim],
            dtype,
            normDtype,
            projection,
            (i) => (at) => 8 * noise(seed + 10 * stream + i)(at),
          )
        );
        const tokens = lengths.reduce((a, b) => a + b);
        const both = tables(device, tokens, headDim, seed + 100, one.tableStart);
        return run(streams, [batch, heads, headDim], dtype, both);
      });
    });

    test("to tiles: the same numbers, rounded, and zeros behind", async (device) => {
      const drawn = fc.record({
        batch: fc.integer({ min: 1, max: 2 }),
        lengths: fc.constantFrom<number[]>([1], [128], [3, 130], [127, 2], [128, 5]),
        heads: fc.constantFrom(1, 3),
        dtype: dtypes,
        normDtype: dtypes,
        projection: projections,
        tileDType: fc.constantFrom<AttentionDType>("f8e4m3", "bf16"),
        seed: seeds,
      });
      await fc.assert(
        fc.asyncProperty(drawn, async (one) => {
          const { batch, lengths, heads, dtype, normDtype, projection, tileDType, seed } = one;
          if (dtype !== "bf16" && tileDType === "bf16") return; // v is not cast to bf16 tiles
          const shapeOf = (tokens: number) => [batch, tokens, heads, TILE] as const;
          const streams = lengths.map((tokens, stream) => {
            const value = (i: number) => (at: number) => 8 * noise(seed + 10 * stream + i)(at);
            return streamOf(device, shapeOf(tokens), dtype, normDtype, projection, value);
          });
          const tokens = lengths.reduce((a, b) => a + b);
          const both = tables(device, tokens, TILE, seed + 100);
          const [cos, sin] = both.map(({ tensor }) => tensor);
          const given = streams.map(asStream);
          assert.equal(jointQkNormRopeTilesTakes(given), dtype === "bf16");
          const { q, k, v, keys } = jointQkNormRopeTiles(device, given, cos, sin, EPS, tileDType);
          assert.equal(keys, tokens);
          const sizes = [batch, heads, TILE] as const;
          const kinds = [[q, "query"], [k, "key"], [v, "value"]] as const;
          for (const [which, [tiles, kind]] of kinds.entries()) {
            const values = which === 2
              ? joined(streams.map(({ qkv }) => qkv[2].values), batch)
              : turnedValues(streams, sizes, both, which === 0 ? 0 : 1);
            // The reference's own sums are this far from exact: a number between two may go either way.
            const slack = which === 2 ? 0 : 6e-6;
            const [low, high] = [-slack, slack].map((shift) => {
              const out = new Uint8Array(tiles.byteLength);
              attentionTilesReference(out, values.map((x) => x + shift), kind, tokens, heads, tileDType);
              return elementsOf(out, tileDType);
            });
            const actual = elementsOf(await device.download(tiles), tileDType);
            assert.ok(actual.every((value, i) => value >= low[i] && value <= high[i]), kind);
            device.free(tiles.memory);
          }
          for (const { tensor } of [...both, ...streams.flatMap(({ norms }) => norms)]) tensor.dispose();
          for (
            const memory of new Set(streams.flatMap(({ qkv }) => qkv.map(({ tensor }) => tensor.memory)))
          ) {
            device.free(memory);
          }
        }),
        { numRuns: 30 },
      );
    });

    test("a NaN spoils its own head only", (device) =>
      check(device, () => {
        const shape = [2, 2, 3, 16] as const;
        const value = (seed: number) => (i: number) => seed < 2 && i === 150 + seed ? NaN : noise(seed)(i);
        const stream = streamOf(device, shape, "bf16", "bf16", "dense", value);
        const results = run([stream], [2, 3, 16], "bf16", tables(device, 2, 16, 9));
        for (const { expected } of results) {
          assert.ok(typeof expected !== "function");
          assert.equal(expected.filter(Number.isNaN).length, 16);
        }
        return results;
      }));

    test("is one launch a stream on slices of a product, and refuses what does not fit", (device) =>
      device.scope(() => {
        const stream = (tokens: number) =>
          asStream(streamOf(device, [2, tokens, 3, 16], "bf16", "bf16", "product", noise));
        const [text, image] = [stream(3), stream(5)];
        const [cos, sin] = tables(device, 8, 16, 1).map(({ tensor }) => tensor);
        const run = (...streams: QkvStream[]) => {
          const tokens = streams.reduce((sum, { q }) => sum + q.shape[1], 0);
          return jointQkNormRopeFused(streams, cos.narrow(0, 0, tokens), sin.narrow(0, 0, tokens), EPS);
        };
        assert.equal(launchesOf(device, () => run(image)), 1);
        assert.equal(launchesOf(device, () => run(text, image)), 2);
        const other = Tensor.empty(device, [2, 3, 3, 16], "f32");
        assert.throws(() => run({ ...text, k: image.k }), ShapeError);
        assert.throws(() => run(image, { ...text, v: other }), ShapeError);
        assert.throws(() => run({ ...text, normQ: cos }), ShapeError);
        assert.throws(() => jointQkNormRopeFused([text, image], cos, sin.narrow(0, 0, 7), EPS), ShapeError);
        const rounded = Tensor.empty(device, [8, 16], "bf16");
        assert.throws(() => jointQkNormRopeFused([text, image], cos, rounded, EPS), ShapeError);
      }));
  });
}

/** All tests of fused kernels on the GPU of this process's tests. */
export function fusedSuite(): void {
  adaLayerNormSuite();
  gatedAdaLayerNormSuite();
  addRmsNormSuite();
  jointQkNormRopeSuite();
}
