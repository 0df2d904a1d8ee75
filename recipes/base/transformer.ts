import { z } from "zod";
import type { Tensor } from "../../ffi/tensor.ts";
import type { JointTurn, StreamLayers } from "../../kernels/double_block.ts";
import type { Normed } from "../../kernels/gated_ada_layer_norm.ts";
import type { ParallelLayers } from "../../kernels/parallel_branches.ts";
import { MAX_LAYERS } from "./checkpoint.ts";
import { modulationsOf, TIME_CHANNELS } from "./modulations.ts";
import type { Ops } from "./ops.ts";
import type { Rotary } from "./rotary.ts";
import { dense, layerOf, under, type Weights, WeightShapes } from "./weights.ts";

/** What `transformer/config.json` says (diffusers' FluxTransformer2DModel), with its defaults. */
export const transformerConfigSchema = z.looseObject({
  patch_size: z.literal(1, { error: "only 1 is supported: FLUX.1 packs its latents before the transformer" })
    .default(1),
  in_channels: z.int().positive().default(64),
  out_channels: z.int().positive().nullish(),
  num_layers: z.int().min(0).max(MAX_LAYERS).default(19),
  num_single_layers: z.int().min(0).max(MAX_LAYERS).default(38),
  attention_head_dim: z.int().positive().multipleOf(2).default(128),
  num_attention_heads: z.int().positive().default(24),
  joint_attention_dim: z.int().positive().default(4096),
  pooled_projection_dim: z.int().positive().default(768),
  guidance_embeds: z.boolean().default(false),
  axes_dims_rope: z.array(z.int().positive().multipleOf(2)).length(3).default([16, 56, 56]),
}).refine((config) => config.axes_dims_rope.reduce((a, b) => a + b, 0) === config.attention_head_dim, {
  path: ["axes_dims_rope"],
  error: "must add up to attention_head_dim",
});

/** What `transformer/config.json` says, in diffusers' or transformers' names, with their defaults filled in. */
export interface TransformerConfig {
  /** Latents are packed before the transformer. */
  readonly patch_size: 1;
  /** Numbers of a token. */
  readonly in_channels: number;
  /** Numbers of a predicted token; `in_channels` when left out. */
  readonly out_channels?: number | null | undefined;
  /** Double-stream blocks. */
  readonly num_layers: number;
  /** Single-stream blocks. */
  readonly num_single_layers: number;
  /** Numbers of a head. */
  readonly attention_head_dim: number;
  /** Heads; the hidden size is as many times `attention_head_dim`. */
  readonly num_attention_heads: number;
  /** T5's hidden size. */
  readonly joint_attention_dim: number;
  /** CLIP's hidden size. */
  readonly pooled_projection_dim: number;
  /** Whether it reads a guidance scale (dev). */
  readonly guidance_embeds: boolean;
  /** How many numbers of a head each of the three position axes turns. */
  readonly axes_dims_rope: readonly number[];
}

export interface TransformerInputs {
  /** Packed noisy latents `[batch, imageTokens, in_channels]`. */
  readonly hiddenStates: Tensor;
  /** T5's output `[batch, textTokens, joint_attention_dim]`. */
  readonly encoderHiddenStates: Tensor;
  /** Of this step, from {@link fluxModulations}: `[batch, modulations]`. */
  readonly modulations: Tensor;
  /** Rotary tables of text tokens, then image tokens. */
  readonly rotary: Rotary;
  /** Of how many of the image tokens, from the first, the velocity is wanted; of all when left out. */
  readonly wantedTokens?: number | undefined;
}

const NORM_EPS = 1e-6;
const MLP_RATIO = 4;

/**
 * FLUX.1's transformer (Black Forest Labs 2024; diffusers' `transformer_flux.py`): blocks with a stream each for text
 * and image that attend jointly (Esser et al. 2024, MM-DiT), then blocks with one stream that run attention and MLP
 * side by side (Dehghani et al. 2023), all modulated by timestep, guidance and pooled text (adaLN-Zero).
 *
 * @returns the velocity `noise - image`, `[batch, wantedTokens, out_channels]`, in the weights' dtype.
 */
export function fluxTransformer(
  config: TransformerConfig,
  weights: Weights,
  ops: Ops,
  inputs: TransformerInputs,
): Tensor {
  return inputs.hiddenStates.device.scope(() => {
    const embedded = embedTokens(weights, ops, inputs);
    const streams = doubleBlocks(config, weights, ops, embedded, inputs, 0);
    const { normed } = singleBlocks(config, weights, ops, streams, inputs);
    return dense(ops, weights, "proj_out", normed);
  });
}

/** The two streams of the double blocks, both `[batch, tokens, hidden]`. */
export interface Streams {
  readonly hiddenStates: Tensor;
  readonly encoderHiddenStates: Tensor;
}

