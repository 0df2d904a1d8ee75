/** Norms, rotary embedding and attention on a GPU against their TypeScript references. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../../ffi/errors.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { attention, attentionByMatmul, attentionReference, softmaxRows } from "../../../kernels/attention.ts";
import { groupNorm, groupNormReference } from "../../../kernels/group_norm.ts";
import { groupNormSilu, groupNormSiluFused } from "../../../kernels/group_norm_silu.ts";
import { layerNorm, layerNormReference } from "../../../kernels/layer_norm.ts";
import { rmsNorm, rmsNormReference } from "../../../kernels/rms_norm.ts";
import { rope, ropeReference } from "../../../kernels/rope.ts";
import { siluReference } from "../../../kernels/silu.ts";
import { softmaxOnGpu } from "../../../kernels/softmax.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import {
  around,
  check,
  columns,
  dtypes,
  EPS,
  type Float,
  frame,
  hiddens,
  lostBy,
  means,
  NONE,
  property,
  type Result,
  type Sample,
  sample,
  seeds,
  starts,
} from "./samples.ts";

/** The norms of rows. */
function rowNormSuite(): void {
  forEachGpu("layerNorm", (test) => {
    test("equals its reference: row lengths, dtypes, weights, large means, odd addresses", async (device) => {
      const drawn = fc.record({
        rows: fc.integer({ min: 1, max: 9 }),
        hidden: hiddens,
        dtype: dtypes,
        mean: means,
        start: starts,
        affine: fc.constantFrom<(Float | "weight" | "bias")[]>([], ["f32"], ["bf16"], ["weight"], ["bias"]),
        seed: seeds,
      });
      await property(device, drawn, 50, ({ rows, hidden, dtype, mean, start, affine: [affine], seed }) => {
        const x = sample(device, [rows, hidden], dtype, around(mean, seed), start);
        const vector = (offset: number) =>
          sample(
            device,
            [hidden],
            affine === "f32" || affine === "bf16" ? affine : dtype,
            noise(seed + offset),
          );
        const weight = affine === undefined || affine === "bias" ? undefined : vector(1);
        const bias = affine === undefined || affine === "weight" ? undefined : vector(2);
        const expected = new Float32Array(x.values.length);
        const [w, b] = [weight?.values ?? NONE, bias?.values ?? NONE];
        layerNormReference(expected, x.values, w, b, hidden, EPS);
        const actual = layerNorm(x.tensor, EPS, weight?.tensor, bias?.tensor);
        return [{ actual, dtype, shape: [rows, hidden], expected, slack: () => lostBy(mean) }];
      });
    });

    test("a NaN or an infinity spoils its own row, whatever shares its block", (device) =>
      check(device, () =>
        [24, 128, 3072].flatMap((hidden) => {
          const odd = new Map([[0, NaN], [2 * hidden + 5, Infinity], [6 * hidden - 1, NaN]]);
          const x = sample(device, [7, hidden], "bf16", (i) => odd.get(i) ?? noise(1)(i));
          const expected = new Float32Array(x.values.length);
          layerNormReference(expected, x.values, NONE, NONE, hidden, EPS);
          assert.equal(expected.filter(Number.isNaN).length, 3 * hidden);
          const actual = layerNorm(x.tensor, EPS);
          return [{ actual, dtype: "bf16", shape: [7, hidden], expected, slack: () => 1e-5 }];
        })));

    test("refuses weights of two dtypes", (device) =>
      device.scope(() => {
        const [x, weight] = [[3, 8], [8]].map((shape) => sample(device, shape, "bf16", noise(1)).tensor);
        const bias = sample(device, [8], "f32", noise(2)).tensor;
        assert.throws(() => layerNorm(x, EPS, weight, bias), ShapeError);
      }));
  });

  forEachGpu("rmsNorm", (test) => {
    test("equals its reference: row lengths, dtypes, large means, odd addresses", async (device) => {
      const drawn = fc.record({
        rows: fc.integer({ min: 1, max: 40 }),
        hidden: hiddens,
        dtypes: fc.constantFrom<[Float, Float]>(["f32", "f32"], ["bf16", "bf16"], ["bf16", "f32"]),
        mean: means,
        start: starts,
        seed: seeds,
      });
      await property(
        device,
        drawn,
        50,
        ({ rows, hidden, dtypes: [dtype, weightDtype], mean, start, seed }) => {
          const x = sample(device, [rows, hidden], dtype, around(mean, seed), start);
          const weight = sample(device, [hidden], weightDtype, noise(seed + 1));
          const expected = new Float32Array(x.values.length);
          rmsNormReference(expected, x.values, weight.values, EPS);
          const actual = rmsNorm(x.tensor, weight.tensor, EPS);
          return [{ actual, dtype, shape: [rows, hidden], expected, slack: () => 2e-6 }];
        },
      );
    });

    test("reads views of q and k where they are: strided heads, tokens and batches", async (device) => {
      const drawn = fc.record({
        batch: fc.integer({ min: 1, max: 2 }),
        tokens: fc.integer({ min: 1, max: 5 }),
        heads: fc.integer({ min: 1, max: 3 }),
        headDim: fc.constantFrom(6, 64, 128),
        dtype: dtypes,
        view: fc.constantFrom("fused", "heads", "tokens", "transposed"),
        seed: seeds,
      });
      await property(device, drawn, 40, ({ batch, tokens, heads, headDim, dtype, view, seed }) => {
        const shape = [batch, tokens, heads, headDim];
        const value = noise(seed);
        let x: Sample;
        if (view === "fused") {
          // The middle third of a projection to q, k and v.
          x = columns(device, [batch, tokens, heads * headDim], dtype, value, heads * headDim);
          x = { tensor: x.tensor.reshape(shape), values: x.values };
        } else if (view === "heads") {
          x = columns(device, shape, dtype, value, headDim);
        } else if (view === "tokens") {
          const wide = sample(device, [batch, tokens + 2, heads, headDim], dtype, value);
          const values = wide.values.filter((_, i) => {
            const token = Math.floor(i / (heads * headDim)) % (tokens + 2);
            return token > 0 && token <= tokens;
          });
          x = { tensor: wide.tensor.narrow(1, 1, tokens), values };
        } else {
          const dense = sample(device, [batch, headDim, heads, tokens], dtype, value);
          const values = new Float32Array(dense.values.length);
          for (let i = 0; i < values.length; i++) {
            const [d, head] = [i % headDim, Math.floor(i / headDim) % heads];
            const row = Math.floor(i / (headDim * heads));
            const [token, b] = [row % tokens, Math.floor(row / tokens)];
            values[i] = dense.values[((b * headDim + d) * heads + head) * tokens + token];
          }
          x = { tensor: dense.tensor.permute([0, 3, 2, 1]), values };
        }
        const weight = sample(device, [headDim], dtype, noise(seed + 1));
        const expected = new Float32Array(x.values.length);
        rmsNormReference(expected, x.values, weight.values, EPS);
        const actual = rmsNorm(x.tensor, weight.tensor, EPS);
        return [{ actual, dtype, shape, expected, slack: () => 2e-6 }];
      });
    });

    test("a NaN spoils its own row only", (device) =>
      check(device, () => {
        const x = sample(device, [33, 128], "f32", (i) => i === 128 * 9 + 77 ? NaN : noise(1)(i));
        const weight = sample(device, [128], "f32", noise(2));
        const expected = new Float32Array(x.values.length);
        rmsNormReference(expected, x.values, weight.values, EPS);
        const actual = rmsNorm(x.tensor, weight.tensor, EPS);
        return [{ actual, dtype: "f32", shape: [33, 128], expected, slack: () => 2e-6 }];
      }));
  });
}

