/** Products with fused epilogues, and the scales that they need beforehand, on a GPU against their TypeScript references. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../../ffi/errors.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import {
  type AttentionDType,
  attentionTilesReference,
  TILE,
  type TileKind,
} from "../../../kernels/attention_tiles.ts";
import { dequantizeReference } from "../../../kernels/dequantize_float8.ts";
import { hasFlashAttention } from "../../../kernels/flash_attention.ts";
import {
  fusedGelu,
  type FusedLayer,
  fusedLinear,
  fusedLinearReference,
  fusedQkv,
  fusedResidual,
  type Layers,
} from "../../../kernels/fused_linear.ts";
import { geluTanhReference } from "../../../kernels/gelu_tanh.ts";
import {
  layerBound,
  layerBoundReference,
  outputScales,
  outputScalesReference,
} from "../../../kernels/output_scales.ts";
import { FLOAT8_ROW_LARGEST, FLOAT8_ROW_SUM, quantizeRows } from "../../../kernels/quantize_float8.ts";
import { quantizeWeightRows } from "../../../kernels/quantize_weight_rows.ts";
import { rmsNormReference } from "../../../kernels/rms_norm.ts";
import { rotaryPairs, rotaryPairsReference } from "../../../kernels/rotary_pairs.ts";
import { ropeReference } from "../../../kernels/rope.ts";
import { valuesOf } from "../golden.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import { decode } from "./layouts.ts";
import { EPS, sample, seeds } from "./samples.ts";

/** A layer on the GPU, and `x weight^T + bias` of its numbers as they are there. */
interface Drawn {
  readonly layer: FusedLayer;
  readonly expected: Float32Array;
  /** How far a result may be off: a part of what Cauchy and Schwarz allow it to be. */
  readonly slack: (i: number) => number;
}

