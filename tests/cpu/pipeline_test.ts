/** Whole images against diffusers' FluxPipeline on small random models: the same prompt, seed, steps and pixels. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { type CpuProviderName, openCpu } from "../../ffi/cpu/open.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { ModelError, UsageError } from "../../recipes/base/errors.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline, type GenerateOptions, type GenerateResult } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { SafetensorsFile } from "../../recipes/base/safetensors.ts";
import { draw, pixelsOf } from "../support/drawing.ts";
import { withModelCopy } from "../support/folders.ts";
import { goldenPath, valuesOf } from "../support/golden.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { pipelineSuite } from "../support/golden_suite_pipelines.ts";
import { ownDevice, testOn } from "../support/test_device.ts";

/** Runs the model of a folder on a CPU device of its own. */
async function generate(folder: string, recipe: Recipe, options: GenerateOptions): Promise<GenerateResult> {
  using device = await openCpu();
  return (await draw(device, folder, [recipe], options)).result;
}

/** The golden model without guidance, which most tests here use. */
const SCHNELL = goldenPath("schnell-like");

/** A pipeline in float32 whose device has done all that it does only once. */
async function openPipeline(folder: string) {
  const device = await openCpu();
  const model = await Model.load(folder, device);
  const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), baselineFp32));
  await pipeline.generate(QUICK); // providers keep packed weights from the first run on
  return {
    device,
    model,
    pipeline,
    [Symbol.dispose]() {
      model[Symbol.dispose]();
      device[Symbol.dispose]();
    },
  };
}

/** "auto" is oneDNN where it is installed; WebAssembly has to be right everywhere. */
const PROVIDERS: readonly CpuProviderName[] = ["auto", "wasm"];
for (const provider of PROVIDERS) pipelineSuite(ownDevice(provider, () => openCpu({ provider })));

const QUICK: GenerateOptions = {
  prompt: "a red apple",
  seed: 1,
  height: 32,
  width: 32,
  numInferenceSteps: 2,
};

