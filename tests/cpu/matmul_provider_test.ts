import assert from "node:assert/strict";
import fc from "fast-check";
import type { CpuDevice } from "../../ffi/cpu/device.ts";
import { Tensor } from "../../ffi/tensor.ts";
import {
  assertAccurate,
  forEachProvider,
  geluTanh,
  noise,
  type Placement,
  poisoned,
  readBack,
  sample,
} from "../support/providers.ts";
import { checkFloat8, float8Problem } from "../support/float8_products.ts";

interface Case {
  m: number;
  n: number;
  k: number;
  dtypes: { a: "f32" | "bf16"; b: "f32" | "bf16"; bias: "f32" | "bf16" | "none"; out: "f32" | "bf16" };
  a: Placement;
  b: Placement;
  out: Placement;
  alpha: number;
  activation?: "geluTanh" | undefined;
  constant: boolean;
  seed: number;
}

const size = fc.oneof(fc.constant(1), fc.integer({ min: 1, max: 40 }), fc.integer({ min: 1, max: 120 }));
const float = fc.constantFrom<"f32" | "bf16">("f32", "bf16");
const matrix = (where: fc.Arbitrary<"device" | "placed">): fc.Arbitrary<Placement> =>
  fc.record({
    order: fc.constantFrom<readonly number[]>([0, 1], [1, 0]),
    gap: fc.oneof(fc.constant(0), fc.integer({ min: 1, max: 9 })),
    where,
  });
const cases: fc.Arbitrary<Case> = fc.record({
  m: size,
  n: size,
  // More than one slice of 256 now and then.
  k: fc.oneof(size, size, fc.integer({ min: 250, max: 600 })),
  dtypes: fc.oneof(
    fc.constant({ a: "f32", b: "f32", bias: "f32", out: "f32" } as const),
    fc.constant({ a: "bf16", b: "bf16", bias: "bf16", out: "bf16" } as const),
    fc.record({ a: float, b: float, bias: fc.oneof(float, fc.constant("none" as const)), out: float }),
  ),
  a: matrix(fc.constantFrom("device")),
  b: matrix(fc.constantFrom("device", "placed")),
  out: matrix(fc.constantFrom("device")),
  alpha: fc.constantFrom(1, 1, 0.125, -3),
  activation: fc.constantFrom(undefined, undefined, "geluTanh" as const),
  constant: fc.boolean(),
  seed: fc.nat(),
});

function check(device: CpuDevice, drawn: Case): void {
  const { m, n, k, dtypes, a, b, out, alpha, activation, constant, seed } = drawn;
  const before = device.memoryUse().current;
  const x = sample(device, [m, k], dtypes.a, a, noise(seed));
  const y = sample(device, [n, k], dtypes.b, b, noise(seed + 1));
  const flat: Placement = { order: [0], gap: seed % 2, where: b.where };
  const z = dtypes.bias === "none" ? undefined : sample(device, [n], dtypes.bias, flat, noise(seed + 2));
  const expected = new Float64Array(m * n);
  const magnitude = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      for (let l = 0; l < k; l++) {
        const product = x.values[i * k + l] * y.values[j * k + l];
        expected[i * n + j] += product;
        magnitude[i * n + j] += Math.abs(product);
      }
      const shift = z?.values[j] ?? 0;
      expected[i * n + j] = alpha * expected[i * n + j] + shift;
      magnitude[i * n + j] = Math.abs(alpha) * magnitude[i * n + j] + Math.abs(shift);
      if (activation !== undefined) expected[i * n + j] = geluTanh(expected[i * n + j]);
    }
  }
  // Twice: the second time a constant operand comes out of the cache.
  for (let round = 0; round < 2; round++) {
    const result = poisoned(device, [m, n], dtypes.out, out);
    device.matmul({ a: x.tensor, b: y.tensor, bias: z?.tensor, out: result, alpha, activation, constant });
    assertAccurate(readBack(result), expected, magnitude, dtypes.out);
    result.dispose();
  }
  for (const tensor of [x.tensor, y.tensor, ...(z ? [z.tensor] : [])]) tensor.dispose();
  assert.equal(device.memoryUse().current, before, "memory was not given back");
}

