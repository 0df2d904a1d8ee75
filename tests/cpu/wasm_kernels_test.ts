import assert from "node:assert/strict";
import fc from "fast-check";
import type { CpuDevice } from "../../ffi/cpu/device.ts";
import { openCpu } from "../../ffi/cpu/open.ts";
import type { Tensor } from "../../ffi/tensor.ts";
import { attention } from "../../kernels/attention.ts";
import { geluTanh } from "../../kernels/gelu_tanh.ts";
import { groupNorm } from "../../kernels/group_norm.ts";
import { quickGelu } from "../../kernels/quick_gelu.ts";
import { silu } from "../../kernels/silu.ts";
import { noise, type Placement, readBack, sample } from "../support/providers.ts";
import { openReference } from "../support/reference_provider.ts";

/** Runs `body` on a device with WebAssembly kernels on 2 threads and on the reference device. */
async function onBoth(body: (wasm: CpuDevice, reference: CpuDevice) => void): Promise<void> {
  using wasm = await openCpu({ provider: "wasm", threads: 2 });
  using reference = openReference();
  await wasm.runner?.warm();
  const before = wasm.memoryUse().current;
  wasm.scope(() => reference.scope(() => body(wasm, reference)));
  assert.equal(wasm.memoryUse().current, before, "memory was not given back");
}

/**
 * Fails unless both are NaN, or equal, or as close as `relative` of `scale` and the dtype's rounding say. What is
 * below 1e-36 may be 0: e^-x of such a result is beyond f32's range.
 */
function assertSame(actual: Tensor, expected: Tensor, relative: number, scale: (i: number) => number): void {
  assert.deepEqual(actual.shape, expected.shape);
  assert.equal(actual.dtype, expected.dtype);
  const [got, want] = [readBack(actual), readBack(expected)];
  for (let i = 0; i < want.length; i++) {
    if (Object.is(got[i], want[i]) || (Number.isNaN(got[i]) && Number.isNaN(want[i]))) continue;
    const rounding = actual.dtype === "bf16" ? 2 ** -7 * Math.abs(want[i]) : 0;
    const error = Math.abs(got[i] - want[i]);
    assert.ok(
      error <= relative * scale(i) + rounding + 1e-36,
      `element ${i} is ${got[i]}, not ${want[i]}: error ${error}`,
    );
  }
}

const dtype = fc.constantFrom<"f32" | "bf16">("f32", "bf16");
/** Dense, but starting `gap` elements into its memory. */
const dense = (rank: number, gap: number): Placement => ({
  order: Array.from({ length: rank }, (_, dim) => dim),
  gap,
  where: "device",
});

/** `shape` on both devices with the same values; it starts `gap` elements into its memory. */
function pair(
  devices: readonly CpuDevice[],
  shape: readonly number[],
  type: "f32" | "bf16",
  gap: number,
  value: (i: number) => number,
): Tensor[] {
  // The gap goes in front only: what lies behind would make rows of it strided.
  return devices.map((device) => {
    const size = shape.reduce((product, dim) => product * dim, 1);
    const flat = sample(device, [size], type, dense(1, gap), value).tensor;
    return flat.reshape(shape);
  });
}

const activations = { silu, quickGelu, geluTanh } as const;
for (const [name, op] of Object.entries(activations)) {
  Deno.test(`${name} in WebAssembly agrees with its reference, at odd sizes, offsets and extreme values`, () =>
    onBoth((wasm, reference) => {
      const value = fc.oneof(
        fc.float({ noNaN: true, min: -30, max: 30 }),
        fc.float(),
        fc.constantFrom(0, -0, 1e-40, -1e-40, 88.8, -88.8, 104, -104, Infinity, -Infinity, NaN),
      );
      fc.assert(
        fc.property(
          fc.array(value, { minLength: 1, maxLength: 37 }),
          dtype,
          fc.nat(3),
          (values, type, gap) => {
            const [a, b] = pair([wasm, reference], [values.length], type, gap, (i) => values[i]);
            const expected = op(b);
            const results = readBack(expected);
            // The exponent is rounded to f32: an error that grows with |x|. And 1 + tanh cancels in the reference
            // for negative x: close in terms of x, not of the result.
            const scale = (i: number) =>
              Math.abs(name === "geluTanh" ? values[i] : results[i] * (2 + Math.abs(values[i])));
            assertSame(op(a), expected, 2e-7, scale);
          },
        ),
        { numRuns: 300 },
      );
      const [a, b] = pair([wasm, reference], [3, 50_001], "f32", 1, (i) => 20 * noise(1)(i));
      assertSame(op(a), op(b), 4e-7, () => 20);
    }));
}

Deno.test("groupNorm in WebAssembly agrees with its reference", () =>
  onBoth((wasm, reference) => {
    const drawn = fc.record({
      batch: fc.integer({ min: 1, max: 2 }),
      groups: fc.integer({ min: 1, max: 4 }),
      perGroup: fc.integer({ min: 1, max: 3 }),
      pixels: fc.oneof(fc.integer({ min: 1, max: 9 }), fc.integer({ min: 1, max: 600 })),
      mean: fc.constantFrom(0, 5, -300),
      gap: fc.nat(3),
      type: dtype,
      seed: fc.nat(),
    });
    fc.assert(
      fc.property(drawn, ({ batch, groups, perGroup, pixels, mean, gap, type, seed }) => {
        const channels = groups * perGroup;
        const value = noise(seed);
        const devices = [wasm, reference];
        const [a, b] = pair(devices, [batch, channels, 1, pixels], type, gap, (i) => mean + value(i));
        const [weightA, weightB] = pair(devices, [channels], type, gap, noise(seed + 1));
        const [biasA, biasB] = pair(devices, [channels], type, gap, noise(seed + 2));
        // x * scale + shift cancels where the mean is large.
        const scale = 10 * (1 + Math.abs(mean));
        assertSame(
          groupNorm(a, groups, weightA, biasA, 1e-3),
          groupNorm(b, groups, weightB, biasB, 1e-3),
          2e-6,
          () => scale,
        );
      }),
      { numRuns: 200 },
    );
  }));

Deno.test("attention with softmax in WebAssembly agrees with the reference: causal, bias, bf16, odd lengths", () =>
  onBoth((wasm, reference) => {
    const drawn = fc.record({
      batch: fc.integer({ min: 1, max: 2 }),
      heads: fc.integer({ min: 1, max: 3 }),
      queries: fc.integer({ min: 1, max: 90 }),
      headDim: fc.constantFrom(1, 8, 20),
      causal: fc.boolean(),
      bias: fc.boolean(),
      sharp: fc.constantFrom(1, 40),
      type: dtype,
      seed: fc.nat(),
    });
    fc.assert(
      fc.property(drawn, ({ batch, heads, queries, headDim, causal, bias, sharp, type, seed }) => {
        const shape = [batch, queries, heads, headDim];
        const devices = [wasm, reference];
        const q = pair(devices, shape, type, 1, (i) => sharp * noise(seed)(i));
        const k = pair(devices, shape, type, 0, noise(seed + 1));
        const v = pair(devices, shape, type, 2, noise(seed + 2));
        const added = pair(devices, [heads, queries, queries], "f32", 1, (i) => 3 * noise(seed + 3)(i));
        const [a, b] = [0, 1].map((device) =>
          attention(q[device], k[device], v[device], { causal, ...(bias ? { bias: added[device] } : {}) })
        );
        // In bf16 the probabilities are rounded before they are multiplied.
        assertSame(a, b, type === "bf16" ? 2 ** -7 : 1e-5, () => 1);
      }),
      { numRuns: 100 },
    );
  }));
