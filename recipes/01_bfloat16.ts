/**
 * 01 bfloat16: weights and activations in bfloat16, sums in float32.
 *
 * Idea: half the bytes to move, and matrix units that multiply bfloat16 at several times float32's rate.
 * Changes: the weights are rounded to bfloat16 (published checkpoints have them so); activations follow their
 * weights. Latents, timesteps, guidance and rotary tables stay in float32, where diffusers rounds them too: that
 * rounding is most of its bfloat16 error. Exact: yes, up to bfloat16's rounding.
 * Measured on an H100: a step 1663 to 126 ms, a picture 7.06 to 0.56 s.
 *
 *     deno run -A recipes/01_bfloat16.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import type { Plan, Recipe } from "./base/plan.ts";
import { castPlan } from "./base/cast_plan.ts";

/** 01: weights and activations in bfloat16, sums in float32. Exact up to rounding. */
export const bfloat16: Recipe = {
  name: "01_bfloat16",
  exact: true,
  devices: ["cpu", "cuda", "hip"],
  preparesWeights: true,
  apply: (plan: Plan) => castPlan(plan, "bf16"),
};

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(bfloat16.name));
