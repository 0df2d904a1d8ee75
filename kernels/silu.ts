import type { Tensor } from "../ffi/tensor.ts";
import { activate } from "./activation.ts";

/**
 * SiLU (Elfwing et al. 2017): `x / (1 + exp(-x))`. Any shape; `x`'s dtype, computed in f32.
 *
 * @param out where the result is stored, which may be `x` itself; see {@link activate}.
 */
export function silu(x: Tensor, out?: Tensor): Tensor {
  return activate(x, 1, 0, siluReference, out);
}

/** Element by element. */
export function siluReference(out: Float32Array, x: Float32Array): void {
  for (let i = 0; i < x.length; i++) {
    out[i] = x[i] / (1 + Math.exp(-x[i]));
  }
}
