import type { Tensor } from "../ffi/tensor.ts";
import { rmsNorm } from "./rms_norm.ts";
import { rope } from "./rope.ts";

/**
 * QK-norm (Henry et al. 2020) and rotary embedding of one of q and k: RMS norm of each head, then {@link rope}.
 * Composite: this body of primitives is the eager baseline; a fused kernel may replace it.
 *
 * @param x `[batch, tokens, heads, headDim]`. @param weight `[headDim]`. @param cos `[tokens, headDim]` f32.
 * @param sin `[tokens, headDim]` f32. @returns `x`'s shape and dtype.
 */
export function qkNormRope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: number): Tensor {
  return rope(rmsNorm(x, weight, eps), cos, sin);
}
