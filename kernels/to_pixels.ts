import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { onCpu } from "./cpu.ts";

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
