import type { Tensor } from "../ffi/tensor.ts";
import { activate } from "./activation.ts";

const SQRT_2_PI = Math.sqrt(2 / Math.PI);

/**
 * GELU in its tanh form (Hendrycks & Gimpel 2016), PyTorch's `approximate="tanh"`. Any shape; `x`'s dtype, computed in f32.
 *
 * @param out where the result is stored; see {@link activate}.
 */
export function geluTanh(x: Tensor, out?: Tensor): Tensor {
  return activate(x, 2 * SQRT_2_PI, 2 * SQRT_2_PI * 0.044715, geluTanhReference, out); // 1 + tanh u = 2 sigmoid(2u)
}

/** Element by element. */
export function geluTanhReference(out: Float32Array, x: Float32Array): void {
  for (let i = 0; i < x.length; i++) {
    const v = x[i];
    out[i] = 0.5 * v * (1 + Math.tanh(SQRT_2_PI * (v + 0.044715 * v * v * v)));
  }
}
