/** The elementwise and copying operators on a GPU against their TypeScript references. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { type DType, dtypeBytes } from "../../../ffi/dtype.ts";
import { ShapeError } from "../../../ffi/errors.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { elementCount, Tensor } from "../../../ffi/tensor.ts";
import { add, addReference } from "../../../kernels/add.ts";
import { bfloat16ToFloat32, float32ToBfloat16 } from "../../../ffi/bfloat16.ts";
import { cast } from "../../../kernels/cast.ts";
import { concat } from "../../../kernels/concat.ts";
import { contiguous } from "../../../kernels/contiguous.ts";
import { embedding } from "../../../kernels/embedding.ts";
import { eulerStep, eulerStepReference } from "../../../kernels/euler_step.ts";
import { float32ToFloat8, float8ToFloat32 } from "../../../ffi/float8.ts";
import { gatedResidual, gatedResidualReference } from "../../../kernels/gated_residual.ts";
import { geluTanh, geluTanhReference } from "../../../kernels/gelu_tanh.ts";
import { isChannelsLast, NHWC } from "../../../kernels/layout.ts";
import { modulate, modulateReference } from "../../../kernels/modulate.ts";
import { multiply, multiplyReference } from "../../../kernels/multiply.ts";
import { quickGelu, quickGeluReference } from "../../../kernels/quick_gelu.ts";
import { scaleShift, scaleShiftReference } from "../../../kernels/scale_shift.ts";
import { silu, siluReference } from "../../../kernels/silu.ts";
import { timestepEmbedding, timestepEmbeddingReference } from "../../../kernels/timestep_embedding.ts";
import { toPixels, toPixelsReference } from "../../../kernels/to_pixels.ts";
import { upsampleNearest, upsampleNearestReference } from "../../../kernels/upsample_nearest.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";

type Float = "f32" | "bf16" | "f16";

/** How a tensor of a test lies in memory. */
interface Layout {
  /** Order of the dimensions from the outermost to the innermost; row-major when left out. */
  readonly order?: readonly number[];
  /** Elements in front of the first one. */
  readonly start?: number;
  /** Elements left unused behind each run of the innermost dimension. */
  readonly gap?: number;
}

/** A tensor on the GPU, and its elements in row-major order on the host. */
interface Sample {
  readonly tensor: Tensor;
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly values: Float32Array;
}

/** Floats of a dtype that kernels compute in, as they are stored. */
function encode(values: Float32Array, dtype: Float): Uint8Array<ArrayBuffer> {
  if (dtype === "f32") return new Uint8Array(values.slice().buffer);
  if (dtype === "f16") return new Uint8Array(Float16Array.from(values).buffer);
  const bits = new Uint16Array(values.length);
  float32ToBfloat16(values, bits);
  return new Uint8Array(bits.buffer);
}

function decode(bytes: Uint8Array<ArrayBuffer>, dtype: DType): Float32Array {
  const values = new Float32Array(bytes.length / dtypeBytes(dtype));
  switch (dtype) {
    case "f32":
      return new Float32Array(bytes.slice().buffer);
    case "f16":
      return Float32Array.from(new Float16Array(bytes.slice().buffer));
    case "bf16":
      bfloat16ToFloat32(new Uint16Array(bytes.slice().buffer), values);
      return values;
    case "f8e4m3":
    case "f8e5m2":
      float8ToFloat32(bytes, values, dtype);
      return values;
    case "i32":
      return Float32Array.from(new Int32Array(bytes.slice().buffer));
    default:
      return Float32Array.from(bytes);
  }
}

/** Row-major elements in `layout`. */
function placed(
  device: GpuDevice,
  bytes: Uint8Array<ArrayBuffer>,
  shape: readonly number[],
  dtype: DType,
  layout: Layout = {},
): Sample {
  const { order = shape.map((_, dim) => dim), start = 0, gap = 0 } = layout;
  const strides = new Array<number>(shape.length).fill(1);
  let step = 1;
  for (const [i, dim] of order.toReversed().entries()) {
    strides[dim] = step;
    step = step * shape[dim] + (i === 0 ? gap : 0);
  }
  const size = dtypeBytes(dtype);
  const memory = new Uint8Array((start + step) * size).fill(0xff);
  forEachPlace(
    shape,
    strides,
    (i, at) => memory.set(bytes.subarray(i * size, (i + 1) * size), (start + at) * size),
  );
  const whole = Tensor.fromBytes(device, memory, [start + step], dtype);
  return {
    tensor: new Tensor(whole.memory, dtype, shape, strides, start),
    bytes,
    values: decode(bytes, dtype),
  };
}

function forEachPlace(
  shape: readonly number[],
  strides: readonly number[],
  visit: (i: number, at: number) => void,
) {
  let i = 0;
  const walk = (dim: number, at: number): void => {
    if (dim === shape.length) return visit(i++, at);
    for (let j = 0; j < shape[dim]; j++) walk(dim + 1, at + j * strides[dim]);
  };
  walk(0, 0);
}

