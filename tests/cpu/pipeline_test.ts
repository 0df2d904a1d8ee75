/** Whole images against diffusers' FluxPipeline on small random models: the same prompt, seed, steps and pixels. */
import assert from "node:assert/strict";
import { type CpuProviderName, openCpu } from "../../ffi/cpu/open.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline, type GenerateOptions, type GenerateResult } from "../../recipes/base/pipeline.ts";
import { packLatents } from "../../recipes/base/latents.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { assertClose, relativeError } from "../support/compare.ts";
import { Golden, goldenPath, valuesOf } from "../support/golden.ts";

interface Run {
  readonly model: string;
  readonly prompt: string;
  readonly prompt_2?: string;
  readonly seed: number;
  readonly num_inference_steps: number;
  readonly height: number;
  readonly width: number;
  readonly guidance_scale: number;
  readonly max_sequence_length: number;
  readonly num_images_per_prompt?: number;
}

const RUNS: Record<string, Run> = JSON.parse(Deno.readTextFileSync(goldenPath("pipelines/runs.json")));

function optionsOf(run: Run): GenerateOptions {
  return {
    prompt: run.prompt,
    ...(run.prompt_2 === undefined ? {} : { prompt2: run.prompt_2 }),
    seed: run.seed,
    numInferenceSteps: run.num_inference_steps,
    height: run.height,
    width: run.width,
    guidanceScale: run.guidance_scale,
    maxSequenceLength: run.max_sequence_length,
    numImagesPerPrompt: run.num_images_per_prompt ?? 1,
  };
}

interface Trace {
  readonly result: GenerateResult;
  /** Packed latents after each step, the starting noise first. */
  readonly latents: readonly Float32Array[];
}

/** Runs a model with one recipe. */
async function generate(
  model: string,
  recipe: Recipe,
  options: GenerateOptions,
  provider: CpuProviderName = "auto",
): Promise<Trace> {
  using device = await openCpu({ provider });
  using loaded = await Model.load(goldenPath(model), device);
  const pipeline = new FluxPipeline(loaded, compose(eagerPlan(device, loaded.weights), recipe));
  const latents: Promise<Float32Array>[] = [];
  const result = await pipeline.generate({
    ...options,
    onProgress: (event) => {
      options.onProgress?.(event);
      latents.push(valuesOf(packLatents(pipeline.plan.ops, event.latents())));
    },
  });
  return { result, latents: await Promise.all(latents) };
}

function pixelsOf(result: GenerateResult): Uint8Array {
  return Uint8Array.from(result.images.flatMap((image) => [...image.rgb]));
}

/** "auto" is oneDNN where it is installed; WebAssembly has to be right everywhere. */
const PROVIDERS: readonly CpuProviderName[] = ["auto", "wasm"];
const CASES = PROVIDERS.flatMap((provider) =>
  Object.entries(RUNS).map(([name, run]) => ({ provider, name, run }))
);

for (const { provider, name, run } of CASES) {
  Deno.test(`pipeline ${name} equals diffusers' in float32, step by step (${provider})`, async () => {
    using device = await openCpu();
    using golden = new Golden(`pipelines/${name}.fp32.safetensors`, device);
    const { result, latents } = await generate(run.model, baselineFp32, optionsOf(run), provider);
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
  });

  Deno.test(`pipeline ${name} in bfloat16 is no farther from float32 than diffusers' bfloat16 (${provider})`, async () => {
    using device = await openCpu();
    using exact = new Golden(`pipelines/${name}.fp32.safetensors`, device);
    using theirs = new Golden(`pipelines/${name}.bf16.safetensors`, device);
    const { latents } = await generate(run.model, bfloat16, optionsOf(run), provider);
    assert.deepEqual(latents[0], theirs.values("initial"), "starting latents differ in their bits");
    // bfloat16 noise is the rounded float32 noise, so that the two runs draw the same picture.
    const last = `step${run.num_inference_steps - 1}`;
    const limit = 1.1 * relativeError(theirs.values(last), exact.values(last));
    assertClose(latents.at(-1)!, exact.values(last), limit, "latents after the last step");
  });
}

const QUICK: GenerateOptions = {
  prompt: "a red apple",
  seed: 1,
  height: 32,
  width: 32,
  numInferenceSteps: 2,
};

