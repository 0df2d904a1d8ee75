/** What all devices have to know of a {@link MatmulPlan}. */
import type { MatmulPlan } from "./device.ts";
import { ShapeError } from "./errors.ts";
import type { Tensor } from "./tensor.ts";

/** How the sums of a float8 product are scaled: by one number, or by one for each row of `a` and one for each of `b`. */
export type Scaling = "tensor" | "row";

/**
 * The scaling of a plan, undefined where its operands are not float8.
 *
 * @throws {ShapeError} for scales that do not fit, and for float8 without them
 */
export function scalingOf(plan: MatmulPlan): Scaling | undefined {
  const { a, b, scaleA, scaleB } = plan;
  const require = (condition: boolean, problem: string) => {
    if (!condition) throw new ShapeError(`matmul: ${problem}: ${describeMatmul(plan)}`);
  };
  if (a.dtype !== "f8e4m3" && b.dtype !== "f8e4m3") {
    require(scaleA === undefined && scaleB === undefined, "only f8e4m3 operands have scales");
    return undefined;
  }
  require(a.dtype === b.dtype, "a and b differ in dtype");
  require(a.rank === 2 && b.rank === 2, "float8 products have no batch");
  if (isScale(scaleA, 1) && isScale(scaleB, 1)) return "tensor";
  require(
    isScale(scaleA, a.shape[0]) && isScale(scaleB, b.shape[0]),
    "scales are neither [1] and [1] nor [m] and [n]",
  );
  return "row";
}

function isScale(scale: Tensor | undefined, length: number): boolean {
  return scale?.dtype === "f32" && scale.rank === 1 && scale.shape[0] === length && scale.isContiguous;
}

/** A plan in words, for messages. */
export function describeMatmul(plan: MatmulPlan): string {
  const parts = (["a", "b", "out", "bias", "scaleA", "scaleB"] as const).flatMap((name) => {
    const tensor = plan[name];
    return tensor === undefined ? [] : [`${name} ${tensor} with strides [${tensor.strides.join(", ")}]`];
  });
  if (plan.activation !== undefined) parts.push(plan.activation);
  return parts.join(", ");
}
