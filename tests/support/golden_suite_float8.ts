import assert from "node:assert/strict";
import type { Device } from "../../ffi/device.ts";
import { isGpu } from "../../ffi/gpu.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { EMBEDDED_MODEL } from "../../recipes/base/command_line.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import type { Ops } from "../../recipes/base/ops.ts";
import { Model } from "../../recipes/base/model.ts";
import { compose, eagerPlan, type Plan, type Recipe } from "../../recipes/base/plan.ts";
import { psnr } from "../../recipes/base/psnr.ts";
import { scaleName } from "../../recipes/base/weights.ts";
import { assertClose, relativeError } from "./compare.ts";
import { draw } from "./drawing.ts";
import { Golden, goldenPath, transformerVelocity, valuesOf } from "./golden.ts";
import { type TestDevice, testOn } from "./test_device.ts";
import { watchLaunches } from "./watch_launches.ts";

const GRANULARITIES = ["row", "tensor"] as const;
/** Weights of a block that are quantized, and some that are not. */
const QUANTIZED = [
  "transformer_blocks.0.attn.to_q",
  "transformer_blocks.0.attn.add_v_proj",
  "transformer_blocks.0.attn.to_out.0",
  "transformer_blocks.0.ff.net.0.proj",
  "transformer_blocks.0.ff_context.net.0.proj",
  "single_transformer_blocks.0.attn.to_k",
  "single_transformer_blocks.0.proj_mlp",
  "single_transformer_blocks.0.proj_out",
];
const KEPT = [
  "x_embedder",
  "context_embedder",
  "time_text_embed.text_embedder.linear_2",
  "transformer_blocks.0.ff_context.net.2",
  "single_transformer_blocks.0.attn.norm_q",
  "norm_out.linear",
  "proj_out",
];
/** Quantized by rows only. */
const MODULATIONS = [
  "transformer_blocks.0.norm1.linear",
  "transformer_blocks.0.norm1_context.linear",
  "single_transformer_blocks.0.norm.linear",
];

/** The transformer's output for a golden file's inputs. */
function run(model: Model, { weights, ops, device }: Plan, golden: Golden): Promise<Float32Array> {
  const config = model.configs.transformer;
  return valuesOf(transformerVelocity(golden, device, config, weights.transformer, ops));
}

