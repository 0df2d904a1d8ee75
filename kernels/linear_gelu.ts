import type { Tensor } from "../ffi/tensor.ts";
import { geluTanh } from "./gelu_tanh.ts";
import { gpuOf } from "./gpu.ts";
import { linear } from "./linear.ts";

/**
 * The up projection of an MLP: {@link linear}, then {@link geluTanh}.
 * Composite: this body of primitives is the eager baseline; an epilogue may replace it.
 *
 * @param x `[..., in]`. @param weight `[out, in]`. @param bias `[out]`. @param place where the result is
 *   stored, see {@link linear}. @returns `[..., out]` in `x`'s dtype.
 */
export function linearGelu(x: Tensor, weight: Tensor, bias?: Tensor, place?: Tensor): Tensor {
  return geluTanh(linear(x, weight, bias), place);
}

/** {@link linearGelu} on a GPU as one product, which applies GELU to its sums before it rounds them; on the CPU the same. */
export function linearGeluFused(x: Tensor, weight: Tensor, bias?: Tensor, place?: Tensor): Tensor {
  return gpuOf(x) === undefined
    ? linearGelu(x, weight, bias, place)
    : linear(x, weight, bias, "geluTanh", place);
}