export function fusedLinearSuite(): void {
  forEachGpu("fused linear", (test) => {
    test("linear, residual and gelu are near their references: dtypes, odd sizes, one stream or two", async (device) => {
      if (!hasFlashAttention(device)) return refusesElsewhere(device);
      const drawn = fc.record({
        rows: fc.array(fc.constantFrom(1, 7, 64, 127, 128, 129, 255, 256, 300), {
          minLength: 1,
          maxLength: 2,
        }),
        columns: fc.constantFrom(16, 192, 208, 256, 272, 528, 784),
        k: fc.constantFrom(16, 64, 128, 144, 400, 1040),
        float8: fc.boolean(),
        biased: fc.boolean(),
        width: fc.constantFrom(undefined, 208 as const, 256 as const),
        epilogue: fc.constantFrom("linear" as const, "residual" as const, "gelu" as const),
        seed: seeds,
      });
      await fc.assert(
        fc.asyncProperty(drawn, async ({ rows, columns, k, float8, biased, width, epilogue, seed }) => {
          const layers = await Promise.all(
            rows.map((count, i) => draw(device, count, columns, k, float8, biased, seed + 9 * i)),
          );
          const stored = epilogue === "gelu" && float8 ? "f8e4m3" : "bf16";
          // Outputs are columns of wider tensors, whose other columns must stay what they are.
          const wide = rows.map((count) => filled(device, [count, columns + 64], stored));
          const outs = wide.map((tensor) => tensor.narrow(1, 32, columns));
          const shape = width === undefined || (stored === "f8e4m3" && width !== 256)
            ? undefined
            : { width, slabs: 1 };
          const residuals = rows.map((count, i) =>
            sample(device, [count, columns], "bf16", noise(seed + 50 + i))
          );
          const gates = rows.map((_, i) => sample(device, [columns], "bf16", noise(seed + 60 + i)));
          const scales = rows.map((count) =>
            Tensor.fromFloat32(device, new Float32Array(count).map((_, row) => 0.02 + row / 4096), [count])
          );
          const given = layers.map(({ layer }, i) => ({
            ...layer,
            out: outs[i],
            residual: residuals[i].tensor,
            gate: gates[i].tensor,
            ...(stored === "f8e4m3" && { outScales: scales[i] }),
          })) as unknown as Layers<never>;
          ({ linear: fusedLinear, residual: fusedResidual, gelu: fusedGelu })[epilogue](device, given, shape);
          for (const [i, { expected, slack }] of layers.entries()) {
            const got = await wideValues(wide[i]);
            for (let row = 0; row < rows[i]; row++) {
              for (let column = 0; column < columns + 64; column++) {
                const value = got[row * (columns + 64) + column];
                const inside = column >= 32 && column < columns + 32;
                const at = row * columns + column - 32;
                if (!inside) {
                  assert.equal(value, 1, `row ${row}, column ${column - 32} was written`);
                  continue;
                }
                let [want, allowed] = [expected[at], slack(at)];
                if (epilogue === "residual") {
                  const gate = gates[i].values[column - 32];
                  want = residuals[i].values[at] + gate * want;
                  allowed = allowed * Math.abs(gate) + Math.abs(want) / 128;
                } else if (epilogue === "gelu") {
                  const gelu = new Float32Array(1);
                  geluTanhReference(gelu, Float32Array.of(want));
                  const scale = float8 ? 0.02 + row / 4096 : 1;
                  want = Math.max(-448, Math.min(448, gelu[0] / scale));
                  allowed = 1.2 * allowed / scale + Math.abs(want) * (float8 ? 1 / 15 : 1 / 128) +
                    (float8 ? 0.002 : 0);
                } else allowed += Math.abs(want) / 128;
                assert.ok(
                  Math.abs(value - want) <= allowed,
                  `${epilogue}: row ${row}, column ${column - 32} is ${value}, not ${want} (${allowed})`,
                );
              }
            }
          }
        }),
        { numRuns: 40 },
      );
    });

    test("sums of float8 stay within f16 whatever rows hold: all of one sign, of one size, or one element alone", async (device) => {
      if (!hasFlashAttention(device)) return;
      const k = 15360;
      const kinds: ((i: number) => number)[] = [
        () => 1,
        (i) => Math.abs(noise(5)(i)),
        (i) => i % 7 === 0 ? 1 : 2 ** -20,
        (i) => i === 4000 ? 1 : 0,
      ];
      for (const value of kinds) {
        for (const size of [1, 1e-4, 1e4]) {
          const x = sample(device, [2, k], "bf16", (i) => size * value(i % k));
          const w = sample(device, [16, k], "bf16", (i) => value(i % k));
          const [qx, qw] = [quantizeRows(x.tensor), quantizeWeightRows(w.tensor)];
          const magnitudes = (await wideValues(qw.values)).subarray(0, k);
          const [sum, most] = [
            magnitudes.reduce((sum, value) => sum + Math.abs(value), 0),
            (await wideValues(qx.values)).reduce((most, value) => Math.max(most, value), 0),
          ];
          assert.equal(most, FLOAT8_ROW_LARGEST);
          // Rounding may add a part of 16.
          assert.ok(sum <= FLOAT8_ROW_SUM * (1 + 1 / 16), `${sum}`);
          const out = Tensor.empty(device, [2, 16], "bf16");
          fusedLinear(device, [{ x: qx, weight: qw, out }]);
          const wanted = x.values.subarray(0, k).reduce((sum, value, i) => sum + value * w.values[i], 0);
          // The units keep some 13 bits of a sum, in f32 as in f16: of 15360 ones the last ones add little.
          for (const got of await valuesOf(out)) {
            assert.ok(got > 0.55 * wanted && got < 1.07 * wanted, `${got}, not ${wanted}`);
          }
        }
      }
    });

    test("q, k and v go to tiles, GELU beside them", async (device) => {
      if (!hasFlashAttention(device)) return;
      const drawn = fc.record({
        first: fc.constantFrom(0, 128, 256),
        last: fc.constantFrom(1, 16, 100, 128, 200, 385),
        heads: fc.constantFrom(2, 4),
        mlp: fc.constantFrom(0, 256, 520),
        float8: fc.boolean(),
        dtype: fc.constantFrom("f8e4m3" as const, "bf16" as const),
        seed: seeds,
      });
      await fc.assert(
        fc.asyncProperty(drawn, async ({ first, last, heads, mlp, float8, dtype, seed }) => {
          const hidden = heads * TILE;
          const rows = first === 0 ? [last] : [first, last];
          const tokens = first + last;
          const columns = 3 * hidden + (first === 0 ? mlp : 0);
          const layers = await Promise.all(
            rows.map((count, i) => draw(device, count, columns, 144, float8, true, seed + 9 * i)),
          );
          const norms = rows.map((_, i) =>
            [0, 1].map((j) =>
              sample(device, [TILE], "bf16", (at) => 1 + noise(seed + 70 + 2 * i + j)(at) / 4)
            )
          );
          const [cos, sin] = [3, 4].map((i) =>
            sample(device, [tokens, TILE], "f32", (at) => noise(seed + i)(at >> 1))
          );
          const out = columns > 3 * hidden
            ? filled(device, [last, mlp], float8 ? "f8e4m3" : "bf16")
            : undefined;
          const outScales = float8
            ? Tensor.fromFloat32(device, new Float32Array(last).fill(0.03), [last])
            : undefined;
          const given = layers.map(({ layer }, i) => ({
            ...layer,
            normQ: norms[i][0].tensor,
            normK: norms[i][1].tensor,
          }));
          const tiles = fusedQkv(device, given as unknown as Layers<never>, {
            heads,
            pairs: rotaryPairs(device, cos.tensor, sin.tensor),
            eps: EPS,
            dtype,
            mlp: out === undefined ? undefined : { out, outScales },
          });
          for (const [which, kind] of (["query", "key", "value"] as TileKind[]).entries()) {
            const whole = new Float32Array(tokens * hidden);
            let start = 0;
            for (const [i, { expected }] of layers.entries()) {
              const part = Float32Array.from(
                { length: rows[i] * hidden },
                (_, at) => expected[Math.floor(at / hidden) * columns + which * hidden + at % hidden],
              );
              whole.set(
                kind === "value"
                  ? part
                  : turned(part, norms[i][which].values, cos.values, sin.values, start, rows[i], heads),
                start * hidden,
              );
              start += rows[i];
            }
            const [tensor, wanted] = [
              [tiles.q, tiles.k, tiles.v][which],
              new Uint8Array(Math.ceil(tokens / TILE) * TILE * hidden * (dtype === "bf16" ? 2 : 1)),
            ];
            attentionTilesReference(wanted, whole, kind, tokens, heads, dtype);
            const [a, b] = [await device.download(tensor), wanted].map((bytes) => decode(bytes, dtype));
            assert.equal(a.length, b.length);
            for (let i = 0; i < a.length; i++) {
              if (b[i] === 0 && a[i] === 0) continue;
              const allowed = Math.abs(b[i]) * (dtype === "bf16" ? 1 / 32 : 1 / 7) + 0.03;
              assert.ok(Math.abs(a[i] - b[i]) <= allowed, `${kind} ${i} is ${a[i]}, not ${b[i]}`);
            }
            assert.ok(relative(a, b) < (dtype === "bf16" ? 0.01 : 0.03), `${kind}: ${relative(a, b)}`);
          }
          if (out !== undefined) {
            const got = await wideValues(out);
            const want = new Float32Array(last * mlp);
            geluTanhReference(
              want,
              Float32Array.from(
                want,
                (_, at) => layers[0].expected[Math.floor(at / mlp) * columns + 3 * hidden + at % mlp],
              ),
            );
            assert.ok(
              relative(got.map((value) => value * (float8 ? 0.03 : 1)), want) < (float8 ? 0.05 : 0.01),
            );
          }
        }),
        { numRuns: 30 },
      );
    });
  });

  forEachGpu("rotary pairs", (test) => {
    test("equal their reference", async (device) => {
      for (const [tokens, headDim] of [[1, 2], [300, 128]]) {
        const [cos, sin] = [1, 2].map((seed) =>
          sample(device, [tokens, headDim], "f32", (at) => noise(seed)(at >> 1))
        );
        const expected = new Float32Array(tokens * headDim);
        rotaryPairsReference(expected, cos.values, sin.values);
        const pairs = rotaryPairs(device, cos.tensor, sin.tensor);
        assert.deepEqual(pairs.shape, [tokens, headDim / 2, 2]);
        assert.deepEqual(await valuesOf(pairs), expected);
      }
    });
  });

  forEachGpu("output scales", (test) => {
    test("equal their reference, and hold what layers give", async (device) => {
      const drawn = fc.record({
        rows: fc.constantFrom(1, 5, 256, 300),
        k: fc.constantFrom(16, 48, 256),
        columns: fc.constantFrom(1, 9, 64),
        mixed: fc.integer({ min: 0, max: 2 }),
        seed: seeds,
      });
      await fc.assert(
        fc.asyncProperty(drawn, async ({ rows, k, columns, mixed, seed }) => {
          const weight = sample(device, [columns, k], "bf16", noise(seed));
          const bias = sample(device, [columns], "bf16", noise(seed + 1));
          const quantized = quantizeRows(weight.tensor);
          const bound = layerBound(device, quantized, bias.tensor);
          const values = await dequantized(device, quantized.values, quantized.scales, k);
          const expectedBound = layerBoundReference(values, k, bias.values);
          const gotBound = await valuesOf(bound);
          for (const i of [0, 1]) {
            assert.ok(Math.abs(gotBound[i] - expectedBound[i]) <= 1e-5 * expectedBound[i]);
          }
          const lengths = Array.from(
            { length: 3 },
            (_, i) => sample(device, [rows + i], "f32", (at) => Math.abs(noise(seed + 2 + i)(at))),
          );
          const scales = Tensor.empty(device, [rows], "f32");
          const others = lengths.slice(1, 1 + mixed).map(({ tensor }) => ({ lengths: tensor, bound }));
          outputScales(device, scales, { lengths: lengths[0].tensor, bound }, others);
          const want = outputScalesReference(
            rows,
            { lengths: lengths[0].values, bound: [gotBound[0], gotBound[1]] },
            lengths.slice(1, 1 + mixed).map(({ values }) => ({
              lengths: values,
              bound: [gotBound[0], gotBound[1]],
            })),
          );
          const got = await valuesOf(scales);
          got.forEach((scale, i) =>
            assert.ok(Math.abs(scale - want[i]) <= 1e-6 * want[i], `${scale} ${want[i]}`)
          );
        }),
        { numRuns: 20 },
      );
    });
  });
}

