import { float32ToFloat8, FLOAT8_LARGEST, type Float8Format, float8ToFloat32 } from "../ffi/float8.ts";
import type { Tensor } from "../ffi/tensor.ts";
import type { Float8Tensor } from "./float8_tensor.ts";
import { FLOAT8_ROW_SUM, quantizeRowsBy, scaleOfLargest } from "./quantize_float8.ts";
import QUANTIZE_WEIGHT_ROWS_CU from "./quantize_weight_rows.cu" with { type: "text" };

const SOURCE = { name: "quantize_weight_rows.cu", text: QUANTIZE_WEIGHT_ROWS_CU };

/** Scales that a row tries. */
export const CANDIDATES = 8;

/**
 * Casts weights to E4M3 with a scale for each row, as {@link quantizeRows} does, but by the one of {@link CANDIDATES} scales that
 * leaves the least sum of squared errors: `1 + c / CANDIDATES` times {@link firstScale}. Of equal ones the smallest; and that
 * where a row has a NaN.
 *
 * @param x `[..., k]`, f32 or bf16, with dense rows.
 * @returns `x`'s shape, with as many scales as it has rows.
 */
export function quantizeWeightRows(x: Tensor): Float8Tensor {
  const reference = quantizeWeightRowsReference;
  return quantizeRowsBy(
    { entry: "quantizeWeightRows", source: SOURCE, constants: { CANDIDATES }, reference },
    x,
  );
}

/** `x` in rows of `k`. `values` are E4M3's codes in `format`. */
export function quantizeWeightRowsReference(
  values: Uint8Array,
  scales: Float32Array,
  x: Float32Array,
  k: number,
  format: Float8Format = "ocp",
): void {
  const [scaled, rounded, codes] = [new Float32Array(k), new Float32Array(k), new Uint8Array(k)];
  for (const row of scales.keys()) {
    const own = x.subarray(row * k, (row + 1) * k);
    const first = firstScale(own, format);
    let least = NaN;
    for (let c = 0; c < CANDIDATES; c++) {
      const step = 1 + c / CANDIDATES;
      const scale = Math.fround(first * step);
      const factor = Math.fround(1 / scale);
      for (let i = 0; i < k; i++) scaled[i] = own[i] * factor;
      float32ToFloat8(scaled, codes, format);
      float8ToFloat32(codes, rounded, "f8e4m3", format);
      let error = 0;
      for (let i = 0; i < k; i++) error += (rounded[i] - scaled[i]) ** 2;
      error *= step ** 2;
      if (c > 0 && !(error < least)) continue;
      least = error;
      scales[row] = scale;
      values.set(codes, row * k);
    }
  }
}

/**
 * The smallest scale that a row of weights may have: its largest absolute value / 448 (240 where the GPU's E4M3 ends there), times the
 * power of 2 with which its absolute values sum to no more than {@link FLOAT8_ROW_SUM}.
 */
export function firstScale(row: Float32Array, format: Float8Format = "ocp"): number {
  const sum = row.reduce((sum, value) => sum + Math.abs(value), 0);
  let scale = scaleOfLargest(row, FLOAT8_LARGEST[format]);
  while (sum > scale * FLOAT8_ROW_SUM) scale *= 2;
  return scale;
}
