import { z } from "zod";
import type { Tensor } from "../../ffi/tensor.ts";
import type { Ops } from "./ops.ts";
import { MAX_LAYERS } from "./checkpoint.ts";
import { dense, denseAll, under, type Weights, WeightShapes } from "./weights.ts";

/** What T5's `text_encoder_2/config.json` says (transformers' T5Config), with its defaults. */
export const t5ConfigSchema = z.looseObject({
  vocab_size: z.int().positive(),
  d_model: z.int().positive(),
  d_kv: z.int().positive(),
  d_ff: z.int().positive(),
  num_layers: z.int().positive().max(MAX_LAYERS),
  num_heads: z.int().positive(),
  relative_attention_num_buckets: z.int().min(4).default(32),
  relative_attention_max_distance: z.int().positive().default(128),
  layer_norm_epsilon: z.number().positive().default(1e-6),
  feed_forward_proj: z.string().default("relu"),
  is_gated_act: z.boolean().optional(),
  dense_act_fn: z.string().optional(),
}).refine(isGatedGelu, {
  path: ["feed_forward_proj"],
  error: "only T5 v1.1's gated GELU in its tanh form (gated-gelu) is supported",
}).refine(
  (config) => config.relative_attention_max_distance > exactBuckets(config.relative_attention_num_buckets),
  {
    path: ["relative_attention_max_distance"],
    error: "must be more than relative_attention_num_buckets / 4",
  },
);

/** What `text_encoder_2/config.json` says, in diffusers' or transformers' names, with their defaults filled in. */
export interface T5Config {
  /** Tokens that it knows. */
  readonly vocab_size: number;
  /** Numbers of a token. */
  readonly d_model: number;
  /** Numbers of a head. */
  readonly d_kv: number;
  /** Of the MLPs. */
  readonly d_ff: number;
  /** Layers. */
  readonly num_layers: number;
  /** Heads. */
  readonly num_heads: number;
  /** Distances that attention tells apart. */
  readonly relative_attention_num_buckets: number;
  /** From here on all distances are one. */
  readonly relative_attention_max_distance: number;
  /** Added to the mean square. */
  readonly layer_norm_epsilon: number;
  /** `gated-gelu`. */
  readonly feed_forward_proj: string;
  /** The same as newer versions write it. */
  readonly is_gated_act?: boolean | undefined;
  /** The same as newer versions write it. */
  readonly dense_act_fn?: string | undefined;
}

/** Newer transformers write the parsed `is_gated_act` and `dense_act_fn`, older ones only `feed_forward_proj`. */
function isGatedGelu(config: {
  feed_forward_proj: string;
  is_gated_act?: boolean | undefined;
  dense_act_fn?: string | undefined;
}): boolean {
  if (config.is_gated_act === undefined) return config.feed_forward_proj === "gated-gelu";
  return config.is_gated_act && ["gelu_new", "gelu_pytorch_tanh"].includes(config.dense_act_fn ?? "gelu_new");
}

/**
 * The encoder of T5 v1.1 (Raffel et al. 2020; Shazeer 2020 for the gated GELU): pre-norm with RMS norm, no biases, no
 * attention scale, and a learned bias by relative position that the first layer has and all layers use
 * (transformers' `models/t5/modeling_t5.py`, `T5EncoderModel`). FluxPipeline gives no mask: padding is seen.
 *
 * @param ids i32 `[batch, tokens]`. @param buckets i32 `[tokens, tokens]`, from {@link relativePositionBuckets}.
 * @returns `[batch, tokens, d_model]`.
 */
export function t5Encoder(
  config: T5Config,
  weights: Weights,
  ops: Ops,
  ids: Tensor,
  buckets: Tensor,
): Tensor {
  const { device } = ids;
  const { layer_norm_epsilon: eps } = config;
  const encoder = under(weights, "encoder");
  // The norms in the order of use: each follows the residual connection of the branch before it.
  const norms = Array.from(
    { length: config.num_layers },
    (_, layer) => [0, 1].map((i) => encoder.get(`block.${layer}.layer.${i}.layer_norm.weight`)),
  ).flat();
  norms.push(encoder.get("final_layer_norm.weight"));
  return device.scope(() => {
    const table = encoder.get("block.0.layer.0.SelfAttention.relative_attention_bias.weight");
    const bias = ops.contiguous(ops.embedding(buckets, table).permute([2, 0, 1]));
    let hiddenStates = ops.embedding(ids, tokenEmbedding(weights));
    let normed = ops.rmsNorm(hiddenStates, norms[0], eps);
    for (let branch = 0; branch < 2 * config.num_layers; branch++) {
      const block = under(encoder, `block.${branch >> 1}`);
      const next = device.scope(() => {
        const x = branch % 2 === 0
          ? selfAttention(config, under(block, "layer.0.SelfAttention"), ops, normed, bias)
          : feedForward(under(block, "layer.1.DenseReluDense"), ops, normed);
        return ops.addRmsNorm(hiddenStates, x, norms[branch + 1], eps);
      });
      hiddenStates.dispose();
      normed.dispose();
      ({ sum: hiddenStates, normed } = next);
    }
    return normed;
  });
}

