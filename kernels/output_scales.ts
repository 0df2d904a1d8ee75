import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import type { Float8Matrix } from "./float8_tensor.ts";
import { launch, vectorWidth } from "./gpu.ts";
import OUTPUT_SCALES_CU from "./output_scales.cu" with { type: "text" };
import { FLOAT8_ROW_LARGEST } from "./quantize_float8.ts";

const SOURCE = { name: "output_scales.cu", text: OUTPUT_SCALES_CU };
const BLOCK = 256;
/** Rows of a block of layerBound. */
const WARPS = 8;
/** What roundings may add: see output_scales.cu. */
const SLACK = Math.fround(1.25);
/** The bytes of a bound that nothing has raised. */
const ZEROS = new Uint8Array(8);
const SMALLEST = Math.fround(1e-12);

/** What a Linear layer makes of a row at most: its length times the first number, and the second. */
export type LayerBound = Tensor;

/** Rows of some lengths, and the layer that reads them. */
export interface Measured {
  /** f32 `[rows]`: Euclidean lengths. */
  readonly lengths: Tensor;
  readonly bound: LayerBound;
}

/**
 * The {@link LayerBound} of a Linear layer, f32 `[2]`: the largest length of a row of its weight, and its largest bias.
 *
 * @param matrix `[out, in]`, in float8 by rows. @param bias `[out]` bf16.
 */
export function layerBound(gpu: GpuDevice, matrix: Float8Matrix, bias?: Tensor): LayerBound {
  const bound = Tensor.fromBytes(gpu, ZEROS, [2], "f32", "weights");
  raise(gpu, matrix, bias, bound);
  return bound;
}

/** {@link layerBound} anew, in its place, for a weight that holds other values now. */
export function renewLayerBound(
  gpu: GpuDevice,
  matrix: Float8Matrix,
  bias: Tensor | undefined,
  bound: LayerBound,
): void {
  gpu.upload(ZEROS, bound.memory);
  raise(gpu, matrix, bias, bound);
}

/** Raises a bound to that of a layer. */
function raise(
  gpu: GpuDevice,
  { values, scales }: Float8Matrix,
  bias: Tensor | undefined,
  bound: LayerBound,
): void {
  const [rows, k] = values.shape;
  expectShape("layerBound", "scales", scales, [rows]);
  if (bias !== undefined) expectShape("layerBound", "bias", bias, [rows]);
  launch(gpu, SOURCE, {
    entry: "layerBound",
    types: { T: values.dtype },
    constants: { N: vectorWidth(k, [values]) },
    grid: Math.ceil(rows / WARPS),
    block: BLOCK,
    args: [bound, values, scales, bias, rows, k],
  });
}

/** What {@link layerBound} computes, from the weight as it is when it is dequantized. */
export function layerBoundReference(weight: Float32Array, k: number, bias?: Float32Array): [number, number] {
  let largest = 0;
  for (let start = 0; start < weight.length; start += k) {
    largest = Math.max(largest, Math.hypot(...weight.subarray(start, start + k)));
  }
  return [largest, bias?.reduce((most, value) => Math.max(most, Math.abs(value)), 0) ?? 0];
}

/**
 * Scales with which E4M3 holds the results of layers, known before these are computed.
 *
 * @param scales f32 `[rows]`, which are written.
 * @param own what gives each row the result that is stored with its scale: as many rows.
 * @param mixed up to two, whose results for any of their rows may be stored with each of the scales, as attention's are.
 */
export function outputScales(
  gpu: GpuDevice,
  scales: Tensor,
  own: Measured | undefined,
  mixed: readonly Measured[] = [],
): void {
  const [rows] = scales.shape;
  if (own !== undefined) expectShape("outputScales", "lengths", own.lengths, [rows]);
  const [first, second] = mixed;
  const fields = (one: Measured | undefined) => [one?.lengths, one?.lengths.size ?? 0, one?.bound];
  launch(gpu, SOURCE, {
    entry: "outputScales",
    types: { T: "f32" },
    constants: { N: 1 },
    grid: Math.ceil(rows / BLOCK),
    block: BLOCK,
    args: [scales, rows, own?.lengths, own?.bound, ...fields(first), ...fields(second)],
  });
}

/** {@link outputScales} of numbers. */
export function outputScalesReference(
  rows: number,
  own: { readonly lengths: Float32Array; readonly bound: readonly [number, number] } | undefined,
  mixed: readonly { readonly lengths: Float32Array; readonly bound: readonly [number, number] }[],
): Float32Array {
  const largest = mixed.map(({ lengths, bound: [length, bias] }) => Math.max(...lengths) * length + bias);
  return Float32Array.from({ length: rows }, (_, row) => {
    const ownBound = own === undefined ? 0 : own.lengths[row] * own.bound[0] + own.bound[1];
    return Math.max(Math.max(ownBound, ...largest) * SLACK, SMALLEST) / FLOAT8_ROW_LARGEST;
  });
}
