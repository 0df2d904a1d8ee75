import { existsSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import type { Device } from "../../ffi/device.ts";
import type { DType } from "../../ffi/dtype.ts";
import { elementCount } from "../../ffi/tensor.ts";
import { type AutoencoderConfig, autoencoderConfigSchema, autoencoderWeightShapes } from "./autoencoder.ts";
import { openComponent, readJson, resolveModelFolder } from "./checkpoint.ts";
import { CheckpointError, type ComponentWeights } from "./component_weights.ts";
import { type ClipConfig, clipConfigSchema, clipWeightShapes } from "./clip.ts";
import { FluxError, ModelError, UsageError } from "./errors.ts";
import { type Component, COMPONENTS } from "./plan.ts";
import { randomWeights } from "./random_weights.ts";
import { fileDTypeBits, printable } from "./safetensors.ts";
import { FlowMatchEulerScheduler, schedulerConfigSchema } from "./scheduler.ts";
import { type T5Config, t5ConfigSchema, t5WeightShapes } from "./t5.ts";
import { loadClipTokenizer, loadT5Tokenizer, type TextTokenizer } from "./tokenizer.ts";
import { type TransformerConfig, transformerConfigSchema, transformerWeightShapes } from "./transformer.ts";
import {
  fileModelName,
  FLUX_AUTOENCODER,
  openSingleFile,
  type PartFiles,
  transformerConfigOf,
} from "./single_file.ts";
import { widenStored } from "./stored_float8.ts";
import { freeAll, placeWeights, scaleName, type Weights, type WeightShapes } from "./weights.ts";

/** The configs of the four parts that have weights. */
export interface ModelConfigs {
  readonly text_encoder: ClipConfig;
  readonly text_encoder_2: T5Config;
  readonly transformer: TransformerConfig;
  readonly vae: AutoencoderConfig;
}

export interface LoadOptions {
  /** Files in the place of parts of the folder. */
  readonly files?: PartFiles | undefined;
  /** What float8 weights of a checkpoint become when they are loaded: bf16 when left out, or f32. */
  readonly dtype?: DType | undefined;
  /** Called before the first byte and again and again: how many bytes of weights are in place, of all. */
  readonly onProgress?: ((event: { loadedBytes: number; totalBytes: number }) => void) | undefined;
  /** Called with things worth knowing that do not stop the loading. */
  readonly onWarning?: ((message: string) => void) | undefined;
}

/** `model_index.json`: only FluxPipeline's parts, each of the class that is implemented here. */
const modelIndexSchema = z.looseObject({
  _class_name: z.literal(["FluxPipeline", "FluxKontextPipeline"], {
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
interface ModelParts {
  /** The folder's name, for messages and metadata. */
  readonly name: string;
  readonly folder: string;
  readonly configs: ModelConfigs;
  readonly scheduler: FlowMatchEulerScheduler;
  readonly clipTokenizer: TextTokenizer;
  readonly t5Tokenizer: TextTokenizer;
}

/**
 * A model folder in diffusers' layout, open: configs, tokenizers, schedule, and the weights on the device as the
 * checkpoint has them. The files stay mapped until it is disposed.
 */
export class Model implements Disposable {
  /** The folder's name, for messages and metadata. */
  readonly name: string;
  readonly configs: ModelConfigs;
  readonly scheduler: FlowMatchEulerScheduler;
  readonly clipTokenizer: TextTokenizer;
  readonly t5Tokenizer: TextTokenizer;

  private constructor(
    parts: ModelParts,
    readonly weights: Readonly<Record<Component, Weights>>,
    private readonly checkpoints: readonly ComponentWeights[],
  ) {
    this.name = parts.name;
    this.configs = parts.configs;
    this.scheduler = parts.scheduler;
    this.clipTokenizer = parts.clipTokenizer;
    this.t5Tokenizer = parts.t5Tokenizer;
  }

  /**
   * The model of a folder's configs and tokenizers with random weights, made on the device; weights in the folder are
   * not looked at. It draws noise, in the time that the real one takes.
   *
   * @param dtype of the weights; the recipe's own saves a cast. @param seed the same one makes the same weights.
   * @throws ModelError that names the file and what is wrong with it; OutOfMemoryError.
   */
  static async random(path: string, device: Device, dtype: DType, seed = 0): Promise<Model> {
    const parts = readParts(path);
    const weights = randomWeights(device, parts.configs, weightShapes(parts.configs), dtype, seed);
    await device.synchronize();
    return new Model({ ...parts, name: withRandom(parts.name) }, weights, []);
  }

  /**
   * The model of a folder's configs and tokenizers with weights that lie on a device already; it takes them over.
   *
   * @param random whether they are made up, which the model's name then says.
   * @throws ModelError that names the file and what is wrong with it, or a weight that is not of these configs; then
   * the weights are freed.
   */
  static placed(
    path: string,
    weights: Readonly<Record<Component, Weights>>,
    random: boolean,
    files: PartFiles = {},
  ): Model {
    try {
      const parts = readParts(path, files);
      for (const component of COMPONENTS) checkWeights(parts, component, weights[component]);
      return new Model(random ? { ...parts, name: withRandom(parts.name) } : parts, weights, []);
    } catch (error) {
      for (const component of COMPONENTS) freeAll(weights[component]);
      throw error;
    }
  }

  /**
   * Opens a model folder.
   *
   * @throws ModelError, CheckpointError or SafetensorsError that names the file and what is wrong with it; one
   * CheckpointError with all that is wrong where several parts' weights are; FfiError or OutOfMemoryError when they
   * cannot be brought to the device.
   */
  static async load(path: string, device: Device, options: LoadOptions = {}): Promise<Model> {
    const { files = {}, dtype = "bf16" } = options;
    const own = readParts(path, files);
    const { folder, configs } = own;
    const checkpoints: ComponentWeights[] = [];
    try {
      // All files are checked before the first byte is placed: a missing shard shows at once.
      const errors: FluxError[] = [];
      const opened = COMPONENTS.flatMap((component) => {
        try {
          const checkpoint = openPart(folder, files, configs, component);
          checkpoints.push(checkpoint);
          const shapes = withScales(
            weightShapes(configs, (name) => checkpoint.has(name))[component],
            checkpoint,
          );
          const { unused } = checkpoint.checkShapes(shapes);
          const strangers = unused.filter((name) => !EXPECTED_LEFTOVERS.test(name));
          if (strangers.length > 0) {
            options.onWarning?.(
              `${checkpoint.folder} has ${strangers.length} weights that the model does not read, e.g. ${
                printable(strangers[0])
              }`,
            );
          }
          if (!checkpoint.mapped) {
            options.onWarning?.(
              `${checkpoint.folder}: files were read into memory, as they could not be mapped`,
            );
          }
          return [{ component, checkpoint, shapes }];
        } catch (error) {
          if (!(error instanceof FluxError)) throw error;
          errors.push(error);
          return [];
        }
      });
      if (errors.length === 1) throw errors[0];
      if (errors.length > 1) {
        throw new CheckpointError(
          folder,
          `the weights of ${errors.length} parts cannot be loaded`,
          errors.map(({ message }) => message.replaceAll("\n", "\n  ")),
          errors[0].hint!,
        );
      }
      const totalBytes = opened.reduce((sum, { checkpoint, shapes }) => sum + bytesOf(checkpoint, shapes), 0);
      const report = (loadedBytes: number) => options.onProgress?.({ loadedBytes, totalBytes });
      report(0);
      const parts = opened.map(({ checkpoint, shapes }) => ({ checkpoint, names: shapes.keys() }));
      const placed = await placeWeights(device, parts, report);
      const weights = Object.fromEntries(
        opened.map(({ component }, i) => [component, widenStored(device, placed[i], dtype)]),
      );
      return new Model(own, weights as Record<Component, Weights>, checkpoints);
    } catch (error) {
      for (const checkpoint of checkpoints) checkpoint[Symbol.dispose]();
      throw error;
    }
  }

  #closed = false;

  /** Throws {@link UsageError} after the model was disposed. */
  checkOpen(): void {
    if (this.#closed) {
      throw new UsageError(`${this.name} was disposed: keep a model for as long as its pipelines draw`);
    }
  }

  /** Frees the weights and closes the files. No plan made of this model may run afterwards. */
  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const weights of Object.values(this.weights)) freeAll(weights);
    for (const checkpoint of this.checkpoints) checkpoint[Symbol.dispose]();
  }
}

function withRandom(name: string): string {
  return `${name} with random weights`;
}

/** Throws {@link ModelError} for a weight that is missing or of another shape than the configs ask for. */
function checkWeights({ folder, configs }: ModelParts, component: Component, weights: Weights): void {
  for (const [name, shape] of weightShapes(configs, (name) => weights.has(name))[component]) {
    const found = weights.has(name) ? weights.get(name) : undefined;
    if (found?.shape.join() === shape.join()) continue;
    throw new ModelError(
      `${folder}: the ${component}'s ${name} is ${found ?? "missing"}, its config wants [${
        shape.join(", ")
      }]`,
    );
  }
}

/** Size of the weights that the model reads. */
function bytesOf(checkpoint: ComponentWeights, shapes: WeightShapes): number {
  return [...shapes].reduce(
    (sum, [name, shape]) => sum + elementCount(shape) * fileDTypeBits(checkpoint.info(name).dtype) / 8,
    0,
  );
}

/** Opens a part's weights, in the model's folder or in a file of its own. */
function openPart(
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
function withScales(shapes: WeightShapes, checkpoint: ComponentWeights): WeightShapes {
  for (const name of [...shapes.keys()]) {
    const scale = scaleName(name);
    if (checkpoint.has(scale)) shapes.set(scale, checkpoint.info(scale).shape);
  }
  return shapes;
}

/** Configs, schedule and tokenizers of a model folder, checked against each other. */
function readParts(path: string, files: PartFiles = {}): ModelParts {
  // Beside a transformer's file the folder is there for text encoders and tokenizers, and may have nothing else.
  const alone = files.transformer === undefined;
  const folder = resolveModelFolder(path, alone ? "model_index.json" : "text_encoder");
  const has = (file: string) => alone || existsSync(join(folder, file));
  if (has("model_index.json")) readJson(folder, "model_index.json", modelIndexSchema);
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
  const name = files.transformer === undefined ? modelName(folder) : fileModelName(files.transformer);
  return { name, folder, configs, scheduler, clipTokenizer, t5Tokenizer };
}

/** The weights that each part reads; `has` tells which of its names a checkpoint uses where there are several. */
function weightShapes(
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
const EXPECTED_LEFTOVERS = /(^|\.)(position_ids|embed_tokens\.weight|shared\.weight)$/;

/** The folder's own name; for a snapshot of the Hugging Face cache the repository's. */
export function modelName(folder: string): string {
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
