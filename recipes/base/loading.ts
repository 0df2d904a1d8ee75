import type { Device } from "../../ffi/device.ts";
import type { DType } from "../../ffi/dtype.ts";
import { EMBEDDED_MODEL, Progress } from "./command_line.ts";
import { Model } from "./model.ts";

/** Which model a program's user wants. */
export interface ModelChoice {
  /** A model folder; the embedded model when left out. */
  readonly ckpt?: string | undefined;
  readonly randomWeights?: true | undefined;
}

/**
 * Loads the model that the flags name, with a progress bar, or makes its weights up.
 *
 * @param dtype of weights that are made up. @param note is told what is worth knowing.
 */
export async function loadModel(
  { ckpt = EMBEDDED_MODEL, randomWeights }: ModelChoice,
  device: Device,
  dtype: DType,
  note: (message: string) => void,
): Promise<Model> {
  if (randomWeights) return await Model.random(ckpt, device, dtype);
  let bar: Progress | undefined;
  return await Model.load(ckpt, device, {
    onProgress: ({ loadedBytes, totalBytes }) => {
      bar ??= new Progress("loading", totalBytes, "bytes");
      bar.update(loadedBytes);
    },
    onWarning: note,
  }).finally(() => bar?.stop());
}
