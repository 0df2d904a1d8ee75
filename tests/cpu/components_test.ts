/** Every part of the model against diffusers and transformers, float32 and bfloat16, on small random models. */
import assert from "node:assert/strict";
import type { Device } from "../../ffi/device.ts";
import type { DType } from "../../ffi/dtype.ts";
import { Tensor } from "../../ffi/tensor.ts";
import {
  type AutoencoderConfig,
  autoencoderConfigSchema,
  autoencoderWeightShapes,
  decode,
  encode,
  encodeMoments,
} from "../../recipes/base/autoencoder.ts";
import { openComponent, readJson } from "../../recipes/base/checkpoint.ts";
import {
  clipConfigSchema,
  clipTextModel,
  clipWeightShapes,
  endOfTextPositions,
} from "../../recipes/base/clip.ts";
import { eagerOps as ops } from "../../recipes/base/ops.ts";
import { rotaryTables } from "../../recipes/base/rotary.ts";
import { t5ConfigSchema, t5Encoder, t5WeightShapes } from "../../recipes/base/t5.ts";
import {
  fluxTransformer,
  transformerConfigSchema,
  transformerWeightShapes,
} from "../../recipes/base/transformer.ts";
import { castWeights, placeWeights, type Weights, type WeightShapes } from "../../recipes/base/weights.ts";
import { assertClose, relativeError } from "../support/compare.ts";
import { Golden, goldenPath, valuesOf } from "../support/golden.ts";
import { openReference } from "../support/reference_provider.ts";

const MODELS = ["schnell-like", "dev-like"] as const;
/** What `Verification` asks for. */
const FP32_LIMIT = 1e-4;
/** Our bfloat16 error against float32 may be this much of diffusers' own. */
const BF16_FACTOR = 1.1;

/** Weights of a golden model's component in `dtype`, checked against the shapes that the config asks for. */
function load(
  device: Device,
  folder: string,
  component: string,
  shapesOf: (has: (n: string) => boolean) => WeightShapes,
  dtype: DType,
) {
  const checkpoint = openComponent(folder, component);
  const shapes = shapesOf((name) => checkpoint.has(name));
  checkpoint.checkShapes(shapes);
  const weights = castWeights(placeWeights(device, checkpoint, shapes.keys()), dtype, ops);
  return { weights, [Symbol.dispose]: () => checkpoint[Symbol.dispose]() };
}

/** Compares a component's outputs: `run` computes `name -> tensor` with the weights in a dtype. */
async function compare(
  golden: Golden,
  run: (dtype: DType) => Record<string, Tensor>,
  options: { expected?: (name: string) => string } = {},
): Promise<void> {
  const f32 = run("f32");
  const bf16 = run("bf16");
  for (const name of Object.keys(f32)) {
    const expected = golden.values(options.expected?.(name) ?? `out.${name}`);
    assertClose(await valuesOf(f32[name]), expected, FP32_LIMIT, `${name} in f32`);
    const theirs = relativeError(golden.values(`out_bf16.${name}`), expected);
    assertClose(
      await valuesOf(bf16[name]),
      expected,
      BF16_FACTOR * theirs,
      `${name} in bf16 (diffusers' own ${theirs})`,
    );
    assert.equal(bf16[name].dtype, "bf16");
  }
}

function i32(device: Device, rows: readonly Int32Array[]): Tensor {
  return Tensor.fromInt32(device, rows.flatMap((row) => [...row]), [rows.length, rows[0].length]);
}

