import type { Device } from "../../ffi/device.ts";
import type { DType } from "../../ffi/dtype.ts";
import { isGpu } from "../../ffi/gpu.ts";
import { openDevice } from "../../ffi/open.ts";
import { readJson, resolveModelFolder } from "./checkpoint.ts";
import { definedOnly, EMBEDDED_MODEL, gigabytes, interruptibly, Progress } from "./command_line.ts";
import { UsageError } from "./errors.ts";
import { hubModel } from "./hub.ts";
import { WHOLE_MODEL } from "./hub_files.ts";
import { isHubId } from "./hub_id.ts";
import { type LoraChoice, Loras } from "./lora.ts";
import { Model } from "./model.ts";
import { isKontext, modelName, readParts } from "./model_parts.ts";
import { piecesFor } from "./pieces.ts";
import type { GenerateOptions } from "./pipeline.ts";
import { COMPONENTS, type Plan, type Recipe } from "./plan.ts";
import { readPicture } from "./read_picture.ts";
import { rehearse } from "./rehearsal.ts";
import { transformerConfigOf } from "./single_file.ts";
import { transformerConfigSchema } from "./transformer.ts";

/** Which device a program's user wants, and where it keeps what it compiles. */
export interface DeviceChoice {
  readonly device: string;
  readonly cacheDir?: string | undefined;
}

/** Opens the device that the flags name. @param note is told what is worth knowing. */
export function openChosen(
  { device, cacheDir }: DeviceChoice,
  note: (message: string) => void,
): ReturnType<typeof openDevice> {
  return openDevice(device, {
    ...definedOnly({ cacheDir }),
    onWarning: note,
    onMeasured: (count) => Progress.tuning(count),
    readAhead: true,
  });
}

/** Which model a program's user wants. */
export interface ModelChoice {
  /** A model folder, or an id on the hub until {@link withLocalModel}; the embedded model when left out. */
  readonly ckpt?: string | undefined;
  /** Of a model on the hub. */
  readonly revision?: string | undefined;
  /** Make the weights up. */
  readonly randomWeights?: true | undefined;
  /** Files in the place of parts of the model. */
  readonly transformer?: string | undefined;
  /** A file of the autoencoder. */
  readonly vae?: string | undefined;
}

/**
 * The same choice with a folder in the place of a hub's id: the cache's, after what is missing there was downloaded, with a
 * progress bar. For `--random-weights` that is configs and tokenizers.
 *
 * @param note is told what is worth knowing. @throws what {@link hubModel} throws; UsageError on Ctrl-C, which loses nothing,
 * and for a revision of something else.
 */
export async function withLocalModel<Choice extends ModelChoice>(
  choice: Choice,
  note: (message: string) => void,
): Promise<Choice> {
  const { ckpt, revision, randomWeights, transformer, vae } = choice;
  refuseClashes(choice);
  if (ckpt === undefined || !isHubId(ckpt)) {
    if (revision === undefined) return choice;
    throw new UsageError("--revision is for a --ckpt from the hub, and this one is a folder", {
      hint: "leave --revision out",
    });
  }
  let bar: Progress | undefined;
  let arrived = 0;
  const folder = await interruptibly(
    (signal) =>
      hubModel(ckpt, {
        revision,
        wanted: {
          ...WHOLE_MODEL,
          weights: randomWeights
            ? []
            : COMPONENTS.filter((part) =>
              !(part === "transformer" && transformer !== undefined) && !(part === "vae" && vae !== undefined)
            ),
        },
        signal,
        onNote: note,
        onProgress: ({ doneBytes, totalBytes, keptBytes }) => {
          bar ??= new Progress("downloading", totalBytes, "bytes");
          bar.update(arrived = doneBytes, totalBytes, keptBytes);
        },
      }),
    () =>
      `stopped; what has arrived of ${ckpt} is kept (${
        gigabytes(arrived)
      } GB): the same command goes on from there`,
  )
    .finally(() => bar?.stop());
  return { ...choice, ckpt: folder };
}

