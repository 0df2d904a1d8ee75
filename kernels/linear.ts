import type { MatmulPlan } from "../ffi/device.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { asMatrix } from "./contiguous.ts";

/**
 * Affine map of the last dimension, `activation(x @ weight^T + bias)`, accumulated in f32 and rounded once.
 *
 * @param x `[..., in]`; copied first where its rows do not lie at one distance from each other.
 * @param weight `[out, in]` as PyTorch's `nn.Linear` keeps it, same dtype as `x`.
 * @param bias `[out]`.
 * @param place where the result is stored, dense rows at any distance; allocated when left out.
 * @returns `[..., out]` in `x`'s dtype.
 * @throws ShapeError where the sizes do not fit.
 */
export function linear(
  x: Tensor,
  weight: Tensor,
  bias?: Tensor,
  activation?: MatmulPlan["activation"],
  place?: Tensor,
): Tensor {
  const [outFeatures] = weight.shape;
  expectShape("linear", "weight", weight, [null, x.shape.at(-1) ?? null]);
  if (bias !== undefined) expectShape("linear", "bias", bias, [outFeatures]);
  expect(x.dtype === weight.dtype, "linear", () => `x is ${x.dtype}, weight is ${weight.dtype}`);
  const shape = [...x.shape.slice(0, -1), outFeatures];
  if (place !== undefined) expectShape("linear", "place", place, shape);
  const out = place ?? Tensor.empty(x.device, shape, x.dtype);
  x.device.scope(() =>
    x.device.matmul({
      a: asMatrix(x),
      b: weight,
      bias,
      out: out.reshape([-1, outFeatures]),
      activation,
      constant: true,
    })
  );
  return out;
}

/** `x` `[rows, in]`, `weight` `[out, in]`, `bias` `[out]` or empty; sums in double precision. */
export function linearReference(
  out: Float32Array,
  x: Float32Array,
  weight: Float32Array,
  bias: Float32Array,
  inFeatures: number,
): void {
  const outFeatures = weight.length / inFeatures;
  for (let row = 0; row < x.length / inFeatures; row++) {
    for (let column = 0; column < outFeatures; column++) {
      let sum = bias.length > 0 ? bias[column] : 0;
      for (let k = 0; k < inFeatures; k++) sum += x[row * inFeatures + k] * weight[column * inFeatures + k];
      out[row * outFeatures + column] = sum;
    }
  }
}
