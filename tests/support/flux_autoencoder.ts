import type { DType } from "../../ffi/dtype.ts";
import { Tensor } from "../../ffi/tensor.ts";
import {
  autoencoderConfigSchema,
  autoencoderWeightShapes,
  decode,
  encode,
} from "../../recipes/base/autoencoder.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { weightsFrom } from "../../recipes/base/weights.ts";
import { openNullGpu, type WatchedGpu } from "./null_gpu.ts";

/** FLUX.1's autoencoder. */
export const FLUX_AUTOENCODER = autoencoderConfigSchema.parse({
  block_out_channels: [128, 256, 512, 512],
  layers_per_block: 2,
  latent_channels: 16,
  use_quant_conv: false,
  use_post_quant_conv: false,
});

/** What FLUX.1's autoencoder tells a GPU for a picture of 1024 x 1024, after the recipes were applied. */
export function issueAutoencoder(
  direction: "decode" | "encode",
  dtype: DType,
  recipes: readonly Recipe[],
): Pick<WatchedGpu, "launches" | "convs"> {
  const { gpu, launches, convs } = openNullGpu();
  const shapes = [...autoencoderWeightShapes(FLUX_AUTOENCODER)];
  const vae = weightsFrom(new Map(shapes.map(([name, shape]) => [name, Tensor.empty(gpu, shape, dtype)])));
  const none = weightsFrom(new Map());
  const weights = { text_encoder: none, text_encoder_2: none, transformer: none, vae };
  const plan = compose(eagerPlan(gpu, weights), ...recipes);
  const before = launches.length; // the recipes' own
  const input = (shape: readonly number[]) => Tensor.empty(gpu, shape, "f32");
  const result = direction === "decode"
    ? decode(FLUX_AUTOENCODER, plan.weights.vae, plan.ops, input([1, 16, 128, 128]))
    : encode(FLUX_AUTOENCODER, plan.weights.vae, plan.ops, input([1, 3, 1024, 1024]));
  if (!result.isContiguous) throw new TypeError(`the result is strided: ${result.strides}`);
  return { launches: launches.slice(before), convs };
}
