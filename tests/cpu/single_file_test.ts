/** Black Forest Labs' and ComfyUI's files, made of the golden models: they draw the same pictures, bit by bit. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { openCpu } from "../../ffi/cpu/open.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { autoencoderWeightShapes } from "../../recipes/base/autoencoder.ts";
import { bflAutoencoderName, bflTransformerPlaces } from "../../recipes/base/bfl_layout.ts";
import { FluxError } from "../../recipes/base/errors.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import type { TensorToWrite } from "../../recipes/base/safetensors.ts";
import { FLUX_AUTOENCODER, type PartFiles, transformerConfigOf } from "../../recipes/base/single_file.ts";
import { transformerConfigSchema, transformerWeightShapes } from "../../recipes/base/transformer.ts";
import {
  bflAutoencoder,
  bflTransformer,
  comfyFloat8,
  type Scaling,
  writePart,
} from "../support/bfl_files.ts";
import { copyFolder, editJson, inFolder } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";
import { runTask } from "../support/programs.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { ownDevice, type TestDevice, testOn } from "../support/test_device.ts";

const CPU: TestDevice = ownDevice("cpu", () => openCpu());
const DEVICES: readonly TestDevice[] = [CPU, TEST_GPU];
const MODELS = ["schnell-like", "dev-like"] as const;

interface Drawn {
  readonly name: string;
  readonly rgb: Uint8Array;
  readonly steps: number;
  readonly warnings: readonly string[];
}

async function draw(
  target: TestDevice,
  folder: string,
  files: PartFiles,
  recipes: readonly Recipe[],
  dtype: "f32" | "bf16" = "bf16",
): Promise<Drawn> {
  const drawn: Drawn[] = [];
  await target.use(async (device) => {
    const warnings: string[] = [];
    using model = await Model.load(folder, device, {
      files,
      dtype,
      onWarning: (text) => warnings.push(text),
    });
    const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), ...recipes));
    const { images: [{ rgb }], settings } = await pipeline.generate({
      prompt: "a cat",
      seed: 1,
      height: 32,
      width: 48,
    });
    drawn.push({ name: model.name, rgb: rgb.slice(), steps: settings.numInferenceSteps, warnings });
  });
  return drawn[0];
}

for (const model of MODELS) {
  Deno.test(`BFL's files of ${model} draw the same picture`, () =>
    inFolder(async (root) => {
      const folder = goldenPath(model);
      const transformer = join(root, "flux1-small.safetensors");
      const vae = join(root, "ae.safetensors");
      await writePart(transformer, bflTransformer(folder));
      await writePart(vae, bflAutoencoder(folder, 4));
      for (const recipes of [[baselineFp32], [bfloat16, fuseQkv]]) {
        const expected = await draw(CPU, folder, {}, recipes);
        const both = await draw(CPU, folder, { transformer, vae }, recipes);
        assert.deepEqual(both.rgb, expected.rgb);
        assert.deepEqual([both.name, both.steps, both.warnings], ["flux1-small", expected.steps, []]);
        assert.deepEqual((await draw(CPU, folder, { vae }, recipes)).rgb, expected.rgb);
      }
    }));
}

Deno.test("BFL's names and rows are those that diffusers converts", () => {
  type Range = [tensor: string, first: number, count: number];
  const golden: { transformer: Record<string, Range[]>; vae: Record<string, string> } = JSON.parse(
    Deno.readTextFileSync(goldenPath("bfl.json")),
  );
  const config = transformerConfigSchema.parse({
    guidance_embeds: true,
    num_layers: 1,
    num_single_layers: 1,
  });
  const shapes = transformerWeightShapes(config);
  const places = Array.from(bflTransformerPlaces(config), ([name, { tensor, rows }]) => {
    const all = rows ?? [[0, shapes.get(name)![0]]];
    return [name, all.map(([first, count]): Range => [tensor, first, count])];
  });
  assert.deepEqual(Object.fromEntries(places), golden.transformer);
  const names = [...autoencoderWeightShapes(FLUX_AUTOENCODER).keys()];
  assert.deepEqual(
    Object.fromEntries(names.map((name) => [name, bflAutoencoderName(name, FLUX_AUTOENCODER)])),
    golden.vae,
  );
});

Deno.test("ComfyUI's prefixes, an all-in-one file, and diffusers' names in one file", () =>
  inFolder(async (root) => {
    const folder = goldenPath("schnell-like");
    const expected = await draw(CPU, folder, {}, [bfloat16]);
    const [transformer, vae] = [bflTransformer(folder), bflAutoencoder(folder, 4)];
    const prefixed = (prefix: string, tensors: TensorToWrite[]) =>
      tensors.map((tensor) => ({ ...tensor, name: prefix + tensor.name }));
    const all = join(root, "all.safetensors");
    await writePart(all, [
      ...prefixed("model.diffusion_model.", transformer),
      ...prefixed("vae.", vae),
      { name: "text_encoders.clip_l.x", dtype: "f32", shape: [1], bytes: new Uint8Array(4) },
    ]);
    const whole = await draw(CPU, folder, { transformer: all, vae: all }, [bfloat16]);
    assert.deepEqual(whole.rgb, expected.rgb);
    assert.deepEqual(whole.warnings, []);
    const plain = join(root, "diffusers.safetensors");
    // The golden model's transformer is in shards.
    const { openComponent } = await import("../../recipes/base/checkpoint.ts");
    using weights = openComponent(folder, "transformer");
    await writePart(plain, weights.names().map((name) => ({ name, ...weights.get(name) })));
    assert.deepEqual((await draw(CPU, folder, { transformer: plain }, [bfloat16])).rgb, expected.rgb);
  }));

for (
  const scaling of ["none", "scale_weight", "weight_scale", "rows"] as const satisfies readonly Scaling[]
) {
  const title = `float8 files with scaling "${scaling}" are the numbers that they stand for`;
  Deno.test(`${title}: pictures`, () =>
    inFolder(async (root) => {
      const folder = goldenPath("dev-like");
      const { float8File, wideFile } = await float8Files(root, folder, scaling);
      const expected = await draw(CPU, folder, { transformer: wideFile }, [bfloat16]);
      const found = await draw(CPU, folder, { transformer: float8File }, [bfloat16]);
      assert.deepEqual(found.rgb, expected.rgb);
      assert.deepEqual(found.warnings, []);
      assert.notDeepEqual(found.rgb, (await draw(CPU, folder, {}, [bfloat16])).rgb, "nothing was quantized");
      if (scaling !== "scale_weight") return;
      // In float32 the products of values and scales are not rounded.
      const exact = await draw(CPU, folder, { transformer: float8File }, [baselineFp32], "f32");
      assert.notDeepEqual(
        exact.rgb,
        (await draw(CPU, folder, { transformer: wideFile }, [baselineFp32])).rgb,
      );
    }));
  for (const target of DEVICES) {
    testOn(target, `${title}: weights`, (device) =>
      inFolder(async (root) => {
        const folder = goldenPath("schnell-like");
        const { float8File, wideFile } = await float8Files(root, folder, scaling);
        using found = await Model.load(folder, device, { files: { transformer: float8File } });
        using expected = await Model.load(folder, device, { files: { transformer: wideFile } });
        assert.deepEqual(found.weights.transformer.names, expected.weights.transformer.names);
        for (const name of found.weights.transformer.names) {
          const [one, other] = [found, expected].map(({ weights }) => weights.transformer.get(name));
          assert.equal(one.dtype, other.dtype, name);
          assert.deepEqual(await device.download(one), await device.download(other), name);
        }
      }));
  }
}

/** A model's transformer as ComfyUI's file, and as one of the numbers that it stands for. */
async function float8Files(root: string, folder: string, scaling: Scaling) {
  const { quantized, widened } = comfyFloat8(bflTransformer(folder), scaling);
  const [float8File, wideFile] = [join(root, "float8.safetensors"), join(root, "wide.safetensors")];
  await writePart(float8File, quantized, "model.diffusion_model.");
  await writePart(wideFile, widened);
  return { float8File, wideFile };
}

