import type { ConvPlan } from "../ffi/device.ts";
import { Tensor } from "../ffi/tensor.ts";
import { addBias, convAddsBias } from "./add_bias.ts";
import { expect, expectShape } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import { isChannelsLast, NCHW, NHWC } from "./layout.ts";
import { linear } from "./linear.ts";

export interface Conv2dOptions {
  /** Step between output pixels, in both directions; 1 when left out. */
  readonly stride?: number;
  /** Zeros around the picture, `[top, left, bottom, right]`; none when left out. */
  readonly padding?: readonly [number, number, number, number];
}

/**
 * 2-D cross-correlation with bias, accumulated in f32. Where the weight lies with its channels last (`[out,
 * kernelHeight, kernelWidth, in]`), the result does too, and `x` is brought there if it is not; the layout of a 1 x 1
 * weight says nothing, so `x`'s counts.
 *
 * @param x `[batch, in, height, width]`.
 * @param weight `[out, in, kernelHeight, kernelWidth]`, same dtype as `x`.
 * @param bias `[out]`.
 * @returns `[batch, out, (height + top + bottom - kernelHeight) / stride + 1, ...]` in `x`'s dtype, dense NCHW or with
 * the channels last.
 * @throws ShapeError where the sizes do not fit.
 */
export function conv2d(x: Tensor, weight: Tensor, bias?: Tensor, options: Conv2dOptions = {}): Tensor {
  const { device } = x;
  const shape = resultShape("conv2d", x, weight, bias, options);
  const { stride = 1, padding = [] } = options;
  const pointwise = isPointwise(weight) && stride === 1 && padding.every((zeros) => zeros === 0);
  if (pointwise && isResultChannelsLast(x, weight)) return pointwiseConv(x, weight, bias);
  return device.scope(() => {
    const plan = convPlan(x, weight, options, shape);
    if (bias === undefined || convAddsBias(device)) {
      device.conv({ ...plan, bias });
    } else {
      device.conv(plan);
      addBias(plan.out, bias);
    }
    return plan.out;
  });
}

/**
 * The shape of {@link conv2d}'s result.
 *
 * @param op for messages. @throws ShapeError where the sizes do not fit.
 */
export function resultShape(
  op: string,
  x: Tensor,
  weight: Tensor,
  bias: Tensor | undefined,
  { stride = 1, padding = [0, 0, 0, 0] }: Conv2dOptions,
): [batch: number, channels: number, height: number, width: number] {
  expectShape(op, "x", x, [null, null, null, null]);
  expectShape(op, "weight", weight, [null, x.shape[1], null, null]);
  if (bias !== undefined) expectShape(op, "bias", bias, [weight.shape[0]]);
  expect(x.dtype === weight.dtype, op, () => `x is ${x.dtype}, weight is ${weight.dtype}`);
  const [top, left, bottom, right] = padding;
  const [batch, , height, width] = x.shape;
  const [channels, , kernelHeight, kernelWidth] = weight.shape;
  const outHeight = Math.floor((height + top + bottom - kernelHeight) / stride) + 1;
  const outWidth = Math.floor((width + left + right - kernelWidth) / stride) + 1;
  expect(outHeight > 0 && outWidth > 0, op, () => `x ${x} is smaller than the kernel ${weight}`);
  return [batch, channels, outHeight, outWidth];
}

/** What {@link Device.conv} takes, without a bias: `x` as the weight lies, and a new place for a result of `shape`. */
export function convPlan(
  x: Tensor,
  weight: Tensor,
  { stride = 1, padding = [0, 0, 0, 0] }: Conv2dOptions,
  [batch, channels, height, width]: readonly [number, number, number, number],
): ConvPlan {
  if (isResultChannelsLast(x, weight)) {
    const out = Tensor.empty(x.device, [batch, height, width, channels], x.dtype).permute(NCHW);
    return { x: withChannelsLast(x), weight, out, stride, padding };
  }
  const out = Tensor.empty(x.device, [batch, channels, height, width], x.dtype);
  return { x: contiguous(x), weight, out, stride, padding };
}

/** The picture with its channels last, copied where it lies otherwise. */
export function withChannelsLast(x: Tensor): Tensor {
  return contiguous(x.permute(NHWC)).permute(NCHW);
}

function isPointwise({ shape: [, , height, width] }: Tensor): boolean {
  return height === 1 && width === 1;
}

function isResultChannelsLast(x: Tensor, weight: Tensor): boolean {
  return isChannelsLast(weight) || (isPointwise(weight) && isChannelsLast(x));
}

/** A 1 x 1 convolution with the channels last: a Linear layer of each pixel. */
function pointwiseConv(x: Tensor, weight: Tensor, bias: Tensor | undefined): Tensor {
  return linear(x.permute(NHWC), weight.reshape([weight.shape[0], weight.shape[1]]), bias).permute(NCHW);
}

/** Reference on dense NCHW arrays; sums in double precision. */
export function conv2dReference(
  out: Float32Array,
  x: Float32Array,
  weight: Float32Array,
  bias: Float32Array,
  shape: { x: readonly number[]; weight: readonly number[]; out: readonly number[] },
  stride: number,
  padding: readonly [number, number, number, number],
): void {
  const [batch, inChannels, height, width] = shape.x;
  const [outChannels, , kernelHeight, kernelWidth] = shape.weight;
  const [, , outHeight, outWidth] = shape.out;
  let at = 0;
  for (let n = 0; n < batch; n++) {
    for (let o = 0; o < outChannels; o++) {
      for (let y = 0; y < outHeight; y++) {
        for (let z = 0; z < outWidth; z++) {
          let sum = bias.length > 0 ? bias[o] : 0;
          for (let c = 0; c < inChannels; c++) {
            for (let r = 0; r < kernelHeight; r++) {
              const row = y * stride + r - padding[0];
              if (row < 0 || row >= height) continue;
              for (let s = 0; s < kernelWidth; s++) {
                const column = z * stride + s - padding[1];
                if (column < 0 || column >= width) continue;
                sum += x[((n * inChannels + c) * height + row) * width + column] *
                  weight[((o * inChannels + c) * kernelHeight + r) * kernelWidth + s];
              }
            }
          }
          out[at++] = sum;
        }
      }
    }
  }
}
