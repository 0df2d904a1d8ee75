/** The operators' references against formulas in double precision, at odd sizes and extreme values. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../ffi/errors.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { attention, attentionReference, softmaxRows } from "../../kernels/attention.ts";
import { bfloat16ToFloat32, float32ToBfloat16, roundToBfloat16 } from "../../ffi/bfloat16.ts";
import { cast } from "../../kernels/cast.ts";
import { asMatrix } from "../../kernels/contiguous.ts";
import { embedding } from "../../kernels/embedding.ts";
import { float32ToFloat8, float8ToFloat32 } from "../../ffi/float8.ts";
import { geluTanhReference } from "../../kernels/gelu_tanh.ts";
import { groupNorm } from "../../kernels/group_norm.ts";
import { layerNorm } from "../../kernels/layer_norm.ts";
import { linear } from "../../kernels/linear.ts";
import { modulate } from "../../kernels/modulate.ts";
import { quickGeluReference } from "../../kernels/quick_gelu.ts";
import { FLOAT8_ROW_LARGEST, quantizeRows, quantizeTensor } from "../../kernels/quantize_float8.ts";
import { quantizeWeightRows } from "../../kernels/quantize_weight_rows.ts";
import { rmsNorm } from "../../kernels/rms_norm.ts";
import { siluReference } from "../../kernels/silu.ts";
import { timestepEmbeddingReference } from "../../kernels/timestep_embedding.ts";
import { toPixelsReference } from "../../kernels/to_pixels.ts";
import { conv2d } from "../../kernels/conv2d.ts";
import {
  polyphaseBias,
  polyphaseFilters,
  upsampleConv,
  upsampleConvPolyphase,
} from "../../kernels/upsample_conv.ts";
import { upsampleNearest } from "../../kernels/upsample_nearest.ts";
import { readFloat32 } from "../../kernels/cpu.ts";
import { assertClose } from "../support/compare.ts";
import { noise } from "../support/providers.ts";
import { openReference } from "../support/reference_provider.ts";

const finite = fc.float({ noNaN: true, noDefaultInfinity: true });
const value = fc.float({ min: -30, max: 30, noNaN: true });

Deno.test("bfloat16: rounding is to nearest, ties to even", () => {
  // Exhaustive on the patterns between neighbours: below, at and above every half-way point.
  const halves = new Uint16Array(65536).map((_, i) => i);
  const widened = new Float32Array(65536);
  bfloat16ToFloat32(halves, widened);
  const back = new Uint16Array(65536);
  float32ToBfloat16(widened, back);
  for (let i = 0; i < 65536; i++) {
    if (Number.isNaN(widened[i])) assert.ok((back[i] & 0x7fff) > 0x7f80, "a NaN became a number");
    else assert.equal(back[i], i);
  }
  const bits = (b: number) => new Float32Array(Uint32Array.of(b).buffer);
  const rounded = (b: number) => {
    const out = new Uint16Array(1);
    float32ToBfloat16(bits(b), out);
    return out[0];
  };
  for (let i = 0; i < 0x7f80; i += 7) {
    const base = (i << 16) >>> 0;
    assert.equal(rounded(base + 0x7fff), i);
    assert.equal(rounded(base + 0x8000), i + (i & 1));
    assert.equal(rounded(base + 0x8001), i + 1);
    assert.equal(rounded(base + 0x80000000 + 0x8001), 0x8000 + i + 1);
  }
  assert.equal(rounded(0x7f7fffff), 0x7f80, "the largest float32 is infinite in bfloat16");
});

Deno.test("bfloat16: the error is at most half a unit in the last place", () => {
  fc.assert(fc.property(finite, (x) => {
    const y = roundToBfloat16(x);
    if (Number.isFinite(y)) {
      assert.ok(Math.abs(y - x) <= Math.max(Math.abs(x) * 2 ** -8, 2 ** -133), `${x} to ${y}`);
    }
  }));
});

Deno.test("float8: the values that the OFP8 specification lists", () => {
  const decode = (code: number, dtype: "f8e4m3" | "f8e5m2") => {
    const out = new Float32Array(1);
    float8ToFloat32(Uint8Array.of(code), out, dtype);
    return out[0];
  };
  assert.equal(decode(0x7e, "f8e4m3"), 448);
  assert.equal(decode(0x08, "f8e4m3"), 2 ** -6);
  assert.equal(decode(0x01, "f8e4m3"), 2 ** -9);
  assert.equal(decode(0xb8, "f8e4m3"), -1);
  assert.ok(Number.isNaN(decode(0x7f, "f8e4m3")) && Number.isNaN(decode(0xff, "f8e4m3")));
  assert.equal(decode(0x7b, "f8e5m2"), 57344);
  assert.equal(decode(0x04, "f8e5m2"), 2 ** -14);
  assert.equal(decode(0x7c, "f8e5m2"), Infinity);
  assert.ok(Number.isNaN(decode(0x7d, "f8e5m2")));
});

Deno.test("float8: rounding to E4M3 is to nearest, ties to even, and ends at 448", () => {
  const codes = Uint8Array.from({ length: 256 }, (_, i) => i);
  const values = new Float32Array(256);
  float8ToFloat32(codes, values, "f8e4m3");
  const rounded = (...xs: number[]) => {
    const out = new Uint8Array(xs.length);
    float32ToFloat8(Float32Array.from(xs), out);
    return [...out];
  };
  assert.deepEqual(rounded(...values), codes.with(0xff, 0x7f).values().toArray());
  const [next, previous] = [1 + 2 ** -20, 1 - 2 ** -20];
  for (let code = 0; code < 0x7e; code++) {
    const half = (values[code] + values[code + 1]) / 2;
    const even = code + code % 2;
    assert.deepEqual(rounded(half * previous, half, half * next), [code, even, code + 1]);
    assert.deepEqual(
      rounded(-half * previous, -half, -half * next),
      [code, even, code + 1].map((c) => c | 0x80),
    );
  }
  assert.deepEqual(rounded(448, 463, 465, 3e38, Infinity), Array(5).fill(0x7e));
  assert.deepEqual(rounded(-449, -Infinity, -1e-30, 1e-44, -0), [0xfe, 0xfe, 0x80, 0, 0x80]);
  assert.deepEqual(rounded(NaN, -NaN), [0x7f, 0x7f]);
});

Deno.test("quantization: values times scales are what they were, to within 1/16 or a part of the largest", () => {
  using device = openReference();
  const element = fc.float({ min: -1e4, max: 1e4, noNaN: true });
  const rows = fc.array(fc.array(element, { minLength: 6, maxLength: 6 }), { minLength: 1, maxLength: 5 });
  fc.assert(fc.property(rows, (xs) =>
    device.scope(() => {
      // A view of four of six columns.
      const x = Tensor.fromFloat32(device, xs.flat(), [xs.length, 6]).narrow(1, 1, 4);
      for (const quantize of [quantizeRows, quantizeTensor]) {
        const { values, scales } = quantize(x);
        assert.deepEqual([values.shape, scales.shape], [x.shape, [
          quantize === quantizeRows ? xs.length : 1,
        ]]);
        const [before, codes, factors] = [x, values, scales].map((tensor) => readFloat32(tensor));
        const largest = (from: number, to: number) =>
          Math.max(1e-12, ...before.slice(from, to).map(Math.abs));
        for (let i = 0; i < before.length; i++) {
          const row = Math.floor(i / 4);
          const [factor, most, becomes] = quantize === quantizeRows
            ? [factors[row], largest(4 * row, 4 * row + 4), FLOAT8_ROW_LARGEST]
            : [factors[0], largest(0, before.length), 448];
          assert.equal(factor, Math.fround(Math.fround(most) / becomes));
          const error = Math.abs(codes[i] * factor - before[i]);
          // Steps of 2^-3 of a power of two; of 2^-9 below 2^-6.
          assert.ok(
            error <= 1.0001 * Math.max(Math.abs(before[i]) / 16, factor * 2 ** -10),
            `${before[i]}: ${error}`,
          );
        }
      }
    })));
  assert.throws(() => quantizeRows(Tensor.fromInt32(device, [1], [1, 1])), ShapeError);
});

Deno.test("quantized weights: each row's errors are at most those with the largest value's scale, and less over many", () => {
  using device = openReference();
  const [rows, k] = [40, 768];
  const normal = (_: unknown, i: number) => {
    const uniform = (seed: number) => (noise(seed)(i) + 1) / 2 * 0.9999 + 1e-5;
    return Math.sqrt(-2 * Math.log(uniform(3))) * Math.cos(2 * Math.PI * uniform(4));
  };
  const x = Tensor.fromFloat32(device, Float32Array.from({ length: rows * k }, normal), [rows, k]);
  const errors = [quantizeRows, quantizeWeightRows].map((quantize) => {
    const { values, scales } = quantize(x);
    const [before, codes, factors] = [x, values, scales].map((tensor) => readFloat32(tensor));
    const sums = new Float64Array(rows);
    before.forEach((value, i) =>
      sums[Math.floor(i / k)] += (codes[i] * factors[Math.floor(i / k)] - value) ** 2
    );
    return sums;
  });
  // Weights are scaled to smaller numbers, of which a few more are below 2^-6, where steps are all the same.
  errors[1].forEach((error, row) => assert.ok(error <= errors[0][row] * (1 + 1e-4), `row ${row}`));
  const [plain, best] = errors.map((sums) => sums.reduce((a, b) => a + b));
  assert.ok(best < 0.95 * plain, `${best} instead of ${plain}`); // 0.91 for rows as short as these
});

Deno.test("activations equal their formulas and stay finite at the ends", () => {
  const sigmoid = (x: number) => x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x));
  const run = (f: (out: Float32Array, x: Float32Array) => void, xs: readonly number[]) => {
    const out = new Float32Array(xs.length);
    f(out, Float32Array.from(xs));
    return out;
  };
  fc.assert(fc.property(fc.array(value, { minLength: 1, maxLength: 70 }), (xs) => {
    const near = (actual: Float32Array, expected: (x: number) => number) =>
      xs.forEach((x, i) =>
        assert.ok(Math.abs(actual[i] - expected(x)) <= 1e-6 * (1 + Math.abs(x)), `${x}: ${actual[i]}`)
      );
    near(run(siluReference, xs), (x) => x * sigmoid(x));
    near(run(quickGeluReference, xs), (x) => x * sigmoid(1.702 * x));
    near(
      run(geluTanhReference, xs),
      (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
    );
  }));
  for (const f of [siluReference, quickGeluReference, geluTanhReference]) {
    const [low, high] = run(f, [-1e30, 1e30]);
    assert.ok(Math.abs(low) === 0 && high === Math.fround(1e30));
  }
});

Deno.test("norms: zero mean, unit variance, and what weights and biases do", () => {
  using device = openReference();
  fc.assert(fc.property(
    fc.integer({ min: 1, max: 4 }),
    fc.integer({ min: 2, max: 9 }),
    fc.infiniteStream(fc.float({ min: -3, max: 3, noNaN: true })),
    (rows, hidden, stream) =>
      device.scope(() => {
        const take = (count: number) => Float32Array.from({ length: count }, () => stream.next().value!);
        const tensor = (values: Float32Array, shape: number[]) => Tensor.fromFloat32(device, values, shape);
        const x = take(rows * hidden);
        const [weight, bias] = [take(hidden), take(hidden)];
        const eps = 1e-3;
        const layer = readFloat32(
          layerNorm(tensor(x, [rows, hidden]), eps, tensor(weight, [hidden]), tensor(bias, [hidden])),
        );
        const rms = readFloat32(rmsNorm(tensor(x, [rows, hidden]), tensor(weight, [hidden]), eps));
        for (let row = 0; row < rows; row++) {
          const xs = [...x.subarray(row * hidden, (row + 1) * hidden)];
          const mean = xs.reduce((a, b) => a + b) / hidden;
          const variance = xs.reduce((sum, v) => sum + (v - mean) ** 2, 0) / hidden;
          const square = xs.reduce((sum, v) => sum + v * v, 0) / hidden;
          xs.forEach((v, i) => {
            const expected = (v - mean) / Math.sqrt(variance + eps) * weight[i] + bias[i];
            assert.ok(Math.abs(layer[row * hidden + i] - expected) <= 1e-5, "layer norm");
            assert.ok(
              Math.abs(rms[row * hidden + i] - v / Math.sqrt(square + eps) * weight[i]) <= 1e-5,
              "RMS norm",
            );
          });
        }
      }),
  ));
});

Deno.test("group norm of one channel a group is layer norm over its pixels", () => {
  using device = openReference();
  const values = Float32Array.from({ length: 2 * 3 * 4 }, (_, i) => Math.sin(i * i));
  const ones = (n: number, v: number) => Tensor.fromFloat32(device, new Float32Array(n).fill(v), [n]);
  const grouped = groupNorm(
    Tensor.fromFloat32(device, values, [2, 3, 2, 2]),
    3,
    ones(3, 1),
    ones(3, 0),
    1e-6,
  );
  const layered = layerNorm(Tensor.fromFloat32(device, values, [6, 4]), 1e-6);
  assertClose(readFloat32(grouped), readFloat32(layered), 1e-6, "group norm");
  assert.throws(() =>
    groupNorm(Tensor.fromFloat32(device, values, [2, 3, 2, 2]), 2, ones(3, 1), ones(3, 0), 1e-6)
  );
});

Deno.test("softmax: rows add up to one, large logits do not overflow, masked keys get nothing", () => {
  fc.assert(
    fc.property(
      fc.array(fc.float({ min: -2000, max: 2000, noNaN: true }), { minLength: 3, maxLength: 30 }),
      (xs) => {
        const row = Float32Array.from(xs);
        softmaxRows(row, row.length);
        assert.ok(Math.abs(row.reduce((a, b) => a + b) - 1) <= 1e-5);
        assert.ok(row.every((p) => p >= 0 && p <= 1));
        const largest = xs.indexOf(Math.max(...xs));
        assert.equal(row[largest], Math.max(...row));
      },
    ),
  );
  const causal = Float32Array.of(1, 2, 3, 1, 2, 3, 1, 2, 3);
  softmaxRows(causal, 3, undefined, 0);
  assert.deepEqual([causal[0], causal[1], causal[2], causal[5]], [1, 0, 0, 0]);
  assert.ok(causal[3] < causal[4] && causal[8] > 0);
});

Deno.test("attention equals its reference: batches, odd sizes, scale, bias, causal", () => {
  using device = openReference();
  const options = fc.record({
    batch: fc.integer({ min: 1, max: 2 }),
    queries: fc.integer({ min: 1, max: 9 }),
    keys: fc.integer({ min: 1, max: 9 }),
    heads: fc.integer({ min: 1, max: 3 }),
    headDim: fc.integer({ min: 1, max: 7 }),
    causal: fc.boolean(),
    withBias: fc.boolean(),
    scale: fc.option(fc.constantFrom(1, 0.3), { nil: undefined }),
    seed: fc.nat(),
  });
  fc.assert(
    fc.property(
      options,
      ({ batch, queries, keys: anyKeys, heads, headDim, causal, withBias, scale, seed }) =>
        device.scope(() => {
          const keys = causal ? queries : anyKeys;
          let state = seed + 1;
          const draw = (count: number) =>
            Float32Array.from({ length: count }, () => {
              state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
              return state / 2 ** 31 - 1;
            });
          const q = draw(batch * queries * heads * headDim);
          const [k, v] = [draw(batch * keys * heads * headDim), draw(batch * keys * heads * headDim)];
          const bias = withBias ? draw(heads * queries * keys) : new Float32Array(0);
          const tensor = (data: Float32Array, shape: number[]) => Tensor.fromFloat32(device, data, shape);
          const out = attention(
            tensor(q, [batch, queries, heads, headDim]),
            tensor(k, [batch, keys, heads, headDim]),
            tensor(v, [batch, keys, heads, headDim]),
            {
              causal,
              ...(scale === undefined ? {} : { scale }),
              ...(withBias ? { bias: tensor(bias, [heads, queries, keys]) } : {}),
            },
          );
          const expected = new Float32Array(q.length);
          const shape = { batch, queries, keys, heads, headDim };
          attentionReference(expected, q, k, v, bias, shape, scale ?? headDim ** -0.5, causal);
          assertClose(readFloat32(out), expected, 1e-5, "attention");
        }),
    ),
  );
});

Deno.test("toPixels clamps, and rounds half to even as NumPy", () => {
  const fromByte = (byte: number) => (byte / 255 - 0.5) * 2;
  const inputs = [-5, -1, 1, 5, fromByte(10), fromByte(200.4), fromByte(200.6), 0];
  const out = new Float32Array(8);
  toPixelsReference(out, Float32Array.from(inputs), 1, 8);
  assert.deepEqual([...out], [0, 0, 255, 255, 10, 200, 201, 128]); // 127.5 goes to the even 128
  const planar = new Float32Array(6);
  toPixelsReference(planar, Float32Array.of(-1, 1, -1, -1, 1, 1), 3, 2);
  assert.deepEqual([...planar], [0, 0, 255, 255, 0, 255], "channels are interleaved");
});

Deno.test("timestep embedding: cosines first, frequencies from 1 down to 1/10000", () => {
  const out = new Float32Array(8);
  timestepEmbeddingReference(out, Float32Array.of(2), 8);
  const expected = [0, 1, 2, 3].map((i) => 2 * 10000 ** (-i / 4));
  assertClose(out, [...expected.map(Math.cos), ...expected.map(Math.sin)], 1e-6, "embedding");
});

Deno.test("embedding refuses indexes outside the table", () => {
  using device = openReference();
  const table = Tensor.fromFloat32(device, [1, 2, 3, 4, 5, 6], [3, 2]);
  const pick = (ids: number[]) => readFloat32(embedding(Tensor.fromInt32(device, ids, [ids.length]), table));
  assert.deepEqual([...pick([2, 0])], [5, 6, 1, 2]);
  assert.throws(() => pick([3]), ShapeError);
  assert.throws(() => pick([-1]), ShapeError);
});

Deno.test("linear reads rows where they lie, and copies those that no single stride reaches", () => {
  using device = openReference();
  const values = Float32Array.from({ length: 2 * 4 * 6 }, (_, i) => i + 1);
  const wide = Tensor.fromFloat32(device, values, [2, 4, 6]);
  const ones = Tensor.fromFloat32(device, [1, 1, 1], [1, 3]);
  const sums = (rows: readonly number[]) => rows.map((first) => 3 * first + 3);
  const columns = wide.narrow(2, 2, 3);
  assert.equal(asMatrix(columns).memory, wide.memory);
  assert.deepEqual(asMatrix(columns).strides, [6, 1]);
  assert.deepEqual([...readFloat32(linear(columns, ones))], sums([3, 9, 15, 21, 27, 33, 39, 45]));
  const some = columns.narrow(1, 1, 2);
  assert.notEqual(asMatrix(some).memory, wide.memory);
  assert.deepEqual(linear(some, ones).shape, [2, 2, 1]);
  assert.deepEqual([...readFloat32(linear(some, ones))], sums([9, 15, 33, 39]));
  assert.equal(asMatrix(some.narrow(0, 1, 1)).memory, wide.memory);
});

Deno.test("operators refuse shapes and dtypes that do not fit, by name", () => {
  using device = openReference();
  const f32 = (...shape: number[]) => Tensor.empty(device, shape, "f32");
  assert.throws(() => linear(f32(2, 3), f32(4, 5)), /linear.*weight/);
  assert.throws(() => linear(f32(2, 3), f32(4, 3), f32(3)), /linear.*bias/);
  assert.throws(() => linear(f32(2, 3), Tensor.empty(device, [4, 3], "bf16")), /linear.*bf16/);
  assert.throws(() => modulate(f32(1, 2, 3), f32(2, 3), f32(1, 3)), /modulate.*scale/);
  assert.throws(
    () => attention(f32(1, 2, 1, 4), f32(1, 3, 1, 4), f32(1, 3, 1, 4), { causal: true }),
    /attention/,
  );
  assert.throws(() => rmsNorm(f32(2, 3), f32(2), 1e-6), /rmsNorm/);
});

Deno.test("cast rounds f32 to bf16 and f16, and widens both exactly", () => {
  using device = openReference();
  fc.assert(fc.property(fc.array(value, { minLength: 1, maxLength: 20 }), (xs) =>
    device.scope(() => {
      const x = Tensor.fromFloat32(device, xs, [xs.length]);
      assert.deepEqual([...readFloat32(cast(x, "bf16"))], xs.map(roundToBfloat16));
      assert.deepEqual([...readFloat32(cast(x, "f16"))], xs.map((v) => Math.f16round(v)));
      const half = cast(x, "bf16");
      assert.deepEqual([...readFloat32(cast(cast(half, "f32"), "bf16"))], [...readFloat32(half)]);
      assert.equal(cast(x, "f32"), x);
    })));
});

Deno.test("upsampleNearest: every pixel of every dtype and layout becomes four", () => {
  using device = openReference();
  const [batch, channels, height, width] = [2, 3, 4, 5];
  const count = batch * channels * height * width;
  const values = Float32Array.from({ length: count }, (_, i) => i - 60);
  const wide = Tensor.fromFloat32(device, values, [batch, channels, height, width]);
  const bytes = new Uint8Array(count * 4 + 1);
  bytes.set(new Uint8Array(values.buffer), 1);
  const odd = new Tensor(device.place(bytes.subarray(1)), "f32", wide.shape);
  const strided = Tensor.fromFloat32(device, values, [batch, channels, width, height]).permute([0, 1, 3, 2]);
  for (const x of [wide, cast(wide, "bf16"), cast(wide, "f16"), odd, strided]) {
    const from = readFloat32(x);
    const to = upsampleNearest(x);
    assert.equal(to.dtype, x.dtype);
    assert.deepEqual(to.shape, [batch, channels, 2 * height, 2 * width]);
    for (const [i, y] of readFloat32(to).entries()) {
      const row = Math.floor(i / (2 * width));
      const plane = Math.floor(row / (2 * height));
      const at = (plane * height + (row % (2 * height) >> 1)) * width + (i % (2 * width) >> 1);
      assert.equal(y, from[at]);
    }
  }
});

Deno.test("upsampleConvPolyphase: the same sums as upsampling and a 3 x 3 convolution", () => {
  using device = openReference();
  const ops = { conv2d, upsampleNearest };
  // Whole numbers: every sum is exact in any order.
  const whole = fc.integer({ min: -8, max: 8 });
  const side = fc.integer({ min: 1, max: 5 });
  const drawn = fc.tuple(fc.integer({ min: 1, max: 2 }), side, side, side, side).chain(([n, c, o, h, w]) => {
    const values = (shape: readonly number[]) => {
      const length = shape.reduce((a, b) => a * b);
      return fc.array(whole, { minLength: length, maxLength: length }).map((array) => ({ shape, array }));
    };
    return fc.tuple(values([n, c, h, w]), values([o, c, 3, 3]), values([o]));
  });
  fc.assert(fc.property(drawn, (given) =>
    device.scope(() => {
      const [x, weight, bias] = given.map(({ shape, array }) => Tensor.fromFloat32(device, array, shape));
      const expected = upsampleConv(x, weight, bias, ops);
      const filters = polyphaseFilters(weight);
      const actual = upsampleConvPolyphase(x, filters, polyphaseBias(bias), ops);
      assert.deepEqual(actual.shape, expected.shape);
      assert.deepEqual(readFloat32(actual), readFloat32(expected));
    })));
  const empty = (...shape: number[]) => Tensor.empty(device, shape, "f32");
  for (const weight of [empty(4, 3, 2, 3), empty(4, 2, 2, 2), empty(4, 3, 3, 3)]) {
    assert.throws(() => upsampleConvPolyphase(empty(1, 3, 2, 2), weight, empty(4), ops), ShapeError);
  }
  assert.throws(() => upsampleConv(empty(1, 3, 2, 2), empty(4, 3, 2, 2), empty(4), ops), ShapeError);
});
