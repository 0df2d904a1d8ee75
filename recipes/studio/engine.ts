/** Draws what pages ask for, and keeps what it has loaded. */
import type { Device } from "../../ffi/device.ts";
import { FfiError, OutOfMemoryError } from "../../ffi/errors.ts";
import { definedOnly, EMBEDDED_MODEL } from "../base/command_line.ts";
import { readJson, resolveModelFolder } from "../base/checkpoint.ts";
import { autoencoderConfigSchema, spatialFactor } from "../base/autoencoder.ts";
import { UsageError } from "../base/errors.ts";
import { LatentPreview } from "../base/latent_preview.ts";
import { checkModel, type DeviceChoice, loadModel, type ModelChoice, openChosen } from "../base/loading.ts";
import { modelName } from "../base/model_parts.ts";
import { encodePicture } from "../base/picture_file.ts";
import { FluxPipeline, type Picture, type ProgressEvent } from "../base/pipeline.ts";
import { compose, eagerPlan } from "../base/plan.ts";
import { largestError, psnr } from "../base/psnr.ts";
import { kindOf, LADDER, recipesFor, recipesNamed } from "../switches.ts";
import type { Drawing, StudioEvent } from "./request.ts";

/** Configurations that are kept loaded: two, to compare them again and again. */
const KEPT = 2;

/** What a page may choose from. */
export interface Offer {
  readonly device: string;
  readonly models: readonly { readonly name: string; readonly width: number; readonly height: number }[];
  readonly recipes: readonly {
    readonly name: string;
    readonly exact: boolean;
    /** On without being asked for. */
    readonly usual: boolean;
    readonly needs: readonly string[];
  }[];
}

/** A model and recipes, ready to draw. Each has a device of its own, as no two plans can have one model's weights. */
interface Ready extends Disposable {
  readonly pipeline: FluxPipeline;
}

export interface EngineChoice extends DeviceChoice {
  /** A model to offer beside the embedded one, whose parts may be in files of their own. */
  readonly ckpt?: string | undefined;
  readonly transformer?: string | undefined;
  readonly vae?: string | undefined;
}

export class Engine implements Disposable {
  /** By model and recipes, the one used last at the end. */
  readonly #ready = new Map<string, Ready>();
  /** By model: they all have the same autoencoder, whatever the recipes. */
  readonly #previews = new Map<string, LatentPreview>();
  /** By the name that pages choose. */
  readonly #folders: ReadonlyMap<string, string>;

