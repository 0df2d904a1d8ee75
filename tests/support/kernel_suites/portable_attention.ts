/** Our portable attention on a GPU against its TypeScript reference: with AMD's matrix units, and without. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { roundToBfloat16 } from "../../../ffi/bfloat16.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { attention, attentionReference } from "../../../kernels/attention.ts";
import { cast } from "../../../kernels/cast.ts";
import { portableAttention, portableAttentionTakes } from "../../../kernels/portable_attention.ts";
import { valuesOf } from "../golden.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";

const DIM = 128;
/** Error that rounding the softmax's weights and the result to bfloat16 explains, of the largest value. */
const LIMIT = 2 ** -7;

interface Sizes {
  readonly batch: number;
  readonly queries: number;
  readonly keys: number;
  readonly heads: number;
}

/** q, k or v as columns of something wider, and its values. */
function input(device: GpuDevice, sizes: Sizes, tokens: number, gap: number, seed: number, sharp: number) {
  const { batch, heads } = sizes;
  const row = heads * DIM + gap;
  const wide = new Float32Array(batch * tokens * row).map((_, i) => roundToBfloat16(sharp * noise(seed)(i)));
  const whole = cast(Tensor.fromFloat32(device, wide, [batch, tokens, row]), "bf16");
  const tensor = new Tensor(whole.memory, "bf16", [batch, tokens, heads, DIM], [tokens * row, row, DIM, 1]);
  const values = Float32Array.from({ length: batch * tokens * heads * DIM }, (_, i) => {
    const at = i % (heads * DIM);
    return wide[Math.floor(i / (heads * DIM)) * row + at];
  });
  return { tensor, values };
}

async function check(
  device: GpuDevice,
  sizes: Sizes,
  gap: number,
  seed: number,
  sharp: number,
  scale: number,
) {
  const { batch, queries, keys, heads } = sizes;
  const [q, k, v] = [queries, keys, keys].map((tokens, i) =>
    input(device, sizes, tokens, gap, seed + i, i === 2 ? 1 : sharp)
  );
  const out = Tensor.empty(device, q.tensor.shape, "bf16");
  portableAttention(device, { q: q.tensor, k: k.tensor, v: v.tensor, out, scale });
  const expected = new Float32Array(out.size);
  const shape = { batch, queries, keys, heads, headDim: DIM };
  attentionReference(expected, q.values, k.values, v.values, new Float32Array(0), shape, scale, false);
  const actual = await valuesOf(out);
  const largest = v.values.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  for (let i = 0; i < expected.length; i++) {
    assert.ok(
      Math.abs(actual[i] - expected[i]) <= LIMIT * largest,
      `${JSON.stringify(sizes)}: element ${i} is ${actual[i]}, expected ${expected[i]}`,
    );
  }
}

export function portableAttentionSuite(): void {
  forEachGpu("portableAttention", (test) => {
    test("equals its reference: sizes around its tiles, views, sharp and flat logits", async (device) => {
      const drawn = fc.record({
        batch: fc.integer({ min: 1, max: 2 }),
        queries: fc.constantFrom(1, 31, 33, 128, 130),
        keys: fc.constantFrom(1, 31, 32, 33, 70),
        heads: fc.integer({ min: 1, max: 2 }),
        gap: fc.constantFrom(0, 8, 40),
        seed: fc.nat(1000),
        sharp: fc.constantFrom(0.1, 1, 6),
        scale: fc.constantFrom(DIM ** -0.5, 1),
      });
      await fc.assert(
        fc.asyncProperty(
          drawn,
          ({ gap, seed, sharp, scale, ...sizes }) => check(device, sizes, gap, seed, sharp, scale),
        ),
        { numRuns: 8 },
      );
    });

    test("a NaN spoils what attends to it, and keys behind the last count for nothing", async (device) => {
      const sizes = { batch: 1, queries: 2, keys: 33, heads: 1 };
      const [q, k, v] = [2, 33, 33].map((tokens, i) => input(device, sizes, tokens, 0, i, 1).tensor);
      const out = Tensor.empty(device, q.shape, "bf16");
      device.upload(Uint8Array.of(0xff, 0xff), v.memory); // the first value of the first key
      portableAttention(device, { q, k, v, out, scale: 1 });
      const values = await valuesOf(out);
      assert.ok(values.every((value, i) => Number.isNaN(value) === (i % DIM === 0)));
    });

    test("is taken where a library has no attention, and the GPU has the matrix units", async (device) => {
      const sizes = { batch: 1, queries: 5, keys: 7, heads: 2 };
      const [q, k, v] = [5, 7, 7].map((tokens, i) => input(device, sizes, tokens, 0, i, 1));
      const out = Tensor.empty(device, q.tensor.shape, "bf16");
      const plan = { q: q.tensor, k: k.tensor, v: v.tensor, out, scale: 1 };
      const isAmd = /^gfx9/.test(device.limits.architecture);
      assert.equal(portableAttentionTakes(device, plan), isAmd);
      const shifted = new Tensor(q.tensor.memory, "bf16", [1, 4, 2, DIM], [1024, 256, 128, 1], 4);
      assert.equal(portableAttentionTakes(device, { ...plan, q: shifted }), false, "rows at odd addresses");
      assert.equal(portableAttentionTakes(device, { ...plan, q: q.tensor.narrow(3, 0, 64) }), false);
      const [own, whole] = [attention(q.tensor, k.tensor, v.tensor), out];
      portableAttention(device, { ...plan, scale: DIM ** -0.5 });
      if (isAmd) assert.deepEqual(await device.download(own), await device.download(whole));
    });
  });
}
