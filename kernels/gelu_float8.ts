import type { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { concat } from "./concat.ts";
import { Float8Tensor } from "./float8_tensor.ts";
import GELU_FLOAT8_CU from "./gelu_float8.cu" with { type: "text" };
import { geluTanh } from "./gelu_tanh.ts";
import { gpuOf, vectorWidth } from "./gpu.ts";
import { quantizeRows } from "./quantize_float8.ts";
import { launchRows, rowsOf } from "./rows.ts";

const SOURCE = { name: "gelu_float8.cu", text: GELU_FLOAT8_CU };
/** Vectors that a thread holds: more than where there is less arithmetic (72 us for 4352 x 15360, 89 with three). */
const HELD = 6;

/**
 * {@link geluTanh} of `x`, behind the columns of `before` as they are, in E4M3 with a scale for each row, as
 * {@link quantizeRows} gives it. On a GPU in one kernel, which rounds to E4M3 alone and reads everything once; on the CPU
 * one after the other.
 *
 * @param x `[..., n]`, f32 or bf16. @param before `[..., m]` of the same dtype; both may be columns of wider tensors.
 * @returns `[..., m + n]`.
 * @throws ShapeError where they do not fit.
 */
export function geluTanhFloat8(x: Tensor, before?: Tensor): Float8Tensor {
  expect(x.dtype === "f32" || x.dtype === "bf16", "geluTanhFloat8", () => `takes f32 and bf16, not ${x}`);
  const lead = x.shape.slice(0, -1);
  const count = x.shape.at(-1)!;
  if (before !== undefined) {
    expectShape("geluTanhFloat8", "before", before, [...lead, null]);
    expect(before.dtype === x.dtype, "geluTanhFloat8", () => `before is ${before}, x is ${x}`);
  }
  const beforeCount = before?.shape.at(-1) ?? 0;
  const gpu = gpuOf(x);
  if (gpu === undefined) {
    return x.device.scope(() => {
      const activated = geluTanh(x);
      return quantizeRows(before === undefined ? activated : concat([before, activated], lead.length));
    });
  }
  const out = Float8Tensor.alloc(gpu, [...lead, beforeCount + count], x.dtype);
  gpu.scope(() => {
    const nothing = x.narrow(-1, 0, 0);
    const parts = [before ?? nothing, x].map(rowsOf);
    const [{ source: left }, { source: right, count: rows }] = parts;
    const width = Math.min(vectorWidth(beforeCount, [out, left]), vectorWidth(count, [out, right]));
    const places = parts.flatMap(({ inner, outerStride, innerStride }) => [
      inner,
      BigInt(outerStride),
      BigInt(innerStride),
    ]);
    launchRows(gpu, SOURCE, {
      entry: "geluFloat8",
      types: { T: x.dtype },
      rows,
      held: HELD,
      length: beforeCount + count,
      width,
      out,
      inputs: [left, right],
      args: [out, out.scales, left, right, rows, beforeCount, count, ...places],
    });
  });
  return out;
}
