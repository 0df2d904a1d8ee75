import { clipConfigSchema } from "../../recipes/base/clip.ts";
import { type ModelParts, readParts } from "../../recipes/base/model_parts.ts";
import { t5ConfigSchema } from "../../recipes/base/t5.ts";
import { transformerConfigSchema } from "../../recipes/base/transformer.ts";
import { FLUX_AUTOENCODER } from "./flux_autoencoder.ts";
import { goldenPath } from "./golden.ts";

/** FLUX.1-dev, as far as shapes go. */
export function fluxDev(): ModelParts {
  return {
    ...readParts(goldenPath("dev-like")),
    configs: {
      text_encoder: clipConfigSchema.parse({
        vocab_size: 49408,
        hidden_size: 768,
        intermediate_size: 3072,
        num_hidden_layers: 12,
        num_attention_heads: 12,
      }),
      text_encoder_2: t5ConfigSchema.parse({
        vocab_size: 32128,
        d_model: 4096,
        d_kv: 64,
        d_ff: 10240,
        num_layers: 24,
        num_heads: 64,
        feed_forward_proj: "gated-gelu",
      }),
      transformer: transformerConfigSchema.parse({ guidance_embeds: true }),
      vae: FLUX_AUTOENCODER,
    },
  };
}
