/** What a model's folder and files have: configs, tokenizers and schedule, and which weights. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { elementCount } from "../../ffi/tensor.ts";
import { type AutoencoderConfig, autoencoderConfigSchema, autoencoderWeightShapes } from "./autoencoder.ts";
import { openComponent, readJson, resolveModelFolder } from "./checkpoint.ts";
import { type ClipConfig, clipConfigSchema, clipWeightShapes } from "./clip.ts";
import type { ComponentWeights } from "./component_weights.ts";
import { ModelError } from "./errors.ts";
import type { Component } from "./plan.ts";
import { fileDTypeBits, printable } from "./safetensors.ts";
import { FlowMatchEulerScheduler, schedulerConfigSchema } from "./scheduler.ts";
import {
  fileModelName,
  FLUX_AUTOENCODER,
  openSingleFile,
  type PartFiles,
  transformerConfigOf,
} from "./single_file.ts";
import { type T5Config, t5ConfigSchema, t5WeightShapes } from "./t5.ts";
import { loadClipTokenizer, loadT5Tokenizer, type TextTokenizer } from "./tokenizer.ts";
import { type TransformerConfig, transformerConfigSchema, transformerWeightShapes } from "./transformer.ts";
import { scaleName, type WeightShapes } from "./weights.ts";

/** The configs of the four parts that have weights. */
export interface ModelConfigs {
  /** CLIP's. */
  readonly text_encoder: ClipConfig;
  /** T5's. */
  readonly text_encoder_2: T5Config;
  /** The transformer's. */
  readonly transformer: TransformerConfig;
  /** The autoencoder's. */
  readonly vae: AutoencoderConfig;
}

const KONTEXT = "FluxKontextPipeline";

/** `model_index.json`: only FluxPipeline's parts, each of the class that is implemented here. */
const modelIndexSchema = z.looseObject({
  _class_name: z.literal(["FluxPipeline", KONTEXT], {
    error: (issue) =>
      `${printable(String(issue.input))} is no FLUX.1 text-to-image pipeline, expected FluxPipeline`,
  }),
  transformer: z.tuple([z.unknown(), z.literal("FluxTransformer2DModel")]),
  vae: z.tuple([z.unknown(), z.literal("AutoencoderKL")]),
  text_encoder: z.tuple([z.unknown(), z.literal("CLIPTextModel")]),
  text_encoder_2: z.tuple([z.unknown(), z.literal("T5EncoderModel")]),
  scheduler: z.tuple([z.unknown(), z.literal("FlowMatchEulerDiscreteScheduler")]),
});

/** What a model folder has besides weights. */
export interface ModelParts {
  /** The folder's name, for messages and metadata. */
  readonly name: string;
  readonly folder: string;
  readonly configs: ModelConfigs;
  readonly scheduler: FlowMatchEulerScheduler;
  readonly clipTokenizer: TextTokenizer;
  readonly t5Tokenizer: TextTokenizer;
  /** Whether it edits pictures. */
  readonly kontext: boolean;
}

/** Size of the weights that the model reads. */
export function bytesOf(checkpoint: ComponentWeights, shapes: Iterable<[string, readonly number[]]>): number {
  return [...shapes].reduce(
    (sum, [name, shape]) => sum + elementCount(shape) * fileDTypeBits(checkpoint.info(name).dtype) / 8,
    0,
  );
}

/** Opens a part's weights, in the model's folder or in a file of its own. */
export function openPart(
  folder: string,
  files: PartFiles,
  configs: ModelConfigs,
  component: Component,
): ComponentWeights {
  if (component === "transformer" && files.transformer !== undefined) {
    return openSingleFile(files.transformer, component, configs.transformer);
  }
  if (component === "vae" && files.vae !== undefined) {
    return openSingleFile(files.vae, component, configs.vae);
  }
  return openComponent(folder, component);
}

/** The shapes with those of the scales that quantized weights have in the files. */
export function withScales(shapes: WeightShapes, checkpoint: ComponentWeights): WeightShapes {
  for (const name of [...shapes.keys()]) {
    const scale = scaleName(name);
    if (checkpoint.has(scale)) shapes.set(scale, checkpoint.info(scale).shape);
  }
  return shapes;
}

