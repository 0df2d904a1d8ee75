import { Tensor } from "../ffi/tensor.ts";
import { add } from "./add.ts";
import { cast } from "./cast.ts";
import { expectShape } from "./check.ts";
import { concat } from "./concat.ts";
import { contiguous } from "./contiguous.ts";
import type { conv2d } from "./conv2d.ts";
import { isChannelsLast, NCHW } from "./layout.ts";
import type { upsampleNearest } from "./upsample_nearest.ts";

/** The operators that {@link upsampleConv} is made of: the running plan's. */
export interface UpsampleConvOps {
  readonly conv2d: typeof conv2d;
  readonly upsampleNearest: typeof upsampleNearest;
}

/** Even and odd rows, each with even and odd columns. */
const PHASES = 4;
const AROUND = { padding: [1, 1, 1, 1] } as const;

/**
 * A picture of twice the size: {@link upsampleNearest}, then a 3 x 3 convolution with zeros around.
 * Composite: this body of primitives is the eager baseline; {@link upsampleConvPolyphase} may replace it.
 *
 * @param x `[batch, in, height, width]`. @param weight `[out, in, 3, 3]`, `x`'s dtype. @param bias `[out]`.
 * @returns `[batch, out, 2 height, 2 width]` in `x`'s dtype, laid out as {@link conv2d}'s result.
 * @throws ShapeError where the sizes do not fit.
 */
export function upsampleConv(x: Tensor, weight: Tensor, bias: Tensor, ops: UpsampleConvOps): Tensor {
  expectShape("upsampleConv", "weight", weight, [null, null, 3, 3]);
  return x.device.scope(() => ops.conv2d(ops.upsampleNearest(x), weight, bias, AROUND));
}

/**
 * {@link upsampleConv} without the large picture that is its input: of the nine pixels under the kernel those in one row or
 * column of `x` are equal, so that each pixel of the result is a 2 x 2 convolution of `x` itself, one for each phase (even or
 * odd row, even or odd column). These are one convolution with 4 times as many filters, 4/9 of the products, whose results
 * are then interleaved. (Polyphase interpolation, Bellanger et al. 1976; sub-pixel convolution, Shi et al. 2016.)
 *
 * @param weight of {@link polyphaseFilters}, `[4 out, in, 2, 2]`. @param bias of {@link polyphaseBias}, `[4 out]`.
 */
export function upsampleConvPolyphase(
  x: Tensor,
  weight: Tensor,
  bias: Tensor,
  ops: Pick<UpsampleConvOps, "conv2d">,
): Tensor {
  expectShape("upsampleConvPolyphase", "weight", weight, [null, null, 2, 2]);
  return x.device.scope(() => interleaved(ops.conv2d(x, weight, bias, AROUND)));
}

/**
 * The filters of {@link upsampleConvPolyphase}. Those of even rows see the row before and their own, `[w0, w1 + w2]`, those of
 * odd rows their own and the next one, `[w0 + w1, w2]`; columns alike. Sums are in f32, and rounded once.
 *
 * @param weight `[out, in, 3, 3]`.
 * @returns `[4 out, in, 2, 2]` in its dtype, dense: all filters of even rows and even columns, then of even rows and odd
 * columns, odd rows and even columns, odd rows and odd columns.
 */
export function polyphaseFilters(weight: Tensor): Tensor {
  expectShape("polyphaseFilters", "weight", weight, [null, null, 3, 3]);
  return weight.device.scope(() => {
    const filters = phasesAlong(cast(weight, "f32"), 2).flatMap((rows) => phasesAlong(rows, 3));
    return cast(concat(filters, 0), weight.dtype);
  });
}

/** The bias `[out]` of {@link upsampleConv} for the filters of all phases, `[4 out]`. */
export function polyphaseBias(bias: Tensor): Tensor {
  return concat(new Array<Tensor>(PHASES).fill(bias), 0);
}

/** Two taps for three along a dimension, for even and for odd places. */
function phasesAlong(weight: Tensor, dim: number): [even: Tensor, odd: Tensor] {
  const [before, own, after] = weight.chunk(3, dim);
  return [concat([before, add(own, after)], dim), concat([add(before, own), after], dim)];
}

/**
 * Pixels of all phases in their places. Even rows have theirs in `phases` at their own place, and odd ones at the next:
 * with zeros on all sides a filter's first result is that of the place before its first pixel.
 *
 * @param phases `[batch, 4 out, height + 1, width + 1]`. @returns `[batch, out, 2 height, 2 width]`.
 */
function interleaved(phases: Tensor): Tensor {
  const [batch, filters] = phases.shape;
  const channels = filters / PHASES;
  const [height, width] = [phases.shape[2] - 1, phases.shape[3] - 1];
  const [perPicture, perFilter, perRow, perColumn] = phases.strides;
  const places = new Tensor(
    phases.memory,
    phases.dtype,
    [batch, height, 2, width, 2, channels],
    [
      perPicture,
      perRow,
      perRow + 2 * channels * perFilter,
      perColumn,
      perColumn + channels * perFilter,
      perFilter,
    ],
    phases.offset,
  );
  if (isChannelsLast(phases)) {
    return contiguous(places).reshape([batch, 2 * height, 2 * width, channels]).permute(NCHW);
  }
  return contiguous(places.permute([0, 5, 1, 2, 3, 4])).reshape([batch, channels, 2 * height, 2 * width]);
}
