import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { attention } from "./attention.ts";
import { expectShape } from "./check.ts";
import { flashAttentionFloat8 } from "./flash_attention_float8.ts";
import {
  jointQkNormRope,
  jointQkNormRopeFused,
  jointQkNormRopeTiles,
  type QkvStream,
} from "./joint_qk_norm_rope.ts";

export interface JointAttentionOptions {
  /** Where the result goes, `[batch, tokens, heads, headDim]` with a dense last dimension; a new tensor when left out. */
  readonly out?: Tensor;
  /** Attention of what was joined. */
  readonly attend?: typeof attention;
}

/**
 * From the projections of one or more streams of tokens to what they attend to jointly (Esser et al. 2024, MM-DiT):
 * QK-norm, rotary embedding, the streams behind one another, attention.
 * Composite: this body of primitives is the eager baseline; fused kernels may replace it.
 *
 * @param cos `[tokens, headDim]` f32 for the tokens of all streams in their order. @param sin the same.
 * @returns `[batch, tokens, heads, headDim]` in the projections' dtype.
 */
export function jointAttention(
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
  eps: number,
  { out, attend = attention }: JointAttentionOptions = {},
): Tensor {
  return cos.device.scope(() => {
    const { q, k, v } = jointQkNormRope(streams, cos, sin, eps);
    return attend(q, k, v, out === undefined ? {} : { out });
  });
}

/** {@link jointAttention} with one kernel a stream before attention, on a GPU. */
export function jointAttentionFused(
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
  eps: number,
  { out, attend = attention }: JointAttentionOptions = {},
): Tensor {
  return cos.device.scope(() => {
    const { q, k, v } = jointQkNormRopeFused(streams, cos, sin, eps);
    return attend(q, k, v, out === undefined ? {} : { out });
  });
}

/**
 * {@link jointAttention} in float8: q, k and v are cast to E4M3 by the kernel that norms and turns them, into the tiles
 * that {@link flashAttentionFloat8} reads.
 *
 * @param streams bf16, that jointQkNormRopeTilesTakes. @param out as in {@link JointAttentionOptions}.
 */
export function jointAttentionFloat8(
  gpu: GpuDevice,
  streams: readonly QkvStream[],
  cos: Tensor,
  sin: Tensor,
  eps: number,
  out?: Tensor,
): Tensor {
  const [{ q }] = streams;
  const [batch, , heads, headDim] = q.shape;
  const shape = [batch, cos.shape[0], heads, headDim];
  if (out !== undefined) expectShape("jointAttentionFloat8", "out", out, shape);
  return gpu.scope(() => {
    const place = out ?? Tensor.empty(gpu, shape, q.dtype);
    flashAttentionFloat8(gpu, jointQkNormRopeTiles(gpu, streams, cos, sin, eps), headDim ** -0.5, place);
    return place;
  });
}
