import type { Tensor } from "../ffi/tensor.ts";
import { gpuOf } from "./gpu.ts";
import { groupNorm, groupNormOnGpu } from "./group_norm.ts";
import { isChannelsLast, NHWC } from "./layout.ts";
import { silu } from "./silu.ts";

/**
 * What stands before each convolution of the autoencoder: {@link groupNorm}, then {@link silu}.
 * Composite: this body of primitives is the eager baseline; {@link groupNormSiluFused} may replace it.
 *
 * @param x `[batch, channels, height, width]`. @returns `x`'s shape and dtype, laid out as {@link groupNorm}'s result.
 */
export function groupNormSilu(x: Tensor, groups: number, weight: Tensor, bias: Tensor, eps: number): Tensor {
  const normed = groupNorm(x, groups, weight, bias, eps);
  const dense = isChannelsLast(normed) ? normed.permute(NHWC) : normed;
  silu(dense, dense); // in place: at full resolution a picture more is what fills the memory
  return normed;
}

/**
 * {@link groupNormSilu} with SiLU in the kernel that writes the normed picture: on a GPU two readings and one writing of
 * it instead of three and two, and one rounding to the dtype instead of two. On the CPU the default body.
 */
export function groupNormSiluFused(
  x: Tensor,
  groups: number,
  weight: Tensor,
  bias: Tensor,
  eps: number,
): Tensor {
  const gpu = gpuOf(x);
  if (gpu === undefined) return groupNormSilu(x, groups, weight, bias, eps);
  return groupNormOnGpu(gpu, x, { groups, weight, bias, eps, silu: true });
}
