/** Casts, copies, tables and pictures on a GPU against their TypeScript references. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { type DType, dtypeBytes } from "../../../ffi/dtype.ts";
import { ShapeError } from "../../../ffi/errors.ts";
import { elementCount, Tensor } from "../../../ffi/tensor.ts";
import { cast } from "../../../kernels/cast.ts";
import { concat } from "../../../kernels/concat.ts";
import { contiguous } from "../../../kernels/contiguous.ts";
import { embedding } from "../../../kernels/embedding.ts";
import { float32ToFloat8 } from "../../../ffi/float8.ts";
import { isChannelsLast, NHWC } from "../../../kernels/layout.ts";
import { scaleInto, scaleIntoReference } from "../../../kernels/scale_into.ts";
import { timestepEmbedding, timestepEmbeddingReference } from "../../../kernels/timestep_embedding.ts";
import { toPixels, toPixelsReference } from "../../../kernels/to_pixels.ts";
import { upsampleNearest, upsampleNearestReference } from "../../../kernels/upsample_nearest.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import {
  bits,
  check,
  decode,
  encode,
  type Float,
  floats,
  floatTypes,
  pictures,
  placed,
  property,
  range,
  type Result,
  rounded,
  same,
  type Sample,
  seeds,
  sizes,
  starts,
  viewBytes,
} from "./layouts.ts";

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

/** All tests of these kernels on the GPU of this process's tests. */
function scaleIntoTests(): void {
  forEachGpu("scaleInto", (test) => {
    const sources = fc.constantFrom<Float>("f32", "bf16", "f16");
    const count = fc.oneof(fc.integer({ min: 1, max: 40 }), fc.constantFrom(256, 257));
    const fill = fc.nat(17);
    test("equals its reference at any size, distance of rows and scale, and fills up with zeros", (device) =>
      property(
        device,
        [
          floatTypes,
          sources,
          fc.tuple(count, count, fill, fill),
          fc.constantFrom(0, 1, 8),
          fc.constantFrom(1, -0.7, 3e-3),
          seeds,
        ],
        (dtype, source, [xRows, xColumns, below, beside], gap, scale, seed) => {
          const x = floats(device, [xRows, xColumns], source, seed);
          const [rows, columns] = [xRows + below, xColumns + beside];
          const out = floats(device, [rows, columns + gap], dtype, seed + 1);
          scaleInto(out.tensor.narrow(1, 0, columns), x.tensor, scale);
          const expected = new Float32Array(rows * columns);
          scaleIntoReference(expected, x.values, scale, columns, xColumns);
          // What lies beside stays as it is.
          const whole = out.values.map((old, i) => {
            const [row, column] = [Math.floor(i / (columns + gap)), i % (columns + gap)];
            return column < columns ? expected[row * columns + column] : old;
          });
          return [rounded(out.tensor, dtype, [rows, columns + gap], whole)];
        },
      ));
    test("refuses what does not fit", (device) =>
      check(device, () => {
        const x = floats(device, [4, 6], "f32", 1).tensor;
        const out = floats(device, [4, 5], "bf16", 2).tensor;
        assert.throws(() => scaleInto(out, x, 1), ShapeError);
        assert.throws(() => scaleInto(out, x.permute([1, 0]).narrow(1, 0, 4), 1), ShapeError);
        return [];
      }));
  });
}

export function copySuite(): void {
  scaleIntoTests();
  castTests();
  copyTests();
  tableTests();
  pictureTests();
}
