/** Convolutions on a GPU against their TypeScript reference, in both layouts of pictures. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { Tensor } from "../../../ffi/tensor.ts";
import { roundToBfloat16 } from "../../../ffi/bfloat16.ts";
import { cast } from "../../../kernels/cast.ts";
import { contiguous } from "../../../kernels/contiguous.ts";
import { conv2d, conv2dReference } from "../../../kernels/conv2d.ts";
import { isChannelsLast, NCHW, NHWC } from "../../../kernels/layout.ts";
import { valuesOf } from "../golden.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import { roundings } from "./samples.ts";

const NONE = new Float32Array(0);

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
}
