import { z } from "zod";
import type { Tensor } from "../../ffi/tensor.ts";
import { qkvStream } from "../../kernels/joint_qk_norm_rope.ts";
import type { ParallelLayers } from "../../kernels/parallel_branches.ts";
import { MAX_LAYERS } from "./checkpoint.ts";
import { type DoubleModulation, modulationsOf, TIME_CHANNELS } from "./modulations.ts";
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

export type TransformerConfig = z.infer<typeof transformerConfigSchema>;

export interface TransformerInputs {
  /** Packed noisy latents `[batch, imageTokens, in_channels]`. */
  readonly hiddenStates: Tensor;
  /** T5's output `[batch, textTokens, joint_attention_dim]`. */
  readonly encoderHiddenStates: Tensor;
  /** Of this step, from {@link fluxModulations}: `[batch, modulations]`. */
  readonly modulations: Tensor;
  /** Rotary tables of text tokens, then image tokens. */
  readonly rotary: Rotary;
}

const NORM_EPS = 1e-6;
const MLP_RATIO = 4;

/**
 * FLUX.1's transformer (Black Forest Labs 2024; diffusers' `transformer_flux.py`): blocks with a stream each for text
 * and image that attend jointly (Esser et al. 2024, MM-DiT), then blocks with one stream that run attention and MLP
 * side by side (Dehghani et al. 2023), all modulated by timestep, guidance and pooled text (adaLN-Zero).
 *
 * @returns the velocity `noise - image`, `[batch, imageTokens, out_channels]`, in the weights' dtype.
 */
export function fluxTransformer(
  config: TransformerConfig,
  weights: Weights,
  ops: Ops,
  inputs: TransformerInputs,
): Tensor {
  const { device } = inputs.hiddenStates;
  const { dtype } = weights.get("x_embedder.weight");
  const textTokens = inputs.encoderHiddenStates.shape[1];
  return device.scope(() => {
    const { doubles, singles, out } = modulationsOf(config, inputs.modulations);
    let streams: Streams = {
      hiddenStates: dense(ops, weights, "x_embedder", ops.cast(inputs.hiddenStates, dtype)),
      encoderHiddenStates: dense(
        ops,
        weights,
        "context_embedder",
        ops.cast(inputs.encoderHiddenStates, dtype),
      ),
    };
    for (let layer = 0; layer < config.num_layers; layer++) {
      const block = under(weights, `transformer_blocks.${layer}`);
      const next = doubleBlock(config, block, ops, streams, doubles[layer], inputs.rotary);
      disposeStreams(streams);
      streams = next;
    }
    // Text first, as the rotary tables have it.
    let joint = ops.concat([streams.encoderHiddenStates, streams.hiddenStates], 1);
    disposeStreams(streams);
    // A block's residual connection and the norm of the next one stand side by side. After the last block that is
    // norm_out, which keeps scale before shift, unlike the blocks.
    const norms = [...singles, out];
    const blocks = singles.map((_, layer) =>
      singleLayers(config, under(weights, `single_transformer_blocks.${layer}`))
    );
    const readers = [...blocks.map(({ q, k, v, mlp }) => [q, k, v, mlp]), [layerOf(weights, "proj_out")]];
    const { cos, sin } = inputs.rotary;
    let normed = ops.adaLayerNorm(joint, norms[0].scale, norms[0].shift, NORM_EPS, readers[0]);
    singles.forEach(({ gate }, layer) => {
      const { scale, shift } = norms[layer + 1];
      const next = device.scope(() => {
        const branch = ops.parallelBranches(normed, blocks[layer], cos, sin, NORM_EPS, ops);
        return ops.gatedAdaLayerNorm(joint, branch, gate, scale, shift, NORM_EPS, readers[layer + 1]);
      });
      joint.dispose();
      normed.dispose();
      ({ sum: joint, normed } = next);
    });
    return dense(ops, weights, "proj_out", normed.narrow(1, textTokens, normed.shape[1] - textTokens));
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

/** One block with separate weights for image and text and joint attention (diffusers' FluxTransformerBlock). */
export function doubleBlock(
  config: TransformerConfig,
  weights: Weights,
  ops: Ops,
  { hiddenStates, encoderHiddenStates }: Streams,
  { image, text }: { readonly image: DoubleModulation; readonly text: DoubleModulation },
  rotary: Rotary,
): Streams {
  const { num_attention_heads: heads, attention_head_dim: headDim } = config;
  const textTokens = encoderHiddenStates.shape[1];
  const imageTokens = hiddenStates.shape[1];
  const attn = under(weights, "attn");

  return hiddenStates.device.scope(() => {
    const attended = hiddenStates.device.scope(() => {
      const stream = (x: Tensor, m: DoubleModulation, names: readonly string[], norms: readonly string[]) => {
        const layers = names.map((name) => layerOf(attn, name));
        const normed = ops.adaLayerNorm(x, m.scaleMsa, m.shiftMsa, NORM_EPS, layers);
        return qkvStream(ops.linears(normed, layers), heads, {
          normQ: attn.get(`${norms[0]}.weight`),
          normK: attn.get(`${norms[1]}.weight`),
        });
      };
      // Text first, as the rotary tables have it.
      return ops.jointAttention(
        [
          stream(encoderHiddenStates, text, ["add_q_proj", "add_k_proj", "add_v_proj"], [
            "norm_added_q",
            "norm_added_k",
          ]),
          stream(hiddenStates, image, ["to_q", "to_k", "to_v"], ["norm_q", "norm_k"]),
        ],
        rotary.cos,
        rotary.sin,
        NORM_EPS,
      );
    }).reshape([hiddenStates.shape[0], textTokens + imageTokens, heads * headDim]);

    const rest = (x: Tensor, attended: Tensor, projection: string, module: string, m: DoubleModulation) =>
      hiddenStates.device.scope(() => {
        const branch = dense(ops, attn, projection, attended);
        const mlp = {
          up: layerOf(weights, `${module}.net.0.proj`),
          down: layerOf(weights, `${module}.net.2`),
        };
        const { sum, normed } = ops.gatedAdaLayerNorm(
          x,
          branch,
          m.gateMsa,
          m.scaleMlp,
          m.shiftMlp,
          NORM_EPS,
          [mlp.up],
        );
        return ops.gatedResidual(sum, ops.feedForward(normed, mlp, ops), m.gateMlp);
      });
    const imageAttended = attended.narrow(1, textTokens, imageTokens);
    const textAttended = attended.narrow(1, 0, textTokens);
    return {
      hiddenStates: rest(hiddenStates, imageAttended, "to_out.0", "ff", image),
      encoderHiddenStates: rest(encoderHiddenStates, textAttended, "to_add_out", "ff_context", text),
    };
  });
}

/**
 * The layers of one block over the joint sequence, attention and MLP in parallel with one output projection
 * (diffusers' FluxSingleTransformerBlock).
 */
function singleLayers(config: TransformerConfig, weights: Weights): ParallelLayers {
  return {
    q: layerOf(weights, "attn.to_q"),
    k: layerOf(weights, "attn.to_k"),
    v: layerOf(weights, "attn.to_v"),
    mlp: layerOf(weights, "proj_mlp"),
    out: layerOf(weights, "proj_out"),
    normQ: weights.get("attn.norm_q.weight"),
    normK: weights.get("attn.norm_k.weight"),
    heads: config.num_attention_heads,
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
