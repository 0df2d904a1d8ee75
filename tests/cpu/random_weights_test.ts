/** Models with random weights: activations of a sane size at every depth, the same picture for the same seed. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { openCpu } from "../../ffi/cpu/open.ts";
import type { DType } from "../../ffi/dtype.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { Model } from "../../recipes/base/model.ts";
import type { Ops } from "../../recipes/base/ops.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { mapTensors } from "../../recipes/base/tensors.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { readFloat32 } from "../../kernels/cpu.ts";
import { editJson, withModelCopy } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";

/** Sizes of activations: root of the mean square, of every result of every operator. */
type Sizes = { op: string; size: number }[];

/** The table with each operator's results measured. */
function measured(ops: Ops, sizes: Sizes): Ops {
  const entries = Object.entries(ops).map(([op, run]) => [
    op,
    (...args: unknown[]) => {
      const result = (run as (...args: unknown[]) => unknown)(...args);
      return mapTensors(result, (tensor) => {
        const values = readFloat32(tensor);
        const squares = values.reduce((sum, value) => sum + value * value, 0);
        sizes.push({ op, size: Math.sqrt(squares / values.length) });
        return tensor;
      });
    },
  ]);
  return Object.fromEntries(entries) as Ops;
}

async function draw(folder: string, dtype: DType, sizes: Sizes = [], seed = 0) {
  using device = await openCpu({ provider: "wasm", threads: 2 });
  using model = await Model.random(folder, device, dtype, seed);
  const plan = compose(eagerPlan(device, model.weights), dtype === "f32" ? baselineFp32 : bfloat16);
  assert.equal(plan.weights.vae.get("decoder.conv_in.weight").dtype, dtype);
  const pipeline = new FluxPipeline(model, { ...plan, ops: measured(plan.ops, sizes) });
  const options = { prompt: "a red apple", seed: 1, height: 64, width: 64, numInferenceSteps: 2 };
  const { images: [{ rgb }] } = await pipeline.generate(options);
  return { name: model.name, rgb };
}

/** Mean and standard deviation. */
function statistics(values: ArrayLike<number>): [number, number] {
  const list = Array.from(values);
  const mean = list.reduce((sum, value) => sum + value, 0) / list.length;
  return [mean, Math.sqrt(list.reduce((sum, value) => sum + (value - mean) ** 2, 0) / list.length)];
}

/** A NaN fails. */
function assertSane(sizes: Sizes): void {
  for (const { op, size } of sizes) {
    if (op === "scaleShift" || op === "toPixels") continue; // times, guidance and pixels have sizes of their own
    assert.ok(size > 0.1 && size < 10, `a result of ${op} has size ${size}`);
  }
}

Deno.test("random weights keep activations sane through FLUX.1's depth, in both dtypes", () =>
  withModelCopy("schnell-like", async (folder) => {
    editJson(join(folder, "transformer/config.json"), { num_layers: 19, num_single_layers: 38 });
    editJson(join(folder, "text_encoder/config.json"), { num_hidden_layers: 12 });
    editJson(join(folder, "text_encoder_2/config.json"), { num_layers: 24 });
    for (const dtype of ["f32", "bf16"] as const) {
      const sizes: Sizes = [];
      const { rgb } = await draw(folder, dtype, sizes);
      assert.ok(sizes.length > 2000);
      assertSane(sizes);
      const [mean, deviation] = statistics(rgb);
      assert.ok(mean > 64 && mean < 192 && deviation > 16 && deviation < 120, `${mean} +- ${deviation}`);
    }
  }));

Deno.test("random weights need no weight files, are the same for the same seed, and are named in the model", () =>
  withModelCopy("schnell-like", async (folder) => {
    const before = await draw(folder, "bf16");
    for (const part of ["text_encoder", "text_encoder_2", "transformer", "vae"]) {
      for (const { name } of [...Deno.readDirSync(join(folder, part))]) {
        if (name !== "config.json") Deno.removeSync(join(folder, part, name));
      }
    }
    const again = await draw(folder, "bf16");
    assert.deepEqual(again, before);
    assert.equal(again.name, "schnell-like with random weights");
    assert.notDeepEqual((await draw(folder, "bf16", [], 1)).rgb, before.rgb);
    // The same weights, rounded or not.
    const wide = (await draw(folder, "f32")).rgb;
    const [distance] = statistics(wide.map((value, i) => Math.abs(value - again.rgb[i])));
    assert.ok(distance < 4, `${distance}`);
  }));

Deno.test("random weights of a model with guidance", async () => {
  const sizes: Sizes = [];
  await draw(goldenPath("dev-like"), "f32", sizes);
  assertSane(sizes);
});
