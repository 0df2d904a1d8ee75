import { Float } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { add } from "./add.ts";
import ADD_RMS_NORM_CU from "./add_rms_norm.cu" with { type: "text" };
import { expectShape } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import type { Normed } from "./gated_ada_layer_norm.ts";
import { gpuOf, vectorWidth } from "./gpu.ts";
import { rmsNorm } from "./rms_norm.ts";
import { launchRows } from "./rows.ts";

const SOURCE = { name: "add_rms_norm.cu", text: ADD_RMS_NORM_CU };

/**
 * The end of a branch and the start of the next in T5: {@link add}, then {@link rmsNorm} of the sum.
 * Composite: this body of primitives is the eager baseline; a fused kernel may replace it.
 *
 * @param residual `[..., hidden]`. @param x `[..., hidden]`. @param weight `[hidden]`.
 * @returns both in `residual`'s shape and dtype.
 */
export function addRmsNorm(residual: Tensor, x: Tensor, weight: Tensor, eps: number): Normed {
  const sum = add(residual, x);
  return { sum, normed: rmsNorm(sum, weight, eps) };
}

/** {@link addRmsNorm} in one kernel on a GPU: the norm of the rounded sum, rounded once; on the CPU the same. */
export function addRmsNormFused(residual: Tensor, x: Tensor, weight: Tensor, eps: number): Normed {
  const gpu = gpuOf(residual);
  if (gpu === undefined) return addRmsNorm(residual, x, weight, eps);
  const hidden = residual.shape.at(-1)!;
  expectShape("addRmsNorm", "x", x, residual.shape);
  expectShape("addRmsNorm", "weight", weight, [hidden]);
  const sum = Tensor.empty(gpu, residual.shape, residual.dtype);
  const normed = Tensor.empty(gpu, residual.shape, residual.dtype);
  gpu.scope(() => {
    const inputs = [residual, x, weight].map(contiguous);
    const width = vectorWidth(hidden, [sum, normed, ...inputs]);
    const rows = residual.size / hidden;
    launchRows(gpu, SOURCE, {
      entry: "addRmsNorm",
      types: { T: residual.dtype, X: x.dtype, W: weight.dtype },
      rows,
      length: hidden,
      width,
      out: sum,
      inputs: [...inputs],
      args: [sum, normed, ...inputs, rows, hidden, new Float(eps)],
    });
  });
  return { sum, normed };
}