function disposeStreams({ hiddenStates, encoderHiddenStates }: Streams): void {
  hiddenStates.dispose();
  encoderHiddenStates.dispose();
}

/** Image and text tokens as the first double block takes them. */
export function embedTokens(
  weights: Weights,
  ops: Ops,
  { hiddenStates, encoderHiddenStates }: Pick<TransformerInputs, "hiddenStates" | "encoderHiddenStates">,
): Streams {
  const { dtype } = weights.get("x_embedder.weight");
  return hiddenStates.device.scope(() => ({
    hiddenStates: dense(ops, weights, "x_embedder", ops.cast(hiddenStates, dtype)),
    encoderHiddenStates: dense(ops, weights, "context_embedder", ops.cast(encoderHiddenStates, dtype)),
  }));
}

/** What a block reads beside the tokens. */
export type BlockInputs = Pick<TransformerInputs, "modulations" | "rotary">;

function jointTurn(config: TransformerConfig, ops: Ops, { rotary: { cos, sin } }: BlockInputs): JointTurn {
  return { heads: config.num_attention_heads, cos, sin, pairs: ops.rotaryPairs(cos, sin), eps: NORM_EPS };
}

/**
 * The double blocks from `first` to `end`, which is behind the last one when left out.
 *
 * @param streams are freed, unless `keep` says that they are the caller's.
 */
export function doubleBlocks(
  config: TransformerConfig,
  weights: Weights,
  ops: Ops,
  streams: Streams,
  inputs: BlockInputs,
  first: number,
  { end = config.num_layers, keep = false }: { readonly end?: number; readonly keep?: boolean } = {},
): Streams {
  return streams.hiddenStates.device.scope(() => {
    const { doubles } = modulationsOf(config, inputs.modulations);
    const turn = jointTurn(config, ops, inputs);
    let current = streams;
    for (let layer = first; layer < end; layer++) {
      const block = under(weights, `transformer_blocks.${layer}`);
      const { text, image } = doubles[layer];
      // Text first, as the rotary tables have it.
      const [encoderHiddenStates, hiddenStates] = ops.doubleBlock(
        [
          { x: current.encoderHiddenStates, layers: textLayers(block), modulation: text },
          { x: current.hiddenStates, layers: imageLayers(block), modulation: image },
        ],
        turn,
        ops,
      );
      if (!(keep && current === streams)) disposeStreams(current);
      current = { hiddenStates, encoderHiddenStates };
    }
    return current;
  });
}

/**
 * The single blocks, and the norm behind them.
 *
 * @param streams are freed, unless `keep` says that they are the caller's.
 * @returns of the wanted image tokens, the last block's `sum` and that `normed` and modulated, as `proj_out` reads it: both
 *   `[batch, wantedTokens, hidden]`.
 */
export function singleBlocks(
  config: TransformerConfig,
  weights: Weights,
  ops: Ops,
  streams: Streams,
  inputs: BlockInputs & Pick<TransformerInputs, "wantedTokens">,
  { keep = false }: { readonly keep?: boolean } = {},
): Normed {
  const { device, shape: [, imageTokens] } = streams.hiddenStates;
  const textTokens = streams.encoderHiddenStates.shape[1];
  return device.scope(() => {
    const { singles, out } = modulationsOf(config, inputs.modulations);
    const turn = jointTurn(config, ops, inputs);
    // Text first, as the rotary tables have it.
    const sum = ops.concat([streams.encoderHiddenStates, streams.hiddenStates], 1);
    if (!keep) disposeStreams(streams);
    // A block's residual connection and the norm of the next one stand side by side. After the last block that is
    // norm_out, which keeps scale before shift, unlike the blocks.
    const norms = [...singles, out];
    const blocks = singles.map((_, layer) =>
      singleLayers(turn.heads, under(weights, `single_transformer_blocks.${layer}`))
    );
    const readers = [...blocks.map(({ q, k, v, mlp }) => [q, k, v, mlp]), [layerOf(weights, "proj_out")]];
    let joint = { sum, normed: ops.adaLayerNorm(sum, norms[0].scale, norms[0].shift, NORM_EPS, readers[0]) };
    singles.forEach(({ gate }, layer) => {
      const { scale, shift } = norms[layer + 1];
      const next = device.scope(() =>
        ops.singleBlock(joint, blocks[layer], { gate, scale, shift }, turn, readers[layer + 1], ops)
      );
      joint.sum.dispose();
      joint.normed.dispose();
      joint = next;
    });
    const wanted = (x: Tensor) => x.narrow(1, textTokens, inputs.wantedTokens ?? imageTokens);
    return { sum: wanted(joint.sum), normed: wanted(joint.normed) };
  });
}