Deno.test("pipeline reports every step and its sigma, and fills in the settings", async () => {
  const events: [number, number][] = [];
  const result = await generate(SCHNELL, baselineFp32, {
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
  const draw = async (seed: number) => pixelsOf(await generate(SCHNELL, bfloat16, { ...QUICK, seed }));
  const first = await draw(5);
  assert.deepEqual(await draw(5), first);
  assert.notDeepEqual(await draw(6), first);
});

Deno.test("pipeline rounds odd sizes down to multiples of 16, with a word", async () => {
  const warnings: string[] = [];
  const result = await generate(SCHNELL, baselineFp32, {
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
  await generate(SCHNELL, baselineFp32, {
    ...QUICK,
    prompt: "a photo of a small brown dog ".repeat(12) + "unmistakable",
    onWarning: (message) => warnings.push(message),
  });
  assert.ok(warnings.some((w) => w.startsWith("CLIP") && w.includes("unmistakable")), warnings.join("\n"));
});

Deno.test("pipeline names T5 and the part of the second prompt that T5 did not read", async () => {
  const warnings: string[] = [];
  await generate(goldenPath("dev-like"), baselineFp32, {
    ...QUICK,
    prompt2: "a cat on a red carpet unmistakable",
    maxSequenceLength: 6,
    onWarning: (message) => warnings.push(message),
  });
  assert.equal(warnings.length, 1, warnings.join("\n"));
  assert.match(warnings[0], /^T5 reads at most 6 tokens; .*unmistakable"$/);
});

Deno.test("pipeline takes an empty second prompt for none, unless it stands in a list", async () => {
  using opened = await openPipeline(SCHNELL);
  const draw = async (prompt2: Partial<GenerateOptions>) =>
    pixelsOf(await opened.pipeline.generate({ ...QUICK, ...prompt2 }));
  const plain = await draw({});
  assert.deepEqual(await draw({ prompt2: "" }), plain);
  assert.deepEqual(await draw({ prompt2: [] }), plain);
  assert.deepEqual(await draw({ prompt2: [QUICK.prompt].flat() }), plain);
  assert.notDeepEqual(await draw({ prompt2: [""] }), plain);
});

Deno.test("pipeline does not care what onProgress returns", async () => {
  let calls = 0;
  await generate(SCHNELL, baselineFp32, {
    ...QUICK,
    // deno-lint-ignore require-await
    onProgress: async () => {
      calls++;
    },
  });
  assert.equal(calls, 3);
  using opened = await openPipeline(SCHNELL);
  // A returned tensor is not kept either.
  const before = opened.device.memoryUse().current;
  await opened.pipeline.generate({ ...QUICK, onProgress: (event) => event.latents() });
  assert.equal(opened.device.memoryUse().current, before);
});

for (
  const [component, weight, part] of [
    ["text_encoder_2", "encoder.final_layer_norm.weight", "denoising"],
    ["transformer", "proj_out.bias", "denoising"],
    ["vae", "decoder.conv_out.bias", "the autoencoder"],
  ]
) {
  Deno.test(`pipeline says that ${part} gave NaN instead of drawing black (${component})`, () =>
    withModelCopy("dev-like", async (folder) => {
      const base = component === "text_encoder_2" ? "model" : "diffusion_pytorch_model";
      const path = join(folder, component, `${base}.safetensors`);
      const bytes = Deno.readFileSync(path);
      {
        using file = SafetensorsFile.open(path);
        const { byteOffset, dtype } = file.info(weight);
        assert.equal(dtype, "bf16");
        bytes.set([0xc0, 0x7f], byteOffset); // NaN
      }
      Deno.writeFileSync(path, bytes);
      for (const recipe of [baselineFp32, bfloat16]) {
        await assert.rejects(generate(folder, recipe, QUICK), (error) => {
          assert.ok(error instanceof ModelError && error.hint, Deno.inspect(error));
          return error.message.startsWith(`${part} gave NaN or infinity`);
        });
      }
    }));
}

Deno.test("pipeline of a model that was disposed, before or meanwhile, says so", async () => {
  for (const when of [0, 1, 2, "before"]) {
    using opened = await openPipeline(SCHNELL);
    const { device, model, pipeline } = opened;
    const before = device.memoryUse().current;
    if (when === "before") model[Symbol.dispose]();
    const options = {
      ...QUICK,
      onProgress: ({ step }: { step: number }) => {
        if (step === when) model[Symbol.dispose]();
      },
    };
    await assert.rejects(pipeline.generate(options), (error) => {
      assert.ok(error instanceof UsageError, Deno.inspect(error));
      return /schnell-like was disposed/.test(error.message);
    });
    assert.equal(device.memoryUse().current, before);
    assert.throws(() => pipeline.encodeClip(["a"], 1), UsageError);
    assert.throws(() => pipeline.encodeT5(["a"], 1, 8), UsageError);
  }
});

Deno.test("pipeline refuses values that make no sense", async () => {
  const wrong: Partial<GenerateOptions>[] = [
    { height: 0 },
    { width: 15 },
    { height: 32.5 },
    { height: 1e9 },
    { width: 8193 },
    { numInferenceSteps: 0 },
    { numInferenceSteps: 1001 },
    { sigmas: [1.5, 0.5] },
    { numImagesPerPrompt: -1 },
    { numImagesPerPrompt: 1e9 },
    { maxSequenceLength: 513 },
    { guidanceScale: NaN },
    { guidanceScale: 1e300 },
    { guidanceScale: 1e36 }, // a float32, but 1000 times it is not
    { seed: 2n ** 64n },
    { seed: 1.5 },
    { seed: NaN },
    { prompt: [] },
    { prompt: ["a", "b"], prompt2: ["c"] },
    { prompt: ["a", "b"], prompt2: "c" },
  ];
  using opened = await openPipeline(goldenPath("dev-like"));
  const { device, pipeline } = opened;
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
  using opened = await openPipeline(SCHNELL);
  const { device, pipeline } = opened;
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

testOn(
  TEST_GPU,
  "pipeline issues a GPU's next step before it reports the last one, and frees what it gave",
  async (device) => {
    using model = await Model.load(SCHNELL, device);
    const heard: string[] = [];
    const plan = compose(eagerPlan(device, model.weights), baselineFp32);
    const { execute } = plan;
    const pipeline = new FluxPipeline(model, {
      ...plan,
      execute: (running, part, inputs, body) => {
        if (part === "transformer" || part === "vae") heard.push(part);
        return execute(running, part, inputs, body);
      },
    });
    const before = device.memoryUse().current;
    const previews: Promise<Float32Array>[] = [];
    const { milliseconds } = await pipeline.generate({
      ...QUICK,
      onProgress: ({ step, latents }) => {
        heard.push(`step ${step}`);
        previews.push(valuesOf(latents()));
      },
    });
    assert.deepEqual(heard, ["transformer", "step 0", "transformer", "step 1", "vae", "step 2"]);
    assert.equal(milliseconds.steps.length, 2);
    assert.ok(milliseconds.pixels > 0 && milliseconds.pixels < milliseconds.decode);
    // Each step is shown what it gave, and not what was issued since.
    const shown = (await Promise.all(previews)).map((values) => values.join());
    assert.equal(new Set(shown).size, 3);
    assert.equal(device.memoryUse().current, before);
    heard.length = 0;
    const controller = new AbortController();
    const stopped = pipeline.generate({
      ...QUICK,
      signal: controller.signal,
      onProgress: () => controller.abort(),
    });
    await assert.rejects(stopped, { name: "AbortError" });
    assert.deepEqual(heard, ["transformer"]);
    assert.equal(device.memoryUse().current, before);
  },
);

Deno.test("pipeline looks at its signal before the text, between the encoders, and around the decoder", async () => {
  using opened = await openPipeline(SCHNELL);
  const { device, model, pipeline } = opened;
  const before = device.memoryUse().current;
  const heard: string[] = [];
  const run = (pipeline: FluxPipeline, controller: AbortController, stopAt: (event: string) => boolean) => {
    heard.length = 0;
    const hear = (event: string) => {
      heard.push(event);
      if (stopAt(event)) controller.abort(new Error("enough"));
    };
    const promise = pipeline.generate({
      ...QUICK,
      prompt: "a very small brown dog ".repeat(20), // both encoders warn
      maxSequenceLength: 8,
      signal: controller.signal,
      onWarning: (message) => hear(message.split(" ")[0]),
      onProgress: ({ step }) => hear(`step ${step}`),
    });
    return assert.rejects(promise, /^Error: enough$/);
  };

  const early = new AbortController();
  early.abort(new Error("enough"));
  await run(pipeline, early, () => false);
  assert.deepEqual(heard, []);

  await run(pipeline, new AbortController(), (event) => event === "T5");
  assert.deepEqual(heard, ["T5"]);

  await run(pipeline, new AbortController(), (event) => event === "step 2");
  assert.deepEqual(heard, ["T5", "CLIP", "step 0", "step 1", "step 2"]);

  const late = new AbortController();
  class StoppedInDecoder extends FluxPipeline {
    override decodeLatents(...args: Parameters<FluxPipeline["decodeLatents"]>) {
      late.abort(new Error("enough"));
      return super.decodeLatents(...args);
    }
  }
  await run(new StoppedInDecoder(model, pipeline.plan), late, () => false);
  assert.equal(device.memoryUse().current, before);

  const controller = new AbortController();
  controller.abort();
  await assert.rejects(pipeline.generate({ ...QUICK, signal: controller.signal }), { name: "AbortError" });
});

Deno.test("compose refuses a recipe twice, a second dtype, and a device that it does not run on", async () => {
  using device = await openCpu();
  using model = await Model.load(SCHNELL, device);
  const plan = eagerPlan(device, model.weights);
  assert.deepEqual(compose(plan, bfloat16).recipes, ["01_bfloat16"]);
  assert.throws(() => compose(plan, bfloat16, bfloat16), UsageError);
  assert.throws(() => compose(plan, baselineFp32, bfloat16), UsageError);
  assert.throws(() => compose(plan, { ...bfloat16, devices: ["cuda"] }), UsageError);
});