/** What breaks arithmetic first. */
const ODD_VALUES = [
  NaN,
  Infinity,
  -Infinity,
  0,
  -0,
  1e-40,
  -3e-39,
  3.3e38,
  -3.3e38,
  1e20,
  -1e20,
  2 ** -24,
  65519,
  88,
  -88,
];

/** Pseudo-random floats of moderate size, and some odd ones among them where `wild`. */
function floats(
  device: GpuDevice,
  shape: readonly number[],
  dtype: Float,
  seed: number,
  { wild = false, ...layout }: Layout & { wild?: boolean } = {},
): Sample {
  const [value, choice] = [noise(seed), noise(seed + 1000)];
  const values = Float32Array.from({ length: elementCount(shape) }, (_, i) => {
    const pick = Math.floor((choice(i) + 1) * 64);
    return wild && pick < ODD_VALUES.length ? ODD_VALUES[pick] : value(i) * 6;
  });
  return placed(device, encode(values, dtype), shape, dtype, layout);
}

/** Pseudo-random bytes. */
function bits(
  device: GpuDevice,
  shape: readonly number[],
  dtype: DType,
  seed: number,
  layout?: Layout,
): Sample {
  const byte = noise(seed);
  const bytes = new Uint8Array(elementCount(shape) * dtypeBytes(dtype)).map((_, i) => (byte(i) + 1) * 128);
  return placed(device, bytes, shape, dtype, layout);
}

/** A result on the GPU, and what has to hold for its bytes. */
interface Result {
  readonly actual: Tensor;
  readonly check: (bytes: Uint8Array<ArrayBuffer>) => void;
}

/** Relative spacing of a dtype's values, halved, and the smallest absolute one. */
const ROUNDING = {
  f32: [2 ** -24, 2 ** -150],
  bf16: [2 ** -8, 2 ** -134],
  f16: [2 ** -11, 2 ** -25],
} as const;

/**
 * Each element is the reference rounded to the dtype. With `slack` it may also be as close to the reference as that
 * rounding and an error of `slack(i)` before it allow.
 */
function rounded(
  actual: Tensor,
  dtype: Float,
  shape: readonly number[],
  reference: Float32Array,
  slack?: (i: number) => number,
): Result {
  assert.equal(actual.dtype, dtype);
  assert.deepEqual(actual.shape, shape);
  const want = decode(encode(reference, dtype), dtype);
  const [relative, absolute] = ROUNDING[dtype];
  const check = (bytes: Uint8Array<ArrayBuffer>) => {
    const got = decode(bytes, dtype);
    for (let i = 0; i < want.length; i++) {
      if (Object.is(got[i], want[i])) continue;
      assert.ok(slack !== undefined, `element ${i} is ${got[i]}, not ${want[i]}`);
      const error = Math.abs(got[i] - reference[i]);
      const allowed = Math.max(relative * Math.abs(got[i]), absolute) + slack(i);
      const message = `element ${i} is ${got[i]}, not ${reference[i]}: error ${error}, allowed ${allowed}`;
      assert.ok(Number.isFinite(error) && error <= allowed, message);
    }
  };
  return { actual, check };
}

/** A slack of some f32 roundings of terms whose absolute values add up to `magnitude`, subnormal ones too. */
const roundings = (magnitude: Float32Array) => (i: number) => magnitude[i] * 2 ** -22 + 2 ** -147;

/** The bytes are equal. */
function same(actual: Tensor, dtype: DType, shape: readonly number[], expected: Uint8Array): Result {
  assert.equal(actual.dtype, dtype);
  assert.deepEqual(actual.shape, shape);
  const check = (bytes: Uint8Array<ArrayBuffer>) => {
    assert.equal(bytes.length, expected.length);
    // deepEqual would print both, and takes gigabytes for that.
    const wrong = bytes.findIndex((byte, i) => byte !== expected[i]);
    assert.equal(wrong, -1, `byte ${wrong} is ${bytes[wrong]}, not ${expected[wrong]}`);
  };
  return { actual, check };
}

/** Row-major bytes of a view of a tensor that was uploaded from `dense` bytes. */
function viewBytes(dense: Uint8Array<ArrayBuffer>, view: Tensor): Uint8Array<ArrayBuffer> {
  const size = dtypeBytes(view.dtype);
  const bytes = new Uint8Array(view.byteLength);
  forEachPlace(view.shape, view.strides, (i, at) => {
    const from = (view.offset + at) * size;
    bytes.set(dense.subarray(from, from + size), i * size);
  });
  return bytes;
}

/** Runs `body`, looks at its results and gives all memory back. */
async function check(device: GpuDevice, body: () => Result[]): Promise<void> {
  const before = device.memoryUse().current;
  const results = device.scope(body);
  try {
    for (const { actual, check } of results) check(await device.download(actual));
  } finally {
    for (const memory of new Set(results.map(({ actual }) => actual.memory))) device.free(memory);
  }
  assert.equal(device.memoryUse().current, before, "memory was not given back");
}

