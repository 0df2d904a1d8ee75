import type { Device } from "../../ffi/device.ts";
import type { DType } from "../../ffi/dtype.ts";
import { openDevice } from "../../ffi/open.ts";
import { readJson, resolveModelFolder } from "./checkpoint.ts";
import { definedOnly, EMBEDDED_MODEL, Progress } from "./command_line.ts";
import { UsageError } from "./errors.ts";
import { isKontext, Model, modelName } from "./model.ts";
import type { Pieces } from "./pieces.ts";
import type { GenerateOptions } from "./pipeline.ts";
import type { Recipe } from "./plan.ts";
import { readPicture } from "./read_picture.ts";
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
  });
}

/** Which model a program's user wants. */
export interface ModelChoice {
  /** A model folder; the embedded model when left out. */
  readonly ckpt?: string | undefined;
  readonly randomWeights?: true | undefined;
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
export function checkModel({ ckpt = EMBEDDED_MODEL }: ModelChoice, recipes: readonly Recipe[]): void {
  if (recipes.every(({ check }) => check === undefined)) return;
  const config = readJson(resolveModelFolder(ckpt), "transformer/config.json", transformerConfigSchema);
  for (const recipe of recipes) recipe.check?.(config);
}

/**
 * Loads the model that the flags name, with a progress bar, or makes its weights up.
 *
 * @param dtype of weights that are made up. @param note is told what is worth knowing.
 * @param pieces loads in pieces, with these recipes; all at once when left out.
 */
export async function loadModel(
  { ckpt = EMBEDDED_MODEL, randomWeights }: ModelChoice,
  device: Device,
  dtype: DType,
  note: (message: string) => void,
  pieces?: Pieces,
): Promise<Model> {
  if (randomWeights) return await Model.random(ckpt, device, dtype, 0, pieces);
  let bar: Progress | undefined;
  return await Model.load(ckpt, device, {
    onProgress: ({ loadedBytes, totalBytes }) => {
      bar ??= new Progress("loading", totalBytes, "bytes");
      bar.update(loadedBytes);
    },
    onWarning: note,
    pieces,
  }).finally(() => bar?.stop());
}
