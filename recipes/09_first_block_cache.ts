/**
 * 09 first block cache: where the first block's result hardly changed since the last step, the other blocks are not run.
 *
 * Idea: neighbouring steps do nearly the same work. What the first double block adds to the image tokens (its residual) tells
 * how much: as long as it differs from that of the last step that was computed in full by less than a threshold, what all other
 * blocks added then is added again (ParaAttention's first-block cache; cache-dit's DBCache with F1B0).
 * Changes: a step becomes two parts, each a graph of its own: the first block, then the others or the addition. Between them
 * one number goes to the host, which decides. Exact: no; with a threshold of 0 every step is computed in full.
 * Threshold, on `mean |residual - last| / mean |last|`: 0.08 by default, 0.05 is careful, 0.12 bold; docs/numerics.md has what
 * each does to the picture. The first 8 steps are always computed in full: there the picture is laid out. Of several
 * pictures at a time all are reused, or none.
 * For models that draw in many steps, FLUX.1-dev and Kontext; refused for FLUX.1-schnell, whose four steps do not resemble each
 * other. Off unless `--cache_dit_config` asks for it.
 *
 *     deno run -A recipes/09_first_block_cache.ts --device cuda --ckpt FLUX.1-dev --cache_dit_config 0.08 --verbose
 */
import type { Device } from "../ffi/device.ts";
import { Tensor } from "../ffi/tensor.ts";
import { relativeChange } from "../kernels/relative_change.ts";
import { UsageError } from "./base/errors.ts";
import { withReference } from "./base/kontext.ts";
import type { Plan, Recipe, StepInputs, Stepper } from "./base/plan.ts";
import {
  doubleBlocks,
  embedTokens,
  singleBlocks,
  type TransformerConfig,
  velocityOf,
} from "./base/transformer.ts";
import { dense } from "./base/weights.ts";

/** What is given up for speed. Names and defaults are cache-dit's where it has them. */
export interface FirstBlockCacheOptions {
  /** Steps whose first block changed by less reuse the others' result (`residual_diff_threshold`); 0.08. */
  readonly threshold?: number;
  /** So many first steps are computed in full (`max_warmup_steps`); 8. */
  readonly warmupSteps?: number;
  /** At most so many steps of a picture are reused (`max_cached_steps`); all that the threshold allows. */
  readonly maxCachedSteps?: number;
  /** At most so many behind one another (`max_continuous_cached_steps`); all that the threshold allows. */
  readonly maxContinuousCachedSteps?: number;
}

/** The recipe. */
export function firstBlockCache(
  {
    threshold = 0.08,
    warmupSteps = 8,
    maxCachedSteps = Infinity,
    maxContinuousCachedSteps = Infinity,
  }: FirstBlockCacheOptions = {},
): Recipe {
  if (!(threshold >= 0 && threshold < Infinity)) {
    throw new UsageError(
      `the first block cache's threshold is ${threshold}: give a number from 0, mostly 0.05 to 0.2`,
    );
  }
  const options = { threshold, warmupSteps, maxCachedSteps, maxContinuousCachedSteps };
  return {
    name: "09_first_block_cache",
    exact: false,
    devices: ["cpu", "cuda", "hip"],
    options: Object.fromEntries(Object.entries(options).map(([name, value]) => [name, String(value)])),
    check: refuseUnguided,
    apply: (plan: Plan) => ({
      ...plan,
      stepper: (running, config) => {
        refuseUnguided(config);
        return new FirstBlockCache(running, config, options);
      },
    }),
  };
}

function refuseUnguided({ guidance_embeds: guided, num_layers: doubles }: TransformerConfig): void {
  if (!guided) {
    throw new UsageError(
      "09_first_block_cache is for FLUX.1-dev and Kontext: this model has no guidance, like FLUX.1-schnell, " +
        "whose few steps do not resemble each other",
      { hint: "leave --cache_dit_config out" },
    );
  }
  if (doubles === 0) throw new UsageError("09_first_block_cache needs a model with a double block");
}

/** What the first block gives. */
interface First {
  /** `[batch, imageTokens, hidden]` and `[batch, textTokens, hidden]`. */
  readonly hiddenStates: Tensor;
  readonly encoderHiddenStates: Tensor;
  /** What the block has added to the image tokens. */
  readonly residual: Tensor;
}

/** The steps of one picture. */
class FirstBlockCache implements Stepper {
  readonly reused: number[] = [];
  #steps = 0;
  #continuous = 0;
  /** Of the last step that was computed in full: the first block's residual, and what the other blocks added. */
  #residual: Tensor | undefined;
  #added: Tensor | undefined;

