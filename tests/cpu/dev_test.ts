/** FLUX.1-dev: what it draws with by default, and that each rung of the ladder draws with it. */
import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Device } from "../../ffi/device.ts";
import { openCpu } from "../../ffi/cpu/open.ts";
import { readJson } from "../../recipes/base/checkpoint.ts";
import type { Picture } from "../../recipes/base/pipeline.ts";
import type { Recipe } from "../../recipes/base/plan.ts";
import { psnr } from "../../recipes/base/psnr.ts";
import { FlowMatchEulerScheduler, schedulerConfigSchema } from "../../recipes/base/scheduler.ts";
import { transformerConfigSchema } from "../../recipes/base/transformer.ts";
import { cumulativeRungs } from "../../recipes/switches.ts";
import { draw } from "../support/drawing.ts";
import { goldenPath } from "../support/golden.ts";
import { GPU_WITH_ATTENTION } from "../support/gpu_devices.ts";
import { ownDevice, type TestDevice, testOn } from "../support/test_device.ts";

const DATA = join(
  Deno.env.get("FLUX_TEST_DATA") ?? join(import.meta.dirname!, "../../../shared/data"),
  "FLUX.1-dev",
);
const missing = existsSync(DATA) ? "" : "; skipped: no FLUX.1-dev in FLUX_TEST_DATA";

Deno.test("a model with guidance draws in 28 steps with guidance 3.5 and 512 tokens by default", async () => {
  using device = await openCpu();
  const { result: { settings }, latents } = await draw(device, goldenPath("dev-like"), [], {
    prompt: "a",
    seed: 1,
    height: 16,
    width: 16,
  });
  assert.equal(settings.numInferenceSteps, 28);
  assert.equal(settings.guidanceScale, 3.5);
  assert.equal(settings.maxSequenceLength, 512);
  assert.equal(latents.length, 29);
});

Deno.test({
  name: `FLUX.1-dev's own configs: guidance, and a schedule that is shifted by the picture's size${missing}`,
  ignore: missing !== "",
  fn: () => {
    assert.equal(readJson(DATA, "transformer/config.json", transformerConfigSchema).guidance_embeds, true);
    const config = readJson(DATA, "scheduler/scheduler_config.json", schedulerConfigSchema);
    const scheduler = new FlowMatchEulerScheduler(config);
    assert.ok(config.use_dynamic_shifting);
    // exp(mu) / (exp(mu) + 1 / sigma - 1), and mu is 1.15 at 4096 tokens.
    const { sigmas } = scheduler.sigmas(28, { imageSequenceLength: 4096 });
    const half = 1 - 14 / 28;
    assert.ok(Math.abs(sigmas[14] - Math.exp(1.15) / (Math.exp(1.15) + 1 / half - 1)) < 0.01);
    const small = scheduler.sigmas(28, { imageSequenceLength: 256 }).sigmas;
    assert.ok(small[14] < sigmas[14] - 0.1, "small pictures are shifted less");
  },
});

/** Several prompts, several pictures of each, several sizes. */
const OPTIONS = [
  { prompt: ["a red apple", "two boats"], numImagesPerPrompt: 2, seed: 4, height: 48, width: 32 },
  { prompt: "a red apple", seed: 4, height: 32, width: 80 },
  { prompt: "two boats", seed: 5, height: 48, width: 32 },
].map((one) => ({ ...one, numInferenceSteps: 2, maxSequenceLength: 32 }));
const SIZES = [[32, 48], [32, 48], [32, 48], [32, 48], [80, 32], [32, 48]];

/** Each rung draws, near what the checkpoint draws as it is. */
function ladderSuite(target: TestDevice, kind: "cpu" | "cuda"): void {
  const drawn = new Map<Device, readonly Picture[]>();
  for (const recipes of cumulativeRungs(kind)) {
    testOn(target, `dev-like draws with ${recipes.map(({ name }) => name).join(", ")}`, async (device) => {
      const drawAll = async (some: readonly Recipe[]) => {
        const results = [];
        for (const one of OPTIONS) {
          results.push((await draw(device, goldenPath("dev-like"), some, one)).result);
        }
        return results.flatMap(({ images }) => images);
      };
      const expected = drawn.get(device) ?? await drawAll([]);
      drawn.set(device, expected);
      const pictures = await drawAll(recipes);
      assert.deepEqual(pictures.map(({ width, height }) => [width, height]), SIZES);
      pictures.forEach(({ rgb }, i) => {
        const distance = psnr(rgb, expected[i].rgb);
        assert.ok(distance >= 35, `picture ${i}: PSNR ${distance} dB`);
      });
    });
  }
}

ladderSuite(ownDevice("cpu", () => openCpu()), "cpu");
ladderSuite(
  GPU_WITH_ATTENTION,
  "cuda",
);
