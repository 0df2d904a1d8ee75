import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import { onCpu } from "./cpu.ts";
import { blockSize, gpuOf, launch, vectorWidth } from "./gpu.ts";
import TO_PIXELS_CU from "./to_pixels.cu" with { type: "text" };

const SOURCE = { name: "to_pixels.cu", text: TO_PIXELS_CU };

/**
 * The decoder's output as 8-bit RGB: -1..1 to 0..255, clamped and rounded half to even as diffusers'
 * `VaeImageProcessor` and NumPy do.
 *
 * @param x `[batch, 3, height, width]`. @returns u8 `[batch, height, width, 3]`.
 */
export function toPixels(x: Tensor): Tensor {
  expectShape("toPixels", "x", x, [null, 3, null, null]);
  const [batch, channels, height, width] = x.shape;
  const out = Tensor.empty(x.device, [batch, height, width, channels], "u8");
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    if (out.size === 0) return out;
    gpu.scope(() => {
      const planes = contiguous(x).reshape([batch * channels, height * width]);
      const pixels = vectorWidth(height * width, [planes]);
      const count = height * width / pixels;
      const block = blockSize(gpu, count);
      launch(gpu, SOURCE, {
        entry: "toPixels",
        types: { T: x.dtype },
        constants: { N: pixels },
        grid: [Math.ceil(count / block), batch],
        block,
        args: [out, planes, count],
      });
    });
    return out;
  }
  return onCpu(out, [x], (o, xs) => toPixelsReference(o, xs, channels, height * width));
}

/** `x` `[batch, channels, pixels]`, `out` `[batch, pixels, channels]`. */
export function toPixelsReference(
  out: Float32Array,
  x: Float32Array,
  channels: number,
  pixels: number,
): void {
  let at = 0;
  for (let start = 0; start < x.length; start += channels * pixels) {
    for (let pixel = 0; pixel < pixels; pixel++) {
      for (let channel = 0; channel < channels; channel++) {
        const value = Math.min(Math.max(x[start + channel * pixels + pixel] / 2 + 0.5, 0), 1) * 255;
        const floor = Math.floor(value);
        const rest = value - floor;
        out[at++] = rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
      }
    }
  }
}
