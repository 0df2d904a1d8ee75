/**
 * 00 baseline: float32 weights and activations, one kernel for each operator.
 *
 * Idea: nothing is optimized. Every later rung is measured and checked against this one.
 * Changes: weights of any dtype are widened to float32, exactly. Exact: yes.
 *
 *     deno run -A recipes/00_baseline_fp32.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import type { Plan, Recipe } from "./base/plan.ts";
import { castPlan } from "./base/cast_plan.ts";

/** 00: float32, one kernel for each operator. Exact. */
export const baselineFp32: Recipe = {
  name: "00_baseline_fp32",
  exact: true,
  devices: ["cpu", "cuda", "hip"],
  preparesWeights: true,
  apply: (plan: Plan) => castPlan(plan, "f32"),
};

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(baselineFp32.name));
