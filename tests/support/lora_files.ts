/** LoRA files in the forms that are about. */
import { float32ToBfloat16 } from "../../ffi/bfloat16.ts";
import { bfloat16ToFloat32 } from "../../ffi/bfloat16.ts";
import { SafetensorsFile, type TensorToWrite } from "../../recipes/base/safetensors.ts";
import { noise } from "./providers.ts";

/** A layer of a LoRA: `scale * up @ down`. */
export interface LoraLayer {
  readonly module: string;
  readonly rank: number;
  readonly inFeatures: number;
  readonly outFeatures: number;
  /** `[rank, in]`, row by row. */
  readonly down: Float32Array;
  /** `[out, rank]`. */
  readonly up: Float32Array;
  readonly scale: number;
}

/** The layers of a golden file, which has its alphas in the metadata (written with PEFT's defaults otherwise). */
export function readLora(path: string): LoraLayer[] {
  using file = SafetensorsFile.open(path);
  const metadata = JSON.parse(file.metadata.get("lora_adapter_metadata")!);
  return file.names.filter((name) => name.endsWith(".lora_A.weight")).map((name) => {
    const module = name.replace(".lora_A.weight", "");
    const [part, ...rest] = module.split(".");
    const up = `${module}.lora_B.weight`;
    const [rank, inFeatures] = file.info(name).shape;
    const [outFeatures] = file.info(up).shape;
    const patterns: Record<string, number> = metadata[`${part}.alpha_pattern`];
    const pattern = Object.keys(patterns).find((one) => rest.join(".").endsWith(one));
    const alpha = pattern === undefined ? metadata[`${part}.lora_alpha`] : patterns[pattern];
    const values = (one: string) => {
      const bits = new Uint16Array(file.bytes(one).slice().buffer);
      const floats = new Float32Array(bits.length);
      bfloat16ToFloat32(bits, floats);
      return floats;
    };
    return { module, rank, inFeatures, outFeatures, down: values(name), up: values(up), scale: alpha / rank };
  });
}

/** Layers of one input as one, whose change of each layer is that layer's own: block by block. */
function joined(module: string, layers: readonly LoraLayer[]): LoraLayer {
  const { inFeatures } = layers[0];
  const rank = layers.reduce((sum, layer) => sum + layer.rank, 0);
  const outFeatures = layers.reduce((sum, layer) => sum + layer.outFeatures, 0);
  const down = new Float32Array(rank * inFeatures);
  const up = new Float32Array(outFeatures * rank);
  let [row, column] = [0, 0];
  for (const layer of layers) {
    down.set(layer.down, column * inFeatures);
    for (let i = 0; i < layer.outFeatures; i++) {
      // Each layer's own scale goes into its part.
      for (let j = 0; j < layer.rank; j++) {
        up[(row + i) * rank + column + j] = layer.up[i * layer.rank + j] * layer.scale;
      }
    }
    row += layer.outFeatures;
    column += layer.rank;
  }
  return { module, rank, inFeatures, outFeatures, down, up, scale: 1 };
}