/** As {@link check}, for drawn arguments. */
async function property<A extends unknown[]>(
  device: GpuDevice,
  arbitraries: { [K in keyof A]: fc.Arbitrary<A[K]> },
  body: (...drawn: A) => Result[],
  numRuns = 40,
): Promise<void> {
  const all = fc.tuple(...arbitraries) as fc.Arbitrary<A>;
  await fc.assert(fc.asyncProperty(all, (drawn) => check(device, () => body(...drawn))), { numRuns });
}

const floatTypes = fc.constantFrom<Float>("f32", "bf16");
const seeds = fc.nat(10000);
/** Sizes in which all elements move by vectors, and such in which none do. */
const sizes = fc.oneof(fc.integer({ min: 1, max: 300 }).map((n) => 8 * n), fc.integer({ min: 1, max: 3000 }));
/** First elements on and off a vector's boundary. */
const starts = fc.constantFrom(0, 8, 1);
/** Shapes of pictures, `[batch, channels, height, width]`. */
const pictures = fc.tuple(
  fc.integer({ min: 1, max: 2 }),
  fc.constantFrom(1, 3, 8, 40),
  fc.integer({ min: 1, max: 9 }),
  fc.integer({ min: 1, max: 70 }),
);
const range = (length: number) => Array.from({ length }, (_, i) => i);

function activationTests(): void {
  const activations = [
    { name: "silu", op: silu, reference: siluReference, exponent: (x: number) => x },
    { name: "quickGelu", op: quickGelu, reference: quickGeluReference, exponent: (x: number) => 1.702 * x },
    {
      name: "geluTanh",
      op: geluTanh,
      reference: geluTanhReference,
      exponent: (x: number) => 1.6 * x + 0.0714 * x ** 3,
    },
  ];
  // Of e^u the rounding of u makes |u| units in the last place. GELU's reference loses digits where tanh is next to -1,
  // and e^-u of results below 1e-36 is beyond f32's range.
  const slack = (x: Float32Array, y: Float32Array, exponent: (x: number) => number) => (i: number) =>
    Math.abs(y[i]) * 3e-7 * (2 + Math.min(Math.abs(exponent(x[i])), 100)) + Math.abs(x[i]) * 1e-15 + 1e-36;
  for (const { name, op, reference, exponent } of activations) {
    forEachGpu(name, (test) => {
      test("equals its reference at any size, address and value", (device) =>
        property(device, [floatTypes, sizes, starts, seeds], (dtype, size, start, seed) => {
          const x = floats(device, [size], dtype, seed, { start, wild: true });
          const expected = new Float32Array(size);
          reference(expected, x.values);
          return [rounded(op(x.tensor), dtype, [size], expected, slack(x.values, expected, exponent))];
        }));
    });
  }
  forEachGpu("silu", (test) => {
    test("writes into its input where it is asked to", (device) =>
      property(device, [floatTypes, sizes, seeds], (dtype, size, seed) => {
        const x = floats(device, [size], dtype, seed);
        const expected = new Float32Array(size);
        siluReference(expected, x.values);
        const out = silu(x.tensor, x.tensor);
        assert.equal(out, x.tensor);
        return [rounded(out, dtype, [size], expected, slack(x.values, expected, (u) => u))];
      }));
    test("takes rows of a wider tensor and stores into such", (device) =>
      property(
        device,
        [
          floatTypes,
          fc.constantFrom([1, 1, 1], [1, 5, 96], [2, 3, 1040], [2, 4, 7]),
          fc.tuple(starts, starts),
          fc.boolean(),
          seeds,
        ],
        (dtype, shape, [from, to], dense, seed) => {
          const [batch, rows, width] = shape;
          const wide = floats(device, [batch, rows + 2, from + width + 8], dtype, seed, { wild: true });
          const x = wide.tensor.narrow(1, 1, rows).narrow(2, from, width);
          const values = decode(viewBytes(wide.bytes, x), dtype);
          const expected = new Float32Array(values.length);
          siluReference(expected, values);
          const around = bits(device, [batch, rows + 1, to + width + 8], dtype, seed + 1);
          const place = around.tensor.narrow(1, 0, rows).narrow(2, to, width);
          const out = dense ? Tensor.empty(device, shape, dtype) : place;
          assert.equal(silu(x, out), out);
          const beside = [
            around.tensor.narrow(1, rows, 1),
            around.tensor.narrow(2, 0, to),
            around.tensor.narrow(2, to + width, 8),
          ].filter(({ size }) => size > 0);
          return [
            rounded(contiguous(out), dtype, shape, expected, slack(values, expected, (u) => u)),
            ...beside.map((part) => same(contiguous(part), dtype, part.shape, viewBytes(around.bytes, part))),
          ];
        },
      ));
    test("takes more rows than a grid has", (device) =>
      check(device, () => {
        const wide = floats(device, [70_000, 2], "bf16", 5);
        const x = wide.tensor.narrow(1, 1, 1);
        const values = decode(viewBytes(wide.bytes, x), "bf16");
        const expected = new Float32Array(values.length);
        siluReference(expected, values);
        return [rounded(silu(x), "bf16", [70_000, 1], expected, slack(values, expected, (u) => u))];
      }));
    test("refuses a place for the result that does not fit", (device) =>
      check(device, () => {
        const x = floats(device, [2, 3, 8], "bf16", 1).tensor;
        const places = [
          Tensor.empty(device, [2, 3, 8], "f32"),
          Tensor.empty(device, [2, 24], "bf16"),
          Tensor.empty(device, [2, 8, 3], "bf16").permute([0, 2, 1]),
        ];
        for (const out of places) assert.throws(() => silu(x, out), ShapeError);
        return [];
      }));
    test("takes strided input and f16", (device) =>
      check(device, () => {
        const x = floats(device, [5, 12, 9], "f16", 3, { order: [2, 0, 1], gap: 2 });
        const expected = new Float32Array(5 * 12 * 9);
        siluReference(expected, x.values);
        return [rounded(silu(x.tensor), "f16", [5, 12, 9], expected, slack(x.values, expected, (u) => u))];
      }));
  });
}

