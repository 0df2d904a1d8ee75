/** LoRAs on the CPU and on the emulated GPU, and as a user gives them. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { openCpu } from "../../ffi/cpu/open.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { FluxError } from "../../recipes/base/errors.ts";
import { readPngText } from "../../recipes/base/image.ts";
import { Loras } from "../../recipes/base/lora.ts";
import { Model } from "../../recipes/base/model.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { type TensorToWrite, writeSafetensors } from "../../recipes/base/safetensors.ts";
import { inFolder } from "../support/folders.ts";
import { bytesOf, goldenPath } from "../support/golden.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { randomLora } from "../support/lora_files.ts";
import { loraSuite } from "../support/lora_suite.ts";
import { runTask } from "../support/programs.ts";
import { ownDevice } from "../support/test_device.ts";

const MODEL = goldenPath("schnell-like");
const LAYER = ["transformer_blocks.0.attn.to_q", 64, 64] as const;

loraSuite(ownDevice("cpu", () => openCpu()));
loraSuite(TEST_GPU, ["schnell-like"]);

Deno.test("LoRA: on the CPU another plan of the same model keeps the model's own weights", async () => {
  using device = await openCpu();
  using model = await Model.load(goldenPath("dev-like"), device); // bfloat16: both plans share the mapped file
  const [one, other] = [1, 2].map(() => compose(eagerPlan(device, model.weights), bfloat16));
  const before = await bytesOf(other.weights.transformer);
  const file = goldenPath("lora/dev-like.a.safetensors");
  await new Loras(model, one).merge([{ path: file, scale: 1 }]);
  assert.notDeepEqual(await bytesOf(one.weights.transformer), before);
  assert.deepEqual(await bytesOf(other.weights.transformer), before);
  assert.deepEqual(await bytesOf(model.weights.transformer), before);
});

Deno.test("LoRA: old names of diffusers, adapters' names and alphas", () =>
  inFolder(async (root) => {
    using device = await openCpu();
    using model = await Model.load(MODEL, device);
    const plan = compose(eagerPlan(device, model.weights), bfloat16);
    const loras = new Loras(model, plan);
    const lora = randomLora([LAYER], 4, 1);
    const path = join(root, "a.safetensors");
    const merge = async (rename: (name: string) => string, extra: TensorToWrite[] = [], scale = 1) => {
      await writeSafetensors(path, [
        ...lora.map((tensor) => ({ ...tensor, name: rename(tensor.name) })),
        ...extra,
      ]);
      await loras.merge([{ path, scale }]);
      return (await bytesOf(plan.weights.transformer)).get(`${LAYER[0]}.weight`)!;
    };
    const expected = await merge((name) => name);
    const half = await merge((name) => name, [], 0.5);
    assert.notEqual(half, expected);
    const ends = (down: string, up: string) => (name: string) =>
      name.replace(/\.lora_A\.weight$/, down).replace(/\.lora_B\.weight$/, up);
    const forms = [
      ends(".lora_A.default.weight", ".lora_B.default.weight"),
      ends(".lora.down.weight", ".lora.up.weight"),
      (name: string) =>
        ends(".lora_down.weight", ".lora_up.weight")(name.replace("transformer.", "base_model.model.")),
      (name: string) =>
        ends("_lora.down.weight", "_lora.up.weight")(name.replace("attn.to_q", "attn.processor.to_q")),
      (name: string) =>
        ends(".lora_down.weight", ".lora_up.weight")(
          name.replace(
            "transformer.transformer_blocks.0.attn.to_q",
            "lora_transformer_transformer_blocks_0_attn_to_q",
          ),
        ),
    ];
    for (const form of forms) assert.equal(await merge(form), expected, form(lora[0].name));
    // An alpha of half the rank is a scale of one half.
    for (const dtype of ["f32", "f16", "bf16", "i64"] as const) {
      const bytes = {
        f32: new Uint8Array(Float32Array.of(2).buffer),
        f16: new Uint8Array(Float16Array.of(2).buffer),
        bf16: new Uint8Array(Uint16Array.of(0x4000).buffer),
        i64: new Uint8Array(BigInt64Array.of(2n).buffer),
      }[dtype];
      const alpha = {
        name: `transformer.${LAYER[0]}.alpha`,
        dtype,
        shape: dtype === "f16" ? [1] : [],
        bytes,
      };
      assert.equal(await merge((name) => name, [alpha]), half, dtype);
    }
    // As PEFT saves an adapter, with its config beside.
    const adapter = join(root, "adapter_model.safetensors");
    const config = join(root, "adapter_config.json");
    const peft = lora.map((tensor) => ({
      ...tensor,
      name: tensor.name.replace("transformer.", "base_model.model."),
    }));
    await writeSafetensors(adapter, peft);
    const merged = async (settings?: object) => {
      if (settings !== undefined) Deno.writeTextFileSync(config, JSON.stringify(settings));
      await loras.merge([{ path: adapter, scale: 1 }]);
      return (await bytesOf(plan.weights.transformer)).get(`${LAYER[0]}.weight`)!;
    };
    assert.equal(await merged(), expected);
    assert.equal(await merged({ r: 4, lora_alpha: 2 }), half);
    assert.equal(await merged({ r: 4, lora_alpha: 1, use_rslora: true }), half);
    assert.equal(await merged({ r: 4, lora_alpha: 9, alpha_pattern: { "attn.to_q": 2 } }), half);
    assert.notEqual(await merged({ r: 4, lora_alpha: 9, alpha_pattern: { "attn.to_k": 2 } }), half);
    await assert.rejects(
      merged({ lora_alpha: 4, use_dora: true }),
      /adapter_config.json: use_dora: DoRA is not merged/,
    );
    // 1 x 1 convolutions are matrices.
    const convolution = lora.map((tensor) => ({ ...tensor, shape: [...tensor.shape, 1, 1] }));
    await writeSafetensors(path, convolution);
    await loras.merge([{ path, scale: 1 }]);
    assert.equal((await bytesOf(plan.weights.transformer)).get(`${LAYER[0]}.weight`), expected);
  }));

Deno.test("LoRA: text encoders by diffusers' and Kohya's names", () =>
  inFolder(async (root) => {
    using device = await openCpu();
    const path = join(root, "a.safetensors");
    for (const folder of ["schnell-like", "dev-like"]) { // CLIP's names with a prefix, and without
      using model = await Model.load(goldenPath(folder), device);
      const plan = compose(eagerPlan(device, model.weights), bfloat16);
      const loras = new Loras(model, plan);
      const [size] = plan.weights.text_encoder.get(
        plan.weights.text_encoder.names.find((name) => name.endsWith("layers.1.self_attn.q_proj.weight"))!,
      ).shape;
      const [rows, columns] =
        plan.weights.text_encoder_2.get("encoder.block.1.layer.0.SelfAttention.k.weight").shape;
      const clip = randomLora([["encoder.layers.1.self_attn.q_proj", size, size]], 2, 1);
      const t5 = randomLora([["encoder.block.1.layer.0.SelfAttention.k", rows, columns]], 2, 9);
      const before = [await bytesOf(plan.weights.text_encoder), await bytesOf(plan.weights.text_encoder_2)];
      const results = new Set<string>();
      for (
        const [clipName, t5Name] of [
          [
            "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
            "text_encoder_2.encoder.block.1.layer.0.SelfAttention.k",
          ],
          [
            "text_encoder.encoder.layers.1.self_attn.q_proj",
            "text_encoder_2.encoder.block.1.layer.0.SelfAttention.k",
          ],
          [
            "lora_te1_text_model_encoder_layers_1_self_attn_q_proj",
            "lora_te3_encoder_block_1_layer_0_SelfAttention_k",
          ],
        ]
      ) {
        const named = (tensors: readonly TensorToWrite[], module: string) =>
          tensors.map((tensor) => ({
            ...tensor,
            name: module + tensor.name.match(/\.lora_[AB]\.weight$/)![0],
          }));
        await writeSafetensors(path, [...named(clip, clipName), ...named(t5, t5Name)]);
        await loras.merge([{ path, scale: 1 }]);
        const found = [await bytesOf(plan.weights.text_encoder), await bytesOf(plan.weights.text_encoder_2)];
        found.forEach((bytes, i) => {
          const changed = [...bytes.keys()].filter((name) => bytes.get(name) !== before[i].get(name));
          assert.equal(changed.length, 1, `${folder}: ${changed}`);
        });
        results.add(JSON.stringify(found.map((bytes) => [...bytes])));
      }
      assert.equal(results.size, 1);
    }
  }));

Deno.test("LoRA: files that do not fit are refused, and nothing changes", () =>
  inFolder(async (root) => {
    using device = await openCpu();
    using model = await Model.load(MODEL, device);
    const plan = compose(eagerPlan(device, model.weights), bfloat16);
    const before = await bytesOf(plan.weights.transformer);
    const loras = new Loras(model, plan);
    const path = join(root, "a.safetensors");
    const f32 = (name: string, shape: number[]): TensorToWrite => ({
      name,
      dtype: "f32",
      shape,
      bytes: new Uint8Array(4 * shape.reduce((a, b) => a * b, 1)),
    });
    const refused = async (tensors: readonly TensorToWrite[], message: RegExp, metadata = {}) => {
      await writeSafetensors(path, tensors, metadata);
      await assert.rejects(loras.merge([{ path, scale: 1 }]), (error) => {
        assert.ok(error instanceof FluxError, String(error));
        assert.match(error.message, message);
        assert.ok(error.message.includes("a.safetensors"), error.message);
        return true;
      });
      assert.deepEqual(await bytesOf(plan.weights.transformer), before);
    };
    const [down, up] = randomLora([LAYER], 4, 1);
    const other = randomLora([["transformer_blocks.7.attn.to_q", 64, 64]], 4, 1);
    await refused(other, /the model has no layer "transformer.transformer_blocks.7.attn.to_q"/);
    await refused([down, up, ...other], /the model has no layer/);
    await refused([down], /half of "transformer.transformer_blocks.0.attn.to_q" is missing/);
    await refused([down, { ...up, shape: [32, 8] }], /which make no product of matrices/);
    await refused(randomLora([[LAYER[0], 64, 32]], 4, 1), /is for \[64, 32\], and the model's is \[64, 64\]/);
    await refused([f32("x_embedder.weight", [1])], /is no LoRA: it has weights such as "x_embedder.weight"/);
    await refused([down, up, f32("surprise", [1])], /"surprise" is no part of a LoRA/);
    const module = `transformer.${LAYER[0]}`;
    await refused([down, up, f32(`${module}.dora_scale`, [64])], /has DoRA .* which is not merged here/);
    await refused([f32(`${module}.hada_w1_a`, [64, 4])], /LoHa/);
    await refused([f32(`${module}.lokr_w1`, [4, 4])], /LoKr/);
    await refused([down, up, f32(`${module}.lora_B.bias`, [64])], /whole differences/);
    await refused([down, up, f32(`${module}.alpha`, [2])], /a number is expected/);
    const infinite = new Uint8Array(Float32Array.of(Infinity).buffer);
    await refused([down, up, { ...f32(`${module}.alpha`, []), bytes: infinite }], /has an alpha of Infinity/);
    await refused([down, up], /lora_adapter_metadata is no JSON object/, { lora_adapter_metadata: "{" });
    const dora = JSON.stringify({ "transformer.use_dora": true });
    await refused([down, up], /DoRA is not merged here/, { lora_adapter_metadata: dora });
    const bytes = new Uint8Array(64 * 4);
    await refused([{ ...down, dtype: "i8", bytes }, up], /make no product/);
    Deno.writeFileSync(path, Deno.readFileSync(path).subarray(0, 300));
    await assert.rejects(loras.merge([{ path, scale: 1 }]), { name: "SafetensorsError" });
    const both = [0, 1].map(() => loras.merge([]));
    await assert.rejects(both[1], { name: "UsageError", message: /being merged already/ });
    await both[0];
    // One file that fits beside one that does not.
    const good = join(root, "good.safetensors");
    await writeSafetensors(good, [down, up]);
    await assert.rejects(loras.merge([{ path: good, scale: 1 }, { path, scale: 1 }]), {
      name: "SafetensorsError",
    });
    assert.deepEqual(await bytesOf(plan.weights.transformer), before);
  }));

Deno.test("gen_image --lora merges files by their scales, and says so in the picture", () =>
  inFolder(async (root) => {
    const output = join(root, "a.png");
    const file = join(root, "style:1.safetensors"); // a colon in a name is no scale
    Deno.copyFileSync(goldenPath("lora/schnell-like.a.safetensors"), file);
    const args = [
      "--ckpt",
      MODEL,
      "--height",
      "32",
      "--width",
      "32",
      "--output-file",
      output,
      "--cache-dir",
      root,
    ];
    const draw = async (...more: string[]) => {
      const result = await runTask("generate", ...args, ...more, "--json");
      assert.equal(result.code, 0, result.stderr);
      const png = await Deno.readFile(output);
      return { png: png.toBase64(), text: readPngText(png).parameters, json: JSON.parse(result.stdout) };
    };
    const plain = await draw();
    assert.ok(!plain.text.includes("LoRA"));
    const one = await draw("--lora", file);
    const two = await draw(
      "--lora",
      `${file}:0.6`,
      "--lora",
      `${goldenPath("lora/schnell-like.b.safetensors")}:-1.2`,
    );
    assert.equal(new Set([plain.png, one.png, two.png]).size, 3);
    assert.match(one.text, /LoRA: "style:1.safetensors:1"/);
    assert.match(two.text, /LoRA: "style:1.safetensors:0.6 schnell-like.b.safetensors:-1.2"/);
    assert.deepEqual(two.json.loras.map(({ scale }: { scale: number }) => scale), [0.6, -1.2]);
    for (const wrong of ["style.bin", `${file}:big`, ":1", ""]) {
      const result = await runTask("generate", ...args, "--lora", wrong);
      assert.equal(result.code, 2, wrong);
      assert.match(result.stderr, /--lora.*(safetensors|Give a number|Give a path)/, wrong);
    }
    const missing = await runTask("generate", ...args, "--lora", join(root, "none.safetensors"));
    assert.equal(missing.code, 1);
    assert.match(missing.stderr, /gen_image: .*none.safetensors: cannot be opened/);
  }));
