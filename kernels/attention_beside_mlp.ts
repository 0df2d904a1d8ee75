import { Tensor } from "../ffi/tensor.ts";
import { attention } from "./attention.ts";
import { expect, expectShape } from "./check.ts";
import { concat } from "./concat.ts";
import { geluTanh } from "./gelu_tanh.ts";
import { gpuOf } from "./gpu.ts";

/**
 * What the output projection of a single-stream block reads (Dehghani et al. 2023): {@link attention}, and beside it
 * {@link geluTanh} of the MLP's up projection.
 * Composite: this body of primitives is the eager baseline; kernels that write side by side may replace it.
 *
 * @param q `[batch, tokens, heads, headDim]`; `k` and `v` the same. @param mlp `[batch, tokens, mlpHidden]`.
 * @param attend the table's attention.
 * @returns `[batch, tokens, heads * headDim + mlpHidden]` in `q`'s dtype.
 */
export function attentionBesideMlp(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  mlp: Tensor,
  attend: typeof attention = attention,
): Tensor {
  const [batch, tokens, heads, headDim] = q.shape;
  const attended = attend(q, k, v).reshape([batch, tokens, heads * headDim]);
  return concat([attended, geluTanh(mlp)], 2);
}

/** {@link attentionBesideMlp} on a GPU without a copy: both write where their columns belong; on the CPU the same. */
export function attentionBesideMlpFused(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  mlp: Tensor,
  attend: typeof attention = attention,
): Tensor {
  const gpu = gpuOf(q);
  if (gpu === undefined) return attentionBesideMlp(q, k, v, mlp, attend);
  const [batch, tokens, heads, headDim] = q.shape;
  const hidden = heads * headDim;
  expectShape("attentionBesideMlp", "mlp", mlp, [batch, tokens, null]);
  expect(mlp.dtype === q.dtype, "attentionBesideMlp", () => `mlp is ${mlp}, q is ${q}`);
  const mlpHidden = mlp.shape[2];
  const out = Tensor.empty(gpu, [batch, tokens, hidden + mlpHidden], q.dtype);
  attend(q, k, v, { out: out.narrow(2, 0, hidden).reshape(q.shape) });
  geluTanh(mlp, out.narrow(2, hidden, mlpHidden));
  return out;
}
