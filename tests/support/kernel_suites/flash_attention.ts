/** Flash attention, its tiles, and what float8 falls back to, on a GPU against their TypeScript references. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { bfloat16ToFloat32, float32ToBfloat16 } from "../../../ffi/bfloat16.ts";
import { ShapeError } from "../../../ffi/errors.ts";
import { float32ToFloat8, FLOAT8_LARGEST, float8ToFloat32 } from "../../../ffi/float8.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { allFinite } from "../../../kernels/all_finite.ts";
import { attentionReference } from "../../../kernels/attention.ts";
import { dequantize, dequantizeReference } from "../../../kernels/dequantize_float8.ts";
import { flashAttention, hasFlashAttention } from "../../../kernels/flash_attention.ts";
import {
  type AttentionDType,
  attentionTilesReference,
  emptyTiles,
  FLOAT8_VALUE_FACTOR,
  TILE,
  type TileKind,
  valueTiles,
} from "../../../kernels/attention_tiles.ts";
import { linearFloat8 } from "../../../kernels/linear_float8.ts";
import {
  FLOAT8_ROW_LARGEST,
  quantizeReference,
  quantizeRows,
  quantizeTensor,
} from "../../../kernels/quantize_float8.ts";
import { relativeError } from "../compare.ts";
import { valuesOf } from "../golden.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import { check, columns, dtypes, property, sample } from "./samples.ts";

export function flashAttentionSuite(): void {
  forEachGpu("valueTiles", (test) => {
    test("equal their reference: one or two streams, dtypes, lengths, views", async (device) => {
      const drawn = fc.record({
        batch: fc.integer({ min: 1, max: 2 }),
        tokens: fc.constantFrom(1, 16, 127, 128, 129, 200),
        heads: fc.integer({ min: 1, max: 2 }),
        dtype: dtypes,
        start: fc.constantFrom(0, 8, 3),
        cut: fc.double({ min: 0, max: 0.999, noNaN: true }),
        seed: fc.nat(1000),
      });
      await fc.assert(
        fc.asyncProperty(drawn, async ({ batch, tokens, heads, dtype, start, cut, seed }) => {
          const shape = [batch, tokens, heads * TILE];
          // Beyond what E4M3 holds, and below its smallest.
          const x = columns(device, shape, dtype, (i) => noise(seed)(i) * 2 ** (i % 24 - 14), start);
          const whole = x.tensor.reshape([batch, tokens, heads, TILE]);
          const first = Math.floor(cut * tokens);
          const pieces = [whole.narrow(1, 0, first), whole.narrow(1, first, tokens - first)] as const;
          const tiles = valueTiles(device, first === 0 ? [whole] : pieces);
          const expected = new Uint8Array(tiles.size);
          attentionTilesReference(expected, x.values, "value", tokens, heads, "f8e4m3");
          assert.deepEqual(await device.download(tiles), expected);
          for (const { memory } of [tiles, x.tensor]) device.free(memory);
        }),
        { numRuns: 30 },
      );
    });
  });

  forEachGpu("flashAttention", (test) => {
    test("is near its reference on rounded inputs: lengths, batches, heads, sharp and flat softmax", async (device) => {
      if (!hasFlashAttention(device)) {
        return device.scope(() => {
          const out = Tensor.empty(device, [1, 2, 1, TILE], "bf16");
          const tiles = emptyTiles(device, out.shape, "bf16");
          assert.throws(
            () => flashAttention(device, { q: tiles, k: tiles, v: tiles, keys: 2 }, 1, out),
            /is no Hopper GPU/,
          );
        });
      }
      // As many pairs of tiles as clusters, or more, or fewer: whole, split or both; and tiles without a neighbour.
      const cases = [
        [1, 128, 128, 1, 1],
        [1, 1, 1, 1, 1],
        [2, 200, 300, 3, 1],
        [1, 64, 16, 2, 4],
        [1, 300, 1000, 2, 8],
        [1, 8, 257, 132, 1],
        [1, 8, 700, 140, 1],
        [2, 130, 300, 35, 2],
      ];
      for (const dtype of ["f8e4m3", "bf16"] as const) {
        for (const [batch, queries, keys, heads, spread] of cases) {
          const error = await attentionError(device, dtype, { batch, queries, keys, heads, spread });
          const allowed = dtype === "bf16" ? 0.004 : 0.03;
          assert.ok(
            error <= allowed,
            `relative error ${error} in ${dtype} at [${batch}, ${queries}, ${keys}, ${heads}]`,
          );
        }
      }
    });

    test("keeps up with logits that grow from key to key, or leap", async (device) => {
      if (!hasFlashAttention(device)) return;
      const sizes = { batch: 1, queries: 130, keys: 700, heads: 1, spread: 1 };
      // In float8 the units keep some 13 bits of a sum: a logit of 300 is good to 0.04 or so, and its weight to 4 %.
      const allowed = (dtype: AttentionDType, growth: number) =>
        dtype === "bf16" ? 0.004 : 0.03 + Math.abs(growth) * 2 ** -11;
      for (const dtype of ["f8e4m3", "bf16"] as const) {
        for (const growth of [-300, 3, 30, 300, 600]) {
          const error = await attentionError(device, dtype, { ...sizes, growth });
          assert.ok(error <= allowed(dtype, growth), `relative error ${error} in ${dtype}, growth ${growth}`);
        }
        // Leaps in one tile of a pair, for which both begin again.
        for (const grows of [(query: number) => query < TILE, (query: number) => query >= TILE]) {
          const error = await attentionError(device, dtype, { ...sizes, growth: 600, grows });
          assert.ok(error <= allowed(dtype, 600), `relative error ${error} in ${dtype}, one tile: ${grows}`);
        }
        // Split by keys.
        const error = await attentionError(device, dtype, { ...sizes, queries: 8, heads: 140, growth: 600 });
        assert.ok(error <= allowed(dtype, 600), `relative error ${error} in ${dtype}, split`);
      }
    });

    test("begins again with larger sums where those of f16 overflow", async (device) => {
      if (!hasFlashAttention(device)) return;
      for (const mean of [20, 200, 3000]) {
        for (const [queries, heads, spread] of [[130, 2, 1], [130, 2, 4], [8, 140, 1]]) {
          const sizes = { batch: 1, queries, keys: 900, heads, spread };
          const error = await attentionError(device, "f8e4m3", { ...sizes, mean });
          assert.ok(error <= 0.03, `relative error ${error}, values near ${mean}, ${queries} queries`);
        }
      }
      // Logits that leap as well.
      const sizes = { batch: 1, queries: 130, keys: 700, heads: 1, spread: 1 };
      const error = await attentionError(device, "f8e4m3", { ...sizes, growth: 600, mean: 2000 });
      assert.ok(error <= 0.03, `relative error ${error}`);
    });

    test("refuses what does not fit", (device) => {
      if (!hasFlashAttention(device)) return;
      device.scope(() => {
        const out = Tensor.empty(device, [1, 130, 2, TILE], "bf16");
        const tiles = emptyTiles(device, out.shape, "f8e4m3");
        const given = { q: tiles, k: tiles, v: tiles, keys: 130 };
        const refuses = (what: typeof given, place: Tensor) =>
          assert.throws(() => flashAttention(device, what, 1, place), ShapeError);
        refuses({ ...given, keys: 300 }, out);
        refuses({ ...given, v: emptyTiles(device, out.shape, "bf16") }, out);
        refuses(given, out.narrow(1, 0, 100));
        refuses(given, out.narrow(3, 0, 64));
        refuses(given, Tensor.empty(device, out.shape, "f32"));
      });
    });
  });

  forEachGpu("dequantize", (test) => {
    test("equals its reference, by rows and by tensor", async (device) => {
      const drawn = fc.record({
        rows: fc.integer({ min: 1, max: 9 }),
        k: fc.constantFrom(1, 8, 16, 30, 256),
        rowwise: fc.boolean(),
        dtype: dtypes,
        seed: fc.nat(1000),
      });
      await property(device, drawn, 30, ({ rows, k, rowwise, dtype, seed }) => {
        const x = sample(device, [rows, k], "f32", noise(seed));
        const quantized = (rowwise ? quantizeRows : quantizeTensor)(x.tensor);
        const actual = dequantize(quantized, dtype);
        const expected = referenceOf(x.values, k, rowwise);
        return [{ actual, dtype, shape: [rows, k], expected, slack: () => 0 }];
      });
    });
  });

  forEachGpu("linearFloat8", (test) => {
    test("is computed in bfloat16 where the library has no float8 kernel", async (device) => {
      await check(device, () => {
        const x = sample(device, [5, 32], "bf16", noise(1));
        const w = sample(device, [48, 32], "bf16", noise(2));
        const weight = { ...quantizeRows(w.tensor), rowwise: true };
        const takes = device.takesMatmul;
        device.takesMatmul = () => false;
        try {
          const actual = linearFloat8(x.tensor, weight);
          const [xs, ws] = [referenceOf(x.values, 32, true), referenceOf(w.values, 32, true)];
          const expected = Float32Array.from({ length: 5 * 48 }, (_, i) => {
            const [row, column] = [Math.floor(i / 48), i % 48];
            let sum = 0;
            for (let j = 0; j < 32; j++) sum += xs[row * 32 + j] * ws[column * 32 + j];
            return sum;
          });
          const slack = () => 32 * 2 ** -7; // both factors are rounded to bfloat16 before
          return [{ actual, dtype: "bf16", shape: [5, 48], expected, slack }];
        } finally {
          device.takesMatmul = takes;
        }
      });
    });
  });

  forEachGpu("allFinite", (test) => {
    test("finds one infinity or NaN anywhere, and nothing else", async (device) => {
      for (const size of [1, 7, 4096, 300_001]) {
        for (const dtype of ["f32", "bf16"] as const) {
          const largest = 3e38;
          for (const [bad, at] of [[NaN, 0], [Infinity, size - 1], [-Infinity, size >> 1], [largest, 0]]) {
            const x = sample(device, [size], dtype, (i) => i === at ? bad : i - 5);
            assert.equal(await allFinite(x.tensor), bad === largest, `${bad} at ${at} of ${size} ${dtype}`);
            device.free(x.tensor.memory);
          }
        }
      }
    });
  });
}

/** What {@link dequantize} gives for a quantized `x`. */
function referenceOf(x: Float32Array, k: number, rowwise: boolean): Float32Array {
  const length = rowwise ? k : x.length;
  const [codes, scales] = [new Uint8Array(x.length), new Float32Array(x.length / length)];
  quantizeReference(codes, scales, x, length, rowwise ? FLOAT8_ROW_LARGEST : FLOAT8_LARGEST.ocp);
  const out = new Float32Array(x.length);
  dequantizeReference(out, codes, scales, length);
  return out;
}

