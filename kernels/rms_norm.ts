import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { onCpu } from "./cpu.ts";

/**
 * Root-mean-square norm over the last dimension (Zhang & Sennrich 2019): `x / sqrt(mean(x^2) + eps) * weight`.
 *
 * @param x `[..., hidden]`. @param weight `[hidden]`. @param eps added to the mean square.
 * @returns `x`'s shape and dtype; the mean in f32.
 */
export function rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor {
  const hidden = x.shape.at(-1)!;
  expectShape("rmsNorm", "weight", weight, [hidden]);
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  return onCpu(out, [x, weight], (o, xs, w) => rmsNormReference(o, xs, w, eps));
}

/** `x` `[rows, hidden]`, `weight` `[hidden]`. */
export function rmsNormReference(
  out: Float32Array,
  x: Float32Array,
  weight: Float32Array,
  eps: number,
): void {
  const hidden = weight.length;
  for (let start = 0; start < x.length; start += hidden) {
    let squares = 0;
    for (let i = 0; i < hidden; i++) squares += x[start + i] ** 2;
    const factor = 1 / Math.sqrt(squares / hidden + eps);
    for (let i = 0; i < hidden; i++) out[start + i] = x[start + i] * factor * weight[i];
  }
}
