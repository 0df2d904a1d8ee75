/**
 * A part of the model in a file of its own: the transformer or the autoencoder in Black Forest Labs' layout
 * (`flux1-*.safetensors`, `ae.safetensors`), in ComfyUI's variants of it (a prefix before the names, float8 weights with or
 * without scales), or in diffusers' own.
 */
import { basename } from "node:path";
import { type AutoencoderConfig, autoencoderConfigSchema, autoencoderWeightShapes } from "./autoencoder.ts";
import { bflAutoencoderName, bflTransformerPlaces } from "./bfl_layout.ts";
import { ComponentWeights, type WeightPlace } from "./component_weights.ts";
import { ModelError } from "./errors.ts";
import { printable, SafetensorsFile } from "./safetensors.ts";
import { scaleName } from "./weights.ts";
import { type TransformerConfig, transformerConfigSchema, transformerWeightShapes } from "./transformer.ts";

/** The parts that can be files. */
export type FilePart = "transformer" | "vae";

/** Files that take the place of parts of a model's folder. */
export type PartFiles = { readonly [Part in FilePart]?: string | undefined };

/** A name in each layout, by which it is known, and what other kinds of files have. */
const MARKS: Readonly<Record<FilePart, { readonly bfl: string; readonly diffusers: string }>> = {
  transformer: { bfl: "img_in.weight", diffusers: "x_embedder.weight" },
  vae: { bfl: "decoder.mid.block_1.conv1.weight", diffusers: "decoder.mid_block.resnets.0.conv1.weight" },
};
/** What programs put before all names of a part; those of more than one part in a file have it. */
const PREFIXES: Readonly<Record<FilePart, readonly string[]>> = {
  transformer: ["", "model.diffusion_model.", "diffusion_model.", "transformer."],
  vae: ["", "vae.", "first_stage_model."],
};
const OTHER_KINDS: readonly (readonly [RegExp, string])[] = [
  [/\.lora_(A|B|up|down)\b|\.lora\.(up|down)\b|_lora\d?\.(up|down)\b/, "a LoRA: give it to --lora"],
  [
    /^(model\.diffusion_model\.|diffusion_model\.)?img_in\.weight|x_embedder\.weight/,
    "a transformer: give it to --transformer",
  ],
  [/^(vae\.)?decoder\.(mid|mid_block)\./, "an autoencoder: give it to --vae"],
  [
    /^(text_model\.|encoder\.block\.|shared\.weight)/,
    "a text encoder: those come from the folders text_encoder and text_encoder_2 of --ckpt",
  ],
];

/** An open file of one part, and how its names are to be read. */
interface PartFile {
  readonly file: SafetensorsFile;
  readonly prefix: string;
  readonly layout: "bfl" | "diffusers";
}

function openPart(path: string, part: FilePart): PartFile {
  const file = SafetensorsFile.open(path);
  for (const prefix of PREFIXES[part]) {
    for (const layout of ["bfl", "diffusers"] as const) {
      if (file.has(prefix + MARKS[part][layout])) return { file, prefix, layout };
    }
  }
  const { names } = file;
  file[Symbol.dispose]();
  const kind = OTHER_KINDS.find(([pattern]) => names.some((name) => pattern.test(name)))?.[1];
  throw new ModelError(`${path} is no ${part === "vae" ? "autoencoder" : "transformer"} of FLUX.1`, {
    hint: kind === undefined
      ? `it has weights such as ${names.slice(0, 3).map(printable).join(", ")}; ${
        MARKS[part].bfl
      } (Black Forest Labs' names) or ${MARKS[part].diffusers} (diffusers') is expected`
      : `it is ${kind}`,
  });
}

/**
 * A transformer's config by the shapes of a file's weights.
 *
 * @param folder the config of the model that gives the other parts, where it has one: how RoPE divides a head among its axes
 * is not in the weights.
 * @throws ModelError for a file of another kind; SafetensorsError for a damaged one
 */