function arithmeticTests(): void {
  forEachGpu("add", (test) => {
    test("is exact, also where the second tensor repeats or has another dtype", (device) =>
      property(
        device,
        [floatTypes, fc.boolean(), fc.integer({ min: 1, max: 6 }), sizes, starts, seeds],
        (dtype, mixed, repeats, size, start, seed) => {
          const other = mixed ? "bf16" : dtype;
          const a = floats(device, [repeats, size], dtype, seed, { wild: true });
          const b = floats(device, [size], other, seed + 1, { start, wild: true });
          const expected = new Float32Array(repeats * size);
          addReference(expected, a.values, b.values);
          return [rounded(add(a.tensor, b.tensor), dtype, [repeats, size], expected)];
        },
      ));
    test("takes more repeats than a grid has rows, and strided tensors", (device) =>
      check(device, () => {
        const long = floats(device, [70_000, 1], "f32", 1);
        const one = floats(device, [1], "f32", 2);
        const a = floats(device, [6, 10, 7], "bf16", 3, { order: [1, 2, 0] });
        const b = floats(device, [10, 7], "bf16", 4, { order: [1, 0], gap: 3 });
        const expected = [new Float32Array(70_000), new Float32Array(420)];
        addReference(expected[0], long.values, one.values);
        addReference(expected[1], a.values, b.values);
        return [
          rounded(add(long.tensor, one.tensor), "f32", [70_000, 1], expected[0]),
          rounded(add(a.tensor, b.tensor), "bf16", [6, 10, 7], expected[1]),
        ];
      }));
  });

  forEachGpu("add", (test) => {
    test("keeps the layout of a picture, whatever the other one's is", (device) =>
      property(
        device,
        [floatTypes, pictures, fc.boolean(), fc.boolean(), seeds],
        (dtype, shape, last, otherLast, seed) => {
          const layout = (last: boolean) => last ? { order: NHWC, wild: true } : { wild: true };
          const a = floats(device, shape, dtype, seed, layout(last));
          const b = floats(device, shape, dtype, seed + 1, layout(otherLast));
          const expected = new Float32Array(a.values.length);
          addReference(expected, a.values, b.values);
          const sum = add(a.tensor, b.tensor);
          assert.equal(isChannelsLast(sum), isChannelsLast(a.tensor));
          return [rounded(contiguous(sum), dtype, shape, expected)];
        },
      ));
  });

  forEachGpu("multiply", (test) => {
    test("is exact", (device) =>
      property(
        device,
        [floatTypes, fc.boolean(), sizes, starts, seeds],
        (dtype, mixed, size, start, seed) => {
          const a = floats(device, [size], dtype, seed, { wild: true });
          const b = floats(device, [size], mixed ? "f32" : dtype, seed + 1, { start, wild: true });
          const expected = new Float32Array(size);
          multiplyReference(expected, a.values, b.values);
          return [rounded(multiply(a.tensor, b.tensor), dtype, [size], expected)];
        },
      ));
  });

  forEachGpu("scaleShift", (test) => {
    test("equals its reference", (device) =>
      property(device, [floatTypes, sizes, starts, seeds], (dtype, size, start, seed) => {
        const x = floats(device, [size], dtype, seed, { start, wild: true });
        const [expected, magnitude] = [new Float32Array(size), new Float32Array(size)];
        scaleShiftReference(expected, x.values, 1 / 0.3611, 0.1159);
        scaleShiftReference(magnitude, x.values.map(Math.abs), 1 / 0.3611, 0.1159);
        const out = scaleShift(x.tensor, 1 / 0.3611, 0.1159);
        return [rounded(out, dtype, [size], expected, roundings(magnitude))];
      }));
  });

  forEachGpu("eulerStep", (test) => {
    test("equals its reference", (device) =>
      property(device, [floatTypes, sizes, starts, seeds], (dtype, size, start, seed) => {
        const sample = floats(device, [size], "f32", seed, { wild: true });
        const velocity = floats(device, [size], dtype, seed + 1, { start, wild: true });
        const dt = floats(device, [1], "f32", seed + 2, { start });
        const [expected, magnitude] = [new Float32Array(size), new Float32Array(size)];
        eulerStepReference(expected, sample.values, velocity.values, dt.values);
        const absolute = [sample, velocity, dt].map(({ values }) => values.map(Math.abs));
        eulerStepReference(magnitude, absolute[0], absolute[1], absolute[2]);
        const out = eulerStep(sample.tensor, velocity.tensor, dt.tensor);
        return [rounded(out, "f32", [size], expected, roundings(magnitude))];
      }));
    test("refuses a sample that is not f32", (device) =>
      check(device, () => {
        const x = floats(device, [4], "bf16", 1).tensor;
        assert.throws(() => eulerStep(x, x, floats(device, [1], "f32", 2).tensor), ShapeError);
        return [];
      }));
  });
}

