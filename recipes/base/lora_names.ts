import { bflTransformerPlaces } from "./bfl_layout.ts";
import type { RowRange } from "./component_weights.ts";
import type { Component } from "./plan.ts";
import type { TransformerConfig } from "./transformer.ts";
import type { Weights } from "./weights.ts";

/** A weight that a LoRA's layer changes, and which rows of the layer's change are its. */
export interface LoraTarget {
  readonly component: Component;
  /** A Linear layer's weight, by its name in the model. */
  readonly weight: string;
  readonly rows: readonly RowRange[] | undefined;
  readonly outFeatures: number;
  readonly inFeatures: number;
}

/** What each name of a layer means, without dots: Kohya writes underscores for them. Several for layers that are joined. */
export type LoraTargets = Readonly<Record<AdaptedPart, ReadonlyMap<string, readonly LoraTarget[]>>>;

type AdaptedPart = "transformer" | "text_encoder" | "text_encoder_2";

/** Before the name of a layer, for which part: diffusers' and PEFT's, ComfyUI's, Kohya's. */
const PREFIXES: readonly (readonly [string, AdaptedPart])[] = [
  ["", "transformer"],
  ["transformer_", "transformer"],
  ["base_model_model_", "transformer"],
  ["diffusion_model_", "transformer"],
  ["model_diffusion_model_", "transformer"],
  ["lora_unet_", "transformer"],
  ["lora_transformer_", "transformer"],
  ["unet_", "transformer"],
  ["text_encoder_", "text_encoder"],
  ["lora_te_", "text_encoder"],
  ["lora_te1_", "text_encoder"],
  ["text_encoder_2_", "text_encoder_2"],
  ["lora_te2_", "text_encoder_2"],
  ["lora_te3_", "text_encoder_2"],
];

/** The layers of a model that a LoRA may change: all Linear ones. @param weights of its parts, by name and shape. */
export function loraTargets(
  config: TransformerConfig,
  weights: Readonly<Record<Component, Weights>>,
): LoraTargets {
  const ofPart = (component: AdaptedPart) => {
    const targets = new Map<string, LoraTarget[]>();
    for (const name of weights[component].names) {
      const { shape } = weights[component].get(name);
      if (!name.endsWith(".weight") || shape.length !== 2) continue;
      const [outFeatures, inFeatures] = shape;
      targets.set(keyOf(name), [{ component, weight: name, rows: undefined, outFeatures, inFeatures }]);
    }
    return targets;
  };
  const [transformer, clip] = [ofPart("transformer"), ofPart("text_encoder")];
  // CLIP's names come with this prefix and without.
  for (const [key, target] of [...clip]) {
    clip.set(key.startsWith("text_model_") ? key.slice("text_model_".length) : `text_model_${key}`, target);
  }
  const joined = new Map<string, LoraTarget[]>();
  for (const [name, { tensor, rows }] of bflTransformerPlaces(config)) {
    const target = transformer.get(keyOf(name))?.[0];
    if (target === undefined || !tensor.endsWith(".weight")) continue;
    joined.set(keyOf(tensor), [...joined.get(keyOf(tensor)) ?? [], { ...target, rows }]);
  }
  for (const [key, targets] of joined) transformer.set(key, targets);
  let t5: Map<string, LoraTarget[]> | undefined;
  return {
    transformer,
    text_encoder: clip,
    // Looked at where a file names it only: it may not be on the device any more.
    get text_encoder_2() {
      return t5 ??= ofPart("text_encoder_2");
    },
  };
}

/** The weights of a layer by its name in a LoRA file, in the order of its rows; undefined where the model has none. */
export function targetsOf(targets: LoraTargets, module: string): readonly LoraTarget[] | undefined {
  // Before PEFT diffusers named the layers of attention by their processor.
  const key = module.replace(".processor.", ".").replaceAll(".", "_");
  for (const [prefix, part] of PREFIXES) {
    if (!key.startsWith(prefix)) continue;
    const found = targets[part].get(key.slice(prefix.length));
    if (found !== undefined) return found;
  }
  return undefined;
}

function keyOf(weight: string): string {
  return weight.replace(/\.weight$/, "").replaceAll(".", "_");
}
