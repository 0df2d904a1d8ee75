/** The relative change of a tensor, on a GPU against its TypeScript reference. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../../ffi/errors.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { relativeChange, relativeChangeReference } from "../../../kernels/relative_change.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import { sample } from "./samples.ts";

export function relativeChangeSuite(): void {
  forEachGpu("relativeChange", (test) => {
    test("equals its reference: sizes, dtypes, small and large changes", async (device) => {
      const drawn = fc.record({
        shape: fc.constantFrom([1], [3, 7], [1, 256], [2, 40, 128], [1, 1024, 1032]),
        dtype: fc.constantFrom("f32" as const, "bf16" as const),
        change: fc.constantFrom(0, 1e-2, 1, 30),
        seed: fc.nat(1000),
      });
      await fc.assert(
        fc.asyncProperty(drawn, async ({ shape, dtype, change, seed }) => {
          const before = sample(device, shape, dtype, noise(seed));
          const x = sample(device, shape, dtype, (i) => noise(seed)(i) + change * noise(seed + 1)(i));
          const expected = relativeChangeReference(x.values, before.values);
          const actual = await relativeChange(x.tensor, before.tensor);
          assert.ok(Math.abs(actual - expected) <= 1e-5 * expected, `${actual}, expected ${expected}`);
          for (const { tensor } of [x, before]) tensor.dispose();
        }),
        { numRuns: 30 },
      );
    });

    test("NaN is NaN, nothing in both is NaN, and nothing before is infinite", async (device) => {
      const of = (values: number[]) => Tensor.fromFloat32(device, Float32Array.from(values), [values.length]);
      assert.ok(Number.isNaN(await relativeChange(of([1, NaN]), of([1, 1]))));
      assert.ok(Number.isNaN(await relativeChange(of([1, 1]), of([NaN, 1]))));
      assert.ok(Number.isNaN(await relativeChange(of([0]), of([0]))));
      assert.equal(await relativeChange(of([2]), of([0])), Infinity);
      assert.equal(await relativeChange(of([3, -1, 0]), of([2, 1, -1])), (1 + 2 + 1) / 4);
    });

    test("refuses tensors that do not fit together", async (device) => {
      const x = Tensor.fromFloat32(device, new Float32Array(6), [2, 3]);
      await assert.rejects(relativeChange(x, x.reshape([3, 2])), ShapeError);
      const half = Tensor.empty(device, [2, 3], "bf16");
      await assert.rejects(relativeChange(x, half), ShapeError);
    });
  });
}
