import { Float } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { onCpu } from "./cpu.ts";
import { gpuOf, vectorWidth } from "./gpu.ts";
import LAYER_NORM_CU from "./layer_norm.cu" with { type: "text" };
import { launchRows, rowsOf } from "./rows.ts";

const SOURCE = { name: "layer_norm.cu", text: LAYER_NORM_CU };

/**
 * Layer norm over the last dimension (Ba et al. 2016): zero mean, unit variance, then `* weight + bias` if given.
 *
 * @param x `[..., hidden]`.
 * @param eps added to the variance.
 * @param weight `[hidden]`. @param bias `[hidden]`, on a GPU in the weight's dtype.
 * @returns `x`'s shape (dense) and dtype; statistics in f32.
 * @throws ShapeError where the sizes do not fit.
 */
export function layerNorm(x: Tensor, eps: number, weight?: Tensor, bias?: Tensor): Tensor {
  const hidden = x.shape.at(-1)!;
  if (weight !== undefined) expectShape("layerNorm", "weight", weight, [hidden]);
  if (bias !== undefined) expectShape("layerNorm", "bias", bias, [hidden]);
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  const gpu = gpuOf(out);
  if (gpu === undefined) {
    return onCpu(out, [x, weight, bias], (o, xs, w, b) => layerNormReference(o, xs, w, b, hidden, eps));
  }
  const affine = weight ?? bias;
  expect(
    affine?.dtype === (bias ?? affine)?.dtype,
    "layerNorm",
    () => `weight is ${weight}, bias is ${bias}: they take one dtype`,
  );
  gpu.scope(() => {
    const { source, count, inner, outerStride, innerStride } = rowsOf(x);
    const width = vectorWidth(hidden, [out, source, weight, bias]);
    launchRows(gpu, SOURCE, {
      entry: "layerNorm",
      types: { T: x.dtype, W: affine?.dtype ?? x.dtype },
      rows: count,
      length: hidden,
      width,
      out,
      inputs: [source],
      args: [
        out,
        source,
        weight,
        bias,
        count,
        hidden,
        inner,
        BigInt(outerStride),
        BigInt(innerStride),
        new Float(eps),
      ],
    });
  });
  return out;
}

/** `x` `[rows, hidden]`; `weight` and `bias` `[hidden]` or empty. */
export function layerNormReference(
  out: Float32Array,
  x: Float32Array,
  weight: Float32Array,
  bias: Float32Array,
  hidden: number,
  eps: number,
): void {
  for (let start = 0; start < x.length; start += hidden) {
    let sum = 0;
    for (let i = 0; i < hidden; i++) sum += x[start + i];
    const mean = sum / hidden;
    let squares = 0;
    for (let i = 0; i < hidden; i++) squares += (x[start + i] - mean) ** 2;
    const factor = 1 / Math.sqrt(squares / hidden + eps);
    for (let i = 0; i < hidden; i++) {
      const normal = (x[start + i] - mean) * factor;
      out[start + i] = (weight.length > 0 ? normal * weight[i] : normal) + (bias.length > 0 ? bias[i] : 0);
    }
  }
}
