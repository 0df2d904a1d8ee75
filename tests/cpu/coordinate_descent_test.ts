/** Coordinate descent, on times that the test makes up. */
import assert from "node:assert/strict";
import fc from "fast-check";
import type { GpuDevice } from "../../ffi/gpu.ts";
import { coordinateDescent } from "../../kernels/coordinate_descent.ts";

/** A GPU that takes a way's time from what it was issued with, and counts what it was asked. */
function gpuThatTakes(time: () => number): { gpu: GpuDevice; keys: string[] } {
  const keys: string[] = [];
  const fastest = (key: string, ways: readonly (() => void)[]) => {
    keys.push(key);
    const times = ways.map((way) => (way(), time()));
    return times.indexOf(Math.min(...times));
  };
  return { gpu: { fastest } as unknown as GpuDevice, keys };
}

Deno.test("coordinate descent finds the best values where parameters do not depend on each other", () => {
  const values = fc.uniqueArray(fc.integer({ min: 1, max: 64 }), { minLength: 1, maxLength: 6 });
  fc.assert(
    fc.property(values, values, fc.nat(64), fc.nat(64), (a, b, bestA, bestB) => {
      let last = NaN;
      const cost = (p: { a: number; b: number }) => Math.abs(p.a - bestA) + 3 * Math.abs(p.b - bestB);
      const { gpu, keys } = gpuThatTakes(() => last);
      const start = { a: a[0], b: b[0] };
      const found = coordinateDescent(gpu, "work", start, { a, b }, (p) => last = cost(p));
      const least = Math.min(...a.flatMap((x) => b.map((y) => cost({ a: x, b: y }))));
      assert.equal(cost(found), least);
      assert.ok(keys.length <= 4);
    }),
  );
});

Deno.test("coordinate descent keeps the start where nothing is measured", () => {
  const gpu = { fastest: () => 0 } as unknown as GpuDevice;
  const start = { block: 256, vectors: 4 };
  const found = coordinateDescent(gpu, "work", start, { block: [128, 512], vectors: [1, 2] }, () => {
    throw new Error("issued");
  });
  assert.deepEqual(found, start);
});
