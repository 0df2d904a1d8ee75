import { Float } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { onCpu } from "./cpu.ts";
import { gpuOf, vectorWidth } from "./gpu.ts";
import RMS_NORM_CU from "./rms_norm.cu" with { type: "text" };
import { launchRows, rowsOf } from "./rows.ts";

const SOURCE = { name: "rms_norm.cu", text: RMS_NORM_CU };

/**
 * Root-mean-square norm over the last dimension (Zhang & Sennrich 2019): `x / sqrt(mean(x^2) + eps) * weight`.
 *
 * @param x `[..., hidden]`; on a GPU a view of q or k inside of a wider tensor is read where it is.
 * @param weight `[hidden]`. @param eps added to the mean square.
 * @returns `x`'s shape (dense) and dtype; the mean in f32.
 * @throws ShapeError where the sizes do not fit.
 */
export function rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor {
  const hidden = x.shape.at(-1)!;
  expectShape("rmsNorm", "weight", weight, [hidden]);
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  const gpu = gpuOf(out);
  if (gpu === undefined) return onCpu(out, [x, weight], (o, xs, w) => rmsNormReference(o, xs, w, eps));
  gpu.scope(() => {
    const { source, count, inner, outerStride, innerStride } = rowsOf(x);
    const width = vectorWidth(hidden, [out, source, weight]);
    launchRows(gpu, SOURCE, {
      entry: "rmsNorm",
      types: { T: x.dtype, W: weight.dtype },
      rows: count,
      length: hidden,
      width,
      out,
      inputs: [source],
      args: [
        out,
        source,
        weight,
        count,
        hidden,
        inner,
        BigInt(outerStride),
        BigInt(innerStride),
        new Float(eps),
      ],
    });
  });
  return out;
}

/** `x` `[rows, hidden]`, `weight` `[hidden]`. */
export function rmsNormReference(
  out: Float32Array,
  x: Float32Array,
  weight: Float32Array,
  eps: number,
): void {
  const hidden = weight.length;
  for (let start = 0; start < x.length; start += hidden) {
    let squares = 0;
    for (let i = 0; i < hidden; i++) squares += x[start + i] ** 2;
    const factor = 1 / Math.sqrt(squares / hidden + eps);
    for (let i = 0; i < hidden; i++) out[start + i] = x[start + i] * factor * weight[i];
  }
}
