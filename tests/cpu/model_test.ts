/** Opening a model folder: shards, dtypes, and one error that says all that is wrong. */
import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { openCpu } from "../../ffi/cpu/open.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { CheckpointError } from "../../recipes/base/component_weights.ts";
import { ModelError } from "../../recipes/base/errors.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { SafetensorsFile, type TensorToWrite, writeSafetensors } from "../../recipes/base/safetensors.ts";
import { editJson, withModelCopy } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";

/** The pixels of a small picture by the model in `folder`. */
async function draw(folder: string): Promise<Uint8Array> {
  using device = await openCpu();
  using model = await Model.load(folder, device, { onWarning: assert.fail });
  const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), baselineFp32));
  const options = { prompt: "a red apple", seed: 1, height: 32, width: 32, numInferenceSteps: 1 };
  return (await pipeline.generate(options)).images[0].rgb;
}

/** The ModelError that loading `folder` must throw. */
async function loadError(folder: string): Promise<ModelError> {
  using device = await openCpu();
  try {
    using _ = await Model.load(folder, device);
  } catch (error) {
    assert.ok(error instanceof ModelError, Deno.inspect(error));
    return error;
  }
  assert.fail("the model was loaded");
}

/** Path and tensors (copied) of every part's weights that are one file. */
function weightFiles(folder: string): { path: string; tensors: TensorToWrite[] }[] {
  const names = ["text_encoder/model", "text_encoder_2/model"].concat(
    ["transformer", "vae"].map((part) => `${part}/diffusion_pytorch_model`),
  );
  return names.map((name) => join(folder, `${name}.safetensors`)).filter((path) => existsSync(path)).map(
    (path) => {
      using file = SafetensorsFile.open(path);
      const tensors = file.names.map((name) => ({
        name,
        ...file.info(name),
        bytes: file.bytes(name).slice(),
      }));
      return { path, tensors };
    },
  );
}

Deno.test("encoders, transformer and autoencoder in shards give the picture of single files", () =>
  withModelCopy("dev-like", async (folder) => {
    const files = weightFiles(folder);
    assert.equal(files.length, 4);
    for (const { path, tensors } of files) {
      const weightMap: Record<string, string> = {};
      for (const shard of [0, 1, 2]) {
        const part = tensors.filter((_, i) => i % 3 === shard); // layers are torn apart
        const name = path.split("/").at(-1)!.replace(".", `-0000${shard + 1}-of-00003.`);
        await writeSafetensors(join(path, "..", name), part);
        for (const tensor of part) weightMap[tensor.name] = name;
      }
      Deno.writeTextFileSync(`${path}.index.json`, JSON.stringify({ metadata: {}, weight_map: weightMap }));
      Deno.removeSync(path);
    }
    assert.deepEqual(await draw(folder), await draw(goldenPath("dev-like")));
  }));

Deno.test("a float16 checkpoint gives the picture of its numbers in float32", () =>
  withModelCopy("dev-like", async (folder) => {
    const files = weightFiles(folder);
    const inFloat16 = files.map(({ tensors }) =>
      tensors.map((tensor) => Float16Array.from(floatsOf(tensor)))
    );
    const write = async (dtype: "f16" | "f32") => {
      for (const [i, { path, tensors }] of files.entries()) {
        const written = tensors.map(({ name, shape }, j): TensorToWrite => {
          const values = inFloat16[i][j];
          const { buffer } = dtype === "f16" ? values : Float32Array.from(values);
          return { name, dtype, shape, bytes: new Uint8Array(buffer) };
        });
        await writeSafetensors(path, written);
      }
    };
    await write("f16");
    const picture = await draw(folder);
    await write("f32");
    assert.deepEqual(picture, await draw(folder));
    assert.ok(new Set(picture).size > 20, "the picture is flat");
  }));

/** The values of a bfloat16 tensor, which is the upper half of a float32. */
function floatsOf({ dtype, bytes }: TensorToWrite): Float32Array {
  assert.ok(dtype === "bf16" && bytes instanceof Uint8Array);
  return new Float32Array(
    Uint32Array.from(new Uint16Array(bytes.slice().buffer), (half) => half << 16).buffer,
  );
}

