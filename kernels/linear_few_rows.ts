import { viewOf } from "../ffi/cpu/device.ts";
import { float8ToFloat32 } from "../ffi/float8.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { asMatrix } from "./contiguous.ts";
import { onCpu } from "./cpu.ts";
import type { Float8Matrix } from "./float8_tensor.ts";
import { gpuOf, launch, vectorWidth } from "./gpu.ts";
import LINEAR_FEW_ROWS_CU from "./linear_few_rows.cu" with { type: "text" };

const SOURCE = { name: "linear_few_rows.cu", text: LINEAR_FEW_ROWS_CU };
/** Small ones, since FLUX's weights make a few for each multiprocessor, and one more or less should not be felt. */
const BLOCK = 128;
/** Rows of the weight that a warp has at a time. */
const FEATURES = 4;
/** Rows of `x` that it has at most: no more sums than a warp has lanes. */
const MOST_ROWS = 8;

/** Up to so many rows, to multiply without matrix units takes less time than to write the weight down wide and read it again. */
export const FEW_ROWS = 32;

/**
 * Affine map of the last dimension by a float8 weight, `x @ (values * scales)^T + bias`, for a few rows: the weight is widened
 * in registers, one byte read for each element. Any number of rows is multiplied; it is made for up to {@link FEW_ROWS}.
 *
 * @param x `[..., in]`, f32 or bf16. @param weight `[out, in]`. @param bias `[out]`, in `x`'s dtype.
 * @returns `[..., out]` in `x`'s dtype; sums in f32, rounded once.
 * @throws ShapeError where the sizes do not fit, or `x` is of another dtype.
 */
export function linearFewRows(x: Tensor, { values, scales, rowwise }: Float8Matrix, bias?: Tensor): Tensor {
  const [features, k] = values.shape;
  expect(x.dtype === "f32" || x.dtype === "bf16", "linearFewRows", () => `takes f32 and bf16, not ${x}`);
  expectShape("linearFewRows", "weight", values, [null, x.shape.at(-1) ?? null]);
  if (bias !== undefined) expectShape("linearFewRows", "bias", bias, [features]);
  const out = Tensor.empty(x.device, [...x.shape.slice(0, -1), features], x.dtype);
  const gpu = gpuOf(out);
  if (gpu === undefined) {
    const codes = viewOf(values, "f8e4m3", values.size);
    return onCpu(
      out,
      [x, scales, bias],
      (o, xs, s, b) => linearFewRowsReference(o, xs, codes, s, b, k),
    );
  }
  gpu.scope(() => {
    const matrix = asMatrix(x);
    const [rows] = matrix.shape;
    const passes = Math.ceil(rows / MOST_ROWS);
    const widths = [vectorWidth(k, [values]), vectorWidth(k, [matrix])];
    launch(gpu, SOURCE, {
      entry: "linearFewRows",
      types: { T: x.dtype },
      constants: {
        N: Math.min(...widths) > 1 ? widths[0] : 1,
        ROWS: Math.ceil(rows / passes),
        FEATURES,
        BLOCK,
      },
      grid: passes * Math.ceil(features / (FEATURES * BLOCK / gpu.limits.warpSize)),
      block: BLOCK,
      args: [
        out,
        matrix,
        values,
        scales,
        bias,
        rows,
        features,
        k,
        BigInt(matrix.strides[0]),
        passes,
        rowwise ? 1 : 0,
      ],
    });
  });
  return out;
}

/** `x` `[rows, k]`, `codes` `[out, k]` in E4M3, a scale for each of their rows or one, `bias` `[out]` or empty; sums in f64. */
export function linearFewRowsReference(
  out: Float32Array,
  x: Float32Array,
  codes: Uint8Array,
  scales: Float32Array,
  bias: Float32Array,
  k: number,
): void {
  const weight = new Float32Array(codes.length);
  float8ToFloat32(codes, weight, "f8e4m3");
  const features = codes.length / k;
  for (let row = 0; row < x.length / k; row++) {
    for (let feature = 0; feature < features; feature++) {
      let sum = 0;
      for (let i = 0; i < k; i++) sum += x[row * k + i] * weight[feature * k + i];
      out[row * features + feature] = sum * scales[scales.length > 1 ? feature : 0] + (bias[feature] ?? 0);
    }
  }
}
