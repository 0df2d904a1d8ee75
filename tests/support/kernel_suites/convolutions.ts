/** Convolutions on a GPU against their TypeScript reference, in both layouts of pictures. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { Tensor } from "../../../ffi/tensor.ts";
import { roundToBfloat16 } from "../../../ffi/bfloat16.ts";
import { add } from "../../../kernels/add.ts";
import { cast } from "../../../kernels/cast.ts";
import { contiguous } from "../../../kernels/contiguous.ts";
import { conv2d, conv2dReference } from "../../../kernels/conv2d.ts";
import { conv2dAddFused } from "../../../kernels/conv2d_add.ts";
import { isChannelsLast, NCHW, NHWC } from "../../../kernels/layout.ts";
import { polyphaseBias, polyphaseFilters, upsampleConvPolyphase } from "../../../kernels/upsample_conv.ts";
import { upsampleNearestReference } from "../../../kernels/upsample_nearest.ts";
import { valuesOf } from "../golden.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import { check, dtypes, NONE, property, roundings, sample, seeds } from "./samples.ts";

const drawn = fc.record({
  batch: fc.integer({ min: 1, max: 2 }),
  channels: fc.constantFrom(1, 3, 8, 16),
  filters: fc.constantFrom(1, 3, 8, 20),
  kernel: fc.constantFrom<[number, number]>([1, 1], [3, 3], [2, 3]),
  height: fc.integer({ min: 3, max: 8 }),
  width: fc.integer({ min: 3, max: 8 }),
  stride: fc.constantFrom(1, 1, 2),
  padding: fc.constantFrom<[number, number, number, number]>([0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]),
  biased: fc.boolean(),
  dtype: fc.constantFrom("f32" as const, "bf16" as const),
  pictureLast: fc.boolean(),
  weightLast: fc.boolean(),
  odd: fc.constantFrom(0, 0, 0, NaN),
  seed: fc.nat(1000),
});

/** Defines the tests of convolutions. */
export function convolutionSuite(): void {
  forEachGpu("conv2d", (test) => {
    test("equals its reference, and lies as its weight does, NCHW or NHWC", async (device) => {
      const property = fc.asyncProperty(drawn, async (one) => {
        const { batch, channels, filters, kernel, height, width, stride, padding, dtype, seed, odd } = one;
        const [top, left, bottom, right] = padding;
        const shape = {
          x: [batch, channels, height, width],
          weight: [filters, channels, ...kernel],
          out: [
            batch,
            filters,
            Math.floor((height + top + bottom - kernel[0]) / stride) + 1,
            Math.floor((width + left + right - kernel[1]) / stride) + 1,
          ],
        };
        const before = device.memoryUse().current;
        const sample = (size: readonly number[], offset: number, last: boolean) => {
          const values = new Float32Array(size.reduce((a, b) => a * b)).map((_, i) => {
            const value = noise(seed + offset)(i);
            return dtype === "f32" ? value : roundToBfloat16(value);
          });
          if (odd !== 0 && offset === 0) values[seed % values.length] = odd;
          const tensor = cast(Tensor.fromFloat32(device, values, size), dtype);
          return { values, tensor: last ? contiguous(tensor.permute(NHWC)).permute(NCHW) : tensor };
        };
        const result = device.scope(() => {
          const x = sample(shape.x, 0, one.pictureLast);
          const weight = sample(shape.weight, 1, one.weightLast);
          const bias = one.biased ? sample([filters], 2, false) : undefined;
          const expected = new Float32Array(shape.out.reduce((a, b) => a * b));
          conv2dReference(expected, x.values, weight.values, bias?.values ?? NONE, shape, stride, padding);
          const out = conv2d(x.tensor, weight.tensor, bias?.tensor, { stride, padding });
          assert.equal(out.dtype, dtype);
          assert.deepEqual(out.shape, shape.out);
          // With one channel or one pixel both layouts are the same.
          if (!out.isContiguous || !out.permute(NHWC).isContiguous) {
            const decides = kernel[0] * kernel[1] === 1 ? x.tensor : weight.tensor;
            assert.equal(isChannelsLast(out), isChannelsLast(decides));
          }
          return { dense: contiguous(out), expected, bias: bias?.values };
        });
        const values = await valuesOf(result.dense);
        device.free(result.dense.memory);
        const terms = channels * kernel[0] * kernel[1];
        result.expected.forEach((expected, i) => {
          if (Object.is(values[i], expected)) return;
          const error = Math.abs(values[i] - expected);
          // What a library rounds before it adds the bias may be larger than the result.
          const filter = Math.floor(i / (shape.out[2] * shape.out[3])) % filters;
          const sum = Math.abs(expected - (result.bias?.[filter] ?? 0));
          const rounded = Math.abs(expected) + (roundings(device) - 1) * sum;
          const allowed = terms * 2 ** -23 + (dtype === "bf16" ? 2 ** -8 * rounded : 0);
          assert.ok(error <= allowed, `element ${i} is ${values[i]}, not ${expected}, allowed ${allowed}`);
        });
        assert.equal(device.memoryUse().current, before, "memory was not given back");
      });
      await fc.assert(property, { numRuns: 100 });
    });
  });
  conv2dAddTests();
  upsampleConvTests();
}