/** On other GPUs the launch is refused with a clear word. */
function refusesElsewhere(device: GpuDevice): void {
  device.scope(() => {
    const x = Tensor.empty(device, [16, 16], "bf16");
    assert.throws(
      () => fusedLinear(device, [{ x: { values: x }, weight: { values: x }, out: x }]),
      ShapeError,
    );
  });
}

async function draw(
  device: GpuDevice,
  rows: number,
  columns: number,
  k: number,
  float8: boolean,
  biased: boolean,
  seed: number,
): Promise<Drawn> {
  const x = sample(device, [rows, k], "bf16", noise(seed));
  const w = sample(device, [columns, k], "bf16", (i) => noise(seed + 1)(i) * 3 / Math.sqrt(k));
  const b = sample(device, [columns], "bf16", noise(seed + 2));
  const bias = biased ? b.tensor : undefined;
  let [xs, ws] = [x.values, w.values];
  let layer: FusedLayer = { x: { values: x.tensor }, weight: { values: w.tensor }, bias };
  if (float8) {
    const [qx, qw] = [quantizeRows(x.tensor), quantizeWeightRows(w.tensor)];
    layer = { x: qx, weight: qw, bias };
    xs = await dequantized(device, qx.values, qx.scales, k);
    ws = await dequantized(device, qw.values, qw.scales, k);
  }
  const lengths = [xs, ws].map((m) =>
    Float32Array.from({ length: m.length / k }, (_, r) => Math.hypot(...m.subarray(r * k, r * k + k)))
  );
  return {
    layer,
    expected: fusedLinearReference(xs, ws, k, biased ? b.values : undefined),
    slack: (i) => 0.008 * lengths[0][Math.floor(i / columns)] * lengths[1][i % columns],
  };
}