forEachProvider("matmul", (test) => {
  test("agrees with float64 at any shape, layout and dtype", (device) => {
    fc.assert(fc.property(cases, (drawn) => check(device, drawn)), { numRuns: 150 });
  });

  test("shapes at the edges of tiles, slices and blocks", (device) => {
    const plain: Placement = { order: [0, 1], gap: 0, where: "device" };
    const dtypes = { a: "f32", b: "f32", bias: "f32", out: "f32" } as const;
    for (const m of [1, 5, 6, 7, 193]) {
      for (const n of [1, 7, 8, 9, 65]) {
        for (const k of [1, 255, 256, 257, 513]) {
          check(device, {
            m,
            n,
            k,
            dtypes,
            a: plain,
            b: plain,
            out: plain,
            alpha: 1,
            constant: true,
            seed: m * n,
          });
        }
      }
    }
  });

  test("float8 agrees with float64, with one scale or with one a row", (device) => {
    fc.assert(fc.property(float8Problem, (drawn) => {
      const before = device.memoryUse();
      checkFloat8(device, (plan) => device.matmul({ ...plan, constant: true }), drawn);
      const after = device.memoryUse();
      assert.deepEqual([after.current, after.weights], [before.current, before.weights]);
    }));
  });

  test("a NaN of float8 spoils its own row of the result, and scales that do not fit are refused", (device) => {
    const codes = (rows: number, nan: number) =>
      Tensor.fromBytes(
        device,
        Uint8Array.from({ length: rows * 4 }, (_, i) => i === nan ? 0xff : 0x38),
        [rows, 4],
        "f8e4m3",
      );
    const [a, b] = [codes(2, 5), codes(3, -1)];
    const scale = (size: number) => Tensor.fromFloat32(device, new Float32Array(size).fill(0.5), [size]);
    const out = Tensor.empty(device, [2, 3], "bf16");
    device.matmul({ a, b, out, scaleA: scale(1), scaleB: scale(1) });
    assert.deepEqual([...readBack(out)], [1, 1, 1, NaN, NaN, NaN]);
    const refused = (message: RegExp, scaleA?: Tensor, scaleB?: Tensor) =>
      assert.throws(() => device.matmul({ a, b, out, scaleA, scaleB }), { name: "ShapeError", message });
    refused(/scales are neither/);
    refused(/scales are neither/, scale(1), scale(3));
    const plain = Tensor.empty(device, [2, 4], "f32");
    assert.throws(
      () => device.matmul({ a: plain, b: plain, out: Tensor.empty(device, [2, 2], "f32"), scaleA: scale(1) }),
      { name: "ShapeError", message: /only f8e4m3/ },
    );
  });

  test("a batch is so many single products, in place", (device) => {
    const batch = fc.record({
      count: fc.integer({ min: 1, max: 4 }),
      m: fc.integer({ min: 1, max: 20 }),
      n: fc.integer({ min: 1, max: 20 }),
      k: fc.integer({ min: 1, max: 40 }),
      // The last two dimensions either way round; matrices behind one another or, as heads are, between rows.
      a: fc.constantFrom([0, 1, 2], [0, 2, 1], [1, 0, 2]),
      b: fc.constantFrom([0, 1, 2], [0, 2, 1], [1, 0, 2]),
      out: fc.constantFrom([0, 1, 2], [1, 0, 2]),
      gap: fc.integer({ min: 0, max: 3 }),
      dtype: float,
      bias: fc.boolean(),
      seed: fc.nat(),
    });
    fc.assert(
      fc.property(batch, ({ count, m, n, k, a, b, out, gap, dtype, bias, seed }) => {
        device.scope(() => {
          const place = (order: readonly number[]): Placement => ({ order, gap, where: "device" });
          const x = sample(device, [count, m, k], dtype, place(a), noise(seed)).tensor;
          const w = sample(device, [count, n, k], dtype, place(b), noise(seed + 1)).tensor;
          const shift = bias ? sample(device, [n], dtype, place([0]), noise(seed + 2)).tensor : undefined;
          const together = poisoned(device, [count, m, n], dtype, place(out));
          const singly = poisoned(device, [count, m, n], dtype, place(out));
          device.matmul({ a: x, b: w, bias: shift, out: together, alpha: 0.5 });
          for (let i = 0; i < count; i++) {
            const [ai, bi, outi] = [x, w, singly].map((tensor) => {
              const [step, ...strides] = tensor.strides;
              return new Tensor(
                tensor.memory,
                dtype,
                tensor.shape.slice(1),
                strides,
                tensor.offset + i * step,
              );
            });
            device.matmul({ a: ai, b: bi, bias: shift, out: outi, alpha: 0.5 });
          }
          assert.deepEqual(readBack(together), readBack(singly));
        });
      }),
      { numRuns: 40 },
    );
  });

  test("a batch beside a single matrix or another batch size is refused", (device) => {
    const zeros = (...shape: number[]) => Tensor.empty(device, shape, "f32");
    for (const b of [zeros(3, 4), zeros(5, 3, 4), zeros(1, 3, 4)]) {
      assert.throws(
        () => device.matmul({ a: zeros(2, 6, 4), b, out: zeros(2, 6, 3) }),
        { name: "ShapeError", message: /matmul: .*a f32 \[2, 6, 4\], b f32 \[.*, out f32 \[2, 6, 3\]/ },
      );
    }
    device.matmul({ a: zeros(0, 6, 4), b: zeros(0, 3, 4), out: zeros(0, 6, 3) });
  });

  test("a freed weight's packing does not serve the tensor that comes to lie at its address", (device) => {
    const x = Tensor.fromFloat32(device, Float32Array.from({ length: 64 }, () => 1), [8, 8]);
    const out = Tensor.empty(device, [8, 8], "f32");
    const first = Tensor.fromFloat32(device, Float32Array.from({ length: 64 }, () => 1), [8, 8]);
    device.matmul({ a: x, b: first, out, constant: true });
    assert.equal(readBack(out)[0], 8);
    const { pointer } = first;
    first.dispose();
    const second = Tensor.fromFloat32(device, Float32Array.from({ length: 64 }, () => 2), [8, 8]);
    assert.equal(second.pointer, pointer, "the test needs the same address");
    device.matmul({ a: x, b: second, out, constant: true });
    assert.equal(readBack(out)[0], 16);
  });

  test("a dtype that it does not take is refused by name", (device) => {
    const x = Tensor.fromInt32(device, [1], [1, 1]);
    const out = Tensor.empty(device, [1, 1], "f32");
    assert.throws(() => device.matmul({ a: x, b: x, out }), { name: "ShapeError", message: /matmul: .*i32/ });
  });

  test("a closed device says so", (device) => {
    const x = Tensor.empty(device, [1, 1], "f32");
    device[Symbol.dispose]();
    assert.throws(() => device.matmul({ a: x, b: x, out: x }), { name: "FfiError", message: /closed/ });
  });
});
