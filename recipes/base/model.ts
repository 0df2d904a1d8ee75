import type { Device } from "../../ffi/device.ts";
import { type DType, dtypeBytes } from "../../ffi/dtype.ts";
import { elementCount, Tensor } from "../../ffi/tensor.ts";
import { CheckpointError, type ComponentWeights } from "./component_weights.ts";
import { FluxError, ModelError, UsageError } from "./errors.ts";
import {
  bytesOf,
  EXPECTED_LEFTOVERS,
  type ModelConfigs,
  type ModelParts,
  openPart,
  readParts,
  weightShapes,
  withScales,
} from "./model_parts.ts";
import { loadInPieces, type Pieces, type Unloaded } from "./pieces.ts";
import { type Component, COMPONENTS } from "./plan.ts";
import { randomPart } from "./random_weights.ts";
import { printable } from "./safetensors.ts";
import type { FlowMatchEulerScheduler } from "./scheduler.ts";
import type { PartFiles } from "./single_file.ts";
import { widenStored } from "./stored_float8.ts";
import type { TextTokenizer } from "./tokenizer.ts";
import {
  freeAll,
  isScale,
  placeWeights,
  scaleName,
  type Weights,
  weightsFrom,
  type WeightShapes,
} from "./weights.ts";

/** Weights of a part as they were before any recipe: their names and where they come from. */
type Source = (component: Component, names: readonly string[]) => Promise<Weights>;

/** How a model is loaded. */
export interface LoadOptions {
  /** Files in the place of parts of the folder. */
  readonly files?: PartFiles | undefined;
  /** What float8 weights of a checkpoint become when they are loaded: bf16 when left out, or f32. */
  readonly dtype?: DType | undefined;
  /** Called before the first byte and again and again: how many bytes of weights are in place, of all. */
  readonly onProgress?: ((event: { loadedBytes: number; totalBytes: number }) => void) | undefined;
  /** Called with things worth knowing that do not stop the loading. */
  readonly onWarning?: ((message: string) => void) | undefined;
  /** Loads in pieces, with these recipes; all at once when left out. */
  readonly pieces?: Pieces | undefined;
}

/**
 * A model folder in diffusers' layout, open: configs, tokenizers, schedule, and the weights on the device as the
 * checkpoint has them. The files stay mapped until it is disposed.
 */
export class Model implements Disposable {
  /** The folder's name, for messages and metadata. */
  readonly name: string;
  /** The configs of its parts. */
  readonly configs: ModelConfigs;
  /** Noise levels of the steps. */
  readonly scheduler: FlowMatchEulerScheduler;
  /** Text to CLIP's token ids. */
  readonly clipTokenizer: TextTokenizer;
  /** Text to T5's token ids. */
  readonly t5Tokenizer: TextTokenizer;
  /** Whether it is a FLUX.1-Kontext, which takes a picture to edit. */
  readonly kontext: boolean;

  private constructor(
    parts: ModelParts,
    readonly weights: Readonly<Record<Component, Weights>>,
    private readonly checkpoints: readonly ComponentWeights[],
    private readonly source: Source,
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
   * @param folder its path, or what was read of it. @param dtype of the weights; the recipe's own saves a cast.
   * @param seed the same one makes the same weights. @param pieces makes them in pieces, with these recipes; all at once when left out.
   * @throws ModelError that names the file and what is wrong with it; OutOfMemoryError.
   */
  static async random(
    folder: string | ModelParts,
    device: Device,
    dtype: DType,
    seed = 0,
    pieces?: Pieces,
  ): Promise<Model> {
    const parts = typeof folder === "string" ? readParts(folder) : folder;
    const shapes = weightShapes(parts.configs);
    const source = randomSource(device, parts, dtype, seed);
    const weights = pieces === undefined
      ? Object.fromEntries(
        COMPONENTS.map((
          component,
        ) => [component, randomPart(device, parts.configs, component, shapes[component], dtype, seed)]),
      ) as Record<Component, Weights>
      : await loadInPieces(device, unloadedParts(shapes, dtype, source), pieces);
    await device.synchronize();
    return new Model({ ...parts, name: withRandom(parts.name) }, weights, [], source);
  }

  /**
   * The model with memory for its weights and nothing in it, for a device that computes nothing.
   *
   * @param pieces how it would be loaded.
   */
  static async hollow(parts: ModelParts, device: Device, dtype: DType, pieces?: Pieces): Promise<Model> {
    const shapes = weightShapes(parts.configs);
    const source: Source = (component, names) => {
      const empty = (name: string) => Tensor.empty(device, shapes[component].get(name)!, dtype, "weights");
      return Promise.resolve(weightsFrom(new Map(names.map((name) => [name, empty(name)]))));
    };
    const unloaded = unloadedParts(shapes, dtype, source);
    const weights = await loadInPieces(device, unloaded, pieces ?? { recipes: [], deposited: [] });
    return new Model(parts, weights, [], source);
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
      const { device, dtype } = weights.transformer.get("x_embedder.weight");
      if (random) {
        const source = randomSource(device, parts, dtype, 0);
        return new Model({ ...parts, name: withRandom(parts.name) }, weights, [], source);
      }
      const opened: ComponentWeights[] = [];
      const byPart = new Map<Component, ComponentWeights>(); // opened when it is first asked for
      return new Model(parts, weights, opened, (component, names) => {
        let checkpoint = byPart.get(component);
        if (checkpoint === undefined) {
          checkpoint = openPart(parts.folder, files, parts.configs, component);
          byPart.set(component, checkpoint);
          opened.push(checkpoint);
        }
        return placeSome(device, checkpoint, names, dtype);
      });
    } catch (error) {
      for (const component of COMPONENTS) freeAll(weights[component]);
      throw error;
    }
  }

