import type { Tensor } from "../ffi/tensor.ts";
import { copyStrided } from "./cpu.ts";
import { gpuOf } from "./gpu.ts";
import { copyStridedOnGpu } from "./strided_copy.ts";

/** Copies the elements of `x` into `out` of the same shape, dtype and device, bit by bit; both may be strided. */
export function copyInto(out: Tensor, x: Tensor): void {
  const gpu = gpuOf(out);
  if (gpu !== undefined) copyStridedOnGpu(gpu, out, x);
  else copyStrided(out, x);
}
