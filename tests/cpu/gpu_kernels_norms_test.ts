/** Norms, rotary embedding, attention and random numbers on the emulated GPU, and what of them needs no GPU. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../ffi/errors.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { attention, attentionReference } from "../../kernels/attention.ts";
import { roundToBfloat16 } from "../../ffi/bfloat16.ts";
import { readFloat32 } from "../../kernels/cpu.ts";
import {
  fillRandom,
  fillRandomReference,
  philox4x32,
  type RandomFillOptions,
} from "../../kernels/random_fill.ts";
import { rowLaunch, rowsOf } from "../../kernels/rows.ts";
import { assertClose } from "../support/compare.ts";
import { missingCompiler } from "../support/emulated_compiler.ts";
import { openEmulatedGpu } from "../support/emulated_gpu.ts";
import { valuesOf } from "../support/golden.ts";
import { normsSuite } from "../support/kernel_suites/norms.ts";
import { noise } from "../support/providers.ts";
import { openReference } from "../support/reference_provider.ts";
import { ownDevice, testOn } from "../support/test_device.ts";

normsSuite();

const withLibrary = ownDevice(
  "emulated GPU with library attention",
  () => openEmulatedGpu({ attention: true }),
  missingCompiler(),
);

testOn(withLibrary, "attention: a library takes what has neither bias nor causal mask", async (device) => {
  const [queries, heads, headDim] = [6, 2, 8];
  const shape = [1, queries, heads, headDim];
  const values = [1, 2, 3].map((seed) =>
    new Float32Array(queries * heads * headDim).map((_, i) => noise(seed)(i))
  );
  const [q, k, v] = values.map((x) => Tensor.fromFloat32(device, x, shape));
  const bias = Tensor.fromFloat32(device, new Float32Array(heads * queries ** 2).fill(0.5), [
    heads,
    queries,
    queries,
  ]);
  let asked = 0;
  const library = device.attention.bind(device);
  device.attention = (plan) => (asked++, library(plan));
  const sizes = { batch: 1, queries, keys: queries, heads, headDim };
  for (
    const { options, calls } of [{ options: {}, calls: 1 }, { options: { causal: true }, calls: 0 }, {
      options: { bias },
      calls: 0,
    }]
  ) {
    asked = 0;
    const out = attention(q, k, v, options);
    assert.equal(asked, calls);
    const expected = new Float32Array(out.size);
    const [qs, ks, vs] = values;
    attentionReference(
      expected,
      qs,
      ks,
      vs,
      new Float32Array(0),
      sizes,
      headDim ** -0.5,
      "causal" in options,
    );
    assertClose(await valuesOf(out), expected, 1e-6, "attention");
  }
});

Deno.test("rowLaunch: threads cover every row, in whole warps or even parts of one", () => {
  const sizes = [
    fc.integer({ min: 1, max: 10000 }),
    fc.integer({ min: 1, max: 20000 }),
    fc.constantFrom(32, 64),
    fc.constantFrom(1, 132, 2000),
  ] as const;
  fc.assert(fc.property(...sizes, (rows, vectors, warpSize, multiprocessors) => {
    const limits = { architecture: "", multiprocessors, warpSize, sharedBytesPerBlock: 0 };
    const { constants: { THREADS, BLOCK, VECTORS }, grid, block } = rowLaunch(limits, rows, vectors);
    assert.equal(block, BLOCK);
    assert.ok(BLOCK <= 1024 && BLOCK % warpSize === 0 && BLOCK % THREADS === 0);
    assert.ok(THREADS > warpSize ? THREADS === BLOCK : warpSize % THREADS === 0);
    assert.ok(THREADS * VECTORS >= vectors && THREADS * (VECTORS - 1) < vectors);
    const most = rows * vectors <= 2048 * multiprocessors ? 1 : 4;
    assert.ok(VECTORS <= most || THREADS === 1024);
    assert.ok(grid * (BLOCK / THREADS) >= rows && (grid - 1) * (BLOCK / THREADS) < rows);
  }));
});

Deno.test("rowsOf: finds each row of a view, and copies only where two strides do not do", () => {
  using device = openReference();
  const wide = Tensor.fromFloat32(device, new Float32Array(2 * 3 * 4 * 10).map((_, i) => i), [2, 3, 4, 10]);
  const firstElements = (x: Tensor) => {
    const { source, count, inner, outerStride, innerStride } = rowsOf(x);
    const values = readFloat32(new Tensor(source.memory, "f32", [source.memory.byteLength / 4]));
    const starts = Array.from(
      { length: count },
      (_, r) => values[source.offset + Math.floor(r / inner) * outerStride + r % inner * innerStride],
    );
    return { copied: source !== x, starts };
  };
  const views = [
    { view: wide, copied: false },
    { view: wide.narrow(3, 2, 5), copied: false },
    { view: wide.narrow(2, 1, 2), copied: false },
    { view: wide.permute([0, 2, 1, 3]), copied: true },
    { view: wide.narrow(0, 1, 1).permute([0, 2, 1, 3]), copied: false },
    { view: wide.permute([0, 1, 3, 2]), copied: true },
    { view: wide.narrow(3, 4, 1), copied: false },
    { view: wide.narrow(0, 0, 1).narrow(1, 0, 1).narrow(2, 3, 1), copied: false },
  ];
  for (const { view, copied } of views) {
    const hidden = view.shape.at(-1)!;
    const expected = [...readFloat32(view)].filter((_, i) => i % hidden === 0);
    assert.deepEqual(firstElements(view), { copied, starts: expected });
  }
});

Deno.test("philox4x32 gives the known answers of its authors' test (Random123, kat_vectors)", () => {
  const known = [
    ["00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"],
    ["ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"],
    ["243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"],
  ];
  const numbers = (text: string) => text.split(" ").map((word) => Number.parseInt(word, 16));
  for (const [counter, key, words] of known) {
    const state = Uint32Array.from(numbers(counter));
    const [low, high] = numbers(key);
    philox4x32(state, [low, high]);
    assert.deepEqual([...state], numbers(words));
  }
});

Deno.test("fillRandom: moments and range of both kinds, and streams and seeds that differ", () => {
  const count = 200_000;
  const draw = (options: Partial<RandomFillOptions>) => {
    const values = new Float32Array(count);
    fillRandomReference(values, { seed: 1, stream: 0, kind: "normal", scale: 1, shift: 0, ...options });
    return values;
  };
  const mean = (values: Float32Array, f = (x: number) => x) =>
    values.reduce((sum, x) => sum + f(x), 0) / values.length;
  // Five standard errors of each mean.
  const near = (actual: number, expected: number, variance: number) =>
    assert.ok(Math.abs(actual - expected) <= 5 * Math.sqrt(variance / count), `${actual}, not ${expected}`);

  const normal = draw({});
  near(mean(normal), 0, 1);
  near(mean(normal, (x) => x * x), 1, 2);
  near(mean(normal, (x) => x ** 3), 0, 15);
  near(mean(normal, (x) => x ** 4), 3, 96);
  near(mean(normal, (x) => Number(Math.abs(x) < 1)), 0.682689, 0.22);
  const uniform = draw({ kind: "uniform" });
  assert.ok(uniform.every((x) => x >= 0 && x < 1));
  near(mean(uniform), 1 / 2, 1 / 12);
  near(mean(uniform, (x) => x * x), 1 / 3, 4 / 45);
  const moved = draw({ scale: 3, shift: -10 });
  near(mean(moved), -10, 9);

  // Neighbours, streams and seeds (in each half of their bits) have nothing to do with one another.
  const others = [
    normal.subarray(1),
    normal.subarray(2),
    normal.subarray(4),
    draw({ stream: 1 }),
    draw({ seed: 2 }),
    draw({ seed: 1n + 2n ** 32n }),
  ];
  for (const other of others) {
    near(mean(other.map((x, i) => x * normal[i])), 0, 1);
  }
  assert.deepEqual(draw({ seed: -1 }), draw({ seed: 2n ** 64n - 1n }));
});

Deno.test("fillRandom on the CPU: the reference, rounded to the tensor's dtype", () => {
  using device = openReference();
  const options = { seed: 7, stream: 3, kind: "normal", scale: 0.02, shift: 1 } as const;
  const expected = new Float32Array(101);
  fillRandomReference(expected, options);
  for (const dtype of ["f32", "bf16"] as const) {
    const x = Tensor.empty(device, [101], dtype);
    fillRandom(x, options);
    assert.deepEqual(
      [...readFloat32(x)],
      [...expected].map((value) => dtype === "f32" ? value : roundToBfloat16(value)),
    );
  }
  assert.throws(() => fillRandom(Tensor.empty(device, [4], "f32"), { ...options, stream: -1 }), ShapeError);
});