  /**
   * Opens a model folder.
   *
   * @param folder its path, or what was read of it with the options' files.
   * @throws ModelError, CheckpointError or SafetensorsError that names the file and what is wrong with it; one
   * CheckpointError with all that is wrong where several parts' weights are; FfiError or OutOfMemoryError when they
   * cannot be brought to the device.
   */
  static async load(
    folder: string | ModelParts,
    device: Device,
    options: LoadOptions = {},
  ): Promise<Model> {
    const { files = {}, dtype = "bf16" } = options;
    const own = typeof folder === "string" ? readParts(folder, files) : folder;
    const { configs } = own;
    const checkpoints: ComponentWeights[] = [];
    try {
      // All files are checked before the first byte is placed: a missing shard shows at once.
      const errors: FluxError[] = [];
      const opened = COMPONENTS.flatMap((component) => {
        try {
          const checkpoint = openPart(own.folder, files, configs, component);
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
          own.folder,
          `the weights of ${errors.length} parts cannot be loaded`,
          errors.map(({ message }) => message.replaceAll("\n", "\n  ")),
          errors[0].hint!,
        );
      }
      const totalBytes = opened.reduce((sum, { checkpoint, shapes }) => sum + bytesOf(checkpoint, shapes), 0);
      const report = (loadedBytes: number) => options.onProgress?.({ loadedBytes, totalBytes });
      report(0);
      const source: Source = (component, names) =>
        placeSome(device, opened.find((one) => one.component === component)!.checkpoint, names, dtype);
      const { pieces } = options;
      if (pieces !== undefined) {
        let loadedBytes = 0;
        const unloaded = opened.map(({ component, checkpoint, shapes }) => ({
          component,
          names: [...shapes.keys()].filter((name) => !isScale(shapes, name)),
          bytesOf: (name: string) => bytesOf(checkpoint, [[name, shapes.get(name)!]]),
          place: async (names: readonly string[]) => {
            const before = loadedBytes;
            const report = (bytes: number) =>
              options.onProgress?.({ loadedBytes: loadedBytes = before + bytes, totalBytes });
            return await placeSome(device, checkpoint, names, dtype, report);
          },
        }));
        return new Model(own, await loadInPieces(device, unloaded, pieces), checkpoints, source);
      }
      const parts = opened.map(({ checkpoint, shapes }) => ({ checkpoint, names: shapes.keys() }));
      const placed = await placeWeights(device, parts, report);
      const weights = Object.fromEntries(
        opened.map(({ component }, i) => [component, widenStored(device, placed[i], dtype)]),
      );
      return new Model(own, weights as Record<Component, Weights>, checkpoints, source);
    } catch (error) {
      for (const checkpoint of checkpoints) checkpoint[Symbol.dispose]();
      throw error;
    }
  }

  /**
   * Some weights as they were before any recipe: brought to the device once more, on the CPU those of the mapped file.
   *
   * @param names of the part's weights. @returns those, which the caller frees.
   * @throws ModelError where the model's folder does not have them any more; OutOfMemoryError, and nothing stays.
   */
  async originals(component: Component, names: readonly string[]): Promise<Weights> {
    this.checkOpen();
    return await this.source(component, names);
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

/** Brings some weights of a checkpoint to the device, float8 ones in `dtype`. */
async function placeSome(
  device: Device,
  checkpoint: ComponentWeights,
  names: readonly string[],
  dtype: DType,
  onBytes?: (bytes: number) => void,
): Promise<Weights> {
  const scales = names.map(scaleName).filter((name) => checkpoint.has(name));
  const [placed] = await placeWeights(device, [{ checkpoint, names: [...names, ...scales] }], onBytes);
  return widenStored(device, placed, dtype);
}

/** Weights of no checkpoint, to be loaded in pieces. */
function unloadedParts(
  shapes: Record<Component, WeightShapes>,
  dtype: DType,
  source: Source,
): Unloaded[] {
  return COMPONENTS.map((component) => ({
    component,
    names: [...shapes[component].keys()],
    bytesOf: (name) => elementCount(shapes[component].get(name)!) * dtypeBytes(dtype),
    place: (names) => source(component, names),
  }));
}

/** Weights that were made up, made up again. */
function randomSource(device: Device, { configs }: ModelParts, dtype: DType, seed: number): Source {
  const shapes = weightShapes(configs);
  return (component, names) =>
    Promise.resolve(randomPart(device, configs, component, shapes[component], dtype, seed, names));
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
