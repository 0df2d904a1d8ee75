/**
 * 08 export: the finished model in one file, for the next process.
 *
 * Idea: a process spends its first seconds on what the one before it has found out already: casting, joining and
 * quantizing weights, compiling kernels, timing algorithms. What comes out is written down once, and the next process
 * only reads: weights go from the file straight to the GPU, in the form that they are multiplied in.
 * Changes: nothing in what is computed; exact. The file (base/package.ts) has the weights as the recipes have left them,
 * cubins, cuBLASLt's chosen algorithms, cuDNN's plans, and how much memory activations, recorded graphs and weights take.
 * That is all of the memory plan that outlives a process: graphs hold addresses, and are recorded anew. Configs and
 * tokenizers stay in the model's folder and are read there.
 * It serves the same model, recipes, GPU, driver and libraries only, and a damaged file not at all: else the reason is
 * told and the model is built. Other sizes of pictures may be drawn; what they need in addition is compiled as ever.
 * Measured on an H100: 25.8 GB; from the start of a process to its picture 4.7 s, and 23.8 s from empty caches.
 *
 *     deno run -A recipes/08_export.ts --device cuda --ckpt FLUX.1-schnell --compile_export_mode export_aoti
 *     deno run -A recipes/08_export.ts --device cuda --ckpt FLUX.1-schnell --use-cached-model --verbose
 */
import { createHash } from "node:crypto";
import { basename, dirname, join } from "node:path";
import type { Device } from "../ffi/device.ts";
import { FileError, OutOfMemoryError } from "../ffi/errors.ts";
import { type GpuDevice, isGpu } from "../ffi/gpu.ts";
import { EMBEDDED_MODEL, gigabytes, interruptibly, Progress } from "./base/command_line.ts";
import { FluxError, UsageError } from "./base/errors.ts";
import { identityOf } from "./base/identity.ts";
import type { ModelChoice } from "./base/loading.ts";
import type { Loras } from "./base/lora.ts";
import { Model } from "./base/model.ts";
import { modelFolder, modelName } from "./base/model_parts.ts";
import { type Origin, Package, writePackage } from "./base/package.ts";
import type { Plan, Recipe } from "./base/plan.ts";
import type { PartFiles } from "./base/single_file.ts";

/** Leaves the plan as it is: {@link ExportedModel} is about where a plan's weights come from. */
export const exporting: Recipe = {
  name: "08_export",
  exact: true,
  devices: ["cuda", "hip"],
  apply: (plan: Plan) => plan,
};

/** The flags that decide what is loaded and written. */
export interface ExportFlags extends ModelChoice {
  /** Where packages are kept; without it there are none. */
  readonly cacheDir?: string | undefined;
  /** As `--compile_export_mode`: `"export_aoti"` writes a package each time. */
  readonly compile_export_mode?: string | undefined;
  /** As `--use-cached-model`: a package is read where one fits. */
  readonly useCachedModel?: true | undefined;
}

/**
 * What a program loads and writes ahead of time; undefined where {@link exporting} is not among the recipes. What no flag
 * asks for is written with restraint: no weights that are made up, and no second package of a model.
 *
 * @param note is told what is worth knowing.
 * @throws UsageError where it was asked for and there is no folder for it; ModelError for a folder that is no model.
 */
export function exportedModel(
  flags: ExportFlags,
  recipes: readonly Recipe[],
  device: Device,
  note: (message: string) => void,
): ExportedModel | undefined {
  if (!recipes.includes(exporting) || !isGpu(device)) return undefined;
  const { cacheDir, useCachedModel } = flags;
  const asked = useCachedModel === true || flags.compile_export_mode === "export_aoti";
  if (recipes.some(({ name }) => name === "12_offload")) {
    if (!asked) return undefined;
    throw new UsageError("--offload clashes with an exported model, whose weights are all on the GPU", {
      hint: "leave one of them out",
    });
  }
  if (!asked && (flags.randomWeights || cacheDir === undefined)) return undefined;
  if (cacheDir === undefined) {
    throw new UsageError("an exported model is kept in --cache-dir, and there is none", {
      hint: "add --cache-dir <folder>",
    });
  }
  return new ExportedModel(flags, cacheDir, asked, recipes, device, note);
}

