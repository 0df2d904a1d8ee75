import type { Tensor } from "../ffi/tensor.ts";
import { linear } from "./linear.ts";

/** A Linear layer's weight `[out, in]` and bias `[out]`. */
export interface LinearLayer {
  readonly weight: Tensor;
  readonly bias?: Tensor | undefined;
}

/**
 * All Linear layers that read an operator's result. An operator that is told may give it in the form that they multiply; the
 * eager ones have no use for it.
 */
export type Readers = readonly LinearLayer[];

/**
 * Several Linear layers of one input: q, k and v, and what else reads the same tokens.
 * Composite: this body of primitives is the eager baseline; one product of joined weights may replace it.
 *
 * @param x `[..., in]`. @returns `[..., out]` for each layer, in `x`'s dtype.
 */
export function linears(x: Tensor, layers: readonly LinearLayer[]): Tensor[] {
  return layers.map(({ weight, bias }) => linear(x, weight, bias));
}
