/** 05_flash_attention: who attends, in what, and what is said where that is not possible. On the emulated GPU. */
import assert from "node:assert/strict";
import { FfiError } from "../../ffi/errors.ts";
import type { AttentionPlan, GpuDevice } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { jointAttentionByLibrary } from "../../kernels/joint_attention.ts";
import type { QkvStream } from "../../kernels/joint_qk_norm_rope.ts";
import { attendsInFloat8, flashAttention } from "../../recipes/05_flash_attention.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { compose, eagerPlan, type Plan } from "../../recipes/base/plan.ts";
import type { Weights } from "../../recipes/base/weights.ts";
import { assertClose } from "../support/compare.ts";
import { valuesOf } from "../support/golden.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { sample } from "../support/kernel_suites/samples.ts";
import { noise } from "../support/providers.ts";
import { testOn } from "../support/test_device.ts";

/** A plan whose transformer has weights of a dtype, and nothing else. */
function planOf(device: GpuDevice, dtype: "bf16" | "f32" = "bf16"): Plan {
  const weight = Tensor.empty(device, [1], dtype);
  return eagerPlan(device, { transformer: { get: () => weight } as unknown as Weights } as Plan["weights"]);
}

/** The libraries' plans, as they are asked for. */
function watched(device: GpuDevice): AttentionPlan[] {
  const seen: AttentionPlan[] = [];
  const { attention } = device;
  device.attention = (plan) => {
    seen.push(plan);
    return attention.call(device, plan);
  };
  return seen;
}

function streamOf(device: GpuDevice, headDim: number): QkvStream {
  const draw = (seed: number) => sample(device, [1, 9, 2, headDim], "bf16", noise(seed)).tensor;
  const norm = sample(device, [headDim], "bf16", () => 1).tensor;
  return { q: draw(1), k: draw(2), v: draw(3), normQ: norm, normK: norm };
}

function tables(device: GpuDevice, headDim: number): [cos: Tensor, sin: Tensor] {
  const table = (phase: number) =>
    sample(device, [9, headDim], "f32", (i) => Math.cos((i >> 1) + phase)).tensor;
  return [table(0), table(-Math.PI / 2)];
}

for (const dtype of ["f8e4m3", "bf16"] as const) {
  testOn(TEST_GPU, `05_flash_attention: fa3 attends in ${dtype}, for heads of 128`, async (device) => {
    const seen = watched(device);
    const plain = planOf(device);
    const plan = compose(plain, flashAttention("fa3", dtype));
    assert.equal(attendsInFloat8(plan), dtype === "f8e4m3");
    assert.deepEqual(
      seen.map(({ library, q }) => [library, q.dtype, q.shape[1]]),
      [["fa3", dtype, 1]],
      "one token, at once",
    );
    seen.length = 0;
    const stream = streamOf(device, 128);
    const [cos, sin] = tables(device, 128);
    const [actual, expected] = [plan, plain].map(({ ops }) => ops.jointAttention([stream], cos, sin, 1e-6));
    assert.deepEqual(seen.map(({ library, q }) => [library, q.dtype]), [["fa3", dtype], [undefined, "bf16"]]);
    assertClose(await valuesOf(actual), await valuesOf(expected), dtype === "bf16" ? 0.01 : 0.1, dtype);

    seen.length = 0;
    const narrow = streamOf(device, 64);
    plan.ops.jointAttention([narrow], ...tables(device, 64), 1e-6);
    assert.deepEqual(
      seen.map(({ library }) => library),
      [undefined],
      "other heads are left to who was there",
    );
  });
}

testOn(
  TEST_GPU,
  "05_flash_attention: cudnn is the vendor's library, auto changes nothing without Hopper",
  (device) => {
    const plan = planOf(device);
    const cudnn = compose(plan, flashAttention("cudnn"));
    assert.equal(cudnn.ops.jointAttention, jointAttentionByLibrary);
    assert.ok(!attendsInFloat8(cudnn));
    const auto = compose(plan, flashAttention());
    assert.equal(auto.ops, plan.ops);
    assert.ok(!attendsInFloat8(auto));
  },
);

testOn(TEST_GPU, "05_flash_attention: what cannot be is said at once", (device) => {
  const refusal = (recipe: ReturnType<typeof flashAttention>, plan: Plan) => {
    try {
      compose(plan, recipe);
    } catch (error) {
      assert.ok(error instanceof UsageError, String(error));
      return `${error.message} | ${error.hint}`;
    }
    return assert.fail("no UsageError");
  };
  assert.equal(
    refusal(flashAttention("own"), planOf(device)),
    "05_flash_attention: cuda:emulated is no Hopper GPU, which our kernel is for | " +
      "--attention cudnn keeps cuDNN's attention in bfloat16",
  );
  for (const provider of ["own", "fa3", "cudnn", "auto"] as const) {
    assert.match(
      refusal(flashAttention(provider), planOf(device, "f32")),
      /needs 01_bfloat16 before it.*--disable_bf16/,
    );
  }
  device.attention = () => false;
  assert.match(
    refusal(flashAttention("fa3"), planOf(device)),
    /is no Hopper GPU, which FlashAttention-3 is for/,
  );
  device.attention = () => {
    throw new FfiError("it is not installed");
  };
  assert.throws(() => compose(planOf(device), flashAttention("fa3")), /it is not installed/);
});
