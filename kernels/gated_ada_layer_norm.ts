import { Float, type GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { adaLayerNorm } from "./ada_layer_norm.ts";
import { expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import { Float8Tensor, rowLengthsOf, rowScalesOf } from "./float8_tensor.ts";
import GATED_ADA_LAYER_NORM_CU from "./gated_ada_layer_norm.cu" with { type: "text" };
import { gatedResidual } from "./gated_residual.ts";
import { gpuOf, vectorWidth } from "./gpu.ts";
import type { Readers } from "./linears.ts";
import { quantizeRows } from "./quantize_float8.ts";
import { launchRows } from "./rows.ts";

const SOURCE = { name: "gated_ada_layer_norm.cu", text: GATED_ADA_LAYER_NORM_CU };

/** A residual stream after a branch was added, and what the next branch reads of it. */
export interface Normed<O extends Tensor = Tensor> {
  readonly sum: Tensor;
  readonly normed: O;
}

/**
 * The end of a branch and the start of the next: {@link gatedResidual}, then {@link adaLayerNorm} of the sum.
 * Composite: this body of primitives is the eager baseline; a fused kernel may replace it.
 *
 * @param residual `[batch, tokens, hidden]`. @param x `[batch, tokens, hidden]`. @param gate `[batch, hidden]`.
 * @param scale `[batch, hidden]`. @param shift `[batch, hidden]`. @param _readers of `normed`.
 * @returns both in `residual`'s shape and dtype.
 */
export function gatedAdaLayerNorm(
  residual: Tensor,
  x: Tensor,
  gate: Tensor,
  scale: Tensor,
  shift: Tensor,
  eps: number,
  _readers?: Readers,
): Normed {
  const sum = gatedResidual(residual, x, gate);
  return { sum, normed: adaLayerNorm(sum, scale, shift, eps) };
}

/** {@link gatedAdaLayerNorm} in one kernel on a GPU: the norm of the rounded sum, rounded once; on the CPU the same. */
export function gatedAdaLayerNormFused(
  residual: Tensor,
  x: Tensor,
  gate: Tensor,
  scale: Tensor,
  shift: Tensor,
  eps: number,
): Normed {
  const gpu = gpuOf(residual);
  if (gpu === undefined) return gatedAdaLayerNorm(residual, x, gate, scale, shift, eps);
  const empty = () => Tensor.empty(gpu, residual.shape, residual.dtype);
  return launchInto(empty, gpu, residual, x, { gate, scale, shift }, eps);
}

/**
 * {@link gatedAdaLayerNorm} with `normed` in E4M3 and a scale for each row, as {@link quantizeRows} gives it. On a GPU in one
 * kernel, which rounds it to E4M3 alone; on the CPU the one after the other.
 *
 * @param measured whether `normed` has the lengths of its rows, too; on a GPU only.
 */
export function gatedAdaLayerNormFloat8(
  residual: Tensor,
  x: Tensor,
  gate: Tensor,
  scale: Tensor,
  shift: Tensor,
  eps: number,
  measured = false,
): Normed<Float8Tensor> {
  const gpu = gpuOf(residual);
  if (gpu === undefined) {
    return residual.device.scope(() => {
      const { sum, normed } = gatedAdaLayerNorm(residual, x, gate, scale, shift, eps);
      return { sum, normed: quantizeRows(normed) };
    });
  }
  const empty = () => Float8Tensor.alloc(gpu, residual.shape, residual.dtype, { measured });
  return launchInto(empty, gpu, residual, x, { gate, scale, shift }, eps);
}

function launchInto<O extends Tensor>(
  empty: () => O,
  gpu: GpuDevice,
  residual: Tensor,
  x: Tensor,
  modulation: { readonly gate: Tensor; readonly scale: Tensor; readonly shift: Tensor },
  eps: number,
): Normed<O> {
  const { gate, scale, shift } = modulation;
  const [batch, tokens, hidden] = residual.shape;
  expectShape("gatedAdaLayerNorm", "x", x, residual.shape);
  for (const [what, vector] of Object.entries(modulation)) {
    expectShape("gatedAdaLayerNorm", what, vector, [batch, hidden]);
  }
  const sum = Tensor.empty(gpu, residual.shape, residual.dtype);
  const normed = empty();
  gpu.scope(() => {
    const rows = [residual, x].map(denseRows);
    const vectors = [gate, scale, shift].map(denseRows);
    const width = vectorWidth(hidden, [sum, normed, ...rows, ...vectors]);
    const strides = [
      ...rows.flatMap((tensor) => tensor.strides.slice(0, 2)),
      ...vectors.map((tensor) => tensor.strides[0]),
    ];
    launchRows(gpu, SOURCE, {
      entry: "gatedAdaLayerNorm",
      types: {
        T: residual.dtype,
        O: normed.dtype,
        X: x.dtype,
        G: gate.dtype,
        S: scale.dtype,
        B: shift.dtype,
      },
      rows: tokens,
      length: hidden,
      width,
      batch,
      out: sum,
      inputs: [...rows],
      args: [
        sum,
        normed,
        rowScalesOf(normed),
        rowLengthsOf(normed),
        ...rows,
        ...vectors,
        tokens,
        hidden,
        ...strides.map(BigInt),
        new Float(eps),
      ],
    });
  });
  return { sum, normed };
}