const last = (tensor: Tensor) => contiguous(tensor.permute(NHWC)).permute(NCHW);

function conv2dAddTests(): void {
  const added = fc.record({
    batch: fc.integer({ min: 1, max: 2 }),
    channels: fc.constantFrom(1, 3, 8, 16),
    filters: fc.constantFrom(1, 3, 8, 20),
    kernel: fc.constantFrom(1, 3),
    height: fc.integer({ min: 1, max: 7 }),
    width: fc.integer({ min: 1, max: 7 }),
    dtype: dtypes,
    weightLast: fc.boolean(),
    residualLast: fc.boolean(),
    seed: seeds,
  });

  forEachGpu("conv2dAddFused", (test) => {
    test("equals a convolution and a sum, and leaves the residual alone", (device) =>
      property(device, added, 60, (one) => {
        const { batch, channels, filters, kernel, height, width, dtype, seed } = one;
        const shape = [batch, filters, height, width];
        const [x, weight, bias, residual] = [
          sample(device, [batch, channels, height, width], dtype, noise(seed)),
          sample(device, [filters, channels, kernel, kernel], dtype, noise(seed + 1)),
          sample(device, [filters], dtype, noise(seed + 2)),
          sample(device, shape, dtype, (i) => 8 * noise(seed + 3)(i)),
        ];
        const edge = kernel >> 1;
        const options = { padding: [edge, edge, edge, edge] } as const;
        const shapes = { x: x.tensor.shape, weight: weight.tensor.shape, out: shape };
        const [convolved, sums] = [bias.values, NONE].map((shift) => {
          const result = new Float32Array(residual.values.length);
          conv2dReference(result, x.values, weight.values, shift, shapes, 1, options.padding);
          return result;
        });
        const expected = convolved.map((value, i) => value + residual.values[i]);
        const beside = one.residualLast ? last(residual.tensor) : residual.tensor;
        const filter = one.weightLast ? last(weight.tensor) : weight.tensor;
        const out = conv2dAddFused(x.tensor, filter, bias.tensor, beside, options, { add, conv2d });
        // Where no library does all of it, the convolution's own results were rounded before.
        const before = dtype === "bf16" && roundings(device) > 1 ? 2 ** -8 : 0;
        const lost = channels * kernel ** 2 * 2 ** -22;
        const slack = (i: number) => lost + before * (Math.abs(convolved[i]) + Math.abs(sums[i]));
        return [
          { actual: contiguous(out), dtype, shape, expected, slack },
          { actual: contiguous(beside), dtype, shape, expected: residual.values, slack: () => -Infinity },
        ];
      }));

    test("cuDNN has a kernel for it, at the autoencoder's channels", (device) =>
      check(device, () => {
        const [x, weight, bias] = [[1, 16, 16, 128], [128, 3, 3, 128], [128]].map((size) =>
          sample(device, size, "bf16", noise(1)).tensor
        );
        const [picture, filters] = [x, weight].map((tensor) => tensor.permute(NCHW));
        const out = Tensor.empty(device, x.shape, "bf16").permute(NCHW);
        const plan = { x: picture, weight: filters, bias, residual: picture, out };
        const takes = device.convAdd({ ...plan, stride: 1, padding: [1, 1, 1, 1] });
        assert.equal(takes, device.kind === "cuda");
        return [];
      }));

    test("refuses sizes that do not fit", (device) =>
      check(device, () => {
        const f32 = (...shape: number[]) => Tensor.empty(device, shape, "f32");
        const [x, weight, bias] = [f32(1, 3, 4, 4), f32(5, 3, 1, 1), f32(5)];
        const adding = (shift: Tensor, residual: Tensor) => () =>
          conv2dAddFused(x, weight, shift, residual, {}, { add, conv2d });
        assert.throws(adding(bias, f32(1, 5, 4, 3)), /conv2dAdd: residual/);
        assert.throws(adding(f32(4), f32(1, 5, 4, 4)), /conv2dAdd: bias/);
        return [];
      }));
  });
}

