/** Tiles of flash attention, how it is shared out, and float8's fallbacks, on the emulated GPU. */
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
        assert.ok(parts >= 1 && parts <= keyTiles && (parts > 1) === (split > 0));
        assert.equal(split === 0 ? 0 : whole % multiprocessors, 0);
        // The end, in times of a tile, is never longer than without parts.
        assert.ok(split === 0 || Math.ceil(split * parts / multiprocessors) < parts);
      },
    ),
  );
  // FLUX.1-schnell's 24 heads of 4352 tokens on an H100.
  assert.deepEqual(partition(24 * 34, 34, 132), { whole: 792, split: 24, parts: 5 });
  assert.deepEqual(partition(264, 34, 132), { whole: 264, split: 0, parts: 1 });
  // FLUX.1-dev's 4608: two thirds of the multiprocessors would be idle at the end.
  assert.deepEqual(partition(24 * 36, 36, 132), { whole: 792, split: 72, parts: 5 });
});
