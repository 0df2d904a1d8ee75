/** LoRAs merged into plans, against diffusers with PEFT; defines the tests on a device. */
import assert from "node:assert/strict";
import { join } from "node:path";
import type { Device } from "../../ffi/device.ts";
import { OutOfMemoryError } from "../../ffi/errors.ts";
import { isGpu, type KernelArgument } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { dequantizeReference } from "../../kernels/dequantize_float8.ts";
import { layerBoundReference } from "../../kernels/output_scales.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { exportedModel, exporting } from "../../recipes/08_export.ts";
import { fusedBlocks } from "../../recipes/13_fused_blocks.ts";
import { clipPooled, clipTextModel, endOfTextPositions } from "../../recipes/base/clip.ts";
import { type LoraChoice, Loras } from "../../recipes/base/lora.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Plan, type Recipe } from "../../recipes/base/plan.ts";
import { writeSafetensors } from "../../recipes/base/safetensors.ts";
import { scaleName } from "../../recipes/base/weights.ts";
import { assertClose, relativeError } from "./compare.ts";
import { copyFolder, inFolder } from "./folders.ts";
import { bytesOf, Golden, goldenPath, transformerVelocity, valuesOf } from "./golden.ts";
import { bflNames, kohyaNames, randomLora, readLora } from "./lora_files.ts";
import { smallestPiecesFor } from "./smallest_pieces.ts";
import { type TestDevice, testOn } from "./test_device.ts";
import { watchLaunches } from "./watch_launches.ts";

const MODELS = ["schnell-like", "dev-like"] as const;
type GoldenModel = (typeof MODELS)[number];

const lora = (model: GoldenModel, name: string, scale = 1): LoraChoice => ({
  path: goldenPath(`lora/${model}.${name}.safetensors`),
  scale,
});
/** What make_golden.py has merged. */
const CASES = (model: GoldenModel): Readonly<Record<string, readonly LoraChoice[]>> => ({
  one: [lora(model, "a")],
  scaled: [lora(model, "b", -0.7)],
  both: [lora(model, "a", 0.6), lora(model, "b", 1.2)],
});

/** The transformer's output for a golden file's inputs. */
function velocity(model: Model, { weights, ops, device }: Plan, golden: Golden): Promise<Float32Array> {
  return valuesOf(transformerVelocity(golden, device, model.configs.transformer, weights.transformer, ops));
}

/** CLIP's pooled output for those of another. */
function pooled(model: Model, { weights, ops, device }: Plan, golden: Golden): Promise<Float32Array> {
  const config = model.configs.text_encoder;
  const rows = golden.ids("in.ids");
  const ids = Tensor.fromInt32(device, rows.flatMap((row) => [...row]), [rows.length, rows[0].length]);
  const hidden = clipTextModel(config, weights.text_encoder, ops, ids);
  return valuesOf(clipPooled(ops, hidden, endOfTextPositions(config, rows)));
}