for (const model of MODELS) {
  const folder = goldenPath(model);

  Deno.test(`CLIP text encoder equals transformers' (${model})`, async () => {
    using device = openReference();
    using golden = new Golden(`components/${model}/clip.safetensors`, device);
    const config = readJson(folder, "text_encoder/config.json", clipConfigSchema);
    const rows = golden.ids("in.ids");
    await compare(golden, (dtype) => {
      using loaded = load(device, folder, "text_encoder", (has) => clipWeightShapes(config, has), dtype);
      const { lastHiddenState, pooled } = clipTextModel(
        config,
        loaded.weights,
        ops,
        i32(device, rows),
        endOfTextPositions(config, rows),
      );
      return { last_hidden_state: lastHiddenState, pooled };
    });
  });

  Deno.test(`T5 encoder equals transformers' (${model})`, async () => {
    using device = openReference();
    using golden = new Golden(`components/${model}/t5.safetensors`, device);
    const config = readJson(folder, "text_encoder_2/config.json", t5ConfigSchema);
    await compare(golden, (dtype) => {
      using loaded = load(device, folder, "text_encoder_2", (has) => t5WeightShapes(config, has), dtype);
      const run = (name: string) => t5Encoder(config, loaded.weights, ops, i32(device, golden.ids(name)));
      return { long: run("in.long"), short: run("in.short") };
    });
  });

  Deno.test(`transformer equals diffusers' (${model})`, async () => {
    using device = openReference();
    using golden = new Golden(`components/${model}/transformer.safetensors`, device);
    const config = readJson(folder, "transformer/config.json", transformerConfigSchema);
    const ids = Float32Array.of(...golden.values("in.txt_ids"), ...golden.values("in.img_ids"));
    const tables = rotaryTables(ids, config.axes_dims_rope);
    assertClose(tables.cos, golden.values("mid.rope_cos"), 1e-7, "cos");
    assertClose(tables.sin, golden.values("mid.rope_sin"), 1e-7, "sin");
    const table = (values: Float32Array) =>
      Tensor.fromFloat32(device, values, [ids.length / 3, config.attention_head_dim]);
    await compare(golden, (dtype) => {
      using loaded = load(device, folder, "transformer", () => transformerWeightShapes(config), dtype);
      const sample = fluxTransformer(config, loaded.weights, ops, {
        hiddenStates: golden.tensor("in.hidden_states"),
        encoderHiddenStates: golden.tensor("in.encoder_hidden_states"),
        pooledProjections: golden.tensor("in.pooled_projections"),
        timestep: golden.tensor("in.timestep"),
        guidance: config.guidance_embeds ? golden.tensor("in.guidance") : undefined,
        rotary: { cos: table(tables.cos), sin: table(tables.sin) },
      });
      return { sample };
    });
  });

  Deno.test(`autoencoder equals diffusers' (${model})`, async () => {
    await compareAutoencoder(folder, "vae", `components/${model}/vae.safetensors`, 2);
  });
}

Deno.test("autoencoder equals diffusers' with uneven groups and sizes (vae-odd)", async () => {
  await compareAutoencoder(goldenPath(""), "vae-odd", "components/vae-odd/vae.safetensors", 1);
});

async function compareAutoencoder(
  folder: string,
  component: string,
  file: string,
  cases: number,
): Promise<void> {
  using device = openReference();
  using golden = new Golden(file, device);
  const config: AutoencoderConfig = readJson(folder, `${component}/config.json`, autoencoderConfigSchema);
  const withWeights = <T>(dtype: DType, run: (weights: Weights) => T): T => {
    using loaded = load(device, folder, component, () => autoencoderWeightShapes(config), dtype);
    return run(loaded.weights);
  };
  await compare(golden, (dtype) =>
    withWeights(dtype, (weights) => {
      const outputs: Record<string, Tensor> = {};
      for (let i = 0; i < cases; i++) {
        outputs[`moments${i}`] = encodeMoments(config, weights, ops, golden.tensor(`in.image${i}`));
        // The golden file gives the decoder's input itself; ours takes the transformer's latents.
        const { scaling_factor: scale, shift_factor: shift } = config;
        const latents = ops.scaleShift(golden.tensor(`in.latents${i}`), scale, -(shift ?? 0) * scale);
        outputs[`decoded${i}`] = decode(config, weights, ops, latents);
      }
      return outputs;
    }));
  for (let i = 0; i < cases; i++) {
    const latents = withWeights(
      "f32",
      (weights) => encode(config, weights, ops, golden.tensor(`in.image${i}`)),
    );
    const { scaling_factor: scale, shift_factor: shift } = config;
    const expected = golden.values(`out.mode${i}`).map((mode) => (mode - (shift ?? 0)) * scale);
    assertClose(await valuesOf(latents), expected, FP32_LIMIT, `latents ${i}`);
  }
}
