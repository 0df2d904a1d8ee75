import { basename } from "node:path";
import { encodePng, parametersText } from "./image.ts";
import type { LoraChoice } from "./lora.ts";
import type { Model } from "./model.ts";
import type { GenerateResult, Picture } from "./pipeline.ts";
import type { Plan } from "./plan.ts";

/** How a picture was made. */
export interface Origin {
  readonly prompt: string;
  readonly settings: GenerateResult["settings"];
  readonly model: Model;
  readonly plan: Plan;
  readonly loras?: readonly LoraChoice[] | undefined;
  /** Which of several pictures of one prompt and seed it is: `"2 of 4"`. */
  readonly place?: string | undefined;
}

/**
 * A picture as PNG, with how it was made in its `parameters` text.
 *
 * @param encode what encodes it: a {@link PngEncoder}'s, to go on meanwhile.
 */
export async function encodePicture(
  { rgb, width, height }: Picture,
  { prompt, settings, model, plan, loras = [], place }: Origin,
  encode = encodePng,
): Promise<Uint8Array<ArrayBuffer>> {
  const parameters = parametersText({
    prompt,
    steps: settings.numInferenceSteps,
    seed: settings.seed,
    width: settings.width,
    height: settings.height,
    model: model.name,
    ...(model.configs.transformer.guidance_embeds ? { guidance: settings.guidanceScale } : {}),
    extra: {
      ...(place && { Picture: place }),
      ...(loras.length > 0 &&
        { LoRA: loras.map(({ path, scale }) => `${basename(path)}:${scale}`).join(" ") }),
      Recipes: plan.recipes.join(" "),
      Software: "flux-recipes",
    },
  });
  return await encode(rgb, width, height, { parameters });
}