/** The velocity of image tokens behind the last block: the norm, its modulation, and the output projection. */
export function velocityOf(
  config: TransformerConfig,
  weights: Weights,
  ops: Ops,
  sum: Tensor,
  modulations: Tensor,
): Tensor {
  return sum.device.scope(() => {
    const { out } = modulationsOf(config, modulations);
    const normed = ops.adaLayerNorm(sum, out.scale, out.shift, NORM_EPS, [layerOf(weights, "proj_out")]);
    return dense(ops, weights, "proj_out", normed);
  });
}

/** The layers of the image's stream in a block that keeps it apart from the text's (diffusers' FluxTransformerBlock). */
function imageLayers(block: Weights): StreamLayers {
  return {
    q: layerOf(block, "attn.to_q"),
    k: layerOf(block, "attn.to_k"),
    v: layerOf(block, "attn.to_v"),
    out: layerOf(block, "attn.to_out.0"),
    up: layerOf(block, "ff.net.0.proj"),
    down: layerOf(block, "ff.net.2"),
    normQ: block.get("attn.norm_q.weight"),
    normK: block.get("attn.norm_k.weight"),
  };
}

/** The layers of the text's stream. */
function textLayers(block: Weights): StreamLayers {
  return {
    q: layerOf(block, "attn.add_q_proj"),
    k: layerOf(block, "attn.add_k_proj"),
    v: layerOf(block, "attn.add_v_proj"),
    out: layerOf(block, "attn.to_add_out"),
    up: layerOf(block, "ff_context.net.0.proj"),
    down: layerOf(block, "ff_context.net.2"),
    normQ: block.get("attn.norm_added_q.weight"),
    normK: block.get("attn.norm_added_k.weight"),
  };
}

/** The layers of a block over the joint sequence (diffusers' FluxSingleTransformerBlock). */
function singleLayers(heads: number, block: Weights): ParallelLayers {
  return {
    q: layerOf(block, "attn.to_q"),
    k: layerOf(block, "attn.to_k"),
    v: layerOf(block, "attn.to_v"),
    mlp: layerOf(block, "proj_mlp"),
    out: layerOf(block, "proj_out"),
    normQ: block.get("attn.norm_q.weight"),
    normK: block.get("attn.norm_k.weight"),
    heads,
  };
}

/** Names and shapes of the weights that {@link fluxTransformer} reads. */
export function transformerWeightShapes(config: TransformerConfig): WeightShapes {
  const headDim = config.attention_head_dim;
  const hidden = config.num_attention_heads * headDim;
  const mlp = hidden * MLP_RATIO;
  const shapes = new WeightShapes()
    .linear("x_embedder", hidden, config.in_channels)
    .linear("context_embedder", hidden, config.joint_attention_dim);
  const embedders: [string, number][] = [["timestep_embedder", TIME_CHANNELS], [
    "text_embedder",
    config.pooled_projection_dim,
  ]];
  if (config.guidance_embeds) embedders.push(["guidance_embedder", TIME_CHANNELS]);
  for (const [name, channels] of embedders) {
    shapes.linear(`time_text_embed.${name}.linear_1`, hidden, channels);
    shapes.linear(`time_text_embed.${name}.linear_2`, hidden, hidden);
  }
  for (let layer = 0; layer < config.num_layers; layer++) {
    const block = `transformer_blocks.${layer}`;
    for (const norm of ["norm1", "norm1_context"]) {
      shapes.linear(`${block}.${norm}.linear`, 6 * hidden, hidden);
    }
    for (
      const name of [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
      ]
    ) {
      shapes.linear(`${block}.attn.${name}`, hidden, hidden);
    }
    for (const norm of ["norm_q", "norm_k", "norm_added_q", "norm_added_k"]) {
      shapes.set(`${block}.attn.${norm}.weight`, [headDim]);
    }
    for (const ff of ["ff", "ff_context"]) {
      shapes.linear(`${block}.${ff}.net.0.proj`, mlp, hidden).linear(`${block}.${ff}.net.2`, hidden, mlp);
    }
  }
  for (let layer = 0; layer < config.num_single_layers; layer++) {
    const block = `single_transformer_blocks.${layer}`;
    shapes.linear(`${block}.norm.linear`, 3 * hidden, hidden);
    for (const name of ["to_q", "to_k", "to_v"]) shapes.linear(`${block}.attn.${name}`, hidden, hidden);
    for (const norm of ["norm_q", "norm_k"]) shapes.set(`${block}.attn.${norm}.weight`, [headDim]);
    shapes.linear(`${block}.proj_mlp`, mlp, hidden).linear(`${block}.proj_out`, hidden, hidden + mlp);
  }
  return shapes
    .linear("norm_out.linear", 2 * hidden, hidden)
    .linear("proj_out", config.out_channels ?? config.in_channels, hidden);
}
