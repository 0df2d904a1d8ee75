/** Recipes put together: the golden pictures with them, on the emulated GPU and on the CPU. */
import assert from "node:assert/strict";
import { openCpu } from "../../ffi/cpu/open.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline, type GenerateOptions } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { pipelineSuite } from "../support/golden_suite_pipelines.ts";
import { tinySuite } from "../support/golden_suite_tiny.ts";
import { goldenPath } from "../support/golden.ts";
import { GPU_WITH_ATTENTION } from "../support/gpu_devices.ts";
import { ownDevice, testOn } from "../support/test_device.ts";

const EXACT: readonly Recipe[] = [compile, fuseQkv];

pipelineSuite(GPU_WITH_ATTENTION, EXACT);
tinySuite(ownDevice("cpu", () => openCpu()), EXACT);

testOn(
  GPU_WITH_ATTENTION,
  "02_compile: replayed graphs draw what is drawn eagerly, at each size",
  async (device) => {
    using model = await Model.load(goldenPath("dev-like"), device);
    const plain = compose(eagerPlan(device, model.weights), bfloat16);
    const eager = new FluxPipeline(model, { ...compose(plain, compile), execute: plain.execute });
    const compiled = new FluxPipeline(model, compose(plain, compile));
    const options: GenerateOptions[] = [
      { prompt: "a red apple", seed: 1, height: 32, width: 32 },
      { prompt: "three boats", seed: 2, height: 32, width: 32, guidanceScale: 2 },
      { prompt: "a red apple", seed: 1, height: 48, width: 32 },
      { prompt: "three boats", seed: 2, height: 32, width: 32, guidanceScale: 2 },
    ];
    for (const one of options) {
      const [expected, actual] = [
        await eager.generate({ ...one, numInferenceSteps: 3, maxSequenceLength: 16 }),
        await compiled.generate({ ...one, numInferenceSteps: 3, maxSequenceLength: 16 }),
      ];
      assert.deepEqual(actual.images, expected.images);
    }
    assert.equal(device.memoryUse().current, 0);
  },
);

testOn(GPU_WITH_ATTENTION, "02_compile: another plan has recordings of its own", async (device) => {
  using model = await Model.load(goldenPath("schnell-like"), device);
  const plan = compose(eagerPlan(device, model.weights), bfloat16, compile);
  const doubled = { ...plan, ops: { ...plan.ops, silu: (x: Tensor) => plan.ops.add(plan.ops.silu(x), x) } };
  const options = {
    prompt: "a",
    seed: 1,
    height: 32,
    width: 32,
    numInferenceSteps: 2,
    maxSequenceLength: 16,
  };
  const draw = async (one: typeof plan) =>
    (await new FluxPipeline(model, one).generate(options)).images[0].rgb;
  const first = await draw(plan);
  assert.notDeepEqual(await draw(doubled), first);
  assert.deepEqual(await draw(plan), first);
});

testOn(
  GPU_WITH_ATTENTION,
  "03_fuse_qkv: the joined weights take the place of the model's",
  async (device) => {
    using model = await Model.load(goldenPath("schnell-like"), device);
    const separate = compose(eagerPlan(device, model.weights), bfloat16);
    const before = device.memoryUse().weights;
    const plan = compose(separate, fuseQkv);
    const { transformer } = plan.weights;
    assert.equal(device.memoryUse().weights, before, "no second copy stays");
    const single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"].map((layer) =>
      transformer.get(`single_transformer_blocks.0.${layer}.weight`)
    );
    const double = ["to_q", "to_k", "to_v"].map((layer) =>
      transformer.get(`transformer_blocks.0.attn.${layer}.weight`)
    );
    for (const group of [single, double]) assert.equal(new Set(group.map(({ memory }) => memory)).size, 1);
    const [q, k] = single;
    assert.equal(k.offset, q.size);
    let products = 0;
    const { matmul } = device;
    device.matmul = (one) => {
      products++;
      matmul.call(device, one);
    };
    const x = Tensor.fromFloat32(device, new Float32Array(2 * q.shape[1]), [2, q.shape[1]]);
    const layers = single.map((weight) => ({ weight }));
    const input = plan.ops.cast(x, "bf16");
    assert.deepEqual(
      plan.ops.linears(input, layers).map(({ shape }) => shape),
      single.map(({ shape }) => [2, shape[0]]),
    );
    assert.equal(products, 1);
    device.scope(() => void plan.ops.linears(input, [layers[1], layers[0]]));
    assert.equal(products, 3, "in another order they are multiplied one by one");
  },
);