Deno.test("the config comes from the file, and the schedule follows it", () =>
  inFolder(async (root) => {
    const transformer = join(root, "flux1-dev.safetensors");
    await writePart(transformer, bflTransformer(goldenPath("dev-like")));
    const { num_layers, num_single_layers, num_attention_heads, guidance_embeds, joint_attention_dim } =
      transformerConfigOf(transformer);
    assert.deepEqual(
      { num_layers, num_single_layers, num_attention_heads, guidance_embeds, joint_attention_dim },
      {
        num_layers: 1,
        num_single_layers: 1,
        num_attention_heads: 1,
        guidance_embeds: true,
        joint_attention_dim: 32,
      },
    );
    const expected = await draw(CPU, goldenPath("dev-like"), {}, [bfloat16]);
    // A folder with text encoders, tokenizers and an autoencoder is enough. dev-like's schedule is FLUX.1-dev's.
    const base = join(root, "base");
    copyFolder(goldenPath("dev-like"), base);
    Deno.removeSync(join(base, "transformer"), { recursive: true });
    Deno.removeSync(join(base, "scheduler"), { recursive: true });
    Deno.removeSync(join(base, "model_index.json"));
    assert.deepEqual((await draw(CPU, base, { transformer }, [bfloat16])).rgb, expected.rgb);
    // As is one whose own transformer is of the other kind, with the other kind's schedule.
    const other = join(root, "other");
    copyFolder(goldenPath("dev-like"), other);
    editJson(join(other, "transformer/config.json"), { guidance_embeds: false });
    editJson(join(other, "scheduler/scheduler_config.json"), { shift: 1, use_dynamic_shifting: false });
    const drawn = await draw(CPU, other, { transformer }, [bfloat16]);
    assert.deepEqual([drawn.rgb, drawn.steps], [expected.rgb, 28]);
  }));

