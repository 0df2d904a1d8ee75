import type { Device, DeviceKind } from "../../ffi/device.ts";
import type { Tensor } from "../../ffi/tensor.ts";
import { UsageError } from "./errors.ts";
import { eagerOps, type Ops } from "./ops.ts";
import type { Rotary } from "./rotary.ts";
import type { TransformerConfig } from "./transformer.ts";
import type { Weights } from "./weights.ts";

/** A part of the pipeline that has weights, by its folder in diffusers' layout. */
export type Component = "text_encoder" | "text_encoder_2" | "transformer" | "vae";
export const COMPONENTS: readonly Component[] = ["text_encoder", "text_encoder_2", "transformer", "vae"];

/**
 * How a part of the pipeline is run. `plan` is the one that runs, `part` names the part, `inputs` are all tensors that
 * change from call to call, and `body` computes the outputs from them (a tensor, or an array or a plain object of
 * tensors): eagerly, or recorded once for the inputs' shapes and replayed. The outputs are the caller's.
 */
export type Execute = <O>(
  plan: Plan,
  part: string,
  inputs: readonly Tensor[],
  body: (inputs: readonly Tensor[]) => O,
) => O;

/** What a denoising step reads. */
export interface StepInputs {
  /** Packed noisy latents, f32 `[batch, tokens, channels]`. */
  readonly latents: Tensor;
  /** T5's output `[batch, tokens, joint_attention_dim]`. */
  readonly embeds: Tensor;
  /** Latents of the picture to edit, `[batch, tokens, channels]`. */
  readonly imageLatents: Tensor | undefined;
  /** Of the text's tokens, the latents' and those of the picture to edit. */
  readonly rotary: Rotary;
  /** This step's `[batch, modulations]`. */
  readonly modulations: Tensor;
  /** Change of the noise level. */
  readonly change: number;
}

/** Runs the steps of one picture, in order, which may share work. */
export interface Stepper extends Disposable {
  /** One Euler step: the next latents, which are the caller's. */
  step(inputs: StepInputs): Promise<Tensor>;
  /** The steps, counted from 0, that were not computed in full. */
  readonly reused: readonly number[];
}

/** What is computed, with which weights and operators, and how it is run. A value: recipes return changed copies. */
export interface Plan {
  /** Where it runs. */
  readonly device: Device;
  /** The weights of each part. */
  readonly weights: Readonly<Record<Component, Weights>>;
  /** The operators that the model calls. */
  readonly ops: Ops;
  /** How a part of the pipeline is run. */
  readonly execute: Execute;
  /** Gives up what is kept for the running plan to be faster, where memory is needed for other things. */
  readonly forget?: (running: Plan) => void;
  /** How a picture's steps are run, where it is not each by itself: begins a picture. `plan` is the one that runs. */
  readonly stepper?: (plan: Plan, config: TransformerConfig) => Stepper;
  /** Names of the recipes applied so far, in order. */
  readonly recipes: readonly string[];
}

/** One optimization: a pure function from plan to plan, with what a reader has to know of it. */
export interface Recipe {
  /** The file's name without extension, e.g. `"01_bfloat16"`. */
  readonly name: string;
  /** Whether the model computes the same function (up to rounding of its dtype); false: quality is traded for speed. */
  readonly exact: boolean;
  /** Where it runs. */
  readonly devices: readonly DeviceKind[];
  /** What was chosen for it, by name; it then differs from the recipe with other options. */
  readonly options?: Readonly<Record<string, string>>;
  /**
   * It changes weights, those of a module without looking at others, and those that it has changed not once more: it may be
   * applied to a part of them as soon as that is loaded, and to all of them again.
   */
  readonly preparesWeights?: true;
  /** Ends of the names of layers that it joins, for each part of the model: they are loaded side by side (base/pieces.ts). */
  readonly joins?: Readonly<Record<Component, readonly (readonly string[])[]>>;
  /** Parts of the model that it takes from a deposit on the host, which loading in pieces makes (base/pieces.ts). */
  readonly deposits?: readonly Component[];
  /** Throws {@link UsageError} for models that it is not for: so that this shows before such a one is loaded. */
  check?(config: TransformerConfig): void;
  /** Returns the changed plan; throws {@link UsageError} when it clashes with a recipe that is there already. */
  apply(plan: Plan): Plan;
}

/** A plan as the checkpoint has it, run one operator after another. */
export function eagerPlan(device: Device, weights: Readonly<Record<Component, Weights>>): Plan {
  return {
    device,
    weights,
    ops: eagerOps,
    execute: (_plan, _part, inputs, body) => device.scope(() => body(inputs)),
    recipes: [],
  };
}

/**
 * Applies recipes in order.
 *
 * @throws UsageError when one is applied twice, does not run on the plan's device, or clashes with an earlier one.
 */
export function compose(plan: Plan, ...recipes: readonly Recipe[]): Plan {
  return recipes.reduce((current, recipe) => {
    if (current.recipes.includes(recipe.name)) throw new UsageError(`recipe ${recipe.name} is applied twice`);
    if (!recipe.devices.includes(current.device.kind)) {
      throw new UsageError(
        `recipe ${recipe.name} does not run on ${current.device.name}, only on ${recipe.devices.join(", ")}`,
      );
    }
    return { ...recipe.apply(current), recipes: [...current.recipes, recipe.name] };
  }, plan);
}
