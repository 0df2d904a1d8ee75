import assert from "node:assert/strict";
import fc from "fast-check";
import { Tensor } from "../../ffi/tensor.ts";
import { packLatents, positionIds, unpackLatents } from "../../recipes/base/latents.ts";
import { eagerOps as ops } from "../../recipes/base/ops.ts";
import { Golden, valuesOf } from "../support/golden.ts";
import { openReference } from "../support/reference_provider.ts";

Deno.test("packing and image ids equal FluxPipeline's", async () => {
  using device = openReference();
  using golden = new Golden("packing.safetensors", device);
  const sizes = golden.names.filter((name) => name.endsWith(".latents")).map((name) => name.slice(0, -8));
  assert.ok(sizes.length >= 4);
  for (const size of sizes) {
    const latents = golden.tensor(`${size}.latents`);
    const [, , height, width] = latents.shape;
    const packed = packLatents(ops, latents);
    assert.deepEqual(await valuesOf(packed), golden.values(`${size}.packed`), size);
    assert.deepEqual(
      await valuesOf(unpackLatents(ops, packed, height, width)),
      golden.values(`${size}.latents`),
      size,
    );
    assert.deepEqual(
      positionIds(0, [{ rows: height / 2, columns: width / 2 }]),
      golden.values(`${size}.image_ids`),
      size,
    );
  }
});

Deno.test("unpackLatents reverses packLatents, and each token holds one square", async () => {
  using device = openReference();
  const even = fc.integer({ min: 1, max: 6 }).map((half) => 2 * half);
  await fc.assert(fc.asyncProperty(
    fc.integer({ min: 1, max: 3 }),
    fc.integer({ min: 1, max: 5 }),
    even,
    even,
    async (batch, channels, height, width) => {
      const count = batch * channels * height * width;
      const values = Float32Array.from({ length: count }, (_, i) => i);
      const latents = Tensor.fromFloat32(device, values, [batch, channels, height, width]);
      const packed = packLatents(ops, latents);
      assert.deepEqual(packed.shape, [batch, height * width / 4, channels * 4]);
      const tokens = await valuesOf(packed);
      assert.deepEqual(await valuesOf(unpackLatents(ops, packed, height, width)), values);
      // By hand: token (row, column) has its four pixels channel by channel.
      const [row, column, channel] = [height / 2 - 1, Math.floor(width / 4), channels - 1];
      const token = (row * (width / 2) + column) * channels * 4 + channel * 4;
      const pixel = (channel * height + 2 * row) * width + 2 * column;
      assert.deepEqual([...tokens.subarray(token, token + 4)], [
        pixel,
        pixel + 1,
        pixel + width,
        pixel + width + 1,
      ]);
      if (packed.memory !== latents.memory) packed.dispose(); // a single square is packed already
      latents.dispose();
    },
  ));
});

Deno.test("positionIds puts the text at the origin", () => {
  assert.deepEqual([...positionIds(2, [{ rows: 1, columns: 2 }])], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
});