interface Sizes {
  readonly batch: number;
  readonly queries: number;
  readonly keys: number;
  readonly heads: number;
  /** Of q's values: large ones make the softmax sharp. */
  readonly spread: number;
  /** By how much logits grow, beside their spread, from the first key to the last. */
  readonly growth?: number;
  /** Of which queries they do; of all, when left out. */
  readonly grows?: (query: number) => boolean;
  /** What values are near. */
  readonly mean?: number;
}

/** The first dimension of queries where logits grow. */
const GROWING = 32;

/** Relative error of attention from tiles against the reference on the same rounded inputs. */
async function attentionError(
  device: GpuDevice,
  dtype: AttentionDType,
  { batch, queries, keys, heads, spread, growth = 0, grows = () => true, mean = 0 }: Sizes,
): Promise<number> {
  const draw = (kind: TileKind, tokens: number, seed: number, size: number) => {
    const shift = kind === "value" ? mean : 0;
    const values = new Float32Array(batch * tokens * heads * TILE).map((_, i) =>
      shift + 2 * size * noise(seed)(i)
    );
    for (let i = 0; growth !== 0 && kind !== "value" && i < values.length; i += TILE) {
      const token = Math.floor(i / (heads * TILE)) % tokens;
      values[i] = kind === "query"
        ? (grows(token) ? GROWING : 0)
        : growth / GROWING * TILE ** 0.5 * token / tokens;
    }
    const tiles = emptyTiles(device, [batch, tokens, heads], dtype);
    const bytes = new Uint8Array(tiles.byteLength);
    attentionTilesReference(bytes, values, kind, tokens, heads, dtype);
    device.upload(bytes, tiles.memory);
    if (dtype === "f8e4m3") {
      const codes = new Uint8Array(values.length);
      const factor = kind === "value" ? FLOAT8_VALUE_FACTOR : 1;
      float32ToFloat8(values.map((value) => value * factor), codes);
      float8ToFloat32(codes, values, dtype);
      for (let i = 0; i < values.length; i++) values[i] /= factor;
    } else {
      const bits = new Uint16Array(values.length);
      float32ToBfloat16(values, bits);
      bfloat16ToFloat32(bits, values);
    }
    return { values, tiles };
  };
  const [q, k, v] = [
    draw("query", queries, 1, spread),
    draw("key", keys, 2, 1),
    draw("value", keys, 3, 1),
  ];
  const expected = new Float32Array(q.values.length);
  const sizes = { batch, queries, keys, heads, headDim: TILE };
  const none = new Float32Array(0);
  attentionReference(expected, q.values, k.values, v.values, none, sizes, TILE ** -0.5, false);
  const out = Tensor.empty(device, [batch, queries, heads, TILE], "bf16");
  flashAttention(device, { q: q.tiles, k: k.tiles, v: v.tiles, keys }, TILE ** -0.5, out);
  const error = relativeError(await valuesOf(out), expected);
  for (const { memory } of [q.tiles, k.tiles, v.tiles, out]) device.free(memory);
  return error;
}
