import { z } from "zod";
import type { Device } from "../../ffi/device.ts";
import { type DType, dtypeBytes } from "../../ffi/dtype.ts";
import { elementCount } from "../../ffi/tensor.ts";
import { type AutoencoderConfig, autoencoderConfigSchema, autoencoderWeightShapes } from "./autoencoder.ts";
import {
  CheckpointError,
  type ComponentWeights,
  openComponent,
  readJson,
  resolveModelFolder,
} from "./checkpoint.ts";
import { type ClipConfig, clipConfigSchema, clipWeightShapes } from "./clip.ts";
import { FluxError, ModelError, UsageError } from "./errors.ts";
import { loadInPieces, type Pieces } from "./pieces.ts";
import { type Component, COMPONENTS } from "./plan.ts";
import { randomPart } from "./random_weights.ts";
import { fileDTypeBits, printable } from "./safetensors.ts";
import { FlowMatchEulerScheduler, schedulerConfigSchema } from "./scheduler.ts";
import { type T5Config, t5ConfigSchema, t5WeightShapes } from "./t5.ts";
import { loadClipTokenizer, loadT5Tokenizer, type TextTokenizer } from "./tokenizer.ts";
import { type TransformerConfig, transformerConfigSchema, transformerWeightShapes } from "./transformer.ts";
import { freeAll, placeWeights, type Weights, type WeightShapes } from "./weights.ts";

/** The configs of the four parts that have weights. */
export interface ModelConfigs {
  readonly text_encoder: ClipConfig;
  readonly text_encoder_2: T5Config;
  readonly transformer: TransformerConfig;
  readonly vae: AutoencoderConfig;
}

export interface LoadOptions {
  /** Called before the first byte and again and again: how many bytes of weights are in place, of all. */
  readonly onProgress?: ((event: { loadedBytes: number; totalBytes: number }) => void) | undefined;
  /** Called with things worth knowing that do not stop the loading. */
  readonly onWarning?: ((message: string) => void) | undefined;
  /** Loads in pieces, with these recipes; all at once when left out. */
  readonly pieces?: Pieces | undefined;
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
interface ModelParts {
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
  /** Whether it is a FLUX.1-Kontext, which takes a picture to edit. */
  readonly kontext: boolean;

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
    this.kontext = parts.kontext;
  }

  /**
   * The model of a folder's configs and tokenizers with random weights, made on the device; weights in the folder are
   * not looked at. It draws noise, in the time that the real one takes.
   *
   * @param dtype of the weights; the recipe's own saves a cast. @param seed the same one makes the same weights.
   * @param pieces makes them in pieces, with these recipes; all at once when left out.
   * @throws ModelError that names the file and what is wrong with it; OutOfMemoryError.
   */
  static async random(
    path: string,
    device: Device,
    dtype: DType,
    seed = 0,
    pieces?: Pieces,
  ): Promise<Model> {
    const parts = readParts(path);
    const shapes = weightShapes(parts.configs);
    const make = (component: Component, names?: readonly string[]) =>
      randomPart(device, parts.configs, component, shapes[component], dtype, seed, names);
    const weights = pieces === undefined
      ? Object.fromEntries(COMPONENTS.map((component) => [component, make(component)])) as Record<
        Component,
        Weights
      >
      : await loadInPieces(
        device,
        COMPONENTS.map((component) => ({
          component,
          names: [...shapes[component].keys()],
          bytesOf: (name) => elementCount(shapes[component].get(name)!) * dtypeBytes(dtype),
          place: (names) => Promise.resolve(make(component, names)),
        })),
        pieces,
      );
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
  static placed(path: string, weights: Readonly<Record<Component, Weights>>, random: boolean): Model {
    try {
      const parts = readParts(path);
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
    const own = readParts(path);
    const { folder, configs } = own;
    const checkpoints: ComponentWeights[] = [];
    try {
      // All files are checked before the first byte is placed: a missing shard shows at once.
      const errors: FluxError[] = [];
      const opened = COMPONENTS.flatMap((component) => {
        try {
          const checkpoint = openComponent(folder, component);
          checkpoints.push(checkpoint);
          const shapes = weightShapes(configs, (name) => checkpoint.has(name))[component];
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
      const { pieces } = options;
      if (pieces !== undefined) {
        let loadedBytes = 0;
        const unloaded = opened.map(({ component, checkpoint, shapes }) => ({
          component,
          names: [...shapes.keys()],
          bytesOf: (name: string) => bytesOf(checkpoint, [[name, shapes.get(name)!]]),
          place: async (names: readonly string[]) => {
            const before = loadedBytes;
            const report = (bytes: number) =>
              options.onProgress?.({ loadedBytes: loadedBytes = before + bytes, totalBytes });
            return (await placeWeights(device, [{ checkpoint, names }], report))[0];
          },
        }));
        return new Model(own, await loadInPieces(device, unloaded, pieces), checkpoints);
      }
      const parts = opened.map(({ checkpoint, shapes }) => ({ checkpoint, names: shapes.keys() }));
      const placed = await placeWeights(device, parts, report);
      const weights = Object.fromEntries(opened.map(({ component }, i) => [component, placed[i]]));
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
function bytesOf(checkpoint: ComponentWeights, shapes: Iterable<[string, readonly number[]]>): number {
  return [...shapes].reduce(
    (sum, [name, shape]) => sum + elementCount(shape) * fileDTypeBits(checkpoint.info(name).dtype) / 8,
    0,
  );
}

/** Configs, schedule and tokenizers of a model folder, checked against each other. */
function readParts(path: string): ModelParts {
  const folder = resolveModelFolder(path);
  const kontext = isKontext(folder);
  const configs: ModelConfigs = {
    text_encoder: readJson(folder, "text_encoder/config.json", clipConfigSchema),
    text_encoder_2: readJson(folder, "text_encoder_2/config.json", t5ConfigSchema),
    transformer: readJson(folder, "transformer/config.json", transformerConfigSchema),
    vae: readJson(folder, "vae/config.json", autoencoderConfigSchema),
  };
  const scheduler = new FlowMatchEulerScheduler(
    readJson(folder, "scheduler/scheduler_config.json", schedulerConfigSchema),
  );
  const clipTokenizer = loadClipTokenizer(folder, "tokenizer");
  const t5Tokenizer = loadT5Tokenizer(folder, "tokenizer_2");
  checkFit(folder, configs, clipTokenizer, t5Tokenizer);
  return { name: modelName(folder), folder, configs, scheduler, clipTokenizer, t5Tokenizer, kontext };
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