export function loraSuite(target: TestDevice, models: readonly GoldenModel[] = MODELS): void {
  const test = (name: string, body: (device: Device) => Promise<void>) =>
    testOn(target, `LoRA: ${name}`, body);
  const open = async (device: Device, folder: string, recipes: readonly Recipe[]) => {
    const model = await Model.load(folder, device, { pieces: smallestPiecesFor(recipes) });
    return { model, plan: compose(eagerPlan(device, model.weights), ...recipes) };
  };

  for (const name of models) {
    test(`${name} equals diffusers with PEFT in float32, and is removed without a trace`, async (device) => {
      using inputs = new Golden(`components/${name}/transformer.safetensors`, device);
      using clip = new Golden(`components/${name}/clip.safetensors`, device);
      using expected = new Golden(`lora/${name}.outputs.safetensors`, device);
      for (const rest of [[], [fuseQkv]]) {
        const { model, plan } = await open(device, goldenPath(name), [baselineFp32, ...rest]);
        using _ = model;
        const before = [await bytesOf(plan.weights.transformer), await bytesOf(plan.weights.text_encoder)];
        const loras = new Loras(model, plan);
        for (const [what, choices] of Object.entries(CASES(name))) {
          await loras.merge(choices);
          assertClose(await velocity(model, plan, inputs), expected.values(`out.${what}`), 1e-4, what);
          if (!expected.names.includes(`out.${what}.pooled`)) continue;
          assertClose(
            await pooled(model, plan, clip),
            expected.values(`out.${what}.pooled`),
            1e-4,
            `${what}, pooled`,
          );
        }
        await loras.merge([]);
        const after = [await bytesOf(plan.weights.transformer), await bytesOf(plan.weights.text_encoder)];
        assert.deepEqual(after, before);
      }
    });

    test(`${name} in bfloat16 is no farther from float32 than diffusers' bfloat16`, async (device) => {
      using inputs = new Golden(`components/${name}/transformer.safetensors`, device);
      using expected = new Golden(`lora/${name}.outputs.safetensors`, device);
      const { model, plan } = await open(device, goldenPath(name), [bfloat16, compile, fuseQkv]);
      using _ = model;
      const loras = new Loras(model, plan);
      for (const [what, choices] of Object.entries(CASES(name))) {
        await loras.merge(choices);
        const exact = expected.values(`out.${what}`);
        const theirs = relativeError(expected.values(`out_bf16.${what}`), exact);
        assertClose(await velocity(model, plan, inputs), exact, 1.1 * theirs, what);
      }
    });
  }

  for (const granularity of ["row", "tensor"] as const) {
    test(`in float8 by ${granularity} it is what a merged checkpoint is quantized to`, (device) =>
      inFolder(async (root) => {
        const name = "schnell-like";
        const choices = CASES(name).both;
        const merged = join(root, "merged");
        await writeMerged(device, name, choices, merged);
        const recipes = [bfloat16, compile, fuseQkv, float8({ granularity })];
        const { model: other, plan: expected } = await open(device, merged, recipes);
        using _ = other;
        const { model, plan } = await open(device, goldenPath(name), recipes);
        using _model = model;
        assert.ok(plan.weights.transformer.has(scaleName("transformer_blocks.0.attn.to_q.weight")));
        const before = await bytesOf(plan.weights.transformer);
        const loras = new Loras(model, plan);
        await loras.merge(choices);
        const found = await bytesOf(plan.weights.transformer);
        assert.notDeepEqual(found, before);
        assert.deepEqual(found, await bytesOf(expected.weights.transformer));
        // A single layer of what is joined, and then nothing.
        const one = join(root, "one.safetensors");
        await writeSafetensors(one, randomLora([["transformer_blocks.0.attn.to_k", 64, 64]], 2, 5));
        await loras.merge([{ path: one, scale: 1 }]);
        assert.notDeepEqual(await bytesOf(plan.weights.transformer), before);
        await loras.merge([]);
        assert.deepEqual(await bytesOf(plan.weights.transformer), before);
      }));
  }

  test("diffusers', Kohya's and BFL's names are the same LoRA", (device) =>
    inFolder(async (root) => {
      const name = models[0];
      const { model, plan } = await open(device, goldenPath(name), [baselineFp32]);
      using _ = model;
      using inputs = new Golden(`components/${name}/transformer.safetensors`, device);
      using expected = new Golden(`lora/${name}.outputs.safetensors`, device);
      const loras = new Loras(model, plan);
      const { doubles, singles } = {
        doubles: model.configs.transformer.num_layers,
        singles: model.configs.transformer.num_single_layers,
      };
      const layers = readLora(CASES(name).one[0].path).filter(({ module }) =>
        !module.startsWith("text_encoder.")
      );
      const files = {
        kohya: kohyaNames(layers, doubles, singles),
        bfl: bflNames(layers, doubles, singles),
        comfy: bflNames(layers, doubles, singles, "diffusion_model."),
      };
      for (const [names, tensors] of Object.entries(files)) {
        const path = join(root, `${names}.safetensors`);
        await writeSafetensors(path, tensors);
        await loras.merge([{ path, scale: 1 }]);
        assertClose(await velocity(model, plan, inputs), expected.values("out.one"), 1e-4, names);
      }
    }));

  test("swapping takes no memory, keeps addresses, and compiles nothing on a GPU", (device) =>
    inFolder(async (root) => {
      const recipes = [bfloat16, compile, fuseQkv, float8()];
      const { model, plan } = await open(device, goldenPath("schnell-like"), recipes);
      using _ = model;
      const loras = new Loras(model, plan);
      const places = () =>
        plan.weights.transformer.names.map((name) => plan.weights.transformer.get(name)).map((
          { memory, offset },
        ) => `${memory.pointer} ${offset}`);
      const layers: [string, number, number][] = [
        ["transformer_blocks.0.attn.to_q", 64, 64],
        ["transformer_blocks.1.ff.net.2", 64, 256],
        ["single_transformer_blocks.0.proj_mlp", 256, 64],
        ["norm_out.linear", 128, 64],
      ];
      const ranks = [16, 1, 3, 40];
      const paths = ranks.map((rank) => join(root, `${rank}.safetensors`));
      for (const [i, rank] of ranks.entries()) {
        await writeSafetensors(paths[i], randomLora(layers, rank, rank));
      }
      await loras.merge([{ path: paths[0], scale: 1 }]);
      await device.synchronize();
      const [before, used] = [places(), device.memoryUse()];
      let compiled = 0;
      using watching = new DisposableStack(); // a device may be the other tests' too
      if (isGpu(device)) {
        const { kernel } = device;
        watching.defer(() => device.kernel = kernel);
        device.kernel = (...args) => {
          compiled++;
          return kernel.apply(device, args);
        };
      }
      for (const path of paths.slice(1)) await loras.merge([{ path, scale: 0.5 }]);
      await loras.merge([]);
      assert.equal(compiled, 0, "kernels were compiled");
      assert.deepEqual(places(), before);
      assert.equal(device.memoryUse().weights, used.weights);
      assert.equal(device.memoryUse().current, used.current);
    }));

  test("pictures follow what is merged, with packed weights and recorded graphs", async (device) => {
    const { model, plan } = await open(device, goldenPath("schnell-like"), [bfloat16, compile, fuseQkv]);
    using _ = model;
    const pipeline = new FluxPipeline(model, plan);
    let recorded = 0;
    using watching = new DisposableStack();
    if (isGpu(device)) {
      const { record } = device;
      watching.defer(() => device.record = record);
      device.record = (body) => {
        recorded++;
        return record.call(device, body);
      };
    }
    const draw = async () => {
      const { images: [{ rgb }] } = await pipeline.generate({
        prompt: "a cat",
        seed: 1,
        height: 32,
        width: 32,
        numInferenceSteps: 2,
      });
      return rgb.toBase64();
    };
    const plain = await draw();
    assert.equal(await draw(), plain);
    const graphs = recorded;
    const loras = new Loras(model, plan);
    const pictures = [];
    for (const choices of Object.values(CASES("schnell-like"))) {
      await loras.merge(choices);
      pictures.push(await draw());
    }
    assert.equal(new Set([plain, ...pictures]).size, 4);
    await loras.merge(CASES("schnell-like").one);
    assert.equal(await draw(), pictures[0]);
    await loras.merge([]);
    assert.equal(await draw(), plain);
    assert.equal(recorded, graphs, "graphs were recorded again");
  });

  test("random weights and exported ones have originals too", (device) =>
    inFolder(async (root) => {
      const folder = goldenPath("schnell-like");
      const recipes = [bfloat16, compile, fuseQkv, float8(), exporting];
      const check = async (model: Model, plan: Plan) => {
        const before = await bytesOf(plan.weights.transformer);
        const loras = new Loras(model, plan);
        await loras.merge(CASES("schnell-like").both);
        const merged = await bytesOf(plan.weights.transformer);
        assert.notDeepEqual(merged, before);
        await loras.merge([]);
        assert.deepEqual(await bytesOf(plan.weights.transformer), before);
        loras.release();
        return merged;
      };
      using random = await Model.random(folder, device, "bf16", 3);
      await check(random, compose(eagerPlan(device, random.weights), ...recipes.slice(0, -1)));
      if (!isGpu(device)) return;
      const flags = { ckpt: folder, cacheDir: root, useCachedModel: true } as const;
      const loaded = await Model.load(folder, device);
      const plan = compose(eagerPlan(device, loaded.weights), ...recipes);
      await exportedModel(flags, recipes, device, () => {})!.write(plan);
      const expected = await check(loaded, plan);
      loaded[Symbol.dispose]();
      using model = await exportedModel(flags, recipes, device, () => {})!.load();
      assert.deepEqual(await check(model!, compose(eagerPlan(device, model!.weights), ...recipes)), expected);
    }));

  test("without room for originals they are read again, and it is the same", async (device) => {
    const folder = goldenPath("schnell-like");
    const recipes = [bfloat16, fuseQkv, float8()];
    const results = [];
    for (const room of [true, false]) {
      const { model, plan } = await open(device, folder, recipes);
      using _ = model;
      const notes: string[] = [];
      const before = await bytesOf(plan.weights.transformer);
      const loras = new Loras(model, plan, (note) => notes.push(note));
      const { placeAll } = device;
      let calls = 0;
      device.placeAll = (...args) => {
        // The first call brings the factors, the second one the originals of all.
        if (!room && ++calls === 2) return Promise.reject(new OutOfMemoryError("full"));
        return placeAll.apply(device, args);
      };
      try {
        const used = device.memoryUse().weights;
        await loras.merge(CASES("schnell-like").both);
        results.push(await bytesOf(plan.weights.transformer));
        await loras.merge([]);
        assert.deepEqual(await bytesOf(plan.weights.transformer), before);
        assert.equal(notes.length, room ? 0 : 1);
        // What earlier tests have left to the garbage collector may go meanwhile.
        if (!room && isGpu(device)) assert.ok(device.memoryUse().weights <= used, "nothing more is kept");
      } finally {
        loras.release();
        device.placeAll = placeAll;
      }
    }
    assert.deepEqual(results[1], results[0]);
  });

  test("13_fused_blocks' bounds follow the weights", async (device) => {
    if (!isGpu(device)) return;
    using own = new DisposableStack();
    const { architecture } = device.limits;
    own.defer(() => Object.assign(device.limits, { architecture }));
    Object.assign(device.limits, { architecture: "sm_90a" }); // the recipe is made there, and nothing is drawn
    const seen = new Map<Tensor, KernelArgument[]>();
    own.use(watchLaunches(device, ({ name }, _size, args) => {
      if (name.endsWith(":layerBound")) seen.set(args[0] as Tensor, [...args]);
    }));
    const { model, plan } = await open(device, goldenPath("schnell-like"), [
      bfloat16,
      compile,
      fuseQkv,
      float8(),
      fusedBlocks,
    ]);
    using _ = model;
    assert.ok(plan.weights.transformer.has(scaleName("transformer_blocks.0.ff_context.net.2.weight")));
    const bounds = [...seen.keys()];
    assert.equal(bounds.length, 2 * 4 + 2 * 2); // v and up of both streams, v and the MLP of single blocks
    const check = async () => {
      const found: number[] = [];
      for (const bound of bounds) {
        const [, values, scales, bias] = seen.get(bound)! as Tensor[];
        const { buffer } = await device.download(scales);
        const codes = await device.download(values);
        const [, columns] = values.shape;
        const wide = new Float32Array(codes.length);
        dequantizeReference(wide, codes, new Float32Array(buffer), columns);
        const expected = layerBoundReference(wide, columns, await valuesOf(bias));
        const actual = await valuesOf(bound);
        assertClose(actual, expected, 1e-5, `${values}`);
        found.push(...actual);
      }
      return found;
    };
    const before = await check();
    const loras = new Loras(model, plan);
    await loras.merge([lora("schnell-like", "a", 3)]);
    const larger = await check();
    assert.ok(larger.some((value, i) => value > before[i]));
    await loras.merge([]);
    assert.deepEqual(await check(), before, "bounds only grew");
  });

  test("what fails in the middle leaves the model's own weights", async (device) => {
    const { model, plan } = await open(device, goldenPath("schnell-like"), [bfloat16, fuseQkv]);
    using _ = model;
    const before = await bytesOf(plan.weights.transformer);
    const loras = new Loras(model, plan);
    const { matmul } = device;
    let left = 5;
    device.matmul = (product) => {
      if (left-- === 0) throw new OutOfMemoryError("full");
      matmul.call(device, product);
    };
    await assert.rejects(loras.merge(CASES("schnell-like").one), OutOfMemoryError);
    device.matmul = matmul;
    assert.deepEqual(await bytesOf(plan.weights.transformer), before);
    await loras.merge(CASES("schnell-like").one);
    assert.notDeepEqual(await bytesOf(plan.weights.transformer), before);
  });
}

/** Writes a model's folder with LoRAs merged into its bfloat16 weights. */
async function writeMerged(device: Device, name: GoldenModel, choices: readonly LoraChoice[], to: string) {
  copyFolder(goldenPath(name), to);
  using model = await Model.load(goldenPath(name), device);
  const plan = compose(eagerPlan(device, model.weights), bfloat16);
  await new Loras(model, plan).merge(choices);
  for (const component of ["transformer", "text_encoder"] as const) {
    const weights = plan.weights[component];
    const tensors = [];
    for (const one of weights.names) {
      const { dtype, shape } = weights.get(one);
      if (dtype !== "bf16") throw new TypeError(dtype);
      tensors.push({ name: one, dtype, shape, bytes: await device.download(weights.get(one)) });
    }
    const base = component === "transformer" ? "diffusion_pytorch_model" : "model";
    await writeSafetensors(join(to, component, `${base}.safetensors`), tensors);
  }
}
