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
  const { stride = 1, padding = [0, 0, 0, 0] } = options;
  expectShape("conv2d", "x", x, [null, null, null, null]);
  expectShape("conv2d", "weight", weight, [null, x.shape[1], null, null]);
  if (bias !== undefined) expectShape("conv2d", "bias", bias, [weight.shape[0]]);
  expect(x.dtype === weight.dtype, "conv2d", () => `x is ${x.dtype}, weight is ${weight.dtype}`);
  const [top, left, bottom, right] = padding;
  const [batch, , height, width] = x.shape;
  const [channels, , kernelHeight, kernelWidth] = weight.shape;
  const outHeight = Math.floor((height + top + bottom - kernelHeight) / stride) + 1;
  const outWidth = Math.floor((width + left + right - kernelWidth) / stride) + 1;
  expect(outHeight > 0 && outWidth > 0, "conv2d", () => `x ${x} is smaller than the kernel ${weight}`);
  const { device } = x;
  const pointwise = kernelHeight === 1 && kernelWidth === 1;
  const channelsLast = isChannelsLast(weight) || (pointwise && isChannelsLast(x));
  if (channelsLast && pointwise && stride === 1 && padding.every((zeros) => zeros === 0)) {
    return pointwiseConv(x, weight, bias);
  }
  const out = channelsLast
    ? Tensor.empty(device, [batch, outHeight, outWidth, channels], x.dtype).permute(NCHW)
    : Tensor.empty(device, [batch, channels, outHeight, outWidth], x.dtype);
  device.scope(() => {
    const source = channelsLast ? contiguous(x.permute(NHWC)).permute(NCHW) : contiguous(x);
    if (bias === undefined || convAddsBias(device)) {
      device.conv({ x: source, weight, bias, out, stride, padding });
    } else {
      device.conv({ x: source, weight, out, stride, padding });
      addBias(out, bias);
    }
  });
  return out;
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
