import type { Tensor } from "../ffi/tensor.ts";
import { add } from "./add.ts";
import type { Normed } from "./gated_ada_layer_norm.ts";
import { rmsNorm } from "./rms_norm.ts";

/**
 * The end of a branch and the start of the next in T5: {@link add}, then {@link rmsNorm} of the sum.
 * Composite: this body of primitives is the eager baseline; a fused kernel may replace it.
 *
 * @param residual `[..., hidden]`. @param x `[..., hidden]`. @param weight `[hidden]`.
 * @returns both in `residual`'s shape and dtype.
 */
export function addRmsNorm(residual: Tensor, x: Tensor, weight: Tensor, eps: number): Normed {
  const sum = add(residual, x);
  return { sum, normed: rmsNorm(sum, weight, eps) };
}
