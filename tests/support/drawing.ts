import type { Device } from "../../ffi/device.ts";
import { packLatents } from "../../recipes/base/latents.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline, type GenerateOptions, type GenerateResult } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { valuesOf } from "./golden.ts";

/** What a run of the pipeline gave. */
export interface Trace {
  readonly result: GenerateResult;
  /** Packed latents after each step, the starting noise first. */
  readonly latents: readonly Float32Array[];
}

/** Runs the model of a folder with the recipes. */
export async function draw(
  device: Device,
  folder: string,
  recipes: readonly Recipe[],
  options: GenerateOptions,
): Promise<Trace> {
  using model = await Model.load(folder, device);
  const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), ...recipes));
  const latents: Promise<Float32Array>[] = [];
  const result = await pipeline.generate({
    ...options,
    onProgress: (event) => {
      options.onProgress?.(event);
      latents.push(valuesOf(packLatents(pipeline.plan.ops, event.latents())));
    },
  });
  return { result, latents: await Promise.all(latents) };
}

/** All pixels of all pictures, RGB. */
export function pixelsOf(result: GenerateResult): Uint8Array {
  return Uint8Array.from(result.images.flatMap((image) => [...image.rgb]));
}
