/** Writes a golden model's transformer and autoencoder as Black Forest Labs' and ComfyUI's files have them. */
import { openComponent } from "../../recipes/base/checkpoint.ts";
import type { ComponentWeights } from "../../recipes/base/component_weights.ts";
import { bfloat16ToFloat32, float32ToBfloat16 } from "../../ffi/bfloat16.ts";
import { float32ToFloat8 } from "../../ffi/float8.ts";
import { type TensorToWrite, writeSafetensors } from "../../recipes/base/safetensors.ts";

/** A weight, or several behind one another as one; from which of diffusers' weights. */
type Recipe = readonly [name: string, from: readonly string[]];

/** BFL's double block, by its modules (flux/modules/layers.py, DoubleStreamBlock). */
function doubleBlock(i: number): Recipe[] {
  const to = `double_blocks.${i}`;
  const from = `transformer_blocks.${i}`;
  const layers: [string, string[]][] = [
    ["img_mod.lin", ["norm1.linear"]],
    ["img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]],
    ["img_attn.proj", ["attn.to_out.0"]],
    ["img_mlp.0", ["ff.net.0.proj"]],
    ["img_mlp.2", ["ff.net.2"]],
    ["txt_mod.lin", ["norm1_context.linear"]],
    ["txt_attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]],
    ["txt_attn.proj", ["attn.to_add_out"]],
    ["txt_mlp.0", ["ff_context.net.0.proj"]],
    ["txt_mlp.2", ["ff_context.net.2"]],
  ];
  const norms: [string, string][] = [
    ["img_attn.norm.query_norm.scale", "attn.norm_q.weight"],
    ["img_attn.norm.key_norm.scale", "attn.norm_k.weight"],
    ["txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"],
    ["txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"],
  ];
  return [
    ...layers.flatMap(([name, modules]) =>
      linear(`${to}.${name}`, modules.map((module) => `${from}.${module}`))
    ),
    ...norms.map(([name, weight]): Recipe => [`${to}.${name}`, [`${from}.${weight}`]]),
  ];
}

/** SingleStreamBlock. */
function singleBlock(i: number): Recipe[] {
  const to = `single_blocks.${i}`;
  const from = `single_transformer_blocks.${i}`;
  const inputs = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"].map((module) => `${from}.${module}`);
  return [
    ...linear(`${to}.linear1`, inputs),
    ...linear(`${to}.linear2`, [`${from}.proj_out`]),
    ...linear(`${to}.modulation.lin`, [`${from}.norm.linear`]),
    [`${to}.norm.query_norm.scale`, [`${from}.attn.norm_q.weight`]],
    [`${to}.norm.key_norm.scale`, [`${from}.attn.norm_k.weight`]],
  ];
}

function linear(name: string, modules: readonly string[]): Recipe[] {
  return ["weight", "bias"].map((kind) => [`${name}.${kind}`, modules.map((module) => `${module}.${kind}`)]);
}

function joined(weights: ComponentWeights, [name, from]: Recipe): TensorToWrite {
  const parts = from.map((one) => weights.get(one));
  const [{ dtype, shape: [, ...rest] }] = parts;
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.bytes.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part.bytes, at);
    at += part.bytes.length;
  }
  return { name, dtype, shape: [parts.reduce((sum, { shape: [rows] }) => sum + rows, 0), ...rest], bytes };
}

/** The transformer of a model's folder in `flux1-*.safetensors`'s layout. */
export function bflTransformer(folder: string): TensorToWrite[] {
  using weights = openComponent(folder, "transformer");
  const count = (name: string) =>
    new Set(weights.names().filter((one) => one.startsWith(`${name}.`)).map((one) => one.split(".")[1])).size;
  const blocks = <T>(name: string, block: (i: number) => T[]) =>
    Array.from({ length: count(name) }, (_, i) => block(i)).flat();
  const guided = weights.has("time_text_embed.guidance_embedder.linear_1.weight");
  const recipes: Recipe[] = [
    ...linear("img_in", ["x_embedder"]),
    ...linear("txt_in", ["context_embedder"]),
    ...[["time_in", "timestep"], ["vector_in", "text"], ...(guided ? [["guidance_in", "guidance"]] : [])]
      .flatMap((
        [to, from],
      ) => [
        ...linear(`${to}.in_layer`, [`time_text_embed.${from}_embedder.linear_1`]),
        ...linear(`${to}.out_layer`, [`time_text_embed.${from}_embedder.linear_2`]),
      ]),
    ...blocks("transformer_blocks", doubleBlock),
    ...blocks("single_transformer_blocks", singleBlock),
    ...linear("final_layer.linear", ["proj_out"]),
  ];
  // shift before scale, where diffusers has scale before shift
  const last = ["weight", "bias"].map((kind): TensorToWrite => {
    const { dtype, shape, bytes } = weights.get(`norm_out.linear.${kind}`);
    const half = bytes.length / 2;
    const swapped = new Uint8Array(bytes.length);
    swapped.set(bytes.subarray(half), 0);
    swapped.set(bytes.subarray(0, half), half);
    return { name: `final_layer.adaLN_modulation.1.${kind}`, dtype, shape, bytes: swapped };
  });
  return [...recipes.map((recipe) => joined(weights, recipe)), ...last].map(owned);
}

