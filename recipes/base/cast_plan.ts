import type { DType } from "../../ffi/dtype.ts";
import { UsageError } from "./errors.ts";
import type { Component, Plan } from "./plan.ts";
import { castWeights, type Weights } from "./weights.ts";

/**
 * The plan with all weights in `dtype`; activations follow, since every operator computes in its weights' dtype.
 * On a GPU the weights of `plan` that have another dtype are consumed: neither it nor another plan of the same model
 * works afterwards.
 *
 * @throws UsageError when another recipe has chosen a dtype before, or a plan has consumed the weights.
 */
export function castPlan(plan: Plan, dtype: DType): Plan {
  if (plan.recipes.length > 0) {
    throw new UsageError(`the dtype is chosen first: ${dtype} cannot follow ${plan.recipes.join(", ")}`);
  }
  const weights = Object.fromEntries(
    Object.entries(plan.weights).map((
      [component, tensors],
    ) => [component, castWeights(tensors, dtype, plan.ops)]),
  ) as Record<Component, Weights>;
  return { ...plan, weights };
}
