import { z } from "zod";
import type { Tensor } from "../../ffi/tensor.ts";
import type { Ops } from "./ops.ts";
import { MAX_LAYERS } from "./checkpoint.ts";
import { dense, denseAll, under, type Weights, WeightShapes } from "./weights.ts";

/** What CLIP's `text_encoder/config.json` says (transformers' CLIPTextConfig), with its defaults. */
export const clipConfigSchema = z.looseObject({
  vocab_size: z.int().positive(),
  hidden_size: z.int().positive(),
  intermediate_size: z.int().positive(),
  num_hidden_layers: z.int().positive().max(MAX_LAYERS),
  num_attention_heads: z.int().positive(),
  max_position_embeddings: z.int().positive().default(77),
  layer_norm_eps: z.number().positive().default(1e-5),
  hidden_act: z.literal("quick_gelu", { error: "only quick_gelu is supported" }).default("quick_gelu"),
  eos_token_id: z.int().default(49407),
}).refine((config) => config.hidden_size % config.num_attention_heads === 0, {
  path: ["num_attention_heads"],
  error: "must divide hidden_size",
});

/** What `text_encoder/config.json` says, in diffusers' or transformers' names, with their defaults filled in. */
export interface ClipConfig {
  /** Tokens that it knows. */
  readonly vocab_size: number;
  /** Numbers of a token. */
  readonly hidden_size: number;
  /** Of the MLPs. */
  readonly intermediate_size: number;
  /** Layers. */
  readonly num_hidden_layers: number;
  /** Heads. */
  readonly num_attention_heads: number;
  /** The longest text, in tokens. */
  readonly max_position_embeddings: number;
  /** Added to the variance. */
  readonly layer_norm_eps: number;
  /** Activation. */
  readonly hidden_act: "quick_gelu";
  /** End of text, where the pooled output is read. */
  readonly eos_token_id: number;
}

/**
 * CLIP's text encoder (Radford et al. 2021): a pre-norm transformer with a causal mask
 * (transformers' `models/clip/modeling_clip.py`, `CLIPTextModel`).
 *
 * @param ids i32 `[batch, tokens]`. @returns the last hidden state after the final layer norm, `[batch, tokens, hidden]`.
 */
export function clipTextModel(
  config: ClipConfig,
  weights: Weights,
  ops: Ops,
  ids: Tensor,
): Tensor {
  const { device } = ids;
  const prefix = modulePrefix((name) => weights.has(name));
  const model = prefix === "" ? weights : under(weights, "text_model");
  const tokens = ids.shape[1];
  return device.scope(() => {
    const positions = model.get("embeddings.position_embedding.weight").narrow(0, 0, tokens);
    let hiddenStates = ops.add(ops.embedding(ids, model.get("embeddings.token_embedding.weight")), positions);
    for (let layer = 0; layer < config.num_hidden_layers; layer++) {
      hiddenStates = encoderLayer(config, under(model, `encoder.layers.${layer}`), ops, hiddenStates);
    }
    return layerNorm(config, model, "final_layer_norm", ops, hiddenStates);
  });
}

/**
 * The pooled output: each sample's last hidden state at its end-of-text token, which has seen the whole prompt.
 *
 * @param lastHiddenState `[batch, tokens, hidden]`. @param endOfText from {@link endOfTextPositions}.
 * @returns `[batch, hidden]`.
 */
export function clipPooled(ops: Ops, lastHiddenState: Tensor, endOfText: readonly number[]): Tensor {
  const rows = endOfText.map((position, b) => lastHiddenState.narrow(0, b, 1).narrow(1, position, 1));
  return ops.concat(rows, 0).reshape([endOfText.length, lastHiddenState.shape[2]]);
}

function encoderLayer(config: ClipConfig, weights: Weights, ops: Ops, x: Tensor): Tensor {
  const [batch, tokens, hidden] = x.shape;
  const heads = [batch, tokens, config.num_attention_heads, hidden / config.num_attention_heads];
  return x.device.scope(() => {
    const normed = layerNorm(config, weights, "layer_norm1", ops, x);
    const projections = ["q_proj", "k_proj", "v_proj"].map((name) => `self_attn.${name}`);
    const [q, k, v] = denseAll(ops, weights, projections, normed).map((y) => y.reshape(heads));
    const attended = ops.attention(q, k, v, { causal: true }).reshape(x.shape);
    const middle = ops.add(x, dense(ops, weights, "self_attn.out_proj", attended));
    const up = ops.quickGelu(
      dense(ops, weights, "mlp.fc1", layerNorm(config, weights, "layer_norm2", ops, middle)),
    );
    return ops.add(middle, dense(ops, weights, "mlp.fc2", up));
  });
}

function layerNorm(config: ClipConfig, weights: Weights, module: string, ops: Ops, x: Tensor): Tensor {
  return ops.layerNorm(
    x,
    config.layer_norm_eps,
    weights.get(`${module}.weight`),
    weights.get(`${module}.bias`),
  );
}

/**
 * Where the pooled output is taken: the first end-of-text token. Configs from before transformers' fix say
 * `eos_token_id: 2`, which no prompt has; for them it is the position of the largest id, which in CLIP's own
 * vocabulary is the end of text.
 */
export function endOfTextPositions(config: ClipConfig, rows: readonly Int32Array[]): number[] {
  return rows.map((ids) => {
    const wanted = config.eos_token_id === 2 ? ids.reduce((a, b) => Math.max(a, b)) : config.eos_token_id;
    return Math.max(ids.indexOf(wanted), 0); // transformers' argmax gives 0 as well when there is none
  });
}

/** transformers 5 writes the weights without the `text_model.` that all published checkpoints have. */
function modulePrefix(has: (name: string) => boolean): string {
  return has("embeddings.token_embedding.weight") ? "" : "text_model.";
}

/** Names and shapes of the weights that {@link clipTextModel} reads; `has` tells which prefix the names have. */
export function clipWeightShapes(config: ClipConfig, has: (name: string) => boolean): WeightShapes {
  const { hidden_size: hidden, intermediate_size: intermediate } = config;
  const prefix = modulePrefix(has);
  const shapes = new WeightShapes();
  shapes.set(`${prefix}embeddings.token_embedding.weight`, [config.vocab_size, hidden]);
  shapes.set(`${prefix}embeddings.position_embedding.weight`, [config.max_position_embeddings, hidden]);
  for (let layer = 0; layer < config.num_hidden_layers; layer++) {
    const module = `${prefix}encoder.layers.${layer}`;
    shapes.norm(`${module}.layer_norm1`, hidden).norm(`${module}.layer_norm2`, hidden);
    for (const name of ["q_proj", "k_proj", "v_proj", "out_proj"]) {
      shapes.linear(`${module}.self_attn.${name}`, hidden, hidden);
    }
    shapes.linear(`${module}.mlp.fc1`, intermediate, hidden).linear(
      `${module}.mlp.fc2`,
      hidden,
      intermediate,
    );
  }
  return shapes.norm(`${prefix}final_layer_norm`, hidden);
}
