import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { onCpu } from "./cpu.ts";
import { launchElementwise } from "./elementwise.ts";
import { gpuOf } from "./gpu.ts";
import MULTIPLY_CU from "./multiply.cu" with { type: "text" };

const SOURCE = { name: "multiply.cu", text: MULTIPLY_CU };

/** Product of two tensors of one shape, element by element; `a`'s dtype. */
export function multiply(a: Tensor, b: Tensor): Tensor {
  expectShape("multiply", "b", b, a.shape);
  const out = Tensor.empty(a.device, a.shape, a.dtype);
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    const types = { T: a.dtype, U: b.dtype };
    launchElementwise(gpu, SOURCE, { entry: "multiply", types, out, inputs: [a, b] });
    return out;
  }
  return onCpu(out, [a, b], multiplyReference);
}

/** Element by element. */
export function multiplyReference(out: Float32Array, a: Float32Array, b: Float32Array): void {
  for (let i = 0; i < a.length; i++) out[i] = a[i] * b[i];
}