/** The autoencoder of a model's folder in `ae.safetensors`'s layout (flux/modules/autoencoder.py). */
export function bflAutoencoder(folder: string, stages: number): TensorToWrite[] {
  using weights = openComponent(folder, "vae");
  return weights.names().map((name) => {
    const { dtype, shape, bytes } = weights.get(name);
    const attention = /attentions\.0\.to_(q|k|v|out\.0)\.weight$/.test(name);
    return owned({
      name: autoencoderName(name, stages),
      dtype,
      shape: attention ? [...shape, 1, 1] : shape,
      bytes,
    });
  });
}

function autoencoderName(name: string, stages: number): string {
  const words = name.split(".");
  const [side, kind, index] = words;
  const tail = (start: number) => words.slice(start).join(".").replace("conv_shortcut", "nin_shortcut");
  if (kind === "conv_norm_out") return `${side}.norm_out.${words[2]}`;
  if (kind === "down_blocks") {
    return words[3] === "resnets"
      ? `encoder.down.${index}.block.${tail(4)}`
      : `encoder.down.${index}.downsample.${tail(5)}`;
  }
  if (kind === "up_blocks") {
    const stage = stages - 1 - Number(index);
    return words[3] === "resnets"
      ? `decoder.up.${stage}.block.${tail(4)}`
      : `decoder.up.${stage}.upsample.${tail(5)}`;
  }
  if (kind === "mid_block" && words[2] === "resnets") {
    return `${side}.mid.block_${Number(words[3]) + 1}.${tail(4)}`;
  }
  if (kind === "mid_block") {
    const layers: Record<string, string> = {
      group_norm: "norm",
      to_q: "q",
      to_k: "k",
      to_v: "v",
      to_out: "proj_out",
    };
    return `${side}.mid.attn_1.${layers[words[4]]}.${words.at(-1)}`;
  }
  return name;
}

/** A tensor that does not go with its file. */
function owned(tensor: TensorToWrite): TensorToWrite {
  return { ...tensor, bytes: (tensor.bytes as Uint8Array).slice() };
}

/** How ComfyUI's float8 files scale their weights. */
export type Scaling = "none" | "scale_weight" | "weight_scale" | "rows";

/**
 * The tensors with all matrices in E4M3, and those in bfloat16 that they then stand for.
 *
 * @param widened rounds what they stand for to bf16, as loading into bf16 does.
 */
export function comfyFloat8(
  tensors: readonly TensorToWrite[],
  scaling: Scaling,
): { quantized: TensorToWrite[]; widened: TensorToWrite[] } {
  const quantized: TensorToWrite[] = scaling === "scale_weight"
    ? [{ name: "scaled_fp8", dtype: "f8e4m3", shape: [2], bytes: new Uint8Array(2) }]
    : [];
  const widened: TensorToWrite[] = [];
  for (const tensor of tensors) {
    if (tensor.shape.length !== 2 || !tensor.name.endsWith(".weight")) {
      quantized.push(tensor);
      widened.push(tensor);
      continue;
    }
    const values = floatsOf(tensor);
    const [rows, columns] = tensor.shape;
    const groups = scaling === "rows" ? rows : 1;
    const size = values.length / groups;
    const codes = new Uint8Array(values.length);
    const scales = new Float32Array(groups).fill(1);
    const wide = new Uint16Array(values.length);
    for (let group = 0; group < groups; group++) {
      const part = values.subarray(group * size, (group + 1) * size);
      if (scaling !== "none") {
        scales[group] = part.reduce((most, value) => Math.max(most, Math.abs(value)), 0) / 448;
      }
      const scaled = part.map((value) => value / scales[group]);
      float32ToFloat8(scaled, codes.subarray(group * size, (group + 1) * size));
    }
    const back = Float32Array.from(codes, (code, i) => decode(code) * scales[Math.floor(i / size)]);
    float32ToBfloat16(back, wide);
    quantized.push({ name: tensor.name, dtype: "f8e4m3", shape: [rows, columns], bytes: codes });
    widened.push({
      name: tensor.name,
      dtype: "bf16",
      shape: [rows, columns],
      bytes: new Uint8Array(wide.buffer),
    });
    if (scaling === "none") continue;
    const kind = scaling === "rows" ? "weight_scale" : scaling;
    quantized.push({
      name: tensor.name.replace(/weight$/, kind),
      dtype: "f32",
      shape: scaling === "rows" ? [rows, 1] : scaling === "scale_weight" ? [1] : [],
      bytes: new Uint8Array(scales.buffer),
    });
    if (scaling === "scale_weight") {
      const bytes = new Uint8Array(Float32Array.of(3).buffer);
      quantized.push({ name: tensor.name.replace(/weight$/, "scale_input"), dtype: "f32", shape: [], bytes });
    }
  }
  return { quantized, widened };
}

/** E4M3, by its definition. */
function decode(code: number): number {
  const [sign, exponent, mantissa] = [code & 0x80 ? -1 : 1, (code & 0x78) >> 3, (code & 7) / 8];
  return sign * (exponent === 0 ? mantissa * 2 ** -6 : (1 + mantissa) * 2 ** (exponent - 7));
}

function floatsOf({ dtype, bytes }: TensorToWrite): Float32Array {
  const copy = (bytes as Uint8Array).slice().buffer as ArrayBuffer;
  if (dtype === "f32") return new Float32Array(copy);
  const values = new Float32Array(copy.byteLength / 2);
  bfloat16ToFloat32(new Uint16Array(copy), values);
  return values;
}

/** Writes the tensors with a prefix before their names. */
export async function writePart(path: string, tensors: readonly TensorToWrite[], prefix = ""): Promise<void> {
  await writeSafetensors(path, tensors.map((tensor) => ({ ...tensor, name: prefix + tensor.name })));
}
