import fc from "fast-check";
import type { CpuDevice } from "../../ffi/cpu/device.ts";
import type { MatmulPlan } from "../../ffi/device.ts";
import { assertAccurate, geluTanh, noise, poisoned, readBack, sample } from "./providers.ts";

/** Float8 products in the sizes that matrix units read. */
export const float8Problem = fc.record({
  tokens: fc.integer({ min: 1, max: 9 }),
  n: fc.constantFrom(16, 32),
  k: fc.constantFrom(16, 48),
  gap: fc.constantFrom(0, 16),
  rowwise: fc.boolean(),
  outDtype: fc.constantFrom<"f32" | "bf16">("f32", "bf16"),
  bias: fc.boolean(),
  activation: fc.constantFrom(undefined, "geluTanh" as const),
  alpha: fc.constantFrom(1, -0.5),
  seed: fc.nat(),
});
type Float8Problem = typeof float8Problem extends fc.Arbitrary<infer T> ? T : never;

/** Compares a drawn product, computed by `matmul` on the CPU device's memory, with float64. */
export function checkFloat8(
  device: CpuDevice,
  matmul: (plan: MatmulPlan) => void,
  drawn: Float8Problem,
): void {
  const { tokens, n, k, gap, rowwise, outDtype, bias, activation, alpha, seed } = drawn;
  device.scope(() => {
    const rows = { order: [0, 1], gap, where: "device" } as const;
    const flat = { order: [0], gap: 0, where: "device" } as const;
    // E4M3's whole range, subnormal numbers too.
    const wide = (seed: number) => (i: number) => noise(seed)(i) * 2 ** (4 * noise(seed + 7)(i) * 2);
    const x = sample(device, [tokens, k], "f8e4m3", rows, wide(seed));
    const w = sample(device, [n, k], "f8e4m3", rows, wide(seed + 1));
    const scale = (size: number, seed: number) =>
      sample(device, [rowwise ? size : 1], "f32", flat, (i) => 0.02 * (1.5 + noise(seed)(i)));
    const [scaleA, scaleB] = [scale(tokens, seed + 2), scale(n, seed + 3)];
    const shift = bias ? sample(device, [n], "bf16", flat, noise(seed + 4)) : undefined;
    const out = poisoned(device, [tokens, n], outDtype, rows);
    const expected = new Float64Array(tokens * n);
    const magnitude = new Float64Array(tokens * n);
    for (let i = 0; i < tokens; i++) {
      for (let j = 0; j < n; j++) {
        const factor = alpha * scaleA.values[rowwise ? i : 0] * scaleB.values[rowwise ? j : 0];
        const at = i * n + j;
        expected[at] = shift?.values[j] ?? 0;
        magnitude[at] = Math.abs(expected[at]);
        for (let l = 0; l < k; l++) {
          const product = factor * x.values[i * k + l] * w.values[j * k + l];
          expected[at] += product;
          magnitude[at] += Math.abs(product);
        }
        if (activation !== undefined) expected[at] = geluTanh(expected[at]);
      }
    }
    matmul({
      a: x.tensor,
      b: w.tensor,
      bias: shift?.tensor,
      out,
      alpha,
      activation,
      scaleA: scaleA.tensor,
      scaleB: scaleB.tensor,
    });
    assertAccurate(readBack(out), expected, magnitude, outDtype);
  });
}
