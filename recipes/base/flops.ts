/** Arithmetic of the model, from its configs: what a benchmark divides by its times. */
import { spatialFactor } from "./autoencoder.ts";
import type { ModelConfigs } from "./model_parts.ts";
import type { GenerateResult } from "./pipeline.ts";
import { type TransformerConfig, transformerWeightShapes } from "./transformer.ts";

/** Floating-point operations, a multiplication and an addition being two. */
export interface Flops {
  /** Of the Linear layers. */
  readonly linear: number;
  /** Of attention's two matrix products. */
  readonly attention: number;
}

/** How many of each token there are in a step. */
export interface StepSize {
  readonly batch: number;
  readonly imageTokens: number;
  readonly textTokens: number;
}

/** Size of a step that draws one picture with these settings. */
export function stepSize({ vae }: ModelConfigs, settings: GenerateResult["settings"]): StepSize {
  const patch = 2 * spatialFactor(vae);
  return {
    batch: 1,
    imageTokens: [settings, ...(settings.image ? [settings.image] : [])]
      .reduce((sum, { height, width }) => sum + height / patch * (width / patch), 0),
    textTokens: settings.maxSequenceLength,
  };
}

/** Linear layers that see one row for each picture: the embedding of timestep and pooled text, and the modulations. */
const PER_PICTURE = /^time_text_embed\.|(^|\.)(norm1|norm1_context|norm|norm_out)\.linear\./;
/** Those of the text's stream. */
const PER_TEXT_TOKEN = /^context_embedder\.|\.attn\.(add_[qkv]_proj|to_add_out)\.|\.ff_context\./;
/** Those of the joint stream. */
const PER_TOKEN = /^single_transformer_blocks\./;

/** Operations of one denoising step of the transformer. */
export function stepFlops(config: TransformerConfig, { batch, imageTokens, textTokens }: StepSize): Flops {
  const tokens = imageTokens + textTokens;
  const rows = (weight: string) => {
    if (PER_PICTURE.test(weight)) return 1;
    if (PER_TEXT_TOKEN.test(weight)) return textTokens;
    return PER_TOKEN.test(weight) ? tokens : imageTokens;
  };
  let linear = 0;
  for (const [weight, shape] of transformerWeightShapes(config)) {
    if (shape.length === 2) linear += 2 * batch * rows(weight) * shape[0] * shape[1];
  }
  const hidden = config.num_attention_heads * config.attention_head_dim;
  const blocks = config.num_layers + config.num_single_layers;
  return { linear, attention: 4 * batch * blocks * tokens ** 2 * hidden };
}