function modulationTests(): void {
  const tokens = fc.integer({ min: 1, max: 11 });
  const batches = fc.integer({ min: 1, max: 3 });
  const hiddens = fc.oneof(fc.constantFrom(8, 64, 1040), fc.integer({ min: 1, max: 40 }));
  /** `[batch, tokens, hidden]` as a part of a longer sequence, transposed or dense. */
  const part = (
    device: GpuDevice,
    shape: readonly number[],
    dtype: Float,
    seed: number,
    kind: number,
  ): Sample => {
    const [batch, count, hidden] = shape;
    if (kind === 0) return floats(device, shape, dtype, seed, { wild: true });
    if (kind === 1) return floats(device, shape, dtype, seed, { order: [0, 2, 1], wild: true });
    const long = floats(device, [batch, count + 3, hidden], dtype, seed, { wild: true });
    const tensor = long.tensor.narrow(1, 2, count);
    const bytes = viewBytes(long.bytes, tensor);
    return { tensor, bytes, values: decode(bytes, dtype) };
  };
  /** Chunks `[batch, hidden]` of one modulation tensor. */
  const chunks = (
    device: GpuDevice,
    batch: number,
    hidden: number,
    parts: number,
    dtype: Float,
    seed: number,
  ) => {
    const whole = floats(device, [batch, parts * hidden], dtype, seed, { wild: true });
    return whole.tensor.chunk(parts, 1).map((tensor) => ({
      tensor,
      values: decode(viewBytes(whole.bytes, tensor), dtype),
    }));
  };
  const absolute = (values: Float32Array) => values.map(Math.abs);

  forEachGpu("modulate", (test) => {
    test("equals its reference on chunks and on parts of sequences", (device) =>
      property(
        device,
        [floatTypes, fc.boolean(), batches, tokens, hiddens, fc.nat(2), seeds],
        (dtype, mixed, batch, count, hidden, kind, seed) => {
          const shape = [batch, count, hidden];
          const x = part(device, shape, dtype, seed, kind);
          const [, scale, shift] = chunks(device, batch, hidden, 3, mixed ? "f32" : dtype, seed + 1);
          const [expected, magnitude] = [
            new Float32Array(x.values.length),
            new Float32Array(x.values.length),
          ];
          modulateReference(expected, x.values, scale.values, shift.values, count, hidden);
          const terms = [x.values, scale.values, shift.values].map(absolute);
          modulateReference(magnitude, terms[0], terms[1], terms[2], count, hidden);
          const out = modulate(x.tensor, scale.tensor, shift.tensor);
          return [rounded(out, dtype, shape, expected, roundings(magnitude))];
        },
        60,
      ));
  });

  forEachGpu("gatedResidual", (test) => {
    test("equals its reference on chunks and on parts of sequences", (device) =>
      property(
        device,
        [floatTypes, batches, tokens, hiddens, fc.nat(2), fc.nat(2), seeds],
        (dtype, batch, count, hidden, kind, otherKind, seed) => {
          const shape = [batch, count, hidden];
          const residual = part(device, shape, dtype, seed, kind);
          const x = part(device, shape, dtype, seed + 1, otherKind);
          const [, , gate] = chunks(device, batch, hidden, 3, dtype, seed + 2);
          const [expected, magnitude] = [
            new Float32Array(x.values.length),
            new Float32Array(x.values.length),
          ];
          gatedResidualReference(expected, residual.values, x.values, gate.values, count, hidden);
          const terms = [residual.values, x.values, gate.values].map(absolute);
          gatedResidualReference(magnitude, terms[0], terms[1], terms[2], count, hidden);
          const out = gatedResidual(residual.tensor, x.tensor, gate.tensor);
          return [rounded(out, dtype, shape, expected, roundings(magnitude))];
        },
        60,
      ));
  });
}

