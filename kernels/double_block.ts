import type { Tensor } from "../ffi/tensor.ts";
import type { adaLayerNorm } from "./ada_layer_norm.ts";
import type { feedForward, FeedForwardLayers, FeedForwardOps } from "./feed_forward.ts";
import type { gatedAdaLayerNorm } from "./gated_ada_layer_norm.ts";
import type { gatedResidual } from "./gated_residual.ts";
import type { jointAttention } from "./joint_attention.ts";
import { qkvStream } from "./joint_qk_norm_rope.ts";
import type { LinearLayer, linears } from "./linears.ts";

/** The layers of one stream of tokens in a double-stream block, and the weights of its QK-norm `[headDim]`. */
export interface StreamLayers extends FeedForwardLayers {
  readonly q: LinearLayer;
  readonly k: LinearLayer;
  readonly v: LinearLayer;
  /** Attention's output projection. */
  readonly out: LinearLayer;
  readonly normQ: Tensor;
  readonly normK: Tensor;
}

/** Shift, scale and gate of attention, then of the MLP: `[batch, hidden]` each. */
export interface DoubleModulation {
  readonly shiftMsa: Tensor;
  readonly scaleMsa: Tensor;
  readonly gateMsa: Tensor;
  readonly shiftMlp: Tensor;
  readonly scaleMlp: Tensor;
  readonly gateMlp: Tensor;
}

/** One of a block's streams: its tokens `[batch, tokens, hidden]`, and what it has of its own. */
export interface BlockStream {
  readonly x: Tensor;
  readonly layers: StreamLayers;
  readonly modulation: DoubleModulation;
}

/** What both streams have in common. */
export interface JointTurn {
  readonly heads: number;
  /** `[tokens, headDim]` f32, of the tokens of all streams in their order. */
  readonly cos: Tensor;
  readonly sin: Tensor;
  /** Both as pairs `[tokens, headDim / 2, 2]` (rotary_pairs.ts), where the running plan has use for them. */
  readonly pairs?: Tensor | undefined;
  readonly eps: number;
}

/** The operators that {@link doubleBlock} is made of: the running plan's. */
export interface DoubleBlockOps extends FeedForwardOps {
  readonly adaLayerNorm: typeof adaLayerNorm;
  readonly feedForward: typeof feedForward;
  readonly gatedAdaLayerNorm: typeof gatedAdaLayerNorm;
  readonly gatedResidual: typeof gatedResidual;
  readonly jointAttention: typeof jointAttention;
  readonly linears: typeof linears;
}

/**
 * A block whose streams have weights of their own and attend jointly (Esser et al. 2024, MM-DiT; diffusers'
 * FluxTransformerBlock).
 * Composite: this body of operators is the eager baseline; kernels that take both streams at once may replace it.
 *
 * @param streams whose tokens lie behind one another for attention: the text's, then the image's.
 * @returns the streams' tokens after the block, in their order.
 */
export function doubleBlock(
  streams: readonly BlockStream[],
  { heads, cos, sin, eps }: JointTurn,
  ops: DoubleBlockOps,
): Tensor[] {
  const [{ x: { device, shape: [batch, , hidden] } }] = streams;
  return device.scope(() => {
    const attended = device.scope(() =>
      ops.jointAttention(
        streams.map(({ x, layers, modulation: { scaleMsa, shiftMsa } }) => {
          const projections = [layers.q, layers.k, layers.v];
          const normed = ops.adaLayerNorm(x, scaleMsa, shiftMsa, eps, projections);
          return qkvStream(ops.linears(normed, projections), heads, layers);
        }),
        cos,
        sin,
        eps,
      )
    ).reshape([batch, -1, hidden]);
    let start = 0;
    return streams.map(({ x, layers, modulation }) => {
      const tokens = x.shape[1];
      start += tokens;
      const own = attended.narrow(1, start - tokens, tokens);
      return device.scope(() => {
        const { gateMsa, scaleMlp, shiftMlp, gateMlp } = modulation;
        const branch = ops.linear(own, layers.out.weight, layers.out.bias);
        const { sum, normed } = ops.gatedAdaLayerNorm(x, branch, gateMsa, scaleMlp, shiftMlp, eps, [
          layers.up,
        ]);
        return ops.gatedResidual(sum, ops.feedForward(normed, layers, ops), gateMlp);
      });
    });
  });
}
