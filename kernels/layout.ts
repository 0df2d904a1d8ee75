import type { Tensor } from "../ffi/tensor.ts";

/** The order of a picture's dimensions in memory when its channels are last: `x.permute(NHWC)` is then dense. */
export const NHWC: readonly number[] = [0, 2, 3, 1];
/** The way back: a dense `[batch, height, width, channels]` permuted by this is `[batch, channels, height, width]`. */
export const NCHW: readonly number[] = [0, 3, 1, 2];

/**
 * Whether a picture `[batch, channels, height, width]` (or a convolution's weight) lies densely with its channels last.
 * Not so where that is the same as dense NCHW: with a single channel or pixel.
 */
export function isChannelsLast(x: Tensor): boolean {
  return x.rank === 4 && !x.isContiguous && x.permute(NHWC).isContiguous;
}