function ropeSuite(): void {
  forEachGpu("rope", (test) => {
    test("equals its reference: heads, widths, views, tables inside of longer ones", async (device) => {
      const drawn = fc.record({
        batch: fc.integer({ min: 1, max: 2 }),
        tokens: fc.integer({ min: 1, max: 5 }),
        heads: fc.constantFrom(1, 3, 4, 9, 24),
        headDim: fc.constantFrom(2, 6, 20, 64, 128, 640),
        dtype: dtypes,
        view: fc.constantFrom("dense", "fused", "heads", "odd"),
        firstToken: fc.nat(2),
        seed: seeds,
      });
      await property(
        device,
        drawn,
        60,
        ({ batch, tokens, heads, headDim, dtype, view, firstToken, seed }) => {
          const shape = [batch, tokens, heads, headDim];
          const value = (i: number) => 8 * noise(seed)(i);
          const fused = () =>
            columns(device, [batch, tokens, heads * headDim], dtype, value, heads * headDim);
          const x = view === "fused"
            ? fused()
            : view === "heads"
            ? columns(device, shape, dtype, value, headDim)
            : sample(device, shape, dtype, value, view === "odd" ? 1 : 0);
          const [cos, sin] = [1, 2].map((offset) => {
            const table = sample(device, [tokens + 3, headDim], "f32", noise(seed + offset));
            const start = firstToken * headDim;
            return {
              tensor: table.tensor.narrow(0, firstToken, tokens),
              values: table.values.subarray(start, start + tokens * headDim),
            };
          });
          const expected = new Float32Array(x.values.length);
          ropeReference(expected, x.values, cos.values, sin.values, heads, headDim);
          const actual = rope(x.tensor.reshape(shape), cos.tensor, sin.tensor);
          return [{ actual, dtype, shape, expected, slack: () => 4e-6 }];
        },
      );
    });

    test("a NaN spoils its own pair only", (device) =>
      check(device, () => {
        const shape = [1, 2, 3, 16];
        const x = sample(device, shape, "bf16", (i) => i === 37 ? NaN : noise(1)(i));
        const [cos, sin] = [1, 2].map((seed) => sample(device, [2, 16], "f32", noise(seed)));
        const expected = new Float32Array(x.values.length);
        ropeReference(expected, x.values, cos.values, sin.values, 3, 16);
        assert.equal(expected.filter(Number.isNaN).length, 2);
        const actual = rope(x.tensor, cos.tensor, sin.tensor);
        return [{ actual, dtype: "bf16", shape, expected, slack: () => 1e-6 }];
      }));

    test("refuses tables that are not f32", (device) =>
      device.scope(() => {
        const x = sample(device, [1, 2, 3, 16], "bf16", noise(1)).tensor;
        const table = sample(device, [2, 16], "bf16", noise(2)).tensor;
        assert.throws(() => rope(x, table, table), ShapeError);
      }));
  });
}