function castTests(): void {
  forEachGpu("cast", (test) => {
    const targets = ["f32", "bf16", "f16"] as const;
    test("rounds every 16-bit and 8-bit pattern", (device) =>
      check(device, () =>
        (["bf16", "f16", "f8e4m3", "f8e5m2", "u8"] as const).flatMap((from) => {
          const every = dtypeBytes(from) === 1
            ? Uint8Array.from(range(256))
            : new Uint8Array(Uint16Array.from(range(65536)).buffer);
          const shape = [every.length / dtypeBytes(from)];
          const x = placed(device, every, shape, from);
          return targets.filter((to) => to !== from).map((to) =>
            rounded(cast(x.tensor, to), to, shape, x.values)
          );
        })));
    test("rounds f32 to nearest, ties to even, at every border of the target", (device) =>
      check(device, () =>
        (["bf16", "f16"] as const).flatMap((to) => {
          const codes = new Uint8Array(Uint16Array.from(range(65536)).buffer);
          const values = decode(codes, to);
          // Above each value by a half of its spacing, and one bit below and above that.
          const half = to === "bf16" ? 0x8000 : 0x1000;
          const around = [...values].flatMap((value) =>
            [0, half - 1, half, half + 1].map((step) => plusBits(value, step))
          );
          // f16 has subnormals, whose spacing is wider.
          const small = Float32Array.from(range(8192), (i) => (i - 4096) * 2 ** -26);
          const all = Float32Array.of(...small, 65519.996, 65520, -65520, 3.4e38);
          const input = Float32Array.from([...around, ...all]);
          const x = placed(device, encode(input, "f32"), [input.length], "f32");
          return [rounded(cast(x.tensor, to), to, [input.length], x.values)];
        })));
    test("takes strided tensors, odd sizes and a place for the result", (device) =>
      property(device, [sizes, starts, seeds], (size, start, seed) => {
        const x = floats(device, [3, size], "f32", seed, { start, wild: true });
        const memory = device.alloc(6 * size);
        const out = cast(x.tensor, "bf16", memory);
        assert.equal(out.memory, memory);
        const y = bits(device, [size, 3], "f8e4m3", seed, { order: [1, 0], start });
        return [
          rounded(out, "bf16", [3, size], x.values),
          rounded(cast(y.tensor, "f32"), "f32", [size, 3], y.values),
        ];
      }, 15));
    test("makes a picture with channels last dense", (device) =>
      property(device, [pictures, seeds], (shape, seed) => {
        const x = floats(device, shape, "bf16", seed, { order: NHWC, wild: true });
        return [rounded(cast(x.tensor, "f32"), "f32", shape, x.values)];
      }, 15));
    test("rounds to E4M3 bit for bit, saturating at 448", async (device) => {
      const patterns = new Uint8Array(Uint16Array.from(range(65536)).buffer);
      for (const dtype of ["bf16", "f16"] as const) {
        const x = placed(device, patterns, [65536], dtype);
        const expected = new Uint8Array(65536);
        float32ToFloat8(x.values, expected);
        const out = cast(x.tensor, "f8e4m3");
        assert.equal(out.dtype, "f8e4m3");
        assert.deepEqual(await device.download(out), expected);
        for (const { memory } of [x.tensor, out]) device.free(memory);
      }
    });
    test("makes floats of integers, and no E5M2", (device) =>
      check(device, () => {
        const numbers = new Uint8Array(Int32Array.of(0, 1, -1, 7, 300, -70000, 2 ** 24).buffer);
        const x = placed(device, numbers, [7], "i32");
        assert.throws(() => cast(x.tensor, "f8e5m2"), ShapeError);
        return [rounded(cast(x.tensor, "f32"), "f32", [7], x.values)];
      }));
  });
}

const scratch = new DataView(new ArrayBuffer(4));

/** The f32 whose bits are `step` above those of `value`. */
function plusBits(value: number, step: number): number {
  scratch.setFloat32(0, value);
  scratch.setUint32(0, scratch.getUint32(0) + step);
  return scratch.getFloat32(0);
}

