import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { onCpu } from "./cpu.ts";

/** Product of two tensors of one shape, element by element; `a`'s dtype. */
export function multiply(a: Tensor, b: Tensor): Tensor {
  expectShape("multiply", "b", b, a.shape);
  return onCpu(Tensor.empty(a.device, a.shape, a.dtype), [a, b], multiplyReference);
}

/** Element by element. */
export function multiplyReference(out: Float32Array, a: Float32Array, b: Float32Array): void {
  for (let i = 0; i < a.length; i++) out[i] = a[i] * b[i];
}
