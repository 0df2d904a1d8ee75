/** Random numbers on a GPU against their TypeScript references, and torch's against the generator's. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../../ffi/errors.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { boxMuller, boxMullerReference } from "../../../kernels/box_muller.ts";
import { fillRandom, fillRandomReference, type RandomFillOptions } from "../../../kernels/random_fill.ts";
import { Generator } from "../../../recipes/base/random.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { dtypes, property, seeds } from "./samples.ts";

function randomFillSuite(): void {
  forEachGpu("fillRandom", (test) => {
    test("equals its reference: kinds, dtypes, seeds, sizes, odd addresses", async (device) => {
      const drawn = fc.record({
        size: fc.oneof(fc.integer({ min: 1, max: 20 }), fc.integer({ min: 1, max: 5000 })),
        dtype: dtypes,
        start: fc.constantFrom(0, 3, 8),
        kind: fc.constantFrom<RandomFillOptions["kind"]>("normal", "uniform"),
        scale: fc.constantFrom(1, 0.02, -3),
        shift: fc.constantFrom(0, 1, -100),
        seed: fc.oneof(fc.nat(), fc.bigInt({ min: -(2n ** 63n), max: 2n ** 64n - 1n })),
        stream: fc.constantFrom(0, 1, 7, 2 ** 31, 2 ** 32 - 1),
      });
      await property(device, drawn, 60, ({ size, dtype, start, ...options }) => {
        const whole = Tensor.empty(device, [start + size], dtype);
        const actual = whole.narrow(0, start, size);
        fillRandom(actual, options);
        const expected = new Float32Array(size);
        fillRandomReference(expected, options);
        // A GPU's fast sine and cosine are good to 2^-21, and so is the angle; radii are up to 5.8.
        const far = options.kind === "normal" ? 6e-6 * Math.abs(options.scale) : 0;
        const slack = () => far + Math.abs(options.shift) * 2 ** -23;
        return [{ actual, dtype, shape: [size], expected, slack }];
      });
    });

    test("refuses strided tensors and streams out of range", (device) =>
      device.scope(() => {
        const options = { seed: 1, kind: "normal", scale: 1, shift: 0 } as const;
        const x = Tensor.empty(device, [4, 6], "f32");
        assert.throws(() => fillRandom(x.permute([1, 0]), { ...options, stream: 0 }), ShapeError);
        for (const stream of [-1, 0.5, 2 ** 32, NaN]) {
          assert.throws(() => fillRandom(x, { ...options, stream }), ShapeError);
        }
      }));
  });
}

function boxMullerSuite(): void {
  forEachGpu("boxMuller", (test) => {
    test("equals its reference bit for bit, the smallest and largest numbers too", async (device) => {
      const uniform = fc.oneof(fc.constantFrom(0, 1, 2 ** 23, 2 ** 24 - 1), fc.nat(2 ** 24 - 1));
      const block = fc.array(uniform, { minLength: 16, maxLength: 16 });
      const drawn = fc.record({ dtype: dtypes, blocks: fc.array(block, { minLength: 1, maxLength: 40 }) });
      await property(device, drawn, 60, ({ dtype, blocks }) => {
        const uniforms = Float32Array.from(blocks.flat(), (bits) => bits * 2 ** -24);
        const expected = new Float32Array(uniforms.length);
        boxMullerReference(expected, uniforms);
        const shape = [uniforms.length];
        const actual = boxMuller(Tensor.fromFloat32(device, uniforms, shape), dtype);
        return [{ actual, dtype, shape, expected, slack: () => 0 }];
      });
    });

    test("gives torch's bits", async (device) => {
      await fc.assert(
        fc.asyncProperty(seeds, fc.integer({ min: 1, max: 300 }), async (seed, blocks) => {
          const count = 16 * blocks;
          const uniforms = new Generator(seed).uniforms(count);
          const narrow = boxMuller(Tensor.fromFloat32(device, uniforms, [count]), "bf16");
          const wide = boxMuller(Tensor.fromFloat32(device, uniforms, [count]), "f32");
          const [narrowBytes, wideBytes] = [await device.download(narrow), await device.download(wide)];
          for (const tensor of [narrow, wide]) tensor.dispose();
          assert.deepEqual(new Uint16Array(narrowBytes.buffer), new Generator(seed).randnBfloat16(count));
          assert.deepEqual(new Float32Array(wideBytes.buffer), new Generator(seed).randn(count));
        }),
        { numRuns: 20 },
      );
    });

    test("refuses incomplete blocks and other dtypes", (device) =>
      device.scope(() => {
        assert.throws(() => boxMuller(Tensor.empty(device, [24], "f32"), "f32"), ShapeError);
        assert.throws(() => boxMuller(Tensor.empty(device, [16], "bf16"), "bf16"), ShapeError);
      }));
  });
}

/** All tests of these kernels on the GPU of this process's tests. */
export function randomSuite(): void {
  randomFillSuite();
  boxMullerSuite();
}
