/** Activations, arithmetic and modulation on a GPU against their TypeScript references. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../../ffi/errors.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { add, addReference } from "../../../kernels/add.ts";
import { contiguous } from "../../../kernels/contiguous.ts";
import { eulerStep, eulerStepReference } from "../../../kernels/euler_step.ts";
import { gatedResidual, gatedResidualReference } from "../../../kernels/gated_residual.ts";
import { geluTanh, geluTanhReference } from "../../../kernels/gelu_tanh.ts";
import { isChannelsLast, NHWC } from "../../../kernels/layout.ts";
import { modulate, modulateReference } from "../../../kernels/modulate.ts";
import { multiply, multiplyReference } from "../../../kernels/multiply.ts";
import { quickGelu, quickGeluReference } from "../../../kernels/quick_gelu.ts";
import { scaleShift, scaleShiftReference } from "../../../kernels/scale_shift.ts";
import { silu, siluReference } from "../../../kernels/silu.ts";
import { forEachGpu } from "../gpu_devices.ts";
import {
  bits,
  check,
  decode,
  type Float,
  floats,
  floatTypes,
  pictures,
  property,
  rounded,
  roundings,
  same,
  type Sample,
  seeds,
  sizes,
  starts,
  viewBytes,
} from "./layouts.ts";

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

/** All tests of these kernels on the GPU of this process's tests. */
export function elementwiseSuite(): void {
  activationTests();
  arithmeticTests();
  modulationTests();
}