/** Configs, schedule and tokenizers of a model folder, checked against each other. */
export function readParts(path: string, files: PartFiles = {}): ModelParts {
  const folder = modelFolder(path, files);
  const alone = files.transformer === undefined;
  const has = (file: string) => alone || existsSync(join(folder, file));
  const kontext = has("model_index.json") && isKontext(folder);
  const ofFolder = has("transformer/config.json")
    ? readJson(folder, "transformer/config.json", transformerConfigSchema)
    : undefined;
  const transformer = files.transformer === undefined
    ? ofFolder!
    : transformerConfigOf(files.transformer, ofFolder);
  const configs: ModelConfigs = {
    text_encoder: readJson(folder, "text_encoder/config.json", clipConfigSchema),
    text_encoder_2: readJson(folder, "text_encoder_2/config.json", t5ConfigSchema),
    transformer,
    vae: files.vae !== undefined && !existsSync(join(folder, "vae/config.json"))
      ? FLUX_AUTOENCODER
      : readJson(folder, "vae/config.json", autoencoderConfigSchema),
  };
  // A schedule belongs to its transformer: with a file of another kind the folder's is the wrong one.
  const sameKind = ofFolder === undefined || ofFolder.guidance_embeds === transformer.guidance_embeds;
  const scheduler = new FlowMatchEulerScheduler(
    sameKind && has("scheduler/scheduler_config.json")
      ? readJson(folder, "scheduler/scheduler_config.json", schedulerConfigSchema)
      : schedulerConfigSchema.parse(
        transformer.guidance_embeds ? { shift: 3, use_dynamic_shifting: true } : { shift: 1 },
      ),
  );
  const clipTokenizer = loadClipTokenizer(folder, "tokenizer");
  const t5Tokenizer = loadT5Tokenizer(folder, "tokenizer_2");
  checkFit(folder, configs, clipTokenizer, t5Tokenizer);
  const name = modelName(folder, files);
  return { name, folder, configs, scheduler, clipTokenizer, t5Tokenizer, kontext };
}

/**
 * Whether a model folder has a FLUX.1-Kontext, which takes a picture to edit; it has the weights of other models' names and
 * shapes, and only its index tells.
 *
 * @throws ModelError for a folder whose index is no FLUX.1's.
 */
export function isKontext(folder: string): boolean {
  return readJson(folder, "model_index.json", modelIndexSchema)._class_name === KONTEXT;
}

/** The weights that each part reads; `has` tells which of its names a checkpoint uses where there are several. */
export function weightShapes(
  configs: ModelConfigs,
  has: (name: string) => boolean = () => false,
): Record<Component, WeightShapes> {
  return {
    text_encoder: clipWeightShapes(configs.text_encoder, has),
    text_encoder_2: t5WeightShapes(configs.text_encoder_2, has),
    transformer: transformerWeightShapes(configs.transformer),
    vae: autoencoderWeightShapes(configs.vae),
  };
}

/** Weights that published checkpoints carry beside those that are read: a second name of T5's table, buffers. */
export const EXPECTED_LEFTOVERS = /(^|\.)(position_ids|embed_tokens\.weight|shared\.weight)$/;

/**
 * The folder of a model. Beside a transformer's file it is there for text encoders and tokenizers, and may have nothing else.
 *
 * @throws ModelError where it is none.
 */
export function modelFolder(path: string, { transformer }: PartFiles = {}): string {
  return resolveModelFolder(path, transformer === undefined ? "model_index.json" : "text_encoder");
}

/** The folder's own name; for a snapshot of the Hugging Face cache the repository's; that of a transformer's file before it. */
export function modelName(folder: string, { transformer }: PartFiles = {}): string {
  if (transformer !== undefined) return fileModelName(transformer);
  const repository = folder.match(/models--([^/]+)--([^/]+)\/snapshots\//);
  return repository ? `${repository[1]}/${repository[2]}` : folder.split("/").at(-1) ?? folder;
}

/** The configs and the tokenizers must be of one model. */
function checkFit(folder: string, configs: ModelConfigs, clip: TextTokenizer, t5: TextTokenizer): void {
  const { text_encoder, text_encoder_2, transformer, vae } = configs;
  const problems: string[] = [];
  const expect = (what: string, found: number, wanted: number) => {
    if (found !== wanted) problems.push(`${what} is ${found}, expected ${wanted}`);
  };
  const expectAtMost = (what: string, found: number, limit: number, limitedBy: string) => {
    if (found > limit) problems.push(`${what} is ${found}, expected at most ${limit} (${limitedBy})`);
  };
  expect("transformer joint_attention_dim", transformer.joint_attention_dim, text_encoder_2.d_model);
  expect("transformer pooled_projection_dim", transformer.pooled_projection_dim, text_encoder.hidden_size);
  expect("transformer in_channels", transformer.in_channels, 4 * vae.latent_channels);
  expect(
    "transformer out_channels",
    transformer.out_channels ?? transformer.in_channels,
    transformer.in_channels,
  );
  expectAtMost(
    "tokenizer model_max_length",
    clip.modelMaxLength,
    text_encoder.max_position_embeddings,
    "text_encoder max_position_embeddings",
  );
  const vocabularies = [
    ["tokenizer", clip, "text_encoder", text_encoder],
    ["tokenizer_2", t5, "text_encoder_2", text_encoder_2],
  ] as const;
  for (const [name, tokenizer, encoder, { vocab_size }] of vocabularies) {
    expectAtMost(`${name}'s largest id`, tokenizer.maxId, vocab_size - 1, `${encoder} vocab_size - 1`);
  }
  if (problems.length > 0) {
    throw new ModelError(`${folder}: the parts do not fit together: ${problems.join("; ")}`, {
      hint: "all parts must be of the same model: download it again",
    });
  }
}
