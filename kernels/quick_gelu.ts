import { Tensor } from "../ffi/tensor.ts";
import { onCpu } from "./cpu.ts";

/** The sigmoid approximation of GELU that CLIP was trained with: `x / (1 + exp(-1.702 x))`. Any shape; `x`'s dtype, computed in f32. */
export function quickGelu(x: Tensor): Tensor {
  return onCpu(Tensor.empty(x.device, x.shape, x.dtype), [x], quickGeluReference);
}

/** Element by element. */
export function quickGeluReference(out: Float32Array, x: Float32Array): void {
  for (let i = 0; i < x.length; i++) {
    out[i] = x[i] / (1 + Math.exp(-1.702 * x[i]));
  }
}
