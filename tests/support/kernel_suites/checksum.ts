/** Checksums of memories on a GPU against their TypeScript reference, and what they find. */
import assert from "node:assert/strict";
import fc from "fast-check";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { checksumReference, checksums } from "../../../kernels/checksum.ts";
import { forEachGpu } from "../gpu_devices.ts";

const SIZES = [0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 4095, 4096, 4100, 100_003];

export function checksumSuite(): void {
  forEachGpu("checksum", (test) => {
    test("equals its reference at all sizes, one memory beside the other", async (device) => {
      const contents = SIZES.map((size, i) => pseudorandom(size, i));
      const found = await checksums(device, contents.map((bytes) => memoryOf(device, bytes)));
      assert.deepEqual(found, contents.map(expected));
      assert.equal(new Set(found).size, SIZES.length);
      assert.deepEqual(await checksums(device, []), []);
    });

    test("the same bytes give the same sums, with nothing left in memory", async (device) => {
      const memory = memoryOf(device, pseudorandom(1_000_000, 7));
      const { current } = device.memoryUse();
      const [first] = await checksums(device, [memory]);
      for (let i = 0; i < 3; i++) assert.deepEqual(await checksums(device, [memory]), [first]);
      assert.equal(device.memoryUse().current, current);
    });
  });
}

/** Damage that the reference, and so the kernel, has to find. */
export function checksumProperties(): void {
  const bytes = fc.uint8Array({ minLength: 8, maxLength: 200 });
  const place = fc.nat({ max: 10_000 });
  Deno.test("checksum: a changed bit, swapped words, a missing end: each gives other sums", () => {
    fc.assert(fc.property(bytes, place, fc.integer({ min: 0, max: 7 }), (original, at, bit) => {
      const changed = original.slice();
      changed[at % original.length] ^= 1 << bit;
      assert.notEqual(
        checksumReference(changed)[0],
        checksumReference(original)[0],
        "the first finds every bit",
      );

      const swapped = original.slice();
      const [first, second] = [original.slice(0, 4), original.slice(4, 8)];
      swapped.set(second, 0);
      swapped.set(first, 4);
      const same = first.every((byte, i) => byte === second[i]);
      assert.equal(expected(swapped) === expected(original), same);

      const shorter = original.subarray(0, -4);
      const zeros = original.subarray(-4).every((byte) => byte === 0);
      if (!zeros) assert.notEqual(expected(shorter), expected(original));
    }));
  });
}

function expected(bytes: Uint8Array): string {
  return checksumReference(bytes).map((sum) => sum.toString(16).padStart(8, "0")).join("");
}

function memoryOf(device: GpuDevice, bytes: Uint8Array) {
  return Tensor.fromBytes(device, bytes, [bytes.length], "u8").memory;
}

/** Bytes of a linear congruential generator. */
function pseudorandom(length: number, seed: number): Uint8Array<ArrayBuffer> {
  let state = seed + 1;
  return Uint8Array.from({ length }, () => (state = Math.imul(state, 1664525) + 1013904223 | 0) >>> 24);
}