function refuseClashes({ ckpt, randomWeights, transformer, vae }: ModelChoice): void {
  const flag = transformer !== undefined ? "--transformer" : vae !== undefined ? "--vae" : undefined;
  if (flag === undefined) return;
  if (randomWeights) {
    throw new UsageError(`${flag} has weights, and --random-weights makes them up: leave one out`);
  }
  if (ckpt === undefined) {
    throw new UsageError(`${flag} is a part of a model: the others come from --ckpt, which is not given`, {
      hint: "add --ckpt with a folder or an id on the hub, such as black-forest-labs/FLUX.1-dev",
    });
  }
}

/**
 * The picture that the flags name, for the model that they name: before that is loaded, so that a wrong one shows at once.
 *
 * @throws UsageError where the model edits no pictures; what {@link readPicture} throws.
 */
export async function pictureToEdit(
  { image, ckpt = EMBEDDED_MODEL }: ModelChoice & { readonly image?: string | undefined },
): Promise<Pick<GenerateOptions, "image">> {
  if (image === undefined) return {};
  const folder = resolveModelFolder(ckpt);
  if (!isKontext(folder)) {
    throw new UsageError(`--image is for FLUX.1-Kontext checkpoints, and ${modelName(folder)} is none`, {
      hint: "leave --image out, or give a Kontext checkpoint with --ckpt",
    });
  }
  return { image: await readPicture(image) };
}

/** Lets recipes refuse the model that the flags name, before it is loaded. Throws {@link UsageError}. */
export function checkModel(
  { ckpt = EMBEDDED_MODEL, transformer }: ModelChoice,
  recipes: readonly Recipe[],
): void {
  if (recipes.every(({ check }) => check === undefined)) return;
  const config = transformer !== undefined
    ? transformerConfigOf(transformer)
    : readJson(resolveModelFolder(ckpt), "transformer/config.json", transformerConfigSchema);
  for (const recipe of recipes) recipe.check?.(config);
}

/**
 * Loads the model that the flags name, with a progress bar, or makes its weights up. Where a GPU will draw with it, the kernels
 * for that are compiled meanwhile.
 *
 * @param dtype of weights that are made up, and of those that are stored in float8. @param note is told what is worth knowing.
 * @param recipes that a plan of the model will be composed of. @param drawing what will be drawn first, where that is known.
 */
export async function loadModel(
  { ckpt = EMBEDDED_MODEL, randomWeights, transformer, vae }: ModelChoice,
  device: Device,
  dtype: DType,
  note: (message: string) => void,
  recipes: readonly Recipe[] = [],
  drawing?: GenerateOptions,
): Promise<Model> {
  const files = { transformer, vae };
  const parts = readParts(ckpt, files);
  const pieces = piecesFor(recipes);
  const load = async () => {
    if (randomWeights) return await Model.random(parts, device, dtype, 0, pieces);
    let bar: Progress | undefined;
    return await Model.load(parts, device, {
      files,
      dtype,
      onProgress: ({ loadedBytes, totalBytes }) => {
        bar ??= new Progress("loading", totalBytes, "bytes");
        bar.update(loadedBytes);
      },
      onWarning: note,
      pieces,
    }).finally(() => bar?.stop());
  };
  if (!isGpu(device) || drawing === undefined) return await load();
  const stored = randomWeights ? dtype : "bf16"; // as FLUX.1's are
  const failed = new AbortController();
  const compiled = device.compileAhead(
    await rehearse(device, { parts, dtype: stored, recipes, drawing }),
    failed.signal,
  );
  try {
    return await load();
  } catch (error) {
    failed.abort();
    throw error;
  } finally {
    await compiled; // a program that fails ends, and must not end while its threads compile
  }
}

/**
 * Merges LoRAs into a finished plan, with a progress bar.
 *
 * @returns what removes them again; undefined where there are none. @param note is told what is worth knowing.
 */
export async function mergeLoras(
  choices: readonly LoraChoice[] | undefined,
  model: Model,
  plan: Plan,
  note: (message: string) => void,
): Promise<Loras | undefined> {
  if (choices === undefined) return undefined;
  const loras = new Loras(model, plan, note);
  let bar: Progress | undefined;
  await loras.merge(choices, ({ done, total }) => {
    bar ??= new Progress("merging", total, "weights");
    bar.update(done);
  }).finally(() => bar?.stop());
  return loras;
}
