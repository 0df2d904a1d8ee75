import type { Tensor } from "../ffi/tensor.ts";
import { attention } from "./attention.ts";
import { concat } from "./concat.ts";
import { geluTanh } from "./gelu_tanh.ts";

/**
 * What the output projection of a single-stream block reads (Dehghani et al. 2023): {@link attention}, and beside it
 * {@link geluTanh} of the MLP's up projection.
 * Composite: this body of primitives is the eager baseline; kernels that write side by side may replace it.
 *
 * @param q `[batch, tokens, heads, headDim]`; `k` and `v` the same. @param mlp `[batch, tokens, mlpHidden]`.
 * @returns `[batch, tokens, heads * headDim + mlpHidden]` in `q`'s dtype.
 */
export function attentionBesideMlp(q: Tensor, k: Tensor, v: Tensor, mlp: Tensor): Tensor {
  const [batch, tokens, heads, headDim] = q.shape;
  const attended = attention(q, k, v).reshape([batch, tokens, heads * headDim]);
  return concat([attended, geluTanh(mlp)], 2);
}