/** Row-major `[batch, pixels, channels]` of row-major `[batch, channels, pixels]`. */
function interleave(values: Float32Array, batch: number, channels: number): Float32Array {
  const pixels = values.length / (batch * channels);
  return values.map((_, i) => {
    const [channel, row] = [i % channels, Math.floor(i / channels)];
    return values[(Math.floor(row / pixels) * channels + channel) * pixels + row % pixels];
  });
}

/** Group norm alone, and what follows it with SiLU. */
function groupNormSuite(): void {
  groupNormTests("groupNorm", groupNorm, false);
  groupNormTests("groupNormSilu", groupNormSilu, true);
  groupNormTests("groupNormSiluFused", groupNormSiluFused, true);
}

function groupNormTests(name: string, op: typeof groupNorm, withSilu: boolean): void {
  /** What `op` makes of row-major `[batch, channels, pixels]`, and how far from it a GPU's result may be. */
  const reference = (
    x: Float32Array,
    weight: Float32Array,
    bias: Float32Array,
    batch: number,
    groups: number,
    dtype: Float,
    normSlack: (i: number) => number,
  ) => {
    const normed = new Float32Array(x.length);
    groupNormReference(normed, x, weight, bias, batch, groups, EPS);
    if (!withSilu) return { expected: normed, slack: normSlack };
    const expected = new Float32Array(x.length);
    siluReference(expected, normed);
    // SiLU's slope is up to 1.1, and its exponential is good to some units in the last place. Two kernels round twice.
    const rounding = dtype === "bf16" && op === groupNormSilu ? 2 ** -8 : 0;
    const slack = (i: number) =>
      1.1 * (normSlack(i) + rounding * Math.abs(normed[i])) + 1e-6 * Math.abs(expected[i]);
    return { expected, slack };
  };

  /** Both layouts of a picture `[batch, channels, height, width]` of `value(i)`, through `op`. */
  const bothLayouts = (
    device: GpuDevice,
    shape: readonly number[],
    groups: number,
    dtype: Float,
    weightDtype: Float,
    start: number,
    value: (i: number) => number,
    normSlack: (i: number) => number,
  ): Result[] => {
    const [batch, channels, height, width] = shape;
    const x = sample(device, shape, dtype, value, start);
    const [weight, bias] = [1, 2].map((seed) => sample(device, [channels], weightDtype, noise(seed)));
    const { expected, slack } = reference(
      x.values,
      weight.values,
      bias.values,
      batch,
      groups,
      dtype,
      normSlack,
    );
    const norm = (picture: Tensor) => op(picture, groups, weight.tensor, bias.tensor, EPS);

    const inside = interleave(x.values, batch, channels);
    const pixelsFirst = sample(device, [batch, height, width, channels], dtype, (i) => inside[i], start);
    const interleaved = norm(pixelsFirst.tensor.permute([0, 3, 1, 2]));
    assert.deepEqual(interleaved.shape, shape);
    const planar = { actual: norm(x.tensor), dtype, shape, expected, slack };
    if (channels === 1 || height * width === 1) return [planar, { ...planar, actual: interleaved }];
    const actual = interleaved.permute([0, 2, 3, 1]);
    assert.ok(actual.isContiguous, "the channels are not last any more");
    const order = interleave(x.values.map((_, i) => i), batch, channels);
    return [planar, {
      actual,
      dtype,
      shape: pixelsFirst.tensor.shape,
      expected: interleave(expected, batch, channels),
      slack: (i) => slack(order[i]),
    }];
  };

  forEachGpu(name, (test) => {
    test("equals its reference, NCHW and NHWC: sizes, dtypes, large means, odd addresses", async (device) => {
      const drawn = fc.record({
        batch: fc.integer({ min: 1, max: 2 }),
        channels: fc.constantFrom<[groups: number, perGroup: number]>([1, 1], [4, 3], [3, 4], [4, 8]),
        size: fc.oneof(
          fc.tuple(fc.integer({ min: 1, max: 9 }), fc.integer({ min: 1, max: 9 })),
          fc.constantFrom<[number, number]>([8, 8], [16, 24], [33, 40]),
        ),
        dtype: dtypes,
        mean: means,
        start: starts,
        seed: seeds,
      });
      await property(
        device,
        drawn,
        60,
        ({ batch, channels: [groups, perGroup], size, dtype, mean, start, seed }) => {
          const shape = [batch, groups * perGroup, ...size];
          const value = around(mean, seed);
          return bothLayouts(
            device,
            shape,
            groups,
            dtype,
            dtype,
            start,
            value,
            () => lostBy(mean),
          );
        },
      );
    });

    test("a group is shared out over many blocks, and a NaN spoils it as a whole", (device) =>
      check(device, () =>
        (["f32", "bf16"] as const).flatMap((dtype) => {
          const shape = [1, 16, 96, 125];
          const value = (i: number) =>
            i === 5 * 12000 + 11999 ? NaN : 7 + noise(3)(i) * (1 + i % 12000 / 3000);
          return bothLayouts(device, shape, 4, dtype, "f32", 0, value, () => 2e-5);
        })));

    test("a picture of one colour becomes its bias", (device) =>
      check(device, () => bothLayouts(device, [1, 8, 40, 52], 2, "f32", "f32", 0, () => -300, () => 1e-6)));

    test("other layouts are copied, and channels may be more than a block has threads", (device) =>
      check(device, () => {
        const x = sample(device, [2, 5, 6, 300], "f32", noise(1));
        const [weight, bias] = [1, 2].map((seed) => sample(device, [300], "f32", noise(seed)));
        const values = interleave(x.values, 2, 30); // [2, 300, 30] of the view below
        const { expected } = reference(values, weight.values, bias.values, 2, 100, "f32", () => 0);
        const norm = (picture: Tensor) => op(picture, 100, weight.tensor, bias.tensor, EPS);
        const last = norm(x.tensor.permute([0, 3, 1, 2])).permute([0, 2, 3, 1]);
        const turned = x.tensor.permute([0, 3, 2, 1]);
        const turnedExpected = expected.map((_, i) => {
          const [b, a] = [i % 5, Math.floor(i / 5) % 6];
          return expected[Math.floor(i / 30) * 30 + b * 6 + a];
        });
        const common = { dtype: "f32" as const, slack: () => 5e-6 };
        return [
          { ...common, actual: last, shape: [2, 5, 6, 300], expected: interleave(expected, 2, 300) },
          { ...common, actual: norm(turned), shape: [2, 300, 6, 5], expected: turnedExpected },
        ];
      }));
  });
}

