import { Tensor } from "../ffi/tensor.ts";
import { onCpu } from "./cpu.ts";

/** SiLU (Elfwing et al. 2017): `x / (1 + exp(-x))`. Any shape; `x`'s dtype, computed in f32. */
export function silu(x: Tensor): Tensor {
  return onCpu(Tensor.empty(x.device, x.shape, x.dtype), [x], siluReference);
}

/** Element by element. */
export function siluReference(out: Float32Array, x: Float32Array): void {
  for (let i = 0; i < x.length; i++) {
    out[i] = x[i] / (1 + Math.exp(-x[i]));
  }
}
