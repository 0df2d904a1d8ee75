/** 05_flash_attention on AMD: who attends, in what, and what is said where that is not possible. On the emulated AMD GPU. */
import assert from "node:assert/strict";
import { FfiError } from "../../ffi/errors.ts";
import type { AttentionPlan, GpuDevice } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import type { QkvStream } from "../../kernels/joint_qk_norm_rope.ts";
import { attendsInFloat8, type AttentionProvider, flashAttention } from "../../recipes/05_flash_attention.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { compose, eagerPlan, type Plan } from "../../recipes/base/plan.ts";
import type { Weights } from "../../recipes/base/weights.ts";
import { assertClose } from "../support/compare.ts";
import { valuesOf } from "../support/golden.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { sample } from "../support/kernel_suites/samples.ts";
import { noise } from "../support/providers.ts";
import { testOn } from "../support/test_device.ts";
import { watchLaunches } from "../support/watch_launches.ts";

function planOf(device: GpuDevice): Plan {
  const weight = Tensor.empty(device, [1], "bf16");
  return eagerPlan(device, { transformer: { get: () => weight } as unknown as Weights } as Plan["weights"]);
}

/** What libraries are asked for; `aiter`: whether it is installed. */
function watched(device: GpuDevice, aiter: boolean): AttentionPlan[] {
  const seen: AttentionPlan[] = [];
  const { attention } = device;
  device.attention = (plan) => {
    seen.push(plan);
    if (plan.library === "aiter" && !aiter) throw new FfiError("AITER was not found");
    return attention.call(device, plan);
  };
  return seen;
}

const TOKENS = 9;

/** Attention of some tokens by a plan's operator. */
function attend(device: GpuDevice, { ops }: Plan, headDim = 128): Promise<Float32Array> {
  const draw = (seed: number) => sample(device, [1, TOKENS, 2, headDim], "bf16", noise(seed)).tensor;
  const norm = sample(device, [headDim], "bf16", () => 1).tensor;
  const stream: QkvStream = { q: draw(1), k: draw(2), v: draw(3), normQ: norm, normK: norm };
  const table = (phase: number) =>
    sample(device, [TOKENS, headDim], "f32", (i) => Math.cos((i >> 1) + phase)).tensor;
  return valuesOf(ops.jointAttention([stream], table(0), table(-Math.PI / 2), 1e-6));
}

for (const dtype of ["f8e4m3", "bf16"] as const) {
  for (const provider of ["auto", "aiter"] as const) {
    testOn(
      TEST_GPU,
      `05_flash_attention: ${provider} is AITER where it is installed, in ${dtype}`,
      async (device) => {
        const seen = watched(device, true);
        const plain = planOf(device);
        const plan = compose(plain, flashAttention(provider, dtype));
        assert.equal(attendsInFloat8(plan), dtype === "f8e4m3");
        seen.length = 0;
        const [actual, expected] = [await attend(device, plan), await attend(device, plain)];
        assert.deepEqual(seen.map(({ library, q }) => [library, q.dtype]), [
          ["aiter", dtype],
          [undefined, "bf16"],
        ]);
        assertClose(actual, expected, dtype === "bf16" ? 0.01 : 0.1, dtype);
        seen.length = 0;
        await attend(device, plan, 64);
        assert.deepEqual(
          seen.map(({ library }) => library),
          [undefined],
          "other heads are left to who was there",
        );
      },
    );
  }
}

testOn(
  TEST_GPU,
  "05_flash_attention: without AITER auto changes nothing, own is our kernel in bfloat16",
  async (device) => {
    const seen = watched(device, false);
    const plain = planOf(device);
    const auto = compose(plain, flashAttention());
    assert.equal(auto.ops, plain.ops);
    const own = compose(plain, flashAttention("own"));
    assert.ok(!attendsInFloat8(auto) && !attendsInFloat8(own));
    seen.length = 0;
    const launched: string[] = [];
    using _ = watchLaunches(device, ({ name }) => launched.push(name));
    const actual = await attend(device, own);
    assert.deepEqual(seen, [], "no library is asked");
    assert.ok(launched.includes("portable_attention.cu:portableAttention"));
    assertClose(actual, await attend(device, plain), 0.01, "own");
    await attend(device, own, 64); // by whom else there is
  },
);

testOn(TEST_GPU, "05_flash_attention: what is not AMD's, or not installed, is said at once", (device) => {
  watched(device, false);
  const refusal = (provider: AttentionProvider) => {
    try {
      compose(planOf(device), flashAttention(provider));
    } catch (error) {
      assert.ok(error instanceof UsageError, String(error));
      return `${error.message} | ${error.hint}`;
    }
    return assert.fail("no UsageError");
  };
  assert.match(
    refusal("fa3"),
    /FlashAttention-3 is for NVIDIA GPUs, not for hip:gfx950 emulated \| --attention aiter/,
  );
  assert.match(refusal("cudnn"), /cuDNN is for NVIDIA GPUs/);
  assert.throws(() => compose(planOf(device), flashAttention("aiter")), /AITER was not found/);
  device.attention = () => false;
  assert.match(refusal("aiter"), /AITER has no attention in f8e4m3 for hip:gfx950 emulated/);
});