/** Recipe 06_float8 on the small golden models, behind 01 and `rest`: defines the tests on a device. */
export function float8RecipeSuite(target: TestDevice, rest: readonly Recipe[] = []): void {
  const test = (name: string, body: (device: Device) => Promise<void>) => testOn(target, name, body);
  const after = rest.length > 0 ? ` after ${rest.map(({ name }) => name).join(", ")}` : "";
  for (const folder of ["schnell-like", "dev-like"] as const) {
    for (const granularity of GRANULARITIES) {
      test(`06_float8 by ${granularity} stays near float32 (${folder})${after}`, async (device) => {
        using golden = new Golden(`components/${folder}/transformer.safetensors`, device);
        using model = await Model.load(goldenPath(folder), device);
        const before = compose(eagerPlan(device, model.weights), bfloat16, ...rest);
        const originals = device.memoryUse().weights;
        const names = [...before.weights.transformer.names];
        const plan = compose(before, float8({ granularity }));

        const { transformer } = plan.weights;
        const scales = new Set(names.filter((name) => transformer.has(scaleName(name))).map(scaleName));
        assert.deepEqual(transformer.names.filter((name) => !scales.has(name)), names);
        const rowwise = granularity === "row";
        for (const module of [...QUANTIZED, ...(rowwise ? MODULATIONS : [])]) {
          assert.equal(transformer.get(`${module}.weight`).dtype, "f8e4m3", module);
          assert.equal(transformer.get(`${module}.weight_scale`).dtype, "f32", module);
        }
        for (const module of [...KEPT, ...(rowwise ? [] : MODULATIONS)]) {
          assert.equal(transformer.get(`${module}.weight`).dtype, "bf16", module);
        }
        assert.equal(transformer.get("transformer_blocks.0.attn.to_q.bias").dtype, "bf16");
        if (isGpu(device)) {
          const quantized = names.map((name) => transformer.get(name)).filter(({ dtype }) =>
            dtype === "f8e4m3"
          );
          const values = quantized.reduce((sum, { size }) => sum + size, 0);
          const scaleCount = quantized.reduce(
            (sum, { shape }) => sum + (rowwise ? shape[0] : 1),
            0,
          );
          // Two bytes went for each that came; a GPU counts whole blocks of memory.
          const saved = originals - device.memoryUse().weights;
          const slack = 512 * 2 * quantized.length;
          assert.ok(
            Math.abs(saved - (values - 4 * scaleCount)) <= slack,
            `${saved} bytes of ${values} were saved`,
          );
          assert.throws(() => before.weights.transformer.get(`${QUANTIZED[0]}.weight`), UsageError);
        }

        const error = relativeError(await run(model, plan, golden), golden.values("out.sample"));
        assert.ok(error > 0.005 && error <= 0.05, `relative error ${error}`);
      });
    }
  }

  test(`06_float8 by rows has operators quantize what they give${after}`, async (device) => {
    using golden = new Golden("components/schnell-like/transformer.safetensors", device);
    using model = await Model.load(goldenPath("schnell-like"), device);
    const before = compose(eagerPlan(device, model.weights), bfloat16, ...rest);
    const plan = compose(before, float8());
    const { adaLayerNorm, feedForward, gatedAdaLayerNorm, parallelBranches } = before.ops;
    const apart = { adaLayerNorm, feedForward, gatedAdaLayerNorm, parallelBranches };
    const passes = async (ops: Partial<Ops>) => {
      let count = 0;
      using _ = isGpu(device)
        ? watchLaunches(device, ({ name }) => count += Number(name.endsWith(":quantizeRows")))
        : undefined;
      const output = await run(model, { ...plan, ops: { ...plan.ops, ...ops } }, golden);
      return { output, count };
    };
    const [fused, separate] = [await passes({}), await passes(apart)];
    // Next to the middle between two codes a last digit decides, so that they differ about as much as both do from float32.
    const expected = golden.values("out.sample");
    const [error, allowed] = [fused, separate].map(({ output }) => relativeError(output, expected));
    assert.ok(error <= 1.2 * allowed, `relative error ${error}, with separate passes ${allowed}`);
    if (!isGpu(device)) return;
    const { num_layers: doubles, num_single_layers: singles } = model.configs.transformer;
    // In a double block attention's output of each stream. Apart also both norms of each stream and the hidden layer of
    // the image's MLP, in a single block the norm (twice, for two products) and what the output projection reads.
    assert.equal(fused.count, 2 * doubles);
    assert.ok(separate.count >= (2 + 4 + 1) * doubles + 2 * singles, `${separate.count} passes`);
  });

  if (rest.length > 0) return;
  test("06_float8 has no effect on weights that it does not hold", async (device) => {
    using golden = new Golden("components/schnell-like/transformer.safetensors", device);
    using model = await Model.load(goldenPath("schnell-like"), device);
    const before = compose(eagerPlan(device, model.weights), bfloat16);
    const expected = await run(model, before, golden);
    const { ops } = compose(before, float8());
    using again = await Model.load(goldenPath("schnell-like"), device);
    const other = compose(eagerPlan(device, again.weights), bfloat16);
    assertClose(await run(again, { ...other, ops }, golden), expected, 1e-3, "bfloat16");
  });

  test("06_float8 clashes with float32 and with itself", async (device) => {
    using model = await Model.load(goldenPath("dev-like"), device);
    const plan = eagerPlan(device, model.weights);
    const refused = (message: RegExp, ...recipes: Recipe[]) =>
      assert.throws(() => compose(plan, ...recipes), { name: "UsageError", message });
    refused(/06_float8 takes bfloat16 weights, and the transformer's .* is f32/, baselineFp32, float8());
    using second = await Model.load(goldenPath("dev-like"), device);
    const once = compose(eagerPlan(device, second.weights), bfloat16, float8());
    assert.throws(() => compose(once, float8({ granularity: "tensor" })), {
      name: "UsageError",
      message: /applied twice/,
    });
    assert.throws(() => compose(once, baselineFp32), { name: "UsageError", message: /06_float8/ });
  });
}

/** Recipe 06_float8 on the embedded model: defines the test on a device. */
export function float8TinySuite(target: TestDevice): void {
  for (const granularity of GRANULARITIES) {
    testOn(
      target,
      `models/tiny in float8 by ${granularity} draws nearly the picture of bfloat16`,
      async (device) => {
        const options = { prompt: "a red apple", seed: 3 };
        const pictures = [];
        for (const recipes of [[bfloat16], [bfloat16, compile, fuseQkv, float8({ granularity })]]) {
          const { result } = await draw(device, EMBEDDED_MODEL, recipes, options);
          pictures.push(result.images[0].rgb);
        }
        const [expected, actual] = pictures;
        const distance = psnr(actual, expected);
        assert.ok(distance >= 30 && distance < 60, `PSNR ${distance} dB`);
      },
    );
  }
}