/** The package of one model and one choice of recipes. */
export class ExportedModel {
  /** The package's file, whether it is there or not. */
  readonly path: string;
  readonly #folder: string;
  readonly #random: boolean;
  readonly #files: PartFiles;
  readonly #origin: Origin;
  #loaded = false;

  /** Made by {@link exportedModel}. */
  constructor(
    private readonly flags: ExportFlags,
    cacheDir: string,
    private readonly asked: boolean,
    recipes: readonly Recipe[],
    private readonly device: GpuDevice,
    private readonly note: (message: string) => void,
  ) {
    this.#random = flags.randomWeights === true;
    this.#files = { transformer: flags.transformer, vae: flags.vae };
    this.#folder = modelFolder(flags.ckpt ?? EMBEDDED_MODEL, this.#files);
    this.#origin = {
      environment: device.environment(),
      // Before the weights are read: a file that changes meanwhile makes a package that is not used.
      checkpoint: identityOf(this.#folder, this.#random, this.#files),
      recipes: Object.fromEntries(recipes.map(({ name, options }) => [name, optionsText(options)])),
    };
    const model = `${this.#random ? "random " : ""}${modelName(this.#folder, this.#files)}`
      .replaceAll(/[^\w.-]+/g, "-");
    const keys = [[
      this.#folder,
      this.#random,
      ...Object.values(this.#files).filter((file) => file !== undefined),
    ], this.#origin.recipes].map(shortHash);
    this.path = join(cacheDir, "exported", `${model}-${keys.join("-")}.safetensors`);
  }

  /**
   * The model with the package's weights, where --use-cached-model asks for it; undefined where it has to be built. Why
   * a package is not used is noted, whatever is wrong with it.
   *
   * @throws OutOfMemoryError
   */
  async load(): Promise<Model | undefined> {
    if (!this.flags.useCachedModel) return undefined;
    let bar: Progress | undefined;
    try {
      using exported = Package.open(this.path, this.#origin);
      const total = exported.byteLength;
      const weights = await exported.place(this.device, (bytes) => {
        bar ??= new Progress("loading", total, "bytes");
        bar.update(bytes);
      });
      const model = Model.placed(this.#folder, weights, this.#random, this.#files);
      this.#loaded = true;
      return model;
    } catch (error) {
      if (!(error instanceof FluxError) || error instanceof OutOfMemoryError) throw error;
      this.note(`no exported model is used: ${error.message}; building it`);
      return undefined;
    } finally {
      bar?.stop();
    }
  }

  /**
   * Writes the package of a plan that has drawn a picture, unless it came from one.
   *
   * @param loras what was merged for the pictures; it is taken off before, since the package is the model's.
   * @throws FileError where it was asked for and cannot be written; UsageError on Ctrl-C. Nothing is left behind then.
   */
  async write({ weights }: Plan, loras?: Loras): Promise<void> {
    if (this.#loaded || (!this.asked && this.#anyPackage())) return;
    await loras?.merge([]);
    let bar: Progress | undefined;
    const onBytes = (written: number, total: number) => {
      bar ??= new Progress("exporting", total, "bytes");
      bar.update(written);
    };
    try {
      const bytes = await interruptibly((signal) =>
        writePackage(this.path, this.device, weights, this.#origin, { signal, onBytes })
      );
      bar?.stop();
      this.note(`exported ${gigabytes(bytes)} GB to ${this.path}: --use-cached-model starts from there`);
    } catch (error) {
      bar?.stop();
      if (this.asked || !(error instanceof FileError)) throw error;
      this.note([error.message, error.hint].filter((text) => text !== undefined).join("; "));
    }
  }

  /** Whether there is a package of this model, made with any recipes. */
  #anyPackage(): boolean {
    const model = basename(this.path).replace(/-\w+\.safetensors$/, "-");
    try {
      return [...Deno.readDirSync(dirname(this.path))].some(({ name }) => name.startsWith(model));
    } catch {
      return false; // no folder so far, or one that writing says more about
    }
  }
}

function optionsText(options: Readonly<Record<string, string>> = {}): string {
  const texts = Object.entries(options).map(([name, value]) => `${name} ${value}`);
  return texts.length === 0 ? "on" : `on with ${texts.join(", ")}`;
}

function shortHash(value: unknown): string {
  return createHash("sha256").update(JSON.stringify(value)).digest("hex").slice(0, 8);
}

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(exporting.name));