function upsampleConvTests(): void {
  const upsampled = fc.record({
    batch: fc.integer({ min: 1, max: 2 }),
    channels: fc.constantFrom(1, 3, 8),
    filters: fc.constantFrom(1, 3, 8),
    height: fc.integer({ min: 1, max: 6 }),
    width: fc.integer({ min: 1, max: 9 }),
    dtype: dtypes,
    pictureLast: fc.boolean(),
    weightLast: fc.boolean(),
    seed: seeds,
  });

  forEachGpu("upsampleConvPolyphase", (test) => {
    test("equals upsampling and a 3 x 3 convolution, at odd sizes and in both layouts", (device) =>
      property(device, upsampled, 60, (one) => {
        const { batch, channels, filters, height, width, dtype, seed } = one;
        const [x, weight, bias] = [
          sample(device, [batch, channels, height, width], dtype, noise(seed)),
          // Sums of four of these are numbers of bfloat16.
          sample(device, [filters, channels, 3, 3], dtype, (i) => Math.round(15 * noise(seed + 1)(i)) / 16),
          sample(device, [filters], dtype, noise(seed + 2)),
        ];
        const large = new Float32Array(4 * x.values.length);
        upsampleNearestReference(large, x.values, width);
        const shape = [batch, filters, 2 * height, 2 * width];
        const shapes = {
          x: [batch, channels, 2 * height, 2 * width],
          weight: weight.tensor.shape,
          out: shape,
        };
        const [expected, sums] = [bias.values, NONE].map((added) => {
          const result = new Float32Array(4 * batch * filters * height * width);
          conv2dReference(result, large, weight.values, added, shapes, 1, [1, 1, 1, 1]);
          return result;
        });
        const dense = polyphaseFilters(weight.tensor);
        const out = upsampleConvPolyphase(
          one.pictureLast ? last(x.tensor) : x.tensor,
          one.weightLast ? last(dense) : dense,
          polyphaseBias(bias.tensor),
          { conv2d },
        );
        // With one channel both layouts are the same.
        if (channels > 1 && filters > 1) assert.equal(isChannelsLast(out), one.weightLast);
        const again = dtype === "bf16" ? (roundings(device) - 1) * 2 ** -8 : 0;
        const slack = (i: number) => 9 * channels * 2 ** -22 + again * Math.abs(sums[i]);
        return [{ actual: contiguous(out), dtype, shape, expected, slack }];
      }));

    test("filters are sums of the taps that see the same pixel, rounded once", (device) =>
      property(device, fc.record({ dtype: dtypes, seed: seeds }), 10, ({ dtype, seed }) => {
        const [filters, channels] = [3, 5];
        // Multiples of 2^-12, so that sums in f32 are exact.
        const weight = sample(
          device,
          [filters, channels, 3, 3],
          dtype,
          (i) => Math.round(2 ** 12 * noise(seed)(i)) / 2 ** 12,
        );
        const taps = [[[0], [1, 2]], [[0, 1], [2]]]; // of even and of odd places: before or own, own or after
        const expected: number[] = [];
        for (const rows of taps) {
          for (const columns of taps) {
            for (let at = 0; at < weight.values.length; at += 9) {
              for (const r of rows) {
                for (const s of columns) {
                  const under = r.flatMap((row) => s.map((column) => weight.values[at + 3 * row + column]));
                  const sum = under.reduce((a, b) => a + b);
                  expected.push(dtype === "bf16" ? roundToBfloat16(sum) : sum);
                }
              }
            }
          }
        }
        return [{
          actual: polyphaseFilters(weight.tensor),
          dtype,
          shape: [4 * filters, channels, 2, 2],
          expected: Float32Array.from(expected, (value) => value),
          slack: () => -Infinity, // the very same bits
        }];
      }));
  });
}
