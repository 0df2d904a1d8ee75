/**
 * 00 baseline: float32 weights and activations, one kernel for each operator.
 *
 * Idea: nothing is optimized. Every later rung is measured and checked against this one.
 * Changes: weights of any dtype are widened to float32, exactly. Exact: yes.
 */
import type { Plan, Recipe } from "./base/plan.ts";
import { castPlan } from "./base/cast_plan.ts";

export const baselineFp32: Recipe = {
  name: "00_baseline_fp32",
  exact: true,
  devices: ["cpu", "cuda", "hip"],
  apply: (plan: Plan) => castPlan(plan, "f32"),
};
