import type { Tensor } from "../ffi/tensor.ts";
import type { add } from "./add.ts";
import { expectShape } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import { type conv2d, type Conv2dOptions, convPlan, resultShape, withChannelsLast } from "./conv2d.ts";
import { gpuOf } from "./gpu.ts";
import { isChannelsLast } from "./layout.ts";

/** The operators that {@link conv2dAdd} is made of: the running plan's. */
export interface Conv2dAddOps {
  readonly add: typeof add;
  readonly conv2d: typeof conv2d;
}

/**
 * What ends a residual block: {@link conv2d} with bias, and a residual connection around it.
 * Composite: this body of primitives is the eager baseline; {@link conv2dAddFused} may replace it.
 *
 * @param x `[batch, in, height, width]`. @param weight `[out, in, kernelHeight, kernelWidth]`. @param bias `[out]`.
 * @param residual of the result's shape, `x`'s dtype.
 * @returns as conv2d, in a memory of its own.
 * @throws ShapeError where the sizes do not fit.
 */
export function conv2dAdd(
  x: Tensor,
  weight: Tensor,
  bias: Tensor,
  residual: Tensor,
  options: Conv2dOptions,
  ops: Conv2dAddOps,
): Tensor {
  const convolved = ops.conv2d(x, weight, bias, options);
  expectShape("conv2dAdd", "residual", residual, convolved.shape);
  return ops.add(convolved, residual, convolved); // in place: at full resolution a picture more is what fills the memory
}

/**
 * {@link conv2dAdd} in one kernel of the library, where it has one: the sum is rounded once, and the convolution's own result is
 * neither written nor read. Elsewhere the default body.
 */
export function conv2dAddFused(
  x: Tensor,
  weight: Tensor,
  bias: Tensor,
  residual: Tensor,
  options: Conv2dOptions,
  ops: Conv2dAddOps,
): Tensor {
  const gpu = gpuOf(x);
  if (gpu === undefined) return conv2dAdd(x, weight, bias, residual, options, ops);
  const shape = resultShape("conv2dAdd", x, weight, bias, options);
  expectShape("conv2dAdd", "residual", residual, shape);
  return gpu.scope(() => {
    const plan = convPlan(x, weight, options, shape);
    const added = isChannelsLast(plan.out) ? withChannelsLast(residual) : contiguous(residual);
    if (gpu.convAdd({ ...plan, bias, residual: added })) return plan.out;
    plan.out.dispose();
    return conv2dAdd(x, weight, bias, residual, options, ops);
  });
}