Deno.test("pipeline reports every step and its sigma, and fills in the settings", async () => {
  const events: [number, number][] = [];
  const { result } = await generate("schnell-like", baselineFp32, {
    ...QUICK,
    onProgress: ({ step, steps, sigma }) => {
      assert.equal(steps, 2);
      events.push([step, sigma]);
    },
  });
  assert.deepEqual(events, [[0, 1], [1, 0.5], [2, 0]]);
  assert.equal(result.settings.seed, 1n);
  assert.equal(result.milliseconds.steps.length, 2);
});

Deno.test("pipeline draws the same picture for the same seed and another for another", async () => {
  const draw = async (seed: number) =>
    pixelsOf((await generate("schnell-like", bfloat16, { ...QUICK, seed })).result);
  const first = await draw(5);
  assert.deepEqual(await draw(5), first);
  assert.notDeepEqual(await draw(6), first);
});

Deno.test("pipeline rounds odd sizes down to multiples of 16, with a word", async () => {
  const warnings: string[] = [];
  const { result } = await generate("schnell-like", baselineFp32, {
    ...QUICK,
    height: 47,
    width: 33,
    onWarning: (message) => warnings.push(message),
  });
  assert.deepEqual([result.settings.height, result.settings.width], [32, 32]);
  assert.ok(
    warnings.some((w) => w.includes("47") && w.includes("32")) && warnings.some((w) => w.includes("33")),
  );
});

Deno.test("pipeline names the part of the prompt that was cut off", async () => {
  const warnings: string[] = [];
  await generate("schnell-like", baselineFp32, {
    ...QUICK,
    prompt: "a photo of a small brown dog ".repeat(12) + "unmistakable",
    onWarning: (message) => warnings.push(message),
  });
  assert.ok(warnings.some((w) => w.startsWith("CLIP") && w.includes("unmistakable")), warnings.join("\n"));
});

Deno.test("pipeline refuses values that make no sense", async () => {
  const wrong: Partial<GenerateOptions>[] = [
    { height: 0 },
    { width: 15 },
    { height: 32.5 },
    { numInferenceSteps: 0 },
    { numImagesPerPrompt: -1 },
    { maxSequenceLength: 513 },
    { guidanceScale: NaN },
    { seed: 2n ** 64n },
    { prompt: [] },
    { prompt: ["a", "b"], prompt2: ["c"] },
  ];
  using device = await openCpu();
  using model = await Model.load(goldenPath("dev-like"), device);
  const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), baselineFp32));
  await pipeline.generate(QUICK); // providers keep packed weights from the first run on
  const before = device.memoryUse().current;
  for (const options of wrong) {
    await assert.rejects(
      pipeline.generate({ ...QUICK, ...options }),
      UsageError,
      JSON.stringify(options, String),
    );
  }
  assert.equal(device.memoryUse().current, before);
});

Deno.test("pipeline stops between steps when its signal aborts, and gives its memory back", async () => {
  const controller = new AbortController();
  const steps: number[] = [];
  using device = await openCpu();
  using model = await Model.load(goldenPath("schnell-like"), device);
  const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), baselineFp32));
  await pipeline.generate(QUICK); // providers keep packed weights from the first run on
  const before = device.memoryUse().current;
  await pipeline.generate(QUICK);
  assert.equal(device.memoryUse().current, before, "a whole run leaks");
  await assert.rejects(
    pipeline.generate({
      ...QUICK,
      numInferenceSteps: 10,
      signal: controller.signal,
      onProgress: ({ step }) => {
        steps.push(step);
        if (step === 2) controller.abort(new Error("enough"));
      },
    }),
    /enough/,
  );
  assert.deepEqual(steps, [0, 1, 2]);
  assert.equal(device.memoryUse().current, before);
});

Deno.test("compose refuses a recipe twice, a second dtype, and a device that it does not run on", async () => {
  using device = await openCpu();
  using model = await Model.load(goldenPath("schnell-like"), device);
  const plan = eagerPlan(device, model.weights);
  assert.deepEqual(compose(plan, bfloat16).recipes, ["01_bfloat16"]);
  assert.throws(() => compose(plan, bfloat16, bfloat16), UsageError);
  assert.throws(() => compose(plan, baselineFp32, bfloat16), UsageError);
  assert.throws(() => compose(plan, { ...bfloat16, devices: ["cuda"] }), UsageError);
});
