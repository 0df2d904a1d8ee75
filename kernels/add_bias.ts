import type { Device } from "../ffi/device.ts";
import { isGpu } from "../ffi/gpu.ts";
import type { Tensor } from "../ffi/tensor.ts";
import ADD_BIAS_CU from "./add_bias.cu" with { type: "text" };
import { expect, expectShape } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import { blockSize, gpuOf, launch, vectorWidth } from "./gpu.ts";
import { isChannelsLast, NHWC } from "./layout.ts";

const SOURCE = { name: "add_bias.cu", text: ADD_BIAS_CU };

/** Whether {@link Device.conv} adds a bias in the same call. */
export function convAddsBias(device: Device): boolean {
  return !isGpu(device) || device.limits.convAddsBias !== false;
}

/**
 * Adds a bias to the channels of pictures, in place, on a GPU.
 *
 * @param out `[batch, channels, height, width]`, dense or with the channels last. @param bias `[channels]`.
 * @throws ShapeError for other layouts.
 */
export function addBias(out: Tensor, bias: Tensor): void {
  const [, channels, height, width] = out.shape;
  const channelsLast = isChannelsLast(out);
  expectShape("addBias", "bias", bias, [channels]);
  const dense = out.isContiguous || out.permute(NHWC).isContiguous;
  const gpu = gpuOf(out);
  expect(dense && gpu !== undefined, "addBias", () => `takes dense pictures on a GPU, not ${out}`);
  if (out.size === 0) return;
  const inner = channelsLast ? 1 : height * width;
  const flat = (channelsLast ? out.permute(NHWC) : out).reshape([out.size]);
  const N = vectorWidth(channelsLast ? channels : inner, [flat]);
  const count = out.size / N;
  gpu!.scope(() => {
    const block = blockSize(gpu!, count);
    launch(gpu!, SOURCE, {
      entry: "addBias",
      types: { T: out.dtype, B: bias.dtype },
      constants: { N },
      grid: Math.ceil(count / block),
      block,
      args: [flat, contiguous(bias), BigInt(count), channels, BigInt(inner)],
    });
  });
}

/** `out` `[pictures, channels, inner]`, in place. */
export function addBiasReference(out: Float32Array, bias: Float32Array, inner: number): void {
  for (let i = 0; i < out.length; i++) out[i] += bias[Math.floor(i / inner) % bias.length];
}
