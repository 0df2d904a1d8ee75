import assert from "node:assert/strict";
import { join } from "node:path";
import type { Device } from "../../ffi/device.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import type { GenerateOptions } from "../../recipes/base/pipeline.ts";
import type { Recipe } from "../../recipes/base/plan.ts";
import { assertClose, relativeError } from "./compare.ts";
import { draw, pixelsOf, type Trace } from "./drawing.ts";
import { editJson, withModelCopy } from "./folders.ts";
import { Golden, goldenPath } from "./golden.ts";
import { type TestDevice, testOn } from "./test_device.ts";

interface Run {
  readonly model: string;
  readonly prompt: string | string[];
  readonly prompt_2?: string | string[];
  readonly seed: number;
  readonly num_inference_steps: number;
  readonly sigmas?: number[];
  readonly height: number;
  readonly width: number;
  readonly guidance_scale: number;
  readonly max_sequence_length: number;
  readonly num_images_per_prompt?: number;
  /** Of the scheduler's config; 1000, the golden models' own, when left out. */
  readonly num_train_timesteps?: number;
}

const RUNS: Record<string, Run> = JSON.parse(Deno.readTextFileSync(goldenPath("pipelines/runs.json")));

function optionsOf(run: Run): GenerateOptions {
  return {
    prompt: run.prompt,
    ...(run.prompt_2 === undefined ? {} : { prompt2: run.prompt_2 }),
    seed: run.seed,
    numInferenceSteps: run.num_inference_steps,
    ...(run.sigmas === undefined ? {} : { sigmas: run.sigmas }),
    height: run.height,
    width: run.width,
    guidanceScale: run.guidance_scale,
    maxSequenceLength: run.max_sequence_length,
    numImagesPerPrompt: run.num_images_per_prompt ?? 1,
  };
}

/** Runs a golden run, with its own scheduler config. */
async function drawRun(device: Device, run: Run, recipes: readonly Recipe[]): Promise<Trace> {
  if (run.num_train_timesteps === undefined) {
    return draw(device, goldenPath(run.model), recipes, optionsOf(run));
  }
  return await withModelCopy(run.model, (folder) => {
    editJson(join(folder, "scheduler", "scheduler_config.json"), {
      num_train_timesteps: run.num_train_timesteps,
    });
    return draw(device, folder, recipes, optionsOf(run));
  });
}

/**
 * Whole images against diffusers' FluxPipeline on small random models, the same prompt, seed, steps and pixels: defines
 * the tests on a device.
 *
 * @param rest exact recipes that follow the one of the dtype.
 */
export function pipelineSuite(target: TestDevice, rest: readonly Recipe[] = []): void {
  const test = (name: string, body: (device: Device) => Promise<void>) => testOn(target, name, body);
  const after = rest.length === 0 ? "" : `, with ${rest.map(({ name }) => name).join(", ")}`;
  for (const [name, run] of Object.entries(RUNS)) {
    test(
      `pipeline ${name} equals diffusers' in float32, step by step${after}`,
      async (device) => {
        using golden = new Golden(`pipelines/${name}.fp32.safetensors`, device);
        const { result, latents } = await drawRun(device, run, [baselineFp32, ...rest]);
        assert.deepEqual(latents[0], golden.values("initial"), "starting latents differ in their bits");
        for (let step = 0; step < run.num_inference_steps; step++) {
          assertClose(latents[step + 1], golden.values(`step${step}`), 1e-4, `latents after step ${step}`);
        }
        const expected = golden.values("pixels");
        const pixels = pixelsOf(result);
        assert.equal(pixels.length, expected.length);
        const worst = pixels.reduce((most, pixel, i) => Math.max(most, Math.abs(pixel - expected[i])), 0);
        assert.ok(worst <= 2, `a pixel differs by ${worst}/255`);
        // A picture that is one flat colour would pass nearly anything.
        assert.ok(new Set(pixels).size > 20, "the golden picture is flat");
      },
    );

    test(
      `pipeline ${name} in bfloat16 is no farther from float32 than diffusers' bfloat16${after}`,
      async (device) => {
        using exact = new Golden(`pipelines/${name}.fp32.safetensors`, device);
        using theirs = new Golden(`pipelines/${name}.bf16.safetensors`, device);
        const { latents } = await drawRun(device, run, [bfloat16, ...rest]);
        assert.deepEqual(latents[0], theirs.values("initial"), "starting latents differ in their bits");
        // bfloat16 noise is the rounded float32 noise, so that the two runs draw the same picture.
        const last = `step${run.num_inference_steps - 1}`;
        const limit = 1.1 * relativeError(theirs.values(last), exact.values(last));
        assertClose(latents.at(-1)!, exact.values(last), limit, "latents after the last step");
      },
    );
  }
}
