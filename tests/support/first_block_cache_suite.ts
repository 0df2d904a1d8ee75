/** Recipe 09_first_block_cache: which steps are reused, what comes of it, and that graphs run it. */
import assert from "node:assert/strict";
import type { Device } from "../../ffi/device.ts";
import { isGpu } from "../../ffi/gpu.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { firstBlockCache } from "../../recipes/09_first_block_cache.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline, type GenerateOptions } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { readPicture } from "../../recipes/base/read_picture.ts";
import { assertClose } from "./compare.ts";
import { draw } from "./drawing.ts";
import { Golden, goldenPath } from "./golden.ts";
import { withKontext } from "./golden_suite_kontext.ts";
import { type TestDevice, testOn } from "./test_device.ts";

interface Run {
  readonly prompt: string;
  readonly height: number;
  readonly width: number;
  readonly guidance_scale: number;
  readonly max_sequence_length: number;
  readonly threshold: number;
  readonly warmup: number;
  readonly seed: number;
  readonly num_inference_steps: number;
  readonly image?: string;
  readonly reused: readonly number[];
}

const RUNS: Record<string, Run> = JSON.parse(Deno.readTextFileSync(goldenPath("cache/runs.json")));

async function optionsOf(run: Run): Promise<GenerateOptions> {
  return {
    prompt: run.prompt,
    ...(run.image && { image: await readPicture(goldenPath(`pictures/${run.image}`)), autoResize: false }),
    seed: run.seed,
    numInferenceSteps: run.num_inference_steps,
    height: run.height,
    width: run.width,
    guidanceScale: run.guidance_scale,
    maxSequenceLength: run.max_sequence_length,
  };
}

