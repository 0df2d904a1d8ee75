import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { concat } from "./concat.ts";
import { geluTanh } from "./gelu_tanh.ts";
import { gpuOf } from "./gpu.ts";
import { jointAttention, jointAttentionFused } from "./joint_attention.ts";
import type { QkvStream } from "./joint_qk_norm_rope.ts";

/**
 * What the output projection of a single-stream block reads (Dehghani et al. 2023): {@link jointAttention} of one stream,
 * and beside it {@link geluTanh} of the MLP's up projection.
 * Composite: this body of primitives is the eager baseline; kernels that write side by side may replace it.
 *
 * @param stream of `[batch, tokens, heads, headDim]`; `cos`, `sin` and `eps` as for jointAttention.
 * @param mlp `[batch, tokens, mlpHidden]`. @param attend the table's joint attention.
 * @returns `[batch, tokens, heads * headDim + mlpHidden]` in the stream's dtype.
 */
export function attentionBesideMlp(
  stream: QkvStream,
  cos: Tensor,
  sin: Tensor,
  eps: number,
  mlp: Tensor,
  attend: typeof jointAttention = jointAttention,
): Tensor {
  const [batch, tokens, heads, headDim] = stream.q.shape;
  const attended = attend([stream], cos, sin, eps).reshape([batch, tokens, heads * headDim]);
  return concat([attended, geluTanh(mlp)], 2);
}

/** {@link attentionBesideMlp} on a GPU without a copy: both write where their columns belong; on the CPU the same. */
export function attentionBesideMlpFused(
  stream: QkvStream,
  cos: Tensor,
  sin: Tensor,
  eps: number,
  mlp: Tensor,
  attend: typeof jointAttention = jointAttentionFused,
): Tensor {
  const { q } = stream;
  const gpu = gpuOf(q);
  if (gpu === undefined) return attentionBesideMlp(stream, cos, sin, eps, mlp, attend);
  const [batch, tokens, heads, headDim] = q.shape;
  const hidden = heads * headDim;
  expectShape("attentionBesideMlp", "mlp", mlp, [batch, tokens, null]);
  expect(mlp.dtype === q.dtype, "attentionBesideMlp", () => `mlp is ${mlp}, q is ${q}`);
  const mlpHidden = mlp.shape[2];
  const out = Tensor.empty(gpu, [batch, tokens, hidden + mlpHidden], q.dtype);
  attend([stream], cos, sin, eps, { out: out.narrow(2, 0, hidden).reshape(q.shape) });
  geluTanh(mlp, out.narrow(2, hidden, mlpHidden));
  return out;
}
