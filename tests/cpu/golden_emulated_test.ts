/**
 * The golden tests of small models on the emulated GPU: the kernels put together. Attention is computed by matrix products
 * and the softmax kernel in the first suite, as by a library in the second.
 */
import assert from "node:assert/strict";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { componentSuite, OTHER_ORDER } from "../support/golden_suite_components.ts";
import { pipelineSuite } from "../support/golden_suite_pipelines.ts";
import { goldenPath } from "../support/golden.ts";
import { GPU_WITH_ATTENTION, TEST_GPU } from "../support/gpu_devices.ts";
import { testOn } from "../support/test_device.ts";

componentSuite(TEST_GPU, OTHER_ORDER);
pipelineSuite(
  GPU_WITH_ATTENTION,
);

testOn(
  TEST_GPU,
  "a run gives back all memory that it took, but the rotary tables of its size",
  async (device) => {
    using model = await Model.load(goldenPath("schnell-like"), device);
    const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), baselineFp32));
    const { weights } = device.memoryUse();
    const options = { prompt: "a red apple", seed: 1, height: 32, width: 32, numInferenceSteps: 2 };
    const { settings } = await pipeline.generate({ ...options, onProgress: (event) => event.latents() });
    const use = device.memoryUse();
    assert.ok(use.peak > 0);
    const { axes_dims_rope: axes } = model.configs.transformer;
    const tokens = settings.maxSequenceLength + 2 * 2;
    const tables = 2 * 4 * tokens * axes.reduce((a, b) => a + b, 0);
    assert.ok(use.weights - weights >= tables && use.weights - weights < tables + 4 * 256);
    await pipeline.generate(options);
    assert.deepEqual([device.memoryUse().current, device.memoryUse().weights], [0, use.weights]);
  },
);