Deno.test("what is wrong with the weights of several parts is one error", () =>
  withModelCopy("schnell-like", async (folder) => {
    const shard = "diffusion_pytorch_model-00002-of-00003.safetensors";
    Deno.removeSync(join(folder, "transformer", shard));
    const alone = await loadError(folder);
    assert.ok(alone instanceof CheckpointError && alone.folder.endsWith("/transformer"));
    assert.deepEqual(alone.problems, [shard]);
    const vae = join(folder, "vae", "diffusion_pytorch_model.safetensors");
    const [{ tensors }] = weightFiles(folder).filter(({ path }) => path === vae);
    await writeSafetensors(vae, tensors.filter(({ name }) => name !== "decoder.conv_in.bias"));
    Deno.truncateSync(join(folder, "text_encoder", "model.safetensors"), 1000);
    Deno.removeSync(join(folder, "text_encoder_2", "model.safetensors"));
    const error = await loadError(folder);
    assert.ok(error instanceof CheckpointError && error.hint);
    assert.equal(error.folder, Deno.realPathSync(folder));
    assert.equal(error.problems.length, 4);
    for (
      const part of [
        shard,
        '"decoder.conv_in.bias"',
        "text_encoder/model.safetensors",
        "text_encoder_2 has no",
      ]
    ) {
      assert.ok(error.message.includes(part), error.message);
    }
  }));

Deno.test("configs that cannot work are refused when loaded, by file and field", async () => {
  const cases: [file: string, changes: Record<string, unknown>, message: RegExp][] = [
    ["text_encoder/config.json", { num_attention_heads: 3 }, /num_attention_heads: must divide hidden_size/],
    ["text_encoder/config.json", { num_hidden_layers: 1e9 }, /num_hidden_layers: /],
    ["text_encoder_2/config.json", { num_layers: 1e9 }, /num_layers: /],
    ["text_encoder_2/config.json", { relative_attention_num_buckets: 3 }, /relative_attention_num_buckets: /],
    [
      "text_encoder_2/config.json",
      { relative_attention_max_distance: 8 },
      /relative_attention_max_distance: /,
    ],
    ["transformer/config.json", { num_layers: 1e9 }, /num_layers: /],
    ["transformer/config.json", { num_single_layers: 1e9 }, /num_single_layers: /],
    ["vae/config.json", { layers_per_block: 1e8 }, /layers_per_block: /],
    ["vae/config.json", { block_out_channels: new Array(40).fill(4) }, /block_out_channels: /],
    ["vae/config.json", { scaling_factor: 0 }, /scaling_factor: /],
    ["vae/config.json", { scaling_factor: 1e-300 }, /scaling_factor: /],
    ["vae/config.json", { shift_factor: 1e300 }, /shift_factor: /],
    ["scheduler/scheduler_config.json", { use_karras_sigmas: true }, /use_karras_sigmas: only false/],
    ["model_index.json", { _class_name: "\x1b[2J" }, /_class_name: "\\u\{1b\}\[2J" is no FLUX\.1/],
  ];
  for (const [file, changes, message] of cases) {
    await withModelCopy("schnell-like", async (folder) => {
      editJson(join(folder, file), changes);
      const error = await loadError(folder);
      assert.match(error.message, message);
      assert.ok(error.message.startsWith(join(folder, file)), error.message);
    });
  }
});

Deno.test("tokenizers that give more than their encoders take are refused", () =>
  withModelCopy("schnell-like", async (folder) => {
    editJson(join(folder, "tokenizer", "tokenizer_config.json"), { model_max_length: 78 });
    editJson(join(folder, "text_encoder", "config.json"), { vocab_size: 713 });
    editJson(join(folder, "text_encoder_2", "config.json"), { vocab_size: 460 });
    const { message } = await loadError(folder);
    assert.match(message, /tokenizer model_max_length is 78, expected at most 77/);
    assert.match(message, /tokenizer's largest id is 713, expected at most 712/);
    assert.match(message, /tokenizer_2's largest id is 460, expected at most 459/);
  }));
