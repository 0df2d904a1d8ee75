import type { MatmulPlan } from "../ffi/device.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { dequantize } from "./dequantize_float8.ts";
import { type Float8Matrix, Float8Tensor } from "./float8_tensor.ts";
import { gpuOf } from "./gpu.ts";
import { quantizeRows, quantizeTensor } from "./quantize_float8.ts";

/**
 * Affine map of the last dimension by a float8 weight, `activation(x @ weight^T + bias)`: `x` is quantized as the weight
 * was, its scales found anew for each call; sums are in f32, as far as the matrix units keep them.
 *
 * @param x `[..., in]`, f32 or bf16 with dense rows, or quantized already. @param weight `[out, in]`.
 * @param bias `[out]`, on a GPU in bf16.
 * @param place where the result is stored, dense rows at any distance; allocated when left out.
 * @returns `[..., out]` in the dtype of `x`, or of what it was before it was quantized; rounded once.
 * @throws ShapeError where the sizes do not fit; on a GPU for sizes that are no multiples of 16.
 */
export function linearFloat8(
  x: Tensor,
  weight: Float8Matrix,
  bias?: Tensor,
  activation?: MatmulPlan["activation"],
  place?: Tensor,
): Tensor {
  return x.device.scope(() => linearQuantized(quantizeAs(weight, x), weight, bias, activation, place));
}

/** `x` quantized as `weight` was, for one or several products with such weights by {@link linearQuantized}. */
export function quantizeAs({ rowwise }: Float8Matrix, x: Tensor): Float8Tensor {
  if (x instanceof Float8Tensor) return x;
  return rowwise ? quantizeRows(x) : quantizeTensor(x);
}

/** The product of {@link linearFloat8} for an `x` that was quantized. */
export function linearQuantized(
  x: Float8Tensor,
  weight: Float8Matrix,
  bias?: Tensor,
  activation?: MatmulPlan["activation"],
  place?: Tensor,
): Tensor {
  const [outFeatures, inFeatures] = weight.values.shape;
  expectShape("linearFloat8", "weight", weight.values, [null, x.shape.at(-1) ?? null]);
  if (bias !== undefined) expectShape("linearFloat8", "bias", bias, [outFeatures]);
  expect(x.rowwise === weight.rowwise, "linearFloat8", () => "x and weight are not scaled alike");
  const shape = [...x.shape.slice(0, -1), outFeatures];
  if (place !== undefined) expectShape("linearFloat8", "place", place, shape);
  const out = place ?? Tensor.empty(x.device, shape, x.source);
  const plan: MatmulPlan = {
    a: x.values.reshape([-1, inFeatures]),
    b: weight.values,
    bias,
    out: out.reshape([-1, outFeatures]),
    activation,
    scaleA: x.scales,
    scaleB: weight.scales,
    constant: true,
  };
  const gpu = gpuOf(out);
  if (gpu === undefined || gpu.takesMatmul(plan)) out.device.matmul(plan);
  else gpu.scope(() => gpu.matmul(inBfloat16(plan, x, weight)));
  return out;
}

/** The same product of the same numbers, in bfloat16: for sizes that the library has no float8 kernel for. */
function inBfloat16(
  { a, bias, out, activation }: MatmulPlan,
  x: Float8Matrix,
  weight: Float8Matrix,
): MatmulPlan {
  return { a: dequantize(x, "bf16").reshape(a.shape), b: dequantize(weight, "bf16"), bias, out, activation };
}
