/** A picture before there is a model to draw it: what that will want of a GPU is known from shapes alone. */
import type { DType } from "../../ffi/dtype.ts";
import { FluxError } from "../../ffi/errors.ts";
import type { GpuDevice, KernelSource } from "../../ffi/gpu.ts";
import { NullGpu } from "../../ffi/null_gpu.ts";
import { Model } from "./model.ts";
import type { ModelParts } from "./model_parts.ts";
import { piecesFor } from "./pieces.ts";
import { FluxPipeline, type GenerateOptions } from "./pipeline.ts";
import { compose, eagerPlan, type Recipe } from "./plan.ts";

/** Blocks of a kind launch the same kernels: the first, the last, and those between. */
const BLOCKS = 3;

/** What is known of a picture before its model is loaded. */
export interface Rehearsal {
  /** What the model's folder has besides weights. */
  readonly parts: ModelParts;
  /** Of the weights, as they are loaded. */
  readonly dtype: DType;
  /** What a plan of the model will be composed of. */
  readonly recipes: readonly Recipe[];
  /** What is drawn. */
  readonly drawing: GenerateOptions;
}

/**
 * The texts of the kernels that a picture launches on a GPU, those that are only tried in a measurement included. The model is
 * composed and the picture drawn on a {@link NullGpu}, which takes some 0.1 s. What the weights as they are stored and LoRAs want
 * beside that is not among them.
 */
export async function rehearse(
  real: Pick<GpuDevice, "kind" | "limits">,
  { parts, dtype, recipes, drawing }: Rehearsal,
): Promise<KernelSource[]> {
  const gpu = new NullGpu(real);
  const { onWarning: _warning, onProgress: _progress, signal: _signal, ...options } = drawing;
  try {
    const short = { ...parts, configs: shortened(parts.configs) };
    const model = await Model.hollow(short, gpu, dtype, piecesFor(recipes));
    const plan = compose(eagerPlan(gpu, model.weights), ...recipes);
    await new FluxPipeline(model, plan).generate(options);
  } catch (error) {
    if (!(error instanceof FluxError)) throw error; // else the picture itself will say it
  }
  return [...gpu.sources.values()];
}

function shortened(
  { text_encoder, text_encoder_2, transformer, vae }: ModelParts["configs"],
): ModelParts["configs"] {
  const few = (blocks: number) => Math.min(blocks, BLOCKS);
  return {
    text_encoder: { ...text_encoder, num_hidden_layers: few(text_encoder.num_hidden_layers) },
    text_encoder_2: { ...text_encoder_2, num_layers: few(text_encoder_2.num_layers) },
    transformer: {
      ...transformer,
      num_layers: few(transformer.num_layers),
      num_single_layers: few(transformer.num_single_layers),
    },
    vae,
  };
}
