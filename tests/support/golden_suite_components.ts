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
  clipPooled,
  clipTextModel,
  clipWeightShapes,
  endOfTextPositions,
} from "../../recipes/base/clip.ts";
import { eagerOps as ops, type Ops } from "../../recipes/base/ops.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { rotaryTables } from "../../recipes/base/rotary.ts";
import { relativePositionBuckets, t5ConfigSchema, t5Encoder, t5WeightShapes } from "../../recipes/base/t5.ts";
import { transformerConfigSchema, transformerWeightShapes } from "../../recipes/base/transformer.ts";
import {
  castWeights,
  placeWeights,
  type Weights,
  weightsFrom,
  type WeightShapes,
} from "../../recipes/base/weights.ts";
import { assertClose, relativeError } from "./compare.ts";
import { Golden, goldenPath, positionsOf, transformerVelocity, valuesOf } from "./golden.ts";
import { type TestDevice, testOn } from "./test_device.ts";

const MODELS = ["schnell-like", "dev-like"] as const;
/** What `Verification` asks for. */
const FP32_LIMIT = 1e-4;
/** Our bfloat16 error against float32 may be this much of diffusers' own. */
export const BF16_FACTOR = 1.1;

/**
 * The same for the autoencoder where sums are added in another order than in the references. In bfloat16 models this
 * small are chaotic: two flipped bits in the encoder's first activations change the error of what it gives by factors
 * from 0.7 to 1.8 (30 flips each; the other components stay within 1.1), and diffusers' own is one such sample. So all
 * outputs are taken together, and have room.
 */
export const OTHER_ORDER = 1.5;

/** Weights of a golden model's component in `dtype`, checked against the shapes that the config asks for. */
async function load(
  device: Device,
  folder: string,
  component: string,
  shapesOf: (has: (n: string) => boolean) => WeightShapes,
  dtype: DType,
) {
  const checkpoint = openComponent(folder, component);
  const shapes = shapesOf((name) => checkpoint.has(name));
  checkpoint.checkShapes(shapes);
  const [placed] = await placeWeights(device, [{ checkpoint, names: shapes.keys() }]);
  const weights = castWeights(placed, dtype, ops);
  return { weights, [Symbol.dispose]: () => checkpoint[Symbol.dispose]() };
}

/**
 * Compares a component's outputs: `run` computes `name -> tensor` with the weights in a dtype. In bfloat16 each output
 * is held against diffusers' own, or with `together` all of them, by the root mean square of their errors.
 */
async function compare(
  golden: Golden,
  run: (dtype: DType) => Promise<Record<string, Tensor>>,
  together?: number,
): Promise<void> {
  const f32 = await run("f32");
  const bf16 = await run("bf16");
  const errors: { ours: number; theirs: number }[] = [];
  for (const name of Object.keys(f32)) {
    const expected = golden.values(`out.${name}`);
    assertClose(await valuesOf(f32[name]), expected, FP32_LIMIT, `${name} in f32`);
    const theirs = relativeError(golden.values(`out_bf16.${name}`), expected);
    const ours = relativeError(await valuesOf(bf16[name]), expected);
    if (together === undefined) {
      assert.ok(
        ours <= BF16_FACTOR * theirs,
        `${name} in bf16: relative error ${ours}, diffusers' own ${theirs}`,
      );
    }
    errors.push({ ours, theirs });
    assert.equal(bf16[name].dtype, "bf16");
  }
  if (together === undefined) return;
  const ours = Math.hypot(...errors.map((error) => error.ours));
  const theirs = Math.hypot(...errors.map((error) => error.theirs));
  assert.ok(ours <= together * theirs, `in bf16: relative errors ${ours}, diffusers' own ${theirs}`);
}

function i32(device: Device, rows: readonly Int32Array[]): Tensor {
  return Tensor.fromInt32(device, rows.flatMap((row) => [...row]), [rows.length, rows[0].length]);
}

/**
 * Every part of the model against diffusers and transformers, float32 and bfloat16, on small random models: defines the
 * tests on a device.
 *
 * @param together how much farther from float32 than diffusers' the outputs of the autoencoder may be in bfloat16, taken
 *   together; each of them {@link BF16_FACTOR} when left out.
 * @param others the same for each other component, where even their single rows (CLIP's pooled output) come out in too many
 *   ways.
 */
