import { Float, type GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import ADA_LAYER_NORM_CU from "./ada_layer_norm.cu" with { type: "text" };
import { expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import { Float8Tensor, rowLengthsOf, rowScalesOf } from "./float8_tensor.ts";
import { gpuOf, vectorWidth } from "./gpu.ts";
import { layerNorm } from "./layer_norm.ts";
import type { Readers } from "./linears.ts";
import { modulate } from "./modulate.ts";
import { quantizeRows } from "./quantize_float8.ts";
import { launchRows } from "./rows.ts";

const SOURCE = { name: "ada_layer_norm.cu", text: ADA_LAYER_NORM_CU };

/**
 * Adaptive layer norm (Peebles & Xie 2022, DiT): layer norm without weights, then `* (1 + scale) + shift`.
 * Composite: this body of primitives is the eager baseline; a fused kernel may replace it.
 *
 * @param x `[batch, tokens, hidden]`. @param scale `[batch, hidden]`. @param shift `[batch, hidden]`.
 * @returns `x`'s shape and dtype.
 */
export function adaLayerNorm(
  x: Tensor,
  scale: Tensor,
  shift: Tensor,
  eps: number,
  _readers?: Readers,
): Tensor {
  return modulate(layerNorm(x, eps), scale, shift);
}

/** {@link adaLayerNorm} in one kernel on a GPU, rounded once; on the CPU the same. */
export function adaLayerNormFused(x: Tensor, scale: Tensor, shift: Tensor, eps: number): Tensor {
  const gpu = gpuOf(x);
  if (gpu === undefined) return adaLayerNorm(x, scale, shift, eps);
  return launchInto(() => Tensor.empty(gpu, x.shape, x.dtype), gpu, x, scale, shift, eps);
}

/**
 * {@link adaLayerNorm} in E4M3 with a scale for each row, as {@link quantizeRows} gives it. On a GPU in one kernel, which
 * rounds to E4M3 alone; on the CPU the one after the other.
 *
 * @param measured whether the result has the lengths of its rows, too; on a GPU only.
 */
export function adaLayerNormFloat8(
  x: Tensor,
  scale: Tensor,
  shift: Tensor,
  eps: number,
  measured = false,
): Float8Tensor {
  const gpu = gpuOf(x);
  if (gpu === undefined) return x.device.scope(() => quantizeRows(adaLayerNorm(x, scale, shift, eps)));
  return launchInto(() => Float8Tensor.alloc(gpu, x.shape, x.dtype, { measured }), gpu, x, scale, shift, eps);
}

function launchInto<O extends Tensor>(
  empty: () => O,
  gpu: GpuDevice,
  x: Tensor,
  scale: Tensor,
  shift: Tensor,
  eps: number,
): O {
  const [batch, tokens, hidden] = x.shape;
  expectShape("adaLayerNorm", "scale", scale, [batch, hidden]);
  expectShape("adaLayerNorm", "shift", shift, [batch, hidden]);
  const out = empty();
  gpu.scope(() => {
    const [xs, a, b] = [x, scale, shift].map(denseRows);
    const width = vectorWidth(hidden, [out, xs, a, b]);
    const strides = [xs.strides[0], xs.strides[1], a.strides[0], b.strides[0]].map(BigInt);
    launchRows(gpu, SOURCE, {
      entry: "adaLayerNorm",
      types: { T: x.dtype, O: out.dtype, S: scale.dtype, B: shift.dtype },
      rows: tokens,
      length: hidden,
      width,
      batch,
      out,
      inputs: [xs],
      args: [out, rowScalesOf(out), rowLengthsOf(out), xs, a, b, tokens, hidden, ...strides, new Float(eps)],
    });
  });
  return out;
}