function attentionSuite(): void {
  forEachGpu("softmax", (test) => {
    test("equals its reference: lengths, bias, causal, dtypes, odd logits", async (device) => {
      const drawn = fc.record({
        heads: fc.integer({ min: 1, max: 3 }),
        rows: fc.integer({ min: 1, max: 5 }),
        // Few keys share a warp; 33000 are more than a block holds.
        keys: fc.constantFrom(1, 7, 77, 256, 1027, 4352, 33000, 33001),
        bias: fc.constantFrom<Float | undefined>(undefined, "f32", "bf16"),
        causalStart: fc.constantFrom(undefined, 0, 3, 200),
        dtype: dtypes,
        odd: fc.constantFrom(0, 0, NaN, Infinity, -Infinity),
        sharp: fc.constantFrom(1, 60),
        seed: seeds,
      });
      await property(
        device,
        drawn,
        60,
        ({ heads, rows, keys, bias: biasDtype, causalStart: anyStart, dtype, odd, sharp, seed }) => {
          const causalStart = anyStart === undefined
            ? undefined
            : Math.min(anyStart, Math.max(keys - rows, 0));
          const seen = causalStart === undefined || keys >= causalStart + rows;
          const shape = [heads, rows, keys];
          const at = seed % (heads * rows * keys);
          const logits = sample(
            device,
            shape,
            "f32",
            (i) => i === at && odd !== 0 ? odd : sharp * noise(seed)(i),
          );
          // The rows of the bias are a part of a longer one's, as for a part of the queries.
          const bias = biasDtype &&
            columns(device, [heads, rows * keys], biasDtype, noise(seed + 1), 2 * keys);
          const expected = logits.values.slice();
          for (let head = 0; head < heads; head++) {
            const part = (x: Float32Array) => x.subarray(head * rows * keys, (head + 1) * rows * keys);
            softmaxRows(part(expected), keys, bias && part(bias.values), seen ? causalStart : undefined);
          }
          const actual = softmaxOnGpu(
            device,
            logits.tensor,
            dtype,
            bias?.tensor.reshape(shape),
            seen ? causalStart : undefined,
          );
          assert.equal(actual === logits.tensor, dtype === "f32", "f32 stays in place");
          return [{ actual, dtype, shape, expected, slack: (i) => 1e-9 + 4e-7 * sharp * expected[i] }];
        },
      );
    });

    test("rows of infinities: all of them -infinity are NaN, some of them are 0", (device) =>
      check(device, () =>
        [5, 128, 33000].map((keys) => {
          const logits = sample(device, [1, 2, keys], "f32", (i) =>
            i >= keys && i % 3 === 0 ? noise(1)(i) : -Infinity);
          const expected = logits.values.slice();
          softmaxRows(expected, keys);
          const actual = softmaxOnGpu(device, logits.tensor, "f32");
          return {
            actual,
            dtype: "f32",
            shape: [1, 2, keys],
            expected,
            slack: () =>
              1e-7,
          };
        })));
  });

  /** q, k and v of drawn sizes, and what attention makes of them. */
  const problem = fc.record({
    batch: fc.integer({ min: 1, max: 2 }),
    queries: fc.constantFrom(1, 5, 24, 77),
    otherKeys: fc.constantFrom(undefined, 1, 9, 64),
    heads: fc.integer({ min: 1, max: 3 }),
    headDim: fc.constantFrom(1, 8, 20, 64),
    causal: fc.boolean(),
    biased: fc.boolean(),
    fused: fc.boolean(),
    framed: fc.boolean(),
    scale: fc.constantFrom(undefined, 1, 0.3),
    dtype: dtypes,
    seed: seeds,
  });
  type Problem = typeof problem extends fc.Arbitrary<infer P> ? P : never;

  const run = (
    device: GpuDevice,
    drawn: Problem,
    compute: (
      q: Tensor,
      k: Tensor,
      v: Tensor,
      options: { scale: number; causal: boolean; bias?: Tensor; out?: Tensor },
    ) => Tensor,
  ): Result[] => {
    const { batch, queries, otherKeys, heads, headDim, causal, biased, fused, dtype, seed } = drawn;
    const keys = causal ? queries : otherKeys ?? queries;
    const scale = drawn.scale ?? headDim ** -0.5;
    const [q, k, v] = [queries, keys, keys].map((tokens, i) => {
      const shape = [batch, tokens, heads, headDim];
      const value = noise(seed + i);
      if (!fused) return sample(device, shape, dtype, value);
      const { tensor, values } = columns(
        device,
        [batch, tokens, heads * headDim],
        dtype,
        value,
        heads * headDim,
      );
      return { tensor: tensor.reshape(shape), values };
    });
    const bias = biased ? sample(device, [heads, queries, keys], dtype, noise(seed + 3)) : undefined;
    const expected = new Float32Array(q.values.length);
    const shape = { batch, queries, keys, heads, headDim };
    attentionReference(expected, q.values, k.values, v.values, bias?.values ?? NONE, shape, scale, causal);
    const options = { scale, causal, ...(bias === undefined ? {} : { bias: bias.tensor }) };
    // Values are up to 1; in bf16 the weights are rounded before they meet them.
    const slack = () => dtype === "bf16" ? 2 ** -8 : 5e-6;
    if (!drawn.framed) {
      const actual = compute(q.tensor, k.tensor, v.tensor, options);
      return [{ actual, dtype, shape: q.tensor.shape, expected, slack }];
    }
    const { whole, inside, filled } = frame(device, [batch, queries, heads * headDim], dtype, 8);
    const out = inside.reshape(q.tensor.shape);
    assert.equal(compute(q.tensor, k.tensor, v.tensor, { ...options, out }), out);
    return [{ actual: whole, dtype, shape: whole.shape, expected: filled(expected), slack }];
  };

  forEachGpu("attention", (test) => {
    test("equals its reference: batches, causal, bias, scale, views, odd sizes, a place for the result", (device) =>
      property(device, problem, 40, (drawn) => run(device, drawn, attention)));

    test("computed by matrix products in parts of the rows equals its reference", (device) =>
      property(
        device,
        fc.tuple(problem, fc.constantFrom(1, 3, 10, 30)),
        40,
        ([drawn, rows]) =>
          run(
            device,
            drawn,
            (q, k, v, { scale, out = Tensor.empty(device, q.shape, q.dtype), ...options }) => {
              attentionByMatmul(device, { q, k, v, out, scale }, options, rows);
              return out;
            },
          ),
      ));

    test("refuses a place for the result that does not fit", (device) =>
      device.scope(() => {
        const x = Tensor.empty(device, [1, 4, 2, 8], "bf16");
        const places = [
          Tensor.empty(device, [1, 4, 2, 8], "f32"),
          Tensor.empty(device, [1, 4, 16], "bf16"),
          Tensor.empty(device, [1, 4, 8, 2], "bf16").permute([0, 1, 3, 2]),
        ];
        for (const out of places) assert.throws(() => attention(x, x, x, { out }), ShapeError);
      }));
  });
}

/** All tests of these kernels on the GPU of this process's tests. */
export function normsSuite(): void {
  rowNormSuite();
  ropeSuite();
  groupNormSuite();
  attentionSuite();
}