export function transformerConfigOf(path: string, folder?: TransformerConfig): TransformerConfig {
  const { file, prefix, layout } = openPart(path, "transformer");
  using _ = file;
  const bfl = layout === "bfl";
  const shape = (bflName: string, name: string): readonly number[] => {
    const full = prefix + (bfl ? bflName : name);
    if (file.has(full)) return file.info(full).shape;
    throw new ModelError(`${path} has no ${full}`, {
      hint: "is it a whole transformer of FLUX.1? Download it again",
    });
  };
  const count = (name: string) => {
    const start = `${prefix}${name}.`;
    return new Set(
      file.names.filter((one) => one.startsWith(start)).map((one) => one.slice(start.length).split(".")[0]),
    )
      .size;
  };
  const [hidden, inChannels] = shape("img_in.weight", "x_embedder.weight");
  const [headDim] = bfl && !file.has(`${prefix}double_blocks.0.img_attn.norm.query_norm.scale`)
    ? shape("single_blocks.0.norm.query_norm.scale", "")
    : shape("double_blocks.0.img_attn.norm.query_norm.scale", "transformer_blocks.0.attn.norm_q.weight");
  const [outChannels] = shape("final_layer.linear.weight", "proj_out.weight");
  const guidance = bfl ? "guidance_in.in_layer.weight" : "time_text_embed.guidance_embedder.linear_1.weight";
  const known = folder?.attention_head_dim === headDim ? { axes_dims_rope: folder.axes_dims_rope } : {};
  const result = transformerConfigSchema.safeParse({
    in_channels: inChannels,
    out_channels: outChannels,
    num_layers: count(bfl ? "double_blocks" : "transformer_blocks"),
    num_single_layers: count(bfl ? "single_blocks" : "single_transformer_blocks"),
    attention_head_dim: headDim,
    num_attention_heads: hidden / headDim,
    joint_attention_dim: shape("txt_in.weight", "context_embedder.weight")[1],
    pooled_projection_dim:
      shape("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight")[1],
    guidance_embeds: file.has(prefix + guidance),
    ...known,
  });
  if (result.success) return result.data;
  const [issue] = result.error.issues;
  throw new ModelError(`${path}: its weights make no transformer: ${issue.path.join(".")} ${issue.message}`, {
    hint: "is it a whole transformer of FLUX.1? Download it again",
  });
}

/** FLUX.1's autoencoder, which all its checkpoints share. */
export const FLUX_AUTOENCODER: AutoencoderConfig = autoencoderConfigSchema.parse({
  block_out_channels: [128, 256, 512, 512],
  layers_per_block: 2,
  latent_channels: 16,
  scaling_factor: 0.3611,
  shift_factor: 0.1159,
  use_quant_conv: false,
  use_post_quant_conv: false,
});

/** Names that a float8 weight's scale has beside it: ComfyUI's old and new one. */
const SCALES = ["scale_weight", "weight_scale"];

/** What ComfyUI's files have besides, which is not read: marks, and scales of activations that were measured once. */
const EXPECTED = /(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant)$/;

/**
 * Opens a part's file; the weights have diffusers' names.
 *
 * @param config of the part, for the names and how many there are.
 * @throws ModelError for a file of another kind; SafetensorsError for a damaged one
 */
export function openSingleFile(
  path: string,
  ...[part, config]: ["transformer", TransformerConfig] | ["vae", AutoencoderConfig]
): ComponentWeights {
  const { file, prefix, layout } = openPart(path, part);
  const shapes = part === "transformer" ? transformerWeightShapes(config) : autoencoderWeightShapes(config);
  const inBfl = part === "transformer"
    ? bflTransformerPlaces(config)
    : new Map([...shapes.keys()].map((name) => [name, { tensor: bflAutoencoderName(name, config) }]));
  const places = new Map<string, WeightPlace>();
  const used = new Set<string>();
  for (const [name, shape] of shapes) {
    const place = layout === "bfl" ? inBfl.get(name)! : { tensor: name };
    const tensor = prefix + place.tensor;
    if (!file.has(tensor)) continue; // which checkShapes says
    used.add(tensor);
    const found = file.info(tensor).shape;
    const isSame = found.length > shape.length && found.join() === [...shape, 1, 1].join();
    places.set(name, { file, ...place, tensor, ...(isSame && { shape }) });
  }
  checkRows(path, file, places.values());
  // What else the part has under its prefix shows as unused.
  for (const name of file.names) {
    if (!name.startsWith(prefix) || used.has(name) || EXPECTED.test(name)) continue;
    places.set(name.slice(prefix.length), { file, tensor: name });
  }
  for (const [name, { tensor, rows }] of [...places]) {
    if (!tensor.endsWith(".weight")) continue;
    const scale = SCALES.map((kind) => tensor.replace(/weight$/, kind)).find((one) => file.has(one));
    if (scale === undefined) continue;
    const ofRows = file.info(scale).shape[0] > 1;
    places.set(scaleName(name), { file, tensor: scale, ...(ofRows && { rows }) });
    places.delete(scale.slice(prefix.length));
  }
  return new ComponentWeights(path, [file], places);
}

/** Joined layers must have the rows that the config counts on, neither fewer nor more. */
function checkRows(path: string, file: SafetensorsFile, places: Iterable<WeightPlace>): void {
  const ends = new Map<string, number>();
  for (const { tensor, rows = [] } of places) {
    for (const [first, count] of rows) ends.set(tensor, Math.max(first + count, ends.get(tensor) ?? 0));
  }
  for (const [tensor, end] of ends) {
    const [rows] = file.info(tensor).shape;
    if (rows === end) continue;
    throw new ModelError(`${path}: ${printable(tensor)} has ${rows} rows, and ${end} are expected`, {
      hint: "is it a whole transformer of FLUX.1? Download it again",
    });
  }
}

/** What a model is called that has its transformer from a file. */
export function fileModelName(path: string): string {
  return basename(path).replace(/\.safetensors$/, "");
}
