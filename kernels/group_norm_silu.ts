import type { Tensor } from "../ffi/tensor.ts";
import { groupNorm } from "./group_norm.ts";
import { silu } from "./silu.ts";

/**
 * What stands before each convolution of the autoencoder: {@link groupNorm}, then {@link silu}.
 * Composite: this body of primitives is the eager baseline; a fused kernel may replace it.
 *
 * @param x `[batch, channels, height, width]`. @returns `x`'s shape and dtype.
 */
export function groupNormSilu(x: Tensor, groups: number, weight: Tensor, bias: Tensor, eps: number): Tensor {
  const normed = groupNorm(x, groups, weight, bias, eps);
  return silu(normed, normed); // in place: at full resolution a picture more is what fills the memory
}
