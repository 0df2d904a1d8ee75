/** Recipe 11_float8_text_encoder: T5 in float8, against transformers in float32. */
import assert from "node:assert/strict";
import type { Device } from "../../ffi/device.ts";
import { isGpu } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { dequantize } from "../../kernels/dequantize_float8.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { float8TextEncoder, TEXT_ENCODER_FLOAT8 } from "../../recipes/11_float8_text_encoder.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { Model } from "../../recipes/base/model.ts";
import { compose, eagerPlan, type Plan, type Recipe } from "../../recipes/base/plan.ts";
import { relativePositionBuckets, t5Encoder } from "../../recipes/base/t5.ts";
import { replaced, scaleName } from "../../recipes/base/weights.ts";
import { assertClose, relativeError } from "./compare.ts";
import { Golden, goldenPath, valuesOf } from "./golden.ts";
import { type TestDevice, testOn } from "./test_device.ts";

/** What T5 gives for the golden ids. */
async function run(model: Model, { weights, ops, device }: Plan, golden: Golden): Promise<Float32Array> {
  const config = model.configs.text_encoder_2;
  const rows = golden.ids("in.long");
  const [tokens] = rows.map(({ length }) => length);
  const ids = Tensor.fromInt32(device, rows.flatMap((row) => [...row]), [rows.length, tokens]);
  const buckets = Tensor.fromInt32(device, relativePositionBuckets(config, tokens), [tokens, tokens]);
  return await valuesOf(t5Encoder(config, weights.text_encoder_2, ops, ids, buckets));
}

/** @param rest recipes between 01_bfloat16 and this one. */
export function float8TextEncoderSuite(target: TestDevice, rest: readonly Recipe[] = []): void {
  const after = rest.length > 0 ? ` after ${rest.map(({ name }) => name).join(", ")}` : "";
  const test = (name: string, body: (device: Device) => Promise<void>) =>
    testOn(target, `11_float8_text_encoder ${name}${after}`, body);

  for (const mode of TEXT_ENCODER_FLOAT8) {
    test(`${mode}: T5's Linear layers are float8, and its output near transformers'`, async (device) => {
      // Of the two models only this one's attention has sizes that are multiples of 16.
      using golden = new Golden("components/dev-like/t5.safetensors", device);
      using model = await Model.load(goldenPath("dev-like"), device);
      const before = compose(eagerPlan(device, model.weights), bfloat16, ...rest);
      const plain = relativeError(await run(model, before, golden), golden.values("out.long"));
      const held = device.memoryUse().weights;
      const plan = compose(before, float8TextEncoder(mode));
      const t5 = plan.weights.text_encoder_2;
      const quantized = t5.names.filter((name) => t5.has(scaleName(name)));
      assert.ok(quantized.length > 0);
      for (const name of quantized) {
        assert.match(name, /\.(SelfAttention\.[qkvo]|DenseReluDense\.w[io](_[01])?)\.weight$/);
        assert.equal(t5.get(name).dtype, "f8e4m3");
        assert.deepEqual(t5.get(scaleName(name)).shape, [t5.get(name).shape[0]]);
      }
      assert.equal(
        t5.get(t5.has("shared.weight") ? "shared.weight" : "encoder.embed_tokens.weight").dtype,
        "bf16",
      );
      if (isGpu(device)) assert.ok(device.memoryUse().weights < held, "memory is saved");
      for (const component of ["text_encoder", "transformer", "vae"] as const) {
        assert.equal(plan.weights[component], before.weights[component], component);
      }
      const error = relativeError(await run(model, plan, golden), golden.values("out.long"));
      assert.ok(error > 2 * plain, `nothing was rounded: ${error}, in bfloat16 ${plain}`);
      const limit = mode === "weights" ? 0.07 : 0.1;
      assert.ok(error <= limit, `relative error ${error}, in bfloat16 ${plain}`);
    });
  }

  test("weights: what is multiplied with are the numbers of the codes, in bfloat16", async (device) => {
    using golden = new Golden("components/dev-like/t5.safetensors", device);
    using model = await Model.load(goldenPath("dev-like"), device);
    const before = compose(eagerPlan(device, model.weights), bfloat16, ...rest);
    const plan = compose(before, float8TextEncoder("weights"));
    const t5 = plan.weights.text_encoder_2;
    const wide = new Map(
      t5.names.filter((name) => t5.has(scaleName(name))).map((name) => {
        const matrix = { values: t5.get(name), scales: t5.get(scaleName(name)), rowwise: true };
        return [name, dequantize(matrix, "bf16")];
      }),
    );
    const widened = { ...before, weights: { ...before.weights, text_encoder_2: replaced(t5, wide) } };
    assertClose(await run(model, plan, golden), await run(model, widened, golden), 2e-3, "T5's output");
  });

  if (rest.some(({ name }) => name === "06_float8")) return;
  test("refuses float32, and to be applied twice", async (device) => {
    using model = await Model.load(goldenPath("dev-like"), device);
    const plan = compose(eagerPlan(device, model.weights), baselineFp32, ...rest);
    assert.throws(
      () => compose(plan, float8TextEncoder()),
      (error) => error instanceof UsageError && /takes bfloat16 weights.*is f32/.test(error.message),
    );
    using second = await Model.load(goldenPath("dev-like"), device);
    const once = compose(eagerPlan(device, second.weights), bfloat16, ...rest, float8TextEncoder());
    assert.throws(() => compose(once, float8TextEncoder("dynamic")), /applied twice/);
  });
}
