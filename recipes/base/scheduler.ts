/**
 * The rectified-flow schedule of FLUX.1: diffusers' FlowMatchEulerDiscreteScheduler
 * (`schedulers/scheduling_flow_match_euler_discrete.py`) and `calculate_shift` of `pipeline_flux.py`, as numbers.
 *
 * A sigma is both the noise level and the time: x = (1 - sigma) * image + sigma * noise. Larger pictures need more
 * steps at high noise, so sigmas are shifted towards 1 (Esser et al. 2024, "Scaling Rectified Flow Transformers",
 * section 5.3.2): by a constant (schnell) or by the number of image tokens (dev).
 *
 * One Euler step is a tensor op elsewhere: x + (sigma[i+1] - sigma[i]) * velocity, in float32.
 */

import { z } from "zod";
import { UsageError } from "./errors.ts";

const { fround } = Math;

/** Features of the diffusers class that FLUX.1 does not use; a config that turns one on would give other images. */
const mustBeOff = z.literal(false, { error: "only false is supported" }).nullish();

/** What `scheduler/scheduler_config.json` says (diffusers' FlowMatchEulerDiscreteScheduler), with its defaults. */
export const schedulerConfigSchema = z.looseObject({
  _class_name: z.literal("FlowMatchEulerDiscreteScheduler").optional(),
  num_train_timesteps: z.int().positive().default(1000),
  shift: z.number().positive().default(1),
  use_dynamic_shifting: z.boolean().default(false),
  base_shift: z.number().default(0.5),
  max_shift: z.number().default(1.15),
  base_image_seq_len: z.int().positive().default(256),
  max_image_seq_len: z.int().positive().default(4096),
  time_shift_type: z.enum(["exponential", "linear"]).default("exponential"),
  invert_sigmas: mustBeOff,
  use_karras_sigmas: mustBeOff,
  use_exponential_sigmas: mustBeOff,
  use_beta_sigmas: mustBeOff,
  stochastic_sampling: mustBeOff,
  shift_terminal: z.literal(0, { error: "only null is supported" }).nullish(),
}).refine((config) => config.max_image_seq_len !== config.base_image_seq_len, {
  path: ["max_image_seq_len"],
  error: "must differ from base_image_seq_len",
});

/** What is read of `scheduler/scheduler_config.json` (diffusers' FlowMatchEulerDiscreteScheduler), defaults filled in. */
export interface SchedulerConfig {
  /** Timesteps of a noise level of 1. */
  readonly num_train_timesteps: number;
  /** Of the schedule where it is not dynamic. */
  readonly shift: number;
  /** Whether the shift depends on the number of image tokens (dev). */
  readonly use_dynamic_shifting: boolean;
  /** Dynamic shift at `base_image_seq_len` tokens. */
  readonly base_shift: number;
  /** Dynamic shift at `max_image_seq_len` tokens. */
  readonly max_shift: number;
  /** See `base_shift`. */
  readonly base_image_seq_len: number;
  /** See `max_shift`. */
  readonly max_image_seq_len: number;
  /** Form of the dynamic shift. */
  readonly time_shift_type: "exponential" | "linear";
}

/** The schedule of one image. */
export interface Schedule {
  /** float32 [steps + 1], noise level before each step; the last is 0. */
  sigmas: Float32Array<ArrayBuffer>;
  /** float32 [steps], sigma * num_train_timesteps; FluxPipeline gives the transformer timestep / 1000. */
  timesteps: Float32Array<ArrayBuffer>;
}

/** What a schedule depends on besides its number of steps. */
export interface ScheduleOptions {
  /** Number of packed image tokens, (height / 16) * (width / 16); decides the dynamic shift. */
  imageSequenceLength: number;
  /** Custom noise levels before shifting, [steps], each from 0 to 1; default linspace(1, 1 / steps, steps). */
  sigmas?: ArrayLike<number>;
}

/** FlowMatchEulerDiscreteScheduler: from a number of steps to noise levels. */
export class FlowMatchEulerScheduler {
  /** A scheduler of a config, whose values make sense together. */
  constructor(readonly config: SchedulerConfig) {}

  /**
   * `calculate_shift`: mu is linear in the number of image tokens, through (base_image_seq_len, base_shift) and
   * (max_image_seq_len, max_shift). float64, as in Python.
   */
  mu(imageSequenceLength: number): number {
    const { base_shift, max_shift, base_image_seq_len, max_image_seq_len } = this.config;
    const slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len);
    const intercept = base_shift - slope * base_image_seq_len;
    return imageSequenceLength * slope + intercept;
  }

  /**
   * The schedule that FluxPipeline gets from `retrieve_timesteps(scheduler, sigmas=..., mu=...)`, bit for bit:
   * float32 with one rounding per operation, as NumPy 2 evaluates it.
   * @throws UsageError for a wrong number of steps, image length or custom sigmas.
   */
  sigmas(steps: number, options: ScheduleOptions): Schedule {
    const { imageSequenceLength, sigmas: custom } = options;
    if (!Number.isSafeInteger(steps) || steps < 1) {
      throw new UsageError(`number of inference steps is ${steps}: give a whole number of 1 or more`);
    }
    if (!Number.isSafeInteger(imageSequenceLength) || imageSequenceLength < 1) {
      throw new UsageError(
        `image sequence length is ${imageSequenceLength}: give a whole number of 1 or more`,
      );
    }
    if (custom !== undefined) checkCustom(custom, steps);

    const { num_train_timesteps } = this.config;
    const shift = this.#shift(imageSequenceLength);
    const sigmas = new Float32Array(steps + 1); // the last stays 0
    const timesteps = new Float32Array(steps);
    for (let i = 0; i < steps; i++) {
      sigmas[i] = shift(fround(custom === undefined ? linspaceFromOne(steps, i) : custom[i]));
      timesteps[i] = sigmas[i] * num_train_timesteps;
    }
    return { sigmas, timesteps };
  }

  /** The shift of one float32 sigma for this image size. */
  #shift(imageSequenceLength: number): (sigma: number) => number {
    const { use_dynamic_shifting, time_shift_type, shift } = this.config;
    if (!use_dynamic_shifting) {
      const factor = fround(shift);
      const excess = fround(shift - 1); // rounded after the subtraction, which Python does in float64
      return (sigma) => fround(fround(factor * sigma) / fround(1 + fround(excess * sigma)));
    }
    const mu = this.mu(imageSequenceLength);
    const weight = fround(time_shift_type === "exponential" ? Math.exp(mu) : mu);
    return (sigma) => fround(weight / fround(weight + fround(fround(1 / sigma) - 1)));
  }
}

/** Element i of `numpy.linspace(1, 1 / steps, steps)`, float64. */
function linspaceFromOne(steps: number, i: number): number {
  if (i === 0) return 1;
  const stop = 1 / steps;
  if (i === steps - 1) return stop; // NumPy sets the end exactly
  return i * ((stop - 1) / (steps - 1)) + 1;
}

function checkCustom(sigmas: ArrayLike<number>, steps: number): void {
  if (sigmas.length !== steps) {
    throw new UsageError(`${sigmas.length} custom sigmas for ${steps} steps: give one per step`);
  }
  for (let i = 0; i < sigmas.length; i++) {
    if (!(sigmas[i] >= 0 && sigmas[i] <= 1)) {
      throw new UsageError(`custom sigma ${i} is ${sigmas[i]}: give numbers from 0 to 1`);
    }
  }
}