function copyTests(): void {
  const units = fc.constantFrom<DType>("u8", "bf16", "f32");
  const copied = (dense: Sample, view: Tensor): Result =>
    same(contiguous(view), view.dtype, view.shape, viewBytes(dense.bytes, view));

  forEachGpu("contiguous", (test) => {
    test("copies narrowed rows of every alignment", (device) =>
      property(
        device,
        [units, fc.nat(40), fc.integer({ min: 1, max: 1200 }), seeds],
        (dtype, from, width, seed) => {
          const x = bits(device, [3, from + width + 7], dtype, seed);
          return [copied(x, x.tensor.narrow(1, from, width))];
        },
      ));
    test("transposes matrices of every size and element", (device) =>
      property(
        device,
        [units, fc.integer({ min: 1, max: 150 }), fc.integer({ min: 1, max: 150 }), fc.boolean(), seeds],
        (dtype, rows, columns, even, seed) => {
          const shape = even ? [2, 4 * rows, 4 * columns] : [2, rows, columns];
          const x = bits(device, shape, dtype, seed);
          return [copied(x, x.tensor.permute([0, 2, 1]))];
        },
      ));
    test("turns NCHW into NHWC and back, also of a part of the channels", (device) =>
      property(device, [units, fc.constantFrom(3, 16, 40), seeds], (dtype, channels, seed) => {
        const nchw = bits(device, [2, channels, 9, 22], dtype, seed);
        const nhwc = bits(device, [2, 9, 22, channels], dtype, seed);
        return [
          copied(nchw, nchw.tensor.permute([0, 2, 3, 1])),
          copied(nchw, nchw.tensor.narrow(1, 1, 2).permute([0, 2, 3, 1])),
          copied(nhwc, nhwc.tensor.permute([0, 3, 1, 2])),
          copied(nhwc, nhwc.tensor.narrow(2, 2, 17).permute([0, 3, 1, 2])),
        ];
      }, 9));
    test("packs and unpacks latents, and splits heads", (device) =>
      property(device, [fc.constantFrom<DType>("bf16", "f32"), seeds], (dtype, seed) => {
        const latents = bits(device, [2, 16, 6, 10], dtype, seed);
        const packed = bits(device, [2, 15, 64], dtype, seed);
        const heads = bits(device, [2, 7, 3, 128], dtype, seed);
        return [
          copied(latents, latents.tensor.reshape([2, 16, 3, 2, 5, 2]).permute([0, 2, 4, 1, 3, 5])),
          copied(packed, packed.tensor.reshape([2, 3, 5, 16, 2, 2]).permute([0, 3, 1, 4, 2, 5])),
          copied(heads, heads.tensor.permute([0, 2, 1, 3])),
        ];
      }, 4));
    test("copies six dimensions that lie apart, and refuses seven", (device) =>
      check(device, () => {
        const six = bits(device, [3, 3, 3, 3, 3, 3], "bf16", 1);
        const tall = bits(device, [2, 3, 2, 9, 3, 10], "bf16", 3);
        const seven = bits(device, [2, 2, 2, 2, 2, 2, 2], "bf16", 2);
        assert.throws(() => contiguous(seven.tensor.permute([6, 5, 4, 3, 2, 1, 0])), ShapeError);
        return [
          copied(six, six.tensor.permute([5, 4, 3, 2, 1, 0])),
          copied(tall, tall.tensor.permute([2, 1, 5, 0, 4, 3])),
          copied(six, six.tensor.narrow(5, 1, 1)),
        ];
      }));
    test("gives a dense tensor back as it is", (device) =>
      check(device, () => {
        const { tensor } = bits(device, [4, 5], "f32", 1);
        assert.equal(contiguous(tensor), tensor);
        return [];
      }));
  });

  forEachGpu("concat", (test) => {
    test("puts tensors behind one another along any dimension", (device) =>
      property(
        device,
        [
          units,
          fc.integer({ min: -3, max: 2 }),
          fc.array(fc.integer({ min: 0, max: 20 }), { minLength: 1, maxLength: 4 }),
          seeds,
        ],
        (dtype, dim, lengths, seed) => {
          const at = dim < 0 ? dim + 3 : dim;
          const parts = lengths.map((length, i) => {
            const whole = bits(device, [3, 6, 16].with(at, length + 1), dtype, seed + i);
            const tensor = whole.tensor.narrow(at, 1, length);
            return { tensor, bytes: viewBytes(whole.bytes, tensor) };
          });
          const total = lengths.reduce((a, b) => a + b);
          if (total === 0) return [];
          const shape = [3, 6, 16].with(at, total);
          // Runs of elements that stay together, part by part.
          const size = dtypeBytes(dtype);
          const outer = elementCount(shape.slice(0, at));
          const inner = elementCount(shape.slice(at + 1));
          const expected = range(outer).flatMap((i) =>
            parts.flatMap(({ bytes }, part) => {
              const run = lengths[part] * inner * size;
              return [...bytes.subarray(i * run, (i + 1) * run)];
            })
          );
          return [
            same(concat(parts.map(({ tensor }) => tensor), dim), dtype, shape, Uint8Array.from(expected)),
          ];
        },
        30,
      ));
  });
}