/** The table of token embeddings has two names in the files that are about. */
function tokenEmbedding(weights: Weights): Tensor {
  const [shared, alias] = EMBEDDING_NAMES;
  return weights.get(weights.has(shared) ? shared : alias);
}

const EMBEDDING_NAMES = ["shared.weight", "encoder.embed_tokens.weight"] as const;

function selfAttention(config: T5Config, weights: Weights, ops: Ops, normed: Tensor, bias: Tensor): Tensor {
  const [batch, tokens] = normed.shape;
  const { num_heads: heads, d_kv: headDim } = config;
  const [q, k, v] = denseAll(ops, weights, ["q", "k", "v"], normed).map((x) =>
    x.reshape([batch, tokens, heads, headDim])
  );
  const attended = ops.attention(q, k, v, { scale: 1, bias }).reshape([batch, tokens, heads * headDim]);
  return dense(ops, weights, "o", attended);
}

function feedForward(weights: Weights, ops: Ops, normed: Tensor): Tensor {
  const gate = ops.linearGelu(normed, weights.get("wi_0.weight"));
  return dense(ops, weights, "wo", ops.multiply(gate, dense(ops, weights, "wi_1", normed)));
}

/**
 * The bucket of each key's position as each query sees it, row by row `[tokens, tokens]`: which of the learned biases
 * the attention's logits get.
 */
export function relativePositionBuckets(config: T5Config, tokens: number): Int32Array {
  // A bucket depends on the distance only: each query's row is a piece of one list of all distances.
  const distances = Int32Array.from(
    { length: 2 * tokens - 1 },
    (_, i) =>
      relativePositionBucket(
        i - (tokens - 1),
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
      ),
  );
  const buckets = new Int32Array(tokens * tokens);
  for (let query = 0; query < tokens; query++) {
    const first = tokens - 1 - query;
    buckets.set(distances.subarray(first, first + tokens), query * tokens);
  }
  return buckets;
}

/** How many distances on each side have a bucket of their own. */
function exactBuckets(buckets: number): number {
  return Math.floor(Math.floor(buckets / 2) / 2);
}

/**
 * T5's buckets: half of them for keys behind the query; of each half, the first half one distance each, the others
 * logarithmically wider up to `maxDistance`, beyond which all distances share the last.
 *
 * @param relativePosition key position minus query position.
 */
export function relativePositionBucket(
  relativePosition: number,
  buckets: number,
  maxDistance: number,
): number {
  const half = Math.floor(buckets / 2);
  const side = relativePosition > 0 ? half : 0;
  const distance = Math.abs(relativePosition);
  const exact = exactBuckets(buckets);
  if (distance < exact) return side + distance;
  const { fround } = Math; // transformers computes the logarithm in f32, which decides at bucket borders
  const ratio = fround(fround(Math.log(fround(distance / exact))) / fround(Math.log(maxDistance / exact)));
  return side + Math.min(exact + Math.floor(fround(ratio * (half - exact))), half - 1);
}

/** Names and shapes of the weights that {@link t5Encoder} reads; `has` tells which name the embedding table has. */
export function t5WeightShapes(config: T5Config, has: (name: string) => boolean): WeightShapes {
  const { d_model: hidden, d_ff: intermediate } = config;
  const inner = config.num_heads * config.d_kv;
  const shapes = new WeightShapes();
  const embedding = EMBEDDING_NAMES.find(has) ?? EMBEDDING_NAMES[0];
  shapes.set(embedding, [config.vocab_size, hidden]);
  shapes.set("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", [
    config.relative_attention_num_buckets,
    config.num_heads,
  ]);
  for (let layer = 0; layer < config.num_layers; layer++) {
    const module = `encoder.block.${layer}`;
    shapes.set(`${module}.layer.0.layer_norm.weight`, [hidden]);
    for (const name of ["q", "k", "v"]) {
      shapes.linear(`${module}.layer.0.SelfAttention.${name}`, inner, hidden, false);
    }
    shapes.linear(`${module}.layer.0.SelfAttention.o`, hidden, inner, false);
    shapes.set(`${module}.layer.1.layer_norm.weight`, [hidden]);
    for (const name of ["wi_0", "wi_1"]) {
      shapes.linear(`${module}.layer.1.DenseReluDense.${name}`, intermediate, hidden, false);
    }
    shapes.linear(`${module}.layer.1.DenseReluDense.wo`, hidden, intermediate, false);
  }
  return shapes.set("encoder.final_layer_norm.weight", [hidden]);
}
