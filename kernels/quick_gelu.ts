import type { Tensor } from "../ffi/tensor.ts";
import { activate } from "./activation.ts";

/**
 * The sigmoid approximation of GELU that CLIP was trained with: `x / (1 + exp(-1.702 x))`. Any shape; `x`'s dtype, computed in
 * f32.
 *
 * @param out where the result is stored, which may be `x` itself; see {@link activate}.
 */
export function quickGelu(x: Tensor, out?: Tensor): Tensor {
  return activate(x, 1.702, 0, quickGeluReference, out);
}

/** Element by element. */
export function quickGeluReference(out: Float32Array, x: Float32Array): void {
  for (let i = 0; i < x.length; i++) {
    out[i] = x[i] / (1 + Math.exp(-1.702 * x[i]));
  }
}