function tableTests(): void {
  forEachGpu("embedding", (test) => {
    test("moves rows bit by bit, and writes NaN for an index outside of the table", (device) =>
      property(
        device,
        [
          fc.constantFrom<DType>("bf16", "f32"),
          fc.constantFrom(1, 6, 64, 768, 1001),
          fc.array(fc.integer({ min: -1, max: 9 }), {
            minLength: 1,
            maxLength: 12,
          }),
          fc.nat(3),
          seeds,
        ],
        (dtype, hidden, list, gap, seed) => {
          const table = bits(device, [9, hidden], dtype, seed, { gap });
          const ids = Tensor.fromInt32(device, list, [1, list.length]);
          const rowBytes = hidden * dtypeBytes(dtype);
          const expected = list.flatMap((id) =>
            id < 0 || id > 8
              ? new Array<number>(rowBytes).fill(0xff)
              : [...table.bytes.subarray(id * rowBytes, (id + 1) * rowBytes)]
          );
          const out = embedding(ids, table.tensor);
          return [same(out, dtype, [1, list.length, hidden], Uint8Array.from(expected))];
        },
      ));
  });

  forEachGpu("timestepEmbedding", (test) => {
    test("equals its reference on the scale of 0 to 1000", (device) =>
      property(
        device,
        [
          fc.constantFrom<Float>("f32", "bf16", "f16"),
          fc.array(fc.float({ min: 0, max: 3500, noNaN: true }), {
            minLength: 1,
            maxLength: 4,
          }),
          fc.constantFrom(2, 10, 256, 640),
        ],
        (dtype, timesteps, width) => {
          const expected = new Float32Array(timesteps.length * width);
          timestepEmbeddingReference(expected, Float32Array.from(timesteps), width);
          const out = timestepEmbedding(
            Tensor.fromFloat32(device, timesteps, [timesteps.length]),
            width,
            dtype,
          );
          return [rounded(out, dtype, [timesteps.length, width], expected, () => 2 ** -23)];
        },
      ));
  });
}

function pictureTests(): void {
  forEachGpu("upsampleNearest", (test) => {
    test("repeats each pixel in both directions, bit by bit", (device) =>
      property(
        device,
        [
          fc.constantFrom<DType>("bf16", "f32"),
          fc.integer({ min: 1, max: 9 }),
          fc.integer({ min: 1, max: 70 }),
          starts,
          seeds,
        ],
        (dtype, height, width, start, seed) => {
          const x = bits(device, [2, 3, height, width], dtype, seed, { start });
          const Words = dtype === "bf16" ? Uint16Array : Int32Array;
          const expected = new Words(4 * x.values.length);
          upsampleNearestReference<Uint16Array | Int32Array>(expected, new Words(x.bytes.buffer), width);
          const bytes = new Uint8Array(expected.buffer);
          return [same(upsampleNearest(x.tensor), dtype, [2, 3, 2 * height, 2 * width], bytes)];
        },
      ));
    test("keeps channels last", (device) =>
      property(
        device,
        [fc.constantFrom<DType>("bf16", "f32"), pictures, starts, seeds],
        (dtype, shape, start, seed) => {
          const [batch, channels, height, width] = shape;
          const x = bits(device, shape, dtype, seed, { order: NHWC, start });
          const Words = dtype === "bf16" ? Uint16Array : Int32Array;
          const expected = new Words(4 * x.values.length);
          upsampleNearestReference<Uint16Array | Int32Array>(expected, new Words(x.bytes.buffer), width);
          const out = upsampleNearest(x.tensor);
          assert.equal(isChannelsLast(out), isChannelsLast(x.tensor));
          const bytes = new Uint8Array(expected.buffer);
          return [same(contiguous(out), dtype, [batch, channels, 2 * height, 2 * width], bytes)];
        },
      ));
  });

  forEachGpu("toPixels", (test) => {
    test("rounds as its reference, at borders and beyond the range too", (device) =>
      property(
        device,
        [
          floatTypes,
          fc.integer({ min: 1, max: 3 }),
          fc.integer({ min: 1, max: 20 }),
          fc.integer({ min: 1, max: 20 }),
          seeds,
        ],
        (dtype, batch, height, width, seed) => {
          const value = noise(seed);
          const values = Float32Array.from({ length: batch * 3 * height * width }, (_, i) => {
            if (i % 3 === 0) return value(i) * 1.3;
            // Half-way between two levels, or next to it.
            const level = Math.fround((Math.floor(value(i) * 128 + 128) + 0.5) / 127.5 - 1);
            return i % 97 === 1 ? NaN : plusBits(level, i % 5 - 2);
          });
          const x = placed(device, encode(values, dtype), [batch, 3, height, width], dtype);
          const expected = new Float32Array(values.length);
          toPixelsReference(expected, x.values, 3, height * width);
          return [same(toPixels(x.tensor), "u8", [batch, height, width, 3], Uint8Array.from(expected))];
        },
      ));
  });
}

/** Defines the tests of all operators that compute element by element or copy. */
export function elementwiseSuite(): void {
  activationTests();
  arithmeticTests();
  modulationTests();
  castTests();
  copyTests();
  tableTests();
  pictureTests();
}