async function dequantized(
  device: GpuDevice,
  values: Tensor,
  scales: Tensor,
  k: number,
): Promise<Float32Array> {
  const codes = new Uint8Array((await device.download(values)).buffer);
  const out = new Float32Array(codes.length);
  dequantizeReference(out, codes, await valuesOf(scales), k);
  return out;
}

/** QK-norm and rotation of `[tokens, heads * 128]`. */
function turned(
  x: Float32Array,
  weight: Float32Array,
  cos: Float32Array,
  sin: Float32Array,
  start: number,
  tokens: number,
  heads: number,
): Float32Array {
  const normed = new Float32Array(x.length);
  rmsNormReference(normed, x, weight, EPS);
  const out = new Float32Array(x.length);
  const part = (table: Float32Array) => table.subarray(start * TILE, (start + tokens) * TILE);
  ropeReference(out, normed, part(cos), part(sin), heads, TILE);
  return out;
}

/** A tensor of ones. */
function filled(device: GpuDevice, shape: readonly number[], dtype: AttentionDType): Tensor {
  const size = shape.reduce((a, b) => a * b, 1);
  const bytes = dtype === "bf16"
    ? new Uint8Array(new Uint16Array(size).fill(0x3f80).buffer)
    : new Uint8Array(size).fill(0x38);
  return Tensor.fromBytes(device, bytes, shape, dtype);
}

async function wideValues(tensor: Tensor): Promise<Float32Array> {
  return decode(await tensor.device.download(tensor), tensor.dtype);
}

function relative(a: Float32Array, b: Float32Array): number {
  let [difference, size] = [0, 0];
  for (let i = 0; i < a.length; i++) {
    difference += (a[i] - b[i]) ** 2;
    size += b[i] ** 2;
  }
  return Math.sqrt(difference / Math.max(size, 1e-30));
}
