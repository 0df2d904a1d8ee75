import { Float } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import { onCpu } from "./cpu.ts";
import { blockSize, gpuOf, launch, vectorWidth } from "./gpu.ts";
import LAYER_NORM_CU from "./layer_norm.cu" with { type: "text" };

const SOURCE = { name: "layer_norm.cu", text: LAYER_NORM_CU };

/**
 * Layer norm over the last dimension (Ba et al. 2016): zero mean, unit variance, then `* weight + bias` if given.
 *
 * @param x `[..., hidden]`.
 * @param eps added to the variance.
 * @param weight `[hidden]`. @param bias `[hidden]`.
 * @returns `x`'s shape and dtype; statistics in f32.
 */
export function layerNorm(x: Tensor, eps: number, weight?: Tensor, bias?: Tensor): Tensor {
  const hidden = x.shape.at(-1)!;
  if (weight !== undefined) expectShape("layerNorm", "weight", weight, [hidden]);
  if (bias !== undefined) expectShape("layerNorm", "bias", bias, [hidden]);
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    const source = contiguous(x);
    const width = vectorWidth(hidden, [out, source, weight, bias]);
    const block = blockSize(gpu, hidden / width);
    launch(gpu, SOURCE, {
      entry: "layerNorm",
      types: { T: x.dtype },
      constants: { N: width, VECTORS: Math.ceil(hidden / (width * block)) },
      grid: x.size / hidden,
      block,
      args: [out, source, weight, bias, hidden, new Float(eps)],
    });
    return out;
  }
  return onCpu(out, [x, weight, bias], (o, xs, w, b) => layerNormReference(o, xs, w, b, hidden, eps));
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
