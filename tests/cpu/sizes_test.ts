/** Pictures of any size: kernels are compiled for a model, and hardly any for a size of pictures. */
import assert from "node:assert/strict";
import { Tensor } from "../../ffi/tensor.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { channelsLast } from "../../recipes/04_channels_last.ts";
import { flashAttention } from "../../recipes/05_flash_attention.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { tuning } from "../../recipes/07_tuning.ts";
import { fusedBlocks } from "../../recipes/13_fused_blocks.ts";
import { autoencoderWeightShapes, decode, encode } from "../../recipes/base/autoencoder.ts";
import { packLatents, unpackLatents } from "../../recipes/base/latents.ts";
import { compose, eagerPlan, type Plan, type Recipe } from "../../recipes/base/plan.ts";
import {
  fluxTransformer,
  transformerConfigSchema,
  transformerWeightShapes,
} from "../../recipes/base/transformer.ts";
import { weightsFrom, type WeightShapes } from "../../recipes/base/weights.ts";
import { FLUX_AUTOENCODER } from "../support/flux_autoencoder.ts";
import { openNullGpu } from "../support/null_gpu.ts";

/** FLUX.1-dev's, with one block of each kind: the others launch the same kernels. */
const CONFIG = transformerConfigSchema.parse({
  num_layers: 1,
  num_single_layers: 1,
  guidance_embeds: true,
});
const TEXT_TOKENS = 512;

/** Issues a step and the autoencoder in both directions. */
function issue(
  { device, weights, ops }: Plan,
  height: number,
  width: number,
  batch: number,
  edited: boolean,
) {
  const empty = (shape: readonly number[], dtype: "f32" | "bf16") => Tensor.empty(device, shape, dtype);
  const tokens = height / 16 * (width / 16);
  const all = edited ? 2 * tokens : tokens;
  const hidden = CONFIG.num_attention_heads * CONFIG.attention_head_dim;
  const latents = empty([batch, tokens, 64], "f32");
  const reference = packLatents(
    ops,
    encode(FLUX_AUTOENCODER, weights.vae, ops, empty([1, 3, height, width], "f32")),
  );
  const references = Array.from({ length: batch }, () => ops.cast(reference, "f32"));
  const table = () => empty([TEXT_TOKENS + all, CONFIG.attention_head_dim], "f32");
  const velocity = fluxTransformer(CONFIG, weights.transformer, ops, {
    hiddenStates: edited ? ops.concat([latents, ops.concat(references, 0)], 1) : latents,
    encoderHiddenStates: empty([batch, TEXT_TOKENS, CONFIG.joint_attention_dim], "bf16"),
    modulations: empty([batch, (2 * 6 + 3 + 2) * hidden], "bf16"),
    rotary: { cos: table(), sin: table() },
    wantedTokens: tokens,
  });
  const next = ops.eulerStep(latents, velocity, empty([1], "f32"));
  const picture = decode(FLUX_AUTOENCODER, weights.vae, ops, unpackLatents(ops, next, height / 8, width / 8));
  ops.toPixels(ops.cast(picture, "f32"));
}

/** A plan for a GPU that only notes what is compiled: the kernels so far. */
function plan(recipes: readonly Recipe[], library: boolean) {
  const { gpu, launches } = openNullGpu("sm_90a");
  gpu.attention = () => library;
  const make = (shapes: WeightShapes) =>
    weightsFrom(new Map([...shapes].map(([name, shape]) => [name, Tensor.empty(gpu, shape, "bf16")])));
  const none = weightsFrom(new Map());
  const weights = {
    text_encoder: none,
    text_encoder_2: none,
    transformer: make(transformerWeightShapes(CONFIG)),
    vae: make(autoencoderWeightShapes(FLUX_AUTOENCODER)),
  };
  const composed = compose(eagerPlan(gpu, weights), bfloat16, ...recipes);
  const kernels = () =>
    new Set(launches.map(({ entry, constants }) => `${entry} ${JSON.stringify(constants)}`));
  return { composed, kernels };
}

const LADDERS: readonly (readonly Recipe[])[] = [
  [],
  [compile],
  [compile, fuseQkv],
  [compile, fuseQkv, channelsLast],
  [compile, fuseQkv, channelsLast, float8()],
  [compile, fuseQkv, channelsLast, float8(), tuning],
  [compile, fuseQkv, channelsLast, flashAttention("own"), float8(), fusedBlocks],
  [compile, fuseQkv, channelsLast, flashAttention("own"), float8(), tuning, fusedBlocks],
];

for (const recipes of LADDERS) {
  for (const library of [true, false]) {
    const names = ["01_bfloat16", ...recipes.map(({ name }) => name)].join(", ");
    Deno.test(
      `sizes: new ones compile nothing, or one of a few variants (${names}, ${
        library ? "with" : "without"
      } library attention)`,
      () => {
        for (const edited of [false, true]) {
          const { composed, kernels } = plan(recipes, library);
          issue(composed, 1024, 1024, 1, edited);
          const first = kernels();
          for (
            const [height, width] of [[512, 512], [256, 256], [768, 1280], [1280, 768], [1216, 832], [
              640,
              1536,
            ]]
          ) {
            issue(composed, height, width, 1, edited);
            const others = [...kernels()].filter((kernel) => !first.has(kernel));
            assert.deepEqual(others, [], `${height} x ${width}`);
          }
          // Odd numbers of tokens move one element at a time, large pictures and several have shapes of their own.
          let seed = 1;
          const side = () => 256 + 16 * ((seed = seed * 1103515245 + 12345 & 0x7fffffff) >> 8 & 127) % 1808;
          const odd = (i: number) => issue(composed, side() & ~15, side() & ~15, 1 + i % 4, edited);
          for (let i = 0; i < 60; i++) odd(i);
          issue(composed, 2048, 2048, 4, edited);
          const variants = [...kernels()].filter((kernel) => !first.has(kernel));
          assert.ok(variants.length <= 14, `${variants.length} more: ${variants.join("; ")}`);
          const before = kernels().size;
          for (let i = 0; i < 60; i++) odd(i);
          assert.equal(kernels().size, before, "some kernel is compiled for each size");
        }
      },
    );
  }
}