  /** @throws ModelError for a `ckpt` that is no model folder */
  constructor(private readonly choice: EngineChoice, private readonly note: (message: string) => void) {
    const folders = [choice.ckpt, EMBEDDED_MODEL].filter((folder) => folder !== undefined);
    this.#folders = new Map(
      folders.map((folder) => resolveModelFolder(folder)).map((folder) => [modelName(folder), folder]),
    );
  }

  offer(): Offer {
    const kind = kindOf(this.choice.device);
    const usual = recipesFor({}, kind).map(({ name }) => name);
    return {
      device: this.choice.device,
      models: [...this.#folders].map(([name, folder]) => {
        const side = readJson(folder, "vae/config.json", autoencoderConfigSchema).sample_size;
        return { name, width: side, height: side };
      }),
      recipes: LADDER.flatMap(({ name, recipe: make, needs = [], drawsTheSame }) => {
        const recipe = make?.({});
        // Without 01_bfloat16 it is float32, by 00_baseline_fp32.
        if (recipe === undefined || drawsTheSame || name === LADDER[0].name) return [];
        if (!recipe.devices.includes(kind)) return [];
        return [{ name, exact: recipe.exact, usual: usual.includes(name), needs }];
      }),
    };
  }

  /**
   * Draws one picture for each configuration.
   *
   * @throws UsageError for what makes no sense; the signal's reason; what loading and drawing throw
   */
  async draw(drawing: Drawing, signal: AbortSignal, tell: (event: StudioEvent) => void): Promise<void> {
    const seed = drawing.seed === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : BigInt(drawing.seed);
    const pictures: Picture[] = [];
    for (const [side, names] of drawing.configurations.entries()) {
      signal.throwIfAborted();
      tell({ type: "loading", side });
      const draw = async () => {
        const { pipeline } = await this.#open(drawing, names);
        return await this.#drawOne(pipeline, { ...drawing, seed }, side, signal, tell);
      };
      try {
        pictures.push(await draw());
      } catch (error) {
        if (!(error instanceof OutOfMemoryError) || this.#ready.size === 0) {
          // What has failed once may be in any state: the next picture begins with new ones.
          if (error instanceof FfiError) this.#close();
          throw error;
        }
        this.#close(); // the other configuration's weights may be all that is in the way
        pictures.push(await draw());
      }
    }
    const [a, b] = pictures;
    if (b === undefined) return tell({ type: "done" });
    const distance = psnr(b.rgb, a.rgb);
    const equal = distance === Infinity; // which JSON has not
    tell({
      type: "done",
      comparison: { equal, ...(equal ? {} : { psnr: distance }), largestError: largestError(b.rgb, a.rgb) },
    });
  }

  async #drawOne(
    pipeline: FluxPipeline,
    { prompt, seed, width, height, steps }: Omit<Drawing, "seed"> & { readonly seed: bigint | number },
    side: number,
    signal: AbortSignal,
    tell: (event: StudioEvent) => void,
  ): Promise<Picture> {
    const { model, plan } = pipeline;
    const { device } = plan;
    const factor = spatialFactor(model.configs.vae);
    const size = (pixels: number) => pixels - pixels % (2 * factor); // as the pipeline rounds it
    let preview = this.#previews.get(model.name);
    const [columns, rows] = [size(width) / factor, size(height) / factor];
    if (preview === undefined && columns > 0 && rows > 0) {
      preview = LatentPreview.fit(pipeline, size(width), size(height));
      this.#previews.set(model.name, preview);
    }
    const emerging = new Emerging(device);
    const { images: [picture], settings, milliseconds } = await pipeline.generate({
      prompt,
      seed,
      width,
      height,
      ...(steps === undefined ? {} : { numInferenceSteps: steps }),
      signal,
      onWarning: (message) => tell({ type: "note", message }),
      onProgress: (event) => {
        const small = preview!.render(emerging.next(event), rows, columns);
        const { step, steps } = event;
        const rgb = small.rgb.toBase64();
        tell({ type: "step", side, step, steps, preview: rgb, width: columns, height: rows });
      },
    });
    preview!.learn(emerging.latents, picture);
    const png = await encodePicture(picture, { prompt, settings, model, plan });
    const { weights, peak } = device.memoryUse();
    const { text, steps: stepTimes, decode } = milliseconds;
    tell({
      type: "picture",
      side,
      png: png.toBase64(),
      width: picture.width,
      height: picture.height,
      steps: settings.numInferenceSteps,
      seed: settings.seed.toString(),
      recipes: plan.recipes,
      exact: LADDER.every(({ name, recipe }) => !plan.recipes.includes(name) || recipe!({}).exact),
      milliseconds: { text, steps: stepTimes, decode },
      memory: { weights, peak },
    });
    return picture;
  }

  /** The configuration, loaded now or kept from before. */
  async #open(drawing: Drawing, names: readonly string[]): Promise<Ready> {
    const folder = this.#folders.get(drawing.model);
    if (folder === undefined) throw new UsageError(`there is no model ${drawing.model}`);
    const float32 = !names.includes("01_bfloat16");
    const wanted = float32 ? [LADDER[0].name, ...names.filter((name) => name !== LADDER[0].name)] : names;
    const recipes = recipesNamed(wanted, kindOf(this.choice.device));
    const key = [folder, ...recipes.map(({ name }) => name)].join("\n");
    let ready = this.#ready.get(key);
    this.#ready.delete(key);
    if (ready === undefined) {
      checkModel(this.#modelOf(folder), recipes);
      for (const [oldest, kept] of [...this.#ready].slice(0, Math.max(0, this.#ready.size + 1 - KEPT))) {
        this.#ready.delete(oldest);
        kept[Symbol.dispose]();
      }
      ready = await this.#load(folder, recipes, float32, drawing);
    }
    this.#ready.set(key, ready);
    return ready;
  }

  async #load(
    folder: string,
    recipes: ReturnType<typeof recipesNamed>,
    float32: boolean,
    { prompt, width, height, steps }: Drawing,
  ): Promise<Ready> {
    using stack = new DisposableStack();
    const device = stack.use(await openChosen(this.choice, this.note));
    const dtype = float32 ? "f32" : "bf16";
    const model = stack.use(
      await loadModel(this.#modelOf(folder), device, dtype, this.note, recipes, {
        prompt,
        width,
        height,
        ...definedOnly({ numInferenceSteps: steps }),
      }),
    );
    const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), ...recipes));
    const owned = stack.move();
    return { pipeline, [Symbol.dispose]: () => owned.dispose() };
  }

  #modelOf(folder: string): ModelChoice {
    const { ckpt, transformer, vae } = this.choice;
    const own = ckpt !== undefined && folder === resolveModelFolder(ckpt);
    return own ? { ckpt: folder, transformer, vae } : { ckpt: folder };
  }

  #close(): void {
    for (const ready of this.#ready.values()) ready[Symbol.dispose]();
    this.#ready.clear();
  }

  [Symbol.dispose](): void {
    this.#close();
  }
}

/**
 * The picture that the steps lead to, as latents. A step goes along the velocity `noise - picture` from one noise level to
 * the next, so two steps' latents give the velocity, and it gives the picture: `latents - sigma * velocity`.
 */
class Emerging {
  /** The last step's. */
  latents = new Float32Array();
  #sigma = NaN;

  constructor(private readonly device: Device) {}

  next({ latents: current, sigma }: ProgressEvent): Float32Array {
    const tensor = current();
    const bytes = new Uint8Array(tensor.byteLength);
    void this.device.download(tensor, bytes); // has copied when it returns: the latents go with the callback
    const [before, sigmaBefore] = [this.latents, this.#sigma];
    this.latents = new Float32Array(bytes.buffer);
    this.#sigma = sigma;
    if (before.length === 0) return this.latents;
    const share = sigma / (sigma - sigmaBefore);
    return this.latents.map((value, i) => value - share * (value - before[i]));
  }
}
