/** The embedded model: what diffusers draws with it, we draw. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { join } from "node:path";
import { decode, type Image } from "imagescript";
import { openCpu } from "../../ffi/cpu/open.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { EMBEDDED_MODEL } from "../../recipes/base/command_line.ts";
import { packLatents } from "../../recipes/base/latents.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline, type GenerateResult } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { assertClose } from "../support/compare.ts";
import { Golden, goldenPath, valuesOf } from "../support/golden.ts";

interface Run {
  readonly image: string;
  readonly tensors: string;
  readonly prompt: string;
  readonly seed: number;
  readonly num_inference_steps: number;
  readonly height: number;
  readonly width: number;
  readonly max_sequence_length: number;
}

const GOLDEN: { sha256: Record<string, string>; runs: Run[] } = JSON.parse(
  Deno.readTextFileSync(goldenPath("tiny/runs.json")),
);

/** Draws a golden prompt; defaults of ours that equal the golden run's settings are left to us. */
async function draw(run: Run, recipe: Recipe): Promise<{ result: GenerateResult; latents: Float32Array[] }> {
  using device = await openCpu();
  using model = await Model.load(EMBEDDED_MODEL, device);
  const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), recipe));
  const latents: Promise<Float32Array>[] = [];
  const result = await pipeline.generate({
    prompt: run.prompt,
    seed: run.seed,
    onProgress: (event) => {
      latents.push(valuesOf(packLatents(pipeline.plan.ops, event.latents())));
    },
  });
  return { result, latents: await Promise.all(latents) };
}

/** Diffusers' picture as RGB. */
async function expectedPixels(run: Run): Promise<Uint8Array> {
  const { bitmap } = await decode(await Deno.readFile(goldenPath(`tiny/${run.image}`))) as Image;
  return Uint8Array.from(bitmap).filter((_, i) => i % 4 !== 3);
}

Deno.test("models/tiny holds the weights that the golden pictures were drawn with, in at most 32 MB", () => {
  let bytes = 0;
  for (const [file, sha256] of Object.entries(GOLDEN.sha256)) {
    const content = Deno.readFileSync(join(EMBEDDED_MODEL, file));
    bytes += content.length;
    assert.equal(
      createHash("sha256").update(content).digest("hex"),
      sha256,
      `${file}: make_golden.py --only tiny`,
    );
  }
  assert.ok(bytes <= 32_000_000, `${bytes} bytes`);
});

for (const run of GOLDEN.runs) {
  Deno.test(`models/tiny draws ${JSON.stringify(run.prompt)} as diffusers does, by its own defaults`, async () => {
    using device = await openCpu();
    using golden = new Golden(`tiny/${run.tensors}`, device);
    const { result, latents } = await draw(run, baselineFp32);
    const { height, width, numInferenceSteps, maxSequenceLength } = result.settings;
    assert.deepEqual(
      { height, width, numInferenceSteps, maxSequenceLength },
      {
        height: run.height,
        width: run.width,
        numInferenceSteps: run.num_inference_steps,
        maxSequenceLength: run.max_sequence_length,
      },
    );
    assert.deepEqual(latents[0], golden.values("initial"));
    assertClose(latents.at(-1)!, golden.values("final"), 1e-4, "final latents");
    const expected = await expectedPixels(run);
    const [{ rgb }] = result.images;
    assert.equal(rgb.length, expected.length);
    const worst = rgb.reduce((most, value, i) => Math.max(most, Math.abs(value - expected[i])), 0);
    assert.ok(worst <= 2, `a pixel differs by ${worst}/255`);
  });
}

Deno.test("models/tiny in bfloat16 draws nearly the same picture", async () => {
  const [run] = GOLDEN.runs;
  const expected = await expectedPixels(run);
  const { result } = await draw(run, bfloat16);
  const [{ rgb }] = result.images;
  const squares = rgb.reduce((sum, value, i) => sum + (value - expected[i]) ** 2, 0) / rgb.length;
  const psnr = 10 * Math.log10(255 ** 2 / squares);
  assert.ok(psnr >= 25, `PSNR ${psnr} dB`);
});
