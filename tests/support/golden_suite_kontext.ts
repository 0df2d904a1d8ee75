import assert from "node:assert/strict";
import { join } from "node:path";
import type { Device } from "../../ffi/device.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { fitReference } from "../../recipes/base/kontext.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline, type GenerateOptions } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { psnr } from "../../recipes/base/psnr.ts";
import { readPicture } from "../../recipes/base/read_picture.ts";
import { assertClose, relativeError } from "./compare.ts";
import { draw, pixelsOf } from "./drawing.ts";
import { editJson, withModelCopy } from "./folders.ts";
import { Golden, goldenPath, valuesOf } from "./golden.ts";
import { type TestDevice, testOn } from "./test_device.ts";

interface Run {
  readonly prompt: string | string[];
  readonly image?: string;
  readonly seed: number;
  readonly num_inference_steps: number;
  readonly height: number;
  readonly width: number;
  readonly guidance_scale: number;
  readonly max_sequence_length: number;
  readonly num_images_per_prompt?: number;
  readonly auto_resize?: boolean;
}

const RUNS: Record<string, Run> = JSON.parse(Deno.readTextFileSync(goldenPath("kontext/runs.json")));

/** Runs `body` with the folder of a small FLUX.1-Kontext: dev-like's weights under Kontext's name. */
export function withKontext(body: (folder: string) => Promise<void>): Promise<void> {
  return withModelCopy("dev-like", async (folder) => {
    editJson(join(folder, "model_index.json"), { _class_name: "FluxKontextPipeline" });
    await body(folder);
  });
}

/** A golden run's options; the guidance scale that Kontext has by default is left to us. */
export async function kontextOptions(name: string): Promise<GenerateOptions> {
  const run = RUNS[name];
  return {
    prompt: run.prompt,
    ...(run.image === undefined ? {} : { image: await readPicture(goldenPath(`pictures/${run.image}`)) }),
    ...(run.auto_resize === undefined ? {} : { autoResize: run.auto_resize }),
    seed: run.seed,
    numInferenceSteps: run.num_inference_steps,
    height: run.height,
    width: run.width,
    ...(run.guidance_scale === 2.5 ? {} : { guidanceScale: run.guidance_scale }),
    maxSequenceLength: run.max_sequence_length,
    numImagesPerPrompt: run.num_images_per_prompt ?? 1,
  };
}

/**
 * Edited pictures against diffusers' FluxKontextPipeline with a small random model: defines the tests on a device.
 *
 * @param rest exact recipes that follow the one of the dtype. @param large whether the picture of a million pixels is
 * encoded, too.
 */
export function kontextSuite(target: TestDevice, rest: readonly Recipe[] = [], large = true): void {
  const test = (name: string, body: (device: Device) => Promise<void>) => testOn(target, name, body);
  const after = rest.length === 0 ? "" : `, with ${rest.map(({ name }) => name).join(", ")}`;
  for (const [name, run] of Object.entries(RUNS)) {
    if (run.auto_resize && !large) continue;
    test(`Kontext ${name} equals diffusers' in float32, step by step${after}`, (device) =>
      withKontext(async (folder) => {
        using golden = new Golden(`kontext/${name}.fp32.safetensors`, device);
        const { result, latents } = await draw(
          device,
          folder,
          [baselineFp32, ...rest],
          await kontextOptions(name),
        );
        assert.deepEqual(latents[0], golden.values("initial"), "starting latents differ in their bits");
        for (let step = 0; step < run.num_inference_steps; step++) {
          assertClose(latents[step + 1], golden.values(`step${step}`), 1e-4, `latents after step ${step}`);
        }
        const size = result.settings.image;
        assert.deepEqual(
          size && [size.height, size.width],
          run.image && [...golden.values("size")],
        );
        const expected = golden.values("pixels");
        const pixels = pixelsOf(result);
        assert.equal(pixels.length, expected.length);
        const worst = pixels.reduce((most, pixel, i) => Math.max(most, Math.abs(pixel - expected[i])), 0);
        assert.ok(worst <= 2, `a pixel differs by ${worst}/255`);
      }));

    test(`Kontext ${name} in bfloat16 is no farther from float32 than diffusers'${after}`, (device) =>
      withKontext(async (folder) => {
        using exact = new Golden(`kontext/${name}.fp32.safetensors`, device);
        using theirs = new Golden(`kontext/${name}.bf16.safetensors`, device);
        const { latents } = await draw(device, folder, [bfloat16, ...rest], await kontextOptions(name));
        const last = `step${run.num_inference_steps - 1}`;
        const limit = 1.1 * relativeError(theirs.values(last), exact.values(last));
        assertClose(latents.at(-1)!, exact.values(last), limit, "latents after the last step");
      }));
  }

  test(`Kontext: the encoded picture equals diffusers'${after}`, (device) =>
    withKontext(async (folder) => {
      using model = await Model.load(folder, device);
      const plan = compose(eagerPlan(device, model.weights), baselineFp32, ...rest);
      for (const name of ["one", "batch"]) {
        using golden = new Golden(`kontext/${name}.fp32.safetensors`, device);
        const { image, autoResize } = await kontextOptions(name);
        const expected = golden.values("image_latents");
        const batch = name === "one" ? 1 : 4;
        // Twice: the second time from a recording, where there are graphs.
        for (let time = 0; time < 2; time++) {
          const fitted = fitReference(image!, 16, autoResize!);
          const encoded = new FluxPipeline(model, plan).encodeImage(fitted, batch);
          assert.deepEqual(encoded.shape, [batch, expected.length / 64 / batch, 64]);
          assertClose(await valuesOf(encoded), expected, 1e-4, `the latents of ${name}`);
          encoded.dispose();
        }
      }
    }));
}

/**
 * Recipes of which some are not exact: edited pictures stay near those of bfloat16, and the picture to edit counts.
 *
 * @param recipes all of them, the first one 01_bfloat16. @param nearest PSNR that has to be reached, in dB.
 */
export function kontextRecipesSuite(target: TestDevice, recipes: readonly Recipe[], nearest: number): void {
  const names = recipes.map(({ name }) => name).join(", ");
  testOn(target, `Kontext edits with ${names}`, (device) =>
    withKontext(async (folder) => {
      const options = await kontextOptions("one");
      const { result: expected } = await draw(device, folder, [bfloat16], options);
      const { result: actual } = await draw(device, folder, recipes, options);
      const distance = psnr(pixelsOf(actual), pixelsOf(expected));
      assert.ok(distance >= nearest, `PSNR ${distance} dB`);
      const { image: _, ...without } = options;
      const { result: other } = await draw(device, folder, recipes, without);
      assert.ok(
        psnr(pixelsOf(other), pixelsOf(expected)) < nearest,
        "the picture to edit makes no difference",
      );
    }));
}
