import type { Tensor } from "../ffi/tensor.ts";
import { adaLayerNorm } from "./ada_layer_norm.ts";
import { gatedResidual } from "./gated_residual.ts";

/** A residual stream after a branch was added, and what the next branch reads of it. */
export interface Normed {
  readonly sum: Tensor;
  readonly normed: Tensor;
}

/**
 * The end of a branch and the start of the next: {@link gatedResidual}, then {@link adaLayerNorm} of the sum.
 * Composite: this body of primitives is the eager baseline; a fused kernel may replace it.
 *
 * @param residual `[batch, tokens, hidden]`. @param x `[batch, tokens, hidden]`. @param gate `[batch, hidden]`.
 * @param scale `[batch, hidden]`. @param shift `[batch, hidden]`. @returns both in `residual`'s shape and dtype.
 */
export function gatedAdaLayerNorm(
  residual: Tensor,
  x: Tensor,
  gate: Tensor,
  scale: Tensor,
  shift: Tensor,
  eps: number,
): Normed {
  const sum = gatedResidual(residual, x, gate);
  return { sum, normed: adaLayerNorm(sum, scale, shift, eps) };
}