/** @param rest exact recipes between the one of the dtype and the cache. */
export function firstBlockCacheSuite(target: TestDevice, rest: readonly Recipe[] = []): void {
  const after = rest.length === 0 ? "" : `, after ${rest.map(({ name }) => name).join(", ")}`;
  const test = (name: string, body: (device: Device) => Promise<void>) =>
    testOn(target, `09_first_block_cache: ${name}${after}`, body);

  for (const [name, run] of Object.entries(RUNS)) {
    test(`${name} reuses the steps that the rule says, and draws what it gives in diffusers' modules`, (device) =>
      withKontext(async (kontext) => {
        using golden = new Golden(`cache/${name}.safetensors`, device);
        const folder = run.image ? kontext : goldenPath("dev-like");
        const recipe = firstBlockCache({ threshold: run.threshold, warmupSteps: run.warmup });
        const { result, latents } = await draw(
          device,
          folder,
          [baselineFp32, ...rest, recipe],
          await optionsOf(run),
        );
        assert.ok(run.reused.length > 0 && run.reused.length < run.num_inference_steps - run.warmup + 1);
        assert.deepEqual(result.reusedSteps, run.reused);
        for (let step = 0; step < run.num_inference_steps; step++) {
          assertClose(latents[step + 1], golden.values(`step${step}`), 1e-4, `latents after step ${step}`);
        }
      }));
  }

  test("with a threshold of 0, all steps are those of no cache, bit for bit", (device) =>
    withKontext(async (kontext) => {
      for (const [folder, run] of [[goldenPath("dev-like"), RUNS.threshold], [kontext, RUNS.edit]] as const) {
        const options = { ...await optionsOf(run), numInferenceSteps: 3, numImagesPerPrompt: 2 };
        const without = await draw(device, folder, [baselineFp32, ...rest], options);
        const cache = firstBlockCache({ threshold: 0, warmupSteps: 0 });
        const { result, latents } = await draw(device, folder, [baselineFp32, ...rest, cache], options);
        assert.deepEqual(result.reusedSteps, []);
        assert.equal(without.result.reusedSteps, undefined);
        latents.forEach((one, step) => assertClose(one, without.latents[step], 1e-6, `step ${step}`));
      }
    }));

  test("limits hold, for each picture anew, and nothing stays in memory", async (device) => {
    using model = await Model.load(goldenPath("dev-like"), device);
    const plan = compose(eagerPlan(device, model.weights), baselineFp32, ...rest);
    const options = { ...await optionsOf(RUNS.all), numInferenceSteps: 8 };
    const { current } = device.memoryUse();
    const cases = [
      [{ warmupSteps: 0 }, [1, 2, 3, 4, 5, 6, 7]],
      [{ warmupSteps: 5 }, [5, 6, 7]],
      [{ warmupSteps: 1, maxCachedSteps: 3 }, [1, 2, 3]],
      [{ warmupSteps: 1, maxContinuousCachedSteps: 2 }, [1, 2, 4, 5, 7]],
      [{ warmupSteps: 8 }, []],
    ] as const;
    for (const [limits, expected] of cases) {
      const cached = compose(plan, firstBlockCache({ threshold: 1e9, ...limits }));
      const pipeline = new FluxPipeline(model, cached);
      for (let time = 0; time < 2; time++) {
        const { reusedSteps } = await pipeline.generate(options);
        assert.deepEqual(reusedSteps, expected, JSON.stringify(limits));
      }
    }
    assert.equal(device.memoryUse().current, current);
  });

  test("a stopped picture leaves nothing in memory", async (device) => {
    using model = await Model.load(goldenPath("dev-like"), device);
    const plan = compose(
      eagerPlan(device, model.weights),
      baselineFp32,
      ...rest,
      firstBlockCache({ threshold: 1e9 }),
    );
    const { current } = device.memoryUse();
    const controller = new AbortController();
    await assert.rejects(
      new FluxPipeline(model, plan).generate({
        ...await optionsOf(RUNS.all),
        signal: controller.signal,
        onProgress: ({ step }) => step === 4 && controller.abort(new Error("enough")),
      }),
      /enough/,
    );
    assert.equal(device.memoryUse().current, current);
  });

  test("refused for models without guidance, and for thresholds without sense", async (device) => {
    using model = await Model.load(goldenPath("schnell-like"), device);
    const plan = compose(eagerPlan(device, model.weights), baselineFp32, ...rest, firstBlockCache());
    const { current } = device.memoryUse();
    const refused = (error: Error) =>
      error instanceof UsageError && /for FLUX\.1-dev and Kontext.*schnell/.test(error.message);
    await assert.rejects(new FluxPipeline(model, plan).generate(await optionsOf(RUNS.all)), refused);
    assert.equal(device.memoryUse().current, current);
    assert.throws(() => firstBlockCache().check!(model.configs.transformer), refused);
    firstBlockCache().check!({ ...model.configs.transformer, guidance_embeds: true });
    assert.throws(
      () => firstBlockCache().check!({ ...model.configs.transformer, guidance_embeds: true, num_layers: 0 }),
      /double block/,
    );
    for (const threshold of [-1, NaN, Infinity]) {
      assert.throws(() => firstBlockCache({ threshold }), UsageError);
    }
  });

  if (!rest.some(({ name }) => name === "02_compile")) return;
  test("each part is one graph, recorded once for a size", async (device) => {
    if (!isGpu(device)) return;
    using model = await Model.load(goldenPath("dev-like"), device);
    const parts: string[] = [];
    const plan = compose(
      eagerPlan(device, model.weights),
      baselineFp32,
      ...rest,
      firstBlockCache({ threshold: 1e9, warmupSteps: 3 }),
    );
    const { record } = device;
    let recorded = 0;
    device.record = (body) => (recorded++, record.call(device, body));
    const pipeline = new FluxPipeline(model, {
      ...plan,
      execute: (running, part, ...more) => (parts.push(part), plan.execute(running, part, ...more)),
    });
    const options = await optionsOf(RUNS.all);
    await pipeline.generate(options);
    const first = recorded;
    await pipeline.generate({ ...options, seed: 9 });
    assert.equal(recorded, first, "nothing is recorded again");
    const count = (part: string) => parts.filter((one) => one === part).length;
    assert.deepEqual(["first_block", "other_blocks", "reused_blocks", "transformer"].map(count), [
      12,
      6,
      6,
      0,
    ]);
    device.record = record;
  });
}
