import { Tensor } from "../ffi/tensor.ts";
import { onCpu } from "./cpu.ts";

/** `x * scale + shift` with two numbers; `x`'s shape and dtype, computed in f32. */
export function scaleShift(x: Tensor, scale: number, shift: number): Tensor {
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  return onCpu(out, [x], (o, xs) => scaleShiftReference(o, xs, scale, shift));
}

/** Element by element. */
export function scaleShiftReference(out: Float32Array, x: Float32Array, scale: number, shift: number): void {
  for (let i = 0; i < x.length; i++) out[i] = x[i] * scale + shift;
}
