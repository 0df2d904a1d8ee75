/** A picture is rehearsed before its model is there: the kernels that it will launch are known, and none is missing. */
import assert from "node:assert/strict";
import { cudnnTakesAttention } from "../../ffi/cuda/cudnn.ts";
import type { GpuDevice, KernelSource } from "../../ffi/gpu.ts";
import { NullGpu } from "../../ffi/null_gpu.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { loadModel } from "../../recipes/base/loading.ts";
import { Model } from "../../recipes/base/model.ts";
import { readParts } from "../../recipes/base/model_parts.ts";
import { FluxPipeline, type GenerateOptions } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { rehearse } from "../../recipes/base/rehearsal.ts";
import { recipesFor } from "../../recipes/switches.ts";
import { missingCompiler } from "../support/emulated_compiler.ts";
import { openEmulatedGpu } from "../support/emulated_gpu.ts";
import { fluxDev } from "../support/flux_dev.ts";
import { goldenPath } from "../support/golden.ts";
import { likeH100 } from "../support/null_gpu.ts";
import { ownDevice, testOn } from "../support/test_device.ts";

const DEV_LIKE = goldenPath("dev-like");
const CACHE = { cache_dit_config: { threshold: 0.5 } };

/** A GPU with a library that takes what cuDNN takes. */
const GPU = ownDevice("emulated GPU with attention", () => {
  const gpu = openEmulatedGpu({ attention: true });
  const attention = gpu.attention.bind(gpu);
  gpu.attention = (plan) => cudnnTakesAttention(plan) && attention(plan);
  return gpu;
}, missingCompiler());

/** Notes the texts that are compiled ahead, and those whose kernels are asked for. */
function watchTexts(gpu: GpuDevice): { readonly ahead: KernelSource[]; readonly used: Map<string, string> } {
  const ahead: KernelSource[] = [];
  const used = new Map<string, string>();
  gpu.compileAhead = (sources) => Promise.resolve(void ahead.push(...sources));
  const kernel = gpu.kernel.bind(gpu);
  gpu.kernel = (source, entry) => {
    used.set(source.text, source.name);
    return kernel(source, entry);
  };
  return { ahead, used };
}

for (
  const [title, recipes] of [
    ["float32", [baselineFp32]],
    ["bfloat16", [bfloat16]],
    ["all recipes", recipesFor({}, "cuda")],
    ["reused blocks and a deposit", recipesFor({ ...CACHE, offload: true }, "cuda")],
  ] as const
) {
  testOn(
    GPU,
    `rehearsal: a model is loaded and draws with the kernels that it names (${title})`,
    async (gpu) => {
      const { ahead, used } = watchTexts(gpu);
      const size = { height: 32, width: 48, numInferenceSteps: 3, maxSequenceLength: 16 };
      const drawing = { prompt: ["a", "b"], seed: 1, ...size };
      const note = (message: string) => assert.fail(message);
      using model = await loadModel({ ckpt: DEV_LIKE }, gpu, "bf16", note, recipes, drawing);
      const plan = compose(eagerPlan(gpu, model.weights), ...recipes);
      await new FluxPipeline(model, plan).generate(drawing);
      const named = new Set(ahead.map(({ text }) => text));
      const missing = [...used].filter(([text]) => !named.has(text)).map(([, name]) => name);
      assert.deepEqual(missing, []);
      assert.deepEqual(ahead.filter(({ text }) => !used.has(text)).map(({ name }) => name), []);
      assert.equal(ahead.length, named.size, "a text is named twice");
    },
  );
}

const DRAWING: GenerateOptions = {
  prompt: "a",
  seed: 1,
  height: 1024,
  width: 1024,
  numInferenceSteps: 28,
  maxSequenceLength: 512,
};

/** The texts that a picture of FLUX.1-dev wants, drawn with all blocks; where ways are measured, any of them wins. */
async function drawnTexts(recipes: readonly Recipe[]): Promise<Set<string>> {
  const gpu = new NullGpu(likeH100());
  const [fastest, measuring] = [gpu.fastest.bind(gpu), gpu.measuring.bind(gpu)];
  const choices = new Map<string, number>();
  let measures = false;
  gpu.measuring = (body) => {
    measures = true;
    try {
      return measuring(body);
    } finally {
      measures = false;
    }
  };
  gpu.fastest = (key, ways) => {
    fastest(key, ways);
    if (!measures) return 0;
    if (!choices.has(key)) choices.set(key, choices.size * 7 % 11 % ways.length);
    return choices.get(key)!;
  };
  const model = await Model.hollow(fluxDev(), gpu, "bf16");
  const plan = compose(eagerPlan(gpu, model.weights), ...recipes);
  await new FluxPipeline(model, plan).generate(DRAWING);
  return new Set(gpu.sources.keys());
}

for (
  const [title, flags] of [
    ["all recipes", {}],
    ["without float8", { disable_quant: true, disable_fa3: true }],
    ["reused blocks", CACHE],
  ] as const
) {
  Deno.test(`rehearsal: a few blocks have the kernels of all, whatever is measured (FLUX.1-dev, ${title})`, async () => {
    const recipes = recipesFor(flags, "cuda");
    const sources = await rehearse(likeH100(), {
      parts: fluxDev(),
      dtype: "bf16",
      recipes,
      drawing: DRAWING,
    });
    const named = new Set(sources.map(({ text }) => text));
    assert.equal(sources.length, named.size, "a text is named twice");
    assert.ok(named.size > 60, `only ${named.size}`);
    const drawn = await drawnTexts(recipes);
    assert.deepEqual([...drawn].filter((text) => !named.has(text)).map((text) => text.slice(-500)), []);
  });
}

Deno.test("rehearsal: what the picture itself will refuse is left to it", async () => {
  const refusing: Recipe = {
    name: "refusing",
    exact: true,
    devices: ["cuda"],
    apply: () => {
      throw new UsageError("no");
    },
  };
  const rehearsal = {
    parts: readParts(DEV_LIKE),
    dtype: "bf16" as const,
    drawing: { ...DRAWING, height: 1 },
  };
  assert.deepEqual(await rehearse(likeH100(), { ...rehearsal, recipes: [bfloat16, refusing] }), []);
  assert.deepEqual(await rehearse(likeH100(), { ...rehearsal, recipes: [bfloat16] }), []);
});
