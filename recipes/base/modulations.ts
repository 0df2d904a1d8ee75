import type { Tensor } from "../../ffi/tensor.ts";
import type { DoubleModulation } from "../../kernels/double_block.ts";
import type { Ops } from "./ops.ts";
import type { TransformerConfig } from "./transformer.ts";
import { dense, denseAll, under, type Weights } from "./weights.ts";

/** Width of the sinusoidal embedding of timestep and guidance. */
export const TIME_CHANNELS = 256;

/** What modulates the transformer: a row for each sample, or for each sample in each of several steps. */
export interface Conditioning {
  /** CLIP's pooled output `[rows, pooled_projection_dim]`. */
  readonly pooledProjections: Tensor;
  /** Noise level, f32 `[rows]` from 0 to 1. */
  readonly timestep: Tensor;
  /** Guidance scale, f32 `[rows]`; exactly for models with `guidance_embeds`. */
  readonly guidance?: Tensor | undefined;
}

/**
 * All shifts, scales and gates of the transformer (adaLN-Zero): a Linear of each block, of the embedding of timestep,
 * guidance and pooled text. They depend on no token, and their weights are a quarter of the model: so those of several
 * steps are computed at once.
 *
 * @returns `[rows, modulations]` in the weights' dtype: block after block, double ones first, as {@link modulationsOf}
 *   takes them apart.
 */
export function fluxModulations(
  config: TransformerConfig,
  weights: Weights,
  ops: Ops,
  conditioning: Conditioning,
): Tensor {
  return conditioning.timestep.device.scope(() => {
    const temb = timeTextEmbed(config, under(weights, "time_text_embed"), ops, conditioning);
    // Each modulation applies SiLU to the embedding before its Linear; it is the same for all of them.
    return ops.concat(denseAll(ops, weights, modulationLayers(config), ops.silu(temb)), 1);
  });
}

/** Embedding of timestep, guidance and pooled text: the sum of three small MLPs, `[rows, hidden]`. */
function timeTextEmbed(
  config: TransformerConfig,
  weights: Weights,
  ops: Ops,
  inputs: Conditioning,
): Tensor {
  const { dtype } = weights.get("text_embedder.linear_1.weight");
  const mlp = (module: string, x: Tensor) =>
    dense(ops, weights, `${module}.linear_2`, ops.silu(dense(ops, weights, `${module}.linear_1`, x)));
  const scalar = (module: string, value: Tensor) =>
    mlp(module, ops.timestepEmbedding(ops.scaleShift(value, 1000, 0), TIME_CHANNELS, dtype));
  return inputs.timestep.device.scope(() => {
    let temb = scalar("timestep_embedder", inputs.timestep);
    if (config.guidance_embeds) temb = ops.add(temb, scalar("guidance_embedder", inputs.guidance!));
    return ops.add(temb, mlp("text_embedder", ops.cast(inputs.pooledProjections, dtype)));
  });
}

/** The Linear layers of all modulations, in the order of their numbers. */
function modulationLayers(config: TransformerConfig): string[] {
  const blocks = (count: number, name: string) =>
    Array.from({ length: count }, (_, layer) => `${name}.${layer}`);
  return [
    ...blocks(config.num_layers, "transformer_blocks").flatMap((block) => [
      `${block}.norm1.linear`,
      `${block}.norm1_context.linear`,
    ]),
    ...blocks(config.num_single_layers, "single_transformer_blocks").map((block) => `${block}.norm.linear`),
    "norm_out.linear",
  ];
}

/** One step's row of each sample as the numbers of each block: views of `[batch, hidden]`. */
export function modulationsOf(config: TransformerConfig, modulations: Tensor) {
  const hidden = config.num_attention_heads * config.attention_head_dim;
  let start = 0;
  const next = () => {
    start += hidden;
    return modulations.narrow(1, start - hidden, hidden);
  };
  // The properties of a literal are evaluated in its order, which is the order in the weights.
  const double = (): DoubleModulation => ({
    shiftMsa: next(),
    scaleMsa: next(),
    gateMsa: next(),
    shiftMlp: next(),
    scaleMlp: next(),
    gateMlp: next(),
  });
  return {
    doubles: Array.from({ length: config.num_layers }, () => ({ image: double(), text: double() })),
    singles: Array.from(
      { length: config.num_single_layers },
      () => ({ shift: next(), scale: next(), gate: next() }),
    ),
    // The last norm keeps scale before shift, unlike the blocks.
    out: { scale: next(), shift: next() },
  };
}