export function componentSuite(target: TestDevice, together?: number, others?: number): void {
  const test = (name: string, body: (device: Device) => Promise<void>) => testOn(target, name, body);
  for (const model of MODELS) {
    const folder = goldenPath(model);

    test(`CLIP text encoder equals transformers' (${model})`, async (device) => {
      using golden = new Golden(`components/${model}/clip.safetensors`, device);
      const config = readJson(folder, "text_encoder/config.json", clipConfigSchema);
      const rows = golden.ids("in.ids");
      await compare(golden, async (dtype) => {
        using loaded = await load(
          device,
          folder,
          "text_encoder",
          (has) => clipWeightShapes(config, has),
          dtype,
        );
        const lastHiddenState = clipTextModel(config, loaded.weights, ops, i32(device, rows));
        const pooled = clipPooled(ops, lastHiddenState, endOfTextPositions(config, rows));
        return { last_hidden_state: lastHiddenState, pooled };
      }, others);
    });

    test(`T5 encoder equals transformers' (${model})`, async (device) => {
      using golden = new Golden(`components/${model}/t5.safetensors`, device);
      const config = readJson(folder, "text_encoder_2/config.json", t5ConfigSchema);
      await compare(golden, async (dtype) => {
        using loaded = await load(
          device,
          folder,
          "text_encoder_2",
          (has) => t5WeightShapes(config, has),
          dtype,
        );
        const run = (name: string) => {
          const ids = golden.ids(name);
          const [tokens] = ids.map(({ length }) => length);
          const buckets = Tensor.fromInt32(device, relativePositionBuckets(config, tokens), [tokens, tokens]);
          return t5Encoder(config, loaded.weights, ops, i32(device, ids), buckets);
        };
        return { long: run("in.long"), short: run("in.short") };
      }, others);
    });

    test(`transformer equals diffusers' (${model})`, async (device) => {
      using golden = new Golden(`components/${model}/transformer.safetensors`, device);
      const config = readJson(folder, "transformer/config.json", transformerConfigSchema);
      const tables = rotaryTables(positionsOf(golden), config.axes_dims_rope);
      assertClose(tables.cos, golden.values("mid.rope_cos"), 1e-7, "cos");
      assertClose(tables.sin, golden.values("mid.rope_sin"), 1e-7, "sin");
      await compare(golden, async (dtype) => {
        using loaded = await load(
          device,
          folder,
          "transformer",
          () => transformerWeightShapes(config),
          dtype,
        );
        return { sample: transformerVelocity(golden, device, config, loaded.weights, ops) };
      }, others);
    });
  }
  autoencoderSuite(target, [], together);
}

/** The part of {@link componentSuite} that is about the autoencoder, with recipes. */
export function autoencoderSuite(
  target: TestDevice,
  recipes: readonly Recipe[],
  together?: number,
): void {
  const cases = [
    ...MODELS.map((model) => ({ model, folder: goldenPath(model), component: "vae", cases: 2 })),
    // Uneven groups and sizes.
    { model: "vae-odd", folder: goldenPath(""), component: "vae-odd", cases: 1 },
  ];
  const suffix = recipes.map(({ name }) => `, ${name}`).join("");
  for (const one of cases) {
    testOn(
      target,
      `autoencoder equals diffusers' (${one.model}${suffix})`,
      (device) => compareAutoencoder(device, one, recipes, together),
    );
  }
}

async function compareAutoencoder(
  device: Device,
  { model, folder, component, cases }: {
    readonly model: string;
    readonly folder: string;
    readonly component: string;
    /** Pictures in the golden file. */
    readonly cases: number;
  },
  recipes: readonly Recipe[],
  together: number | undefined,
): Promise<void> {
  const file = `components/${model}/vae.safetensors`;
  using golden = new Golden(file, device);
  const config: AutoencoderConfig = readJson(folder, `${component}/config.json`, autoencoderConfigSchema);
  const withPlan = async <T>(dtype: DType, run: (weights: Weights, ops: Ops) => T): Promise<T> => {
    using loaded = await load(device, folder, component, () => autoencoderWeightShapes(config), dtype);
    const none = weightsFrom(new Map());
    const all = { text_encoder: none, text_encoder_2: none, transformer: none, vae: loaded.weights };
    const { weights, ops } = compose(eagerPlan(device, all), ...recipes);
    return run(weights.vae, ops);
  };
  await compare(golden, (dtype) =>
    withPlan(dtype, (weights, ops) => {
      const outputs: Record<string, Tensor> = {};
      for (let i = 0; i < cases; i++) {
        outputs[`moments${i}`] = ops.contiguous(
          encodeMoments(config, weights, ops, golden.tensor(`in.image${i}`)),
        );
        // The golden file gives the decoder's input itself; ours takes the transformer's latents.
        const { scaling_factor: scale, shift_factor: shift } = config;
        const latents = ops.scaleShift(golden.tensor(`in.latents${i}`), scale, -(shift ?? 0) * scale);
        outputs[`decoded${i}`] = decode(config, weights, ops, latents);
      }
      return outputs;
    }), together);
  for (let i = 0; i < cases; i++) {
    const latents = await withPlan(
      "f32",
      (weights, ops) => encode(config, weights, ops, golden.tensor(`in.image${i}`)),
    );
    const { scaling_factor: scale, shift_factor: shift } = config;
    const expected = golden.values(`out.mode${i}`).map((mode) => (mode - (shift ?? 0)) * scale);
    assertClose(await valuesOf(latents), expected, FP32_LIMIT, `latents ${i}`);
  }
}
