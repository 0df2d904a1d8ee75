import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { onCpu } from "./cpu.ts";

/**
 * Each pixel becomes a square of 2 x 2.
 *
 * @param x `[batch, channels, height, width]`. @returns `[batch, channels, 2 height, 2 width]`, `x`'s dtype.
 */
export function upsampleNearest(x: Tensor): Tensor {
  expectShape("upsampleNearest", "x", x, [null, null, null, null]);
  const [batch, channels, height, width] = x.shape;
  const out = Tensor.empty(x.device, [batch, channels, 2 * height, 2 * width], x.dtype);
  return onCpu(out, [x], (o, xs) => upsampleNearestReference(o, xs, width));
}

/** `x` `[rows, width]`, all pictures' rows behind one another. */
export function upsampleNearestReference(out: Float32Array, x: Float32Array, width: number): void {
  for (let row = 0; row < x.length / width; row++) {
    const at = row * 4 * width;
    for (let i = 0; i < width; i++) out[at + 2 * i] = out[at + 2 * i + 1] = x[row * width + i];
    out.copyWithin(at + 2 * width, at, at + 2 * width);
  }
}
