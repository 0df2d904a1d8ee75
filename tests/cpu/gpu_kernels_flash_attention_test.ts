/** Tiles of float8 attention, and float8's fallbacks, on the emulated GPU. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { partition } from "../../kernels/flash_attention.ts";
import { flashAttentionSuite } from "../support/kernel_suites/flash_attention.ts";

flashAttentionSuite();

Deno.test("partition: each tile is done once, and no multiprocessor waits for long", () => {
  fc.assert(
    fc.property(
      fc.integer({ min: 1, max: 3000 }),
      fc.integer({ min: 1, max: 80 }),
      fc.integer({ min: 1, max: 150 }),
      (tiles, keyTiles, multiprocessors) => {
        const { whole, split, parts } = partition(tiles, keyTiles, multiprocessors);
        assert.equal(whole + split, tiles);
        assert.ok(parts >= 1 && parts <= keyTiles && split * parts <= multiprocessors);
        // Split or not, the last round is full to more than half, or there are too few keys.
        const last = split > 0 ? split * parts : whole % multiprocessors;
        assert.ok(last === 0 || 2 * last > multiprocessors || parts === keyTiles);
      },
    ),
  );
  // FLUX.1-schnell's 24 heads of 4352 tokens on an H100.
  assert.deepEqual(partition(24 * 34, 34, 132), { whole: 792, split: 24, parts: 5 });
  assert.deepEqual(partition(264, 34, 132), { whole: 264, split: 0, parts: 1 });
});
