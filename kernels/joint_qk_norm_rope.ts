import type { Tensor } from "../ffi/tensor.ts";
import { concat } from "./concat.ts";
import { qkNormRope } from "./qk_norm_rope.ts";

/** The projections of one stream of tokens, `[batch, tokens, heads, headDim]` each, and its norms' weights `[headDim]`. */
export interface QkvStream {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly normQ: Tensor;
  readonly normK: Tensor;
}

/** What attention takes, `[batch, tokens, heads, headDim]` each. */
export interface Qkv {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
}

/**
 * From the projections of one or more streams to the inputs of joint attention (Esser et al. 2024, MM-DiT): QK-norm and
 * rotary embedding of q and k, then the streams' tokens behind one another.
 * Composite: this body of primitives is the eager baseline; a fused kernel may replace it.
 *
 * @param cos `[tokens, headDim]` f32 for the tokens of all streams in their order. @param sin the same.
 */
export function jointQkNormRope(streams: readonly QkvStream[], cos: Tensor, sin: Tensor, eps: number): Qkv {
  let start = 0;
  const parts = streams.map(({ q, k, v, normQ, normK }) => {
    const tokens = q.shape[1];
    const tables = [cos, sin].map((table) => table.narrow(0, start, tokens));
    start += tokens;
    const rotated = (x: Tensor, weight: Tensor) => qkNormRope(x, weight, tables[0], tables[1], eps);
    return { q: rotated(q, normQ), k: rotated(k, normK), v };
  });
  if (parts.length === 1) return parts[0];
  return {
    q: concat(parts.map(({ q }) => q), 1),
    k: concat(parts.map(({ k }) => k), 1),
    v: concat(parts.map(({ v }) => v), 1),
  };
}
