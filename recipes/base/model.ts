import { z } from "zod";
import type { Device } from "../../ffi/device.ts";
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
import type { Component } from "./plan.ts";
import { printable } from "./safetensors.ts";
import { FlowMatchEulerScheduler, schedulerConfigSchema } from "./scheduler.ts";
import { type T5Config, t5ConfigSchema, t5WeightShapes } from "./t5.ts";
import { loadClipTokenizer, loadT5Tokenizer, type TextTokenizer } from "./tokenizer.ts";
import { type TransformerConfig, transformerConfigSchema, transformerWeightShapes } from "./transformer.ts";
import { placeWeights, type Weights, type WeightShapes } from "./weights.ts";

/** The configs of the four parts that have weights. */
export interface ModelConfigs {
  readonly text_encoder: ClipConfig;
  readonly text_encoder_2: T5Config;
  readonly transformer: TransformerConfig;
  readonly vae: AutoencoderConfig;
}

export interface LoadOptions {
  /** Called after each part: how many bytes of weights are in place, of all. */
  readonly onProgress?:
    | ((event: { component: Component; loadedBytes: number; totalBytes: number }) => void)
    | undefined;
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

/**
 * A model folder in diffusers' layout, open: configs, tokenizers, schedule, and the weights on the device as the
 * checkpoint has them. The files stay mapped until it is disposed.
 */
export class Model implements Disposable {
  private constructor(
    /** The folder's name, for messages and metadata. */
    readonly name: string,
    readonly configs: ModelConfigs,
    readonly scheduler: FlowMatchEulerScheduler,
    readonly clipTokenizer: TextTokenizer,
    readonly t5Tokenizer: TextTokenizer,
    readonly weights: Readonly<Record<Component, Weights>>,
    private readonly checkpoints: readonly ComponentWeights[],
  ) {}

  /**
   * Opens a model folder.
   *
   * @throws ModelError, CheckpointError or SafetensorsError that names the file and what is wrong with it; one
   * CheckpointError with all that is wrong where several parts' weights are.
   */
  static async load(path: string, device: Device, options: LoadOptions = {}): Promise<Model> {
    const folder = resolveModelFolder(path);
    readJson(folder, "model_index.json", modelIndexSchema);
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

    const shapesOf: Record<Component, (has: (name: string) => boolean) => WeightShapes> = {
      text_encoder: (has) => clipWeightShapes(configs.text_encoder, has),
      text_encoder_2: (has) => t5WeightShapes(configs.text_encoder_2, has),
      transformer: () => transformerWeightShapes(configs.transformer),
      vae: () => autoencoderWeightShapes(configs.vae),
    };
    const checkpoints: ComponentWeights[] = [];
    try {
      // All files are checked before the first byte is placed: a missing shard shows at once.
      const errors: FluxError[] = [];
      const opened = (Object.keys(shapesOf) as Component[]).flatMap((component) => {
        try {
          const checkpoint = openComponent(folder, component);
          checkpoints.push(checkpoint);
          const shapes = shapesOf[component]((name) => checkpoint.has(name));
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
      const totalBytes = opened.reduce((sum, { checkpoint }) => sum + checkpoint.byteLength, 0);
      let loadedBytes = 0;
      const weights: Partial<Record<Component, Weights>> = {};
      for (const { component, checkpoint, shapes } of opened) {
        weights[component] = placeWeights(device, checkpoint, shapes.keys());
        await device.synchronize();
        loadedBytes += checkpoint.byteLength;
        options.onProgress?.({ component, loadedBytes, totalBytes });
      }
      return new Model(
        basenameOf(folder),
        configs,
        scheduler,
        clipTokenizer,
        t5Tokenizer,
        weights as Record<Component, Weights>,
        checkpoints,
      );
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

  /** Closes the files. No plan made of this model may run afterwards. */
  [Symbol.dispose](): void {
    this.#closed = true;
    for (const checkpoint of this.checkpoints) checkpoint[Symbol.dispose]();
  }
}

/** Weights that published checkpoints carry beside those that are read: a second name of T5's table, buffers. */
const EXPECTED_LEFTOVERS = /(^|\.)(position_ids|embed_tokens\.weight|shared\.weight)$/;

/** The folder's own name; for a snapshot of the Hugging Face cache the repository's. */
function basenameOf(folder: string): string {
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
