import type { MatmulPlan } from "../ffi/device.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { asMatrix } from "./contiguous.ts";
import { dequantize } from "./dequantize_float8.ts";
import type { Float8Matrix } from "./float8_tensor.ts";
import { FEW_ROWS, linearFewRows } from "./linear_few_rows.ts";
import type { Float8Layer } from "./linears_float8.ts";

/**
 * Affine map of the last dimension by a weight that is kept in float8 and multiplied in `x`'s dtype, `activation(x @
 * weight^T + bias)`: half of the memory, without rounding what it is multiplied with. A few rows are multiplied by
 * {@link linearFewRows}; for more, the wide weight is made for the product and freed behind it.
 *
 * @param x `[..., in]`, f32 or bf16. @param weight `[out, in]`. @param bias `[out]`, in `x`'s dtype.
 * @param place where the result is stored, dense rows at any distance; allocated when left out.
 * @returns `[..., out]` in `x`'s dtype, rounded once.
 * @throws ShapeError where the sizes do not fit, or `x` is quantized.
 */
export function linearFloat8Weight(
  x: Tensor,
  weight: Float8Matrix,
  bias?: Tensor,
  activation?: MatmulPlan["activation"],
  place?: Tensor,
): Tensor {
  const [outFeatures, inFeatures] = weight.values.shape;
  expectShape("linearFloat8Weight", "weight", weight.values, [null, x.shape.at(-1) ?? null]);
  if (bias !== undefined) expectShape("linearFloat8Weight", "bias", bias, [outFeatures]);
  expect(x.dtype !== "f8e4m3", "linearFloat8Weight", () => `x is ${x}`);
  if (activation === undefined && place === undefined && x.size <= FEW_ROWS * inFeatures) {
    return linearFewRows(x, weight, bias);
  }
  const shape = [...x.shape.slice(0, -1), outFeatures];
  if (place !== undefined) expectShape("linearFloat8Weight", "place", place, shape);
  const out = place ?? Tensor.empty(x.device, shape, x.dtype);
  // Not constant: the wide weight is another one for each product.
  x.device.scope(() =>
    x.device.matmul({
      a: asMatrix(x),
      b: dequantize(weight, x.dtype),
      bias,
      out: out.reshape([-1, outFeatures]),
      activation,
    })
  );
  return out;
}

/** Several Linear layers of one input, each by {@link linearFloat8Weight}. @returns `[..., out]` for each layer. */
export function linearsFloat8Weight(x: Tensor, layers: readonly Float8Layer[]): Tensor[] {
  return layers.map(({ weight, bias }) => linearFloat8Weight(x, weight, bias));
}
