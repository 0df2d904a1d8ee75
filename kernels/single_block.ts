import type { Tensor } from "../ffi/tensor.ts";
import type { adaLayerNorm } from "./ada_layer_norm.ts";
import type { JointTurn } from "./double_block.ts";
import type { gatedAdaLayerNorm, Normed } from "./gated_ada_layer_norm.ts";
import type { Readers } from "./linears.ts";
import type { parallelBranches, ParallelLayers, ParallelOps } from "./parallel_branches.ts";

/** The gate of a single-stream block, and scale and shift of the norm behind it: `[batch, hidden]` each. */
export interface SingleModulation {
  readonly gate: Tensor;
  readonly scale: Tensor;
  readonly shift: Tensor;
}

/** The operators that {@link singleBlock} is made of, or a fused block in its place: the running plan's. */
export interface SingleBlockOps extends ParallelOps {
  readonly adaLayerNorm: typeof adaLayerNorm;
  readonly gatedAdaLayerNorm: typeof gatedAdaLayerNorm;
  readonly parallelBranches: typeof parallelBranches;
}

/**
 * A single-stream block behind its norm, with its residual connection and the norm of what follows: the norm before it came
 * from the block before (Dehghani et al. 2023; diffusers' FluxSingleTransformerBlock).
 * Composite: this body of operators is the eager baseline; fused kernels may replace it.
 *
 * @param x the tokens `[batch, tokens, hidden]`, and their norm. @param readers of the norm that is returned.
 * @returns the tokens after the block, and their norm.
 */
export function singleBlock(
  { sum, normed }: Normed,
  layers: ParallelLayers,
  { gate, scale, shift }: SingleModulation,
  { cos, sin, eps }: JointTurn,
  readers: Readers,
  ops: SingleBlockOps,
): Normed {
  const branch = ops.parallelBranches(normed, layers, cos, sin, eps, ops);
  return ops.gatedAdaLayerNorm(sum, branch, gate, scale, shift, eps, readers);
}