Deno.test("files of another kind, damaged ones and wrong calls say what is wrong", () =>
  inFolder(async (root) => {
    const folder = goldenPath("dev-like");
    const transformer = bflTransformer(folder);
    const files: Record<string, readonly TensorToWrite[]> = {
      ae: bflAutoencoder(folder, 4),
      lora: [{ name: "transformer.x.lora_A.weight", dtype: "f32", shape: [1], bytes: new Uint8Array(4) }],
      t5: [{
        name: "encoder.block.0.layer.0.SelfAttention.q.weight",
        dtype: "f32",
        shape: [1],
        bytes: new Uint8Array(4),
      }],
      other: [{ name: "blocks.0.weight", dtype: "f32", shape: [1], bytes: new Uint8Array(4) }],
      holes: transformer.filter(({ name }) => name !== "double_blocks.0.img_attn.qkv.weight"),
      short: transformer.map((tensor) =>
        tensor.name !== "single_blocks.0.linear1.bias"
          ? tensor
          : { ...tensor, shape: [tensor.shape[0] - 8], bytes: (tensor.bytes as Uint8Array).slice(16) }
      ),
      half: transformer.filter(({ name }) => !name.startsWith("txt_in")),
      flux: transformer,
    };
    const path = (name: string) => join(root, `${name}.safetensors`);
    for (const [name, tensors] of Object.entries(files)) await writePart(path(name), tensors);
    Deno.writeFileSync(path("cut"), Deno.readFileSync(path("flux")).subarray(0, 100_000));
    const refused = async (parts: PartFiles, message: RegExp, hint: RegExp) => {
      using device = await openCpu();
      try {
        (await Model.load(folder, device, { files: parts }))[Symbol.dispose]();
      } catch (error) {
        assert.ok(error instanceof FluxError, String(error));
        assert.match(error.message, message);
        assert.match(error.hint ?? "", hint);
        return;
      }
      assert.fail("it was not refused");
    };
    await refused(
      { transformer: path("ae") },
      /ae.safetensors is no transformer/,
      /autoencoder: give it to --vae/,
    );
    await refused({ transformer: path("lora") }, /is no transformer/, /a LoRA: give it to --lora/);
    await refused({ transformer: path("t5") }, /is no transformer/, /a text encoder/);
    await refused({ transformer: path("other") }, /is no transformer/, /it has weights such as "blocks/);
    await refused({ vae: path("flux") }, /is no autoencoder/, /a transformer: give it to --transformer/);
    await refused({ transformer: path("holes") }, /missing: "transformer_blocks.0.attn.to_q.weight"/, /./);
    await refused({ transformer: path("short") }, /linear1.bias" has \d+ rows, and \d+ are expected/, /./);
    await refused({ transformer: path("half") }, /has no txt_in.weight/, /Download it again/);
    await refused({ transformer: path("cut") }, /truncated/, /damaged/);
    await refused({ transformer: path("none") }, /cannot be opened/, /check the path/);
    await refused({ transformer: path("cut"), vae: path("none") }, /./, /./);

    const run = (...args: string[]) =>
      runTask(
        "generate",
        ...args,
        "--output-file",
        join(root, "a.png"),
        "--cache-dir",
        root,
        "--height",
        "32",
        "--width",
        "32",
      );
    const alone = await run("--transformer", path("flux"));
    assert.match(alone.stderr, /--transformer is a part of a model: the others come from --ckpt/);
    assert.equal(alone.code, 2);
    assert.match(
      (await run("--ckpt", path("flux"))).stderr,
      /is a file, not a model folder\n.*--transformer.*--vae/,
    );
    assert.match(
      (await run("--ckpt", folder, "--vae", path("ae"), "--random-weights")).stderr,
      /--vae has weights/,
    );
    const drawn = await run("--ckpt", folder, "--transformer", path("flux"), "--vae", path("ae"), "--json");
    assert.equal(drawn.code, 0, drawn.stderr);
    assert.equal(JSON.parse(drawn.stdout).model, "flux");
  }));
