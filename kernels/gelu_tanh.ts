import { Tensor } from "../ffi/tensor.ts";
import { onCpu } from "./cpu.ts";

/** GELU in its tanh form (Hendrycks & Gimpel 2016), PyTorch's `approximate="tanh"`. Any shape; `x`'s dtype, computed in f32. */
export function geluTanh(x: Tensor): Tensor {
  return onCpu(Tensor.empty(x.device, x.shape, x.dtype), [x], geluTanhReference);
}

/** Element by element. */
export function geluTanhReference(out: Float32Array, x: Float32Array): void {
  for (let i = 0; i < x.length; i++) {
    const v = x[i];
    out[i] = 0.5 * v * (1 + Math.tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))); // sqrt(2 / pi)
  }
}
