import type { Tensor } from "../ffi/tensor.ts";
import { layerNorm } from "./layer_norm.ts";
import { modulate } from "./modulate.ts";

/**
 * Adaptive layer norm (Peebles & Xie 2022, DiT): layer norm without weights, then `* (1 + scale) + shift`.
 * Composite: this body of primitives is the eager baseline; a fused kernel may replace it.
 *
 * @param x `[batch, tokens, hidden]`. @param scale `[batch, hidden]`. @param shift `[batch, hidden]`.
 * @returns `x`'s shape and dtype.
 */
export function adaLayerNorm(x: Tensor, scale: Tensor, shift: Tensor, eps: number): Tensor {
  return modulate(layerNorm(x, eps), scale, shift);
}