  constructor(
    private readonly plan: Plan,
    private readonly config: TransformerConfig,
    private readonly options: Required<FirstBlockCacheOptions>,
  ) {}

  async step(inputs: StepInputs): Promise<Tensor> {
    const first = this.#first(inputs);
    const { hiddenStates, encoderHiddenStates, residual } = first;
    try {
      if (await this.#isNear(residual)) {
        const latents = this.#reuse(inputs, hiddenStates);
        this.reused.push(this.#steps);
        this.#continuous++;
        return latents;
      }
      const { latents, added } = this.#compute(inputs, first);
      this[Symbol.dispose]();
      this.#residual = residual;
      this.#added = added;
      this.#continuous = 0;
      return latents;
    } finally {
      this.#steps++;
      hiddenStates.dispose();
      encoderHiddenStates.dispose();
      if (this.#residual !== residual) residual.dispose();
    }
  }

  /** Whether the other blocks' result of the last full step is good enough for this one. */
  async #isNear(residual: Tensor): Promise<boolean> {
    const { threshold, warmupSteps, maxCachedSteps, maxContinuousCachedSteps } = this.options;
    if (this.#residual === undefined || this.#steps < warmupSteps) return false;
    if (this.reused.length >= maxCachedSteps || this.#continuous >= maxContinuousCachedSteps) return false;
    return await relativeChange(residual, this.#residual) < threshold; // not for NaN
  }

  #first({ latents, embeds, modulations, rotary, imageLatents }: StepInputs): First {
    const { plan, config } = this;
    return plan.device.scope(() =>
      plan.execute(
        plan,
        "first_block",
        [latents, embeds, modulations, rotary.cos, rotary.sin, ...(imageLatents ? [imageLatents] : [])],
        ([latents, encoderHiddenStates, modulations, cos, sin, imageLatents]) => {
          const { ops, weights: { transformer } } = plan;
          const hiddenStates = withReference(ops, latents, imageLatents);
          const embedded = embedTokens(transformer, ops, { hiddenStates, encoderHiddenStates });
          const inputs = { modulations, rotary: { cos, sin } };
          const streams = doubleBlocks(config, transformer, ops, embedded, inputs, 0, { end: 1, keep: true });
          return { ...streams, residual: minus(plan, streams.hiddenStates, embedded.hiddenStates) };
        },
      )
    );
  }

  /** The other blocks. */
  #compute({ latents, modulations, rotary, change }: StepInputs, first: First) {
    const { plan, config } = this;
    const { device } = plan;
    return device.scope(() =>
      plan.execute(
        plan,
        "other_blocks",
        [
          latents,
          first.hiddenStates,
          first.encoderHiddenStates,
          modulations,
          rotary.cos,
          rotary.sin,
          changeTensor(device, change),
        ],
        ([latents, hiddenStates, encoderHiddenStates, modulations, cos, sin, change]) => {
          const { ops, weights: { transformer } } = plan;
          const wantedTokens = latents.shape[1];
          const inputs = { modulations, rotary: { cos, sin }, wantedTokens };
          const given = { hiddenStates, encoderHiddenStates };
          const streams = doubleBlocks(config, transformer, ops, given, inputs, 1, { keep: true });
          const { sum, normed } = singleBlocks(config, transformer, ops, streams, inputs, {
            keep: streams === given,
          });
          return {
            latents: ops.eulerStep(latents, dense(ops, transformer, "proj_out", normed), change),
            added: minus(plan, sum, hiddenStates.narrow(1, 0, wantedTokens)),
          };
        },
      )
    );
  }

  /** What the other blocks added last, once more. */
  #reuse({ latents, modulations, change }: StepInputs, hiddenStates: Tensor): Tensor {
    const { plan, config } = this;
    const { device } = plan;
    return device.scope(() =>
      plan.execute(
        plan,
        "reused_blocks",
        [latents, hiddenStates, this.#added!, modulations, changeTensor(device, change)],
        ([latents, hiddenStates, added, modulations, change]) => {
          const { ops, weights: { transformer } } = plan;
          const sum = ops.add(added, hiddenStates.narrow(1, 0, latents.shape[1]));
          return ops.eulerStep(latents, velocityOf(config, transformer, ops, sum, modulations), change);
        },
      )
    );
  }

  [Symbol.dispose](): void {
    this.#residual?.dispose();
    this.#added?.dispose();
    this.#residual = this.#added = undefined;
  }
}

/** In the dtype of the two. */
function minus({ ops }: Plan, a: Tensor, b: Tensor): Tensor {
  return ops.add(a, ops.scaleShift(b, -1, 0));
}

function changeTensor(device: Device, change: number): Tensor {
  return Tensor.fromFloat32(device, Float32Array.of(change), [1]);
}

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(firstBlockCache().name));