/** The layers under BFL's names (flux/model.py), those that are one matrix there joined. */
function inBfl(layers: readonly LoraLayer[], doubles: number, singles: number): LoraLayer[] {
  const find = (module: string) => layers.find((layer) => layer.module === `transformer.${module}`)!;
  const named = (module: string, from: readonly string[]) => joined(module, from.map(find));
  const all = [
    named("img_in", ["x_embedder"]),
    named("txt_in", ["context_embedder"]),
    named("time_in.in_layer", ["time_text_embed.timestep_embedder.linear_1"]),
    named("time_in.out_layer", ["time_text_embed.timestep_embedder.linear_2"]),
    named("vector_in.in_layer", ["time_text_embed.text_embedder.linear_1"]),
    named("vector_in.out_layer", ["time_text_embed.text_embedder.linear_2"]),
    named("final_layer.linear", ["proj_out"]),
  ];
  if (layers.some(({ module }) => module.includes("guidance_embedder"))) {
    all.push(
      named("guidance_in.in_layer", ["time_text_embed.guidance_embedder.linear_1"]),
      named("guidance_in.out_layer", ["time_text_embed.guidance_embedder.linear_2"]),
    );
  }
  const last = named("final_layer.adaLN_modulation.1", ["norm_out.linear"]);
  const half = last.up.length / 2;
  all.push({ ...last, up: Float32Array.of(...last.up.subarray(half), ...last.up.subarray(0, half)) });
  for (let i = 0; i < doubles; i++) {
    const from = (names: readonly string[]) => names.map((name) => `transformer_blocks.${i}.${name}`);
    const to = `double_blocks.${i}`;
    all.push(
      named(`${to}.img_mod.lin`, from(["norm1.linear"])),
      named(`${to}.txt_mod.lin`, from(["norm1_context.linear"])),
      named(`${to}.img_attn.qkv`, from(["attn.to_q", "attn.to_k", "attn.to_v"])),
      named(`${to}.txt_attn.qkv`, from(["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"])),
      named(`${to}.img_attn.proj`, from(["attn.to_out.0"])),
      named(`${to}.txt_attn.proj`, from(["attn.to_add_out"])),
      named(`${to}.img_mlp.0`, from(["ff.net.0.proj"])),
      named(`${to}.img_mlp.2`, from(["ff.net.2"])),
      named(`${to}.txt_mlp.0`, from(["ff_context.net.0.proj"])),
      named(`${to}.txt_mlp.2`, from(["ff_context.net.2"])),
    );
  }
  for (let i = 0; i < singles; i++) {
    const from = (names: readonly string[]) => names.map((name) => `single_transformer_blocks.${i}.${name}`);
    all.push(
      named(`single_blocks.${i}.linear1`, from(["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"])),
      named(`single_blocks.${i}.linear2`, from(["proj_out"])),
      named(`single_blocks.${i}.modulation.lin`, from(["norm.linear"])),
    );
  }
  return all;
}

const floats = (name: string, shape: readonly number[], values: Float32Array): TensorToWrite => ({
  name,
  dtype: "f32",
  shape,
  bytes: new Uint8Array(values.slice().buffer),
});

/** As sd-scripts writes them, with alphas; in f16 and f32 by turns. */
export function kohyaNames(layers: readonly LoraLayer[], doubles: number, singles: number): TensorToWrite[] {
  return inBfl(layers, doubles, singles).flatMap(({ module, rank, inFeatures, outFeatures, down, up }, i) => {
    const name = `lora_unet_${module.replaceAll(".", "_")}`;
    // The scale goes into alpha: half of it here, so that up is twice as large.
    const doubled = up.map((value) => value * 2);
    return [
      floats(`${name}.lora_down.weight`, [rank, inFeatures], down),
      floats(`${name}.lora_up.weight`, [outFeatures, rank], doubled),
      i % 2 === 0 ? floats(`${name}.alpha`, [], Float32Array.of(rank / 2)) : {
        name: `${name}.alpha`,
        dtype: "f16",
        shape: [1],
        bytes: new Uint8Array(Float16Array.of(rank / 2).buffer),
      },
    ];
  });
}

/** BFL's names with PEFT's endings, as its own LoRAs and ComfyUI's have them. */
export function bflNames(
  layers: readonly LoraLayer[],
  doubles: number,
  singles: number,
  prefix = "",
): TensorToWrite[] {
  return inBfl(layers, doubles, singles).flatMap(({ module, rank, inFeatures, outFeatures, down, up }) => [
    floats(`${prefix}${module}.lora_A.weight`, [rank, inFeatures], down),
    floats(`${prefix}${module}.lora_B.weight`, [outFeatures, rank], up),
  ]);
}

/** A LoRA in bfloat16 for layers `[module, out, in]` with diffusers' names. */
export function randomLora(
  layers: readonly (readonly [string, number, number])[],
  rank: number,
  seed: number,
): TensorToWrite[] {
  return layers.flatMap(([module, outFeatures, inFeatures], i) => {
    const tensor = (name: string, shape: readonly [number, number], at: number): TensorToWrite => {
      const value = noise(seed + 100 * i + at);
      const bits = new Uint16Array(shape[0] * shape[1]);
      float32ToBfloat16(Float32Array.from(bits, (_, j) => value(j) * 0.2), bits);
      return { name, dtype: "bf16", shape, bytes: new Uint8Array(bits.buffer) };
    };
    return [
      tensor(`transformer.${module}.lora_A.weight`, [rank, inFeatures], 0),
      tensor(`transformer.${module}.lora_B.weight`, [outFeatures, rank], 1),
    ];
  });
}
