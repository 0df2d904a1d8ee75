import { viewOf } from "../ffi/cpu/device.ts";
import type { DType } from "../ffi/dtype.ts";
import { float32ToFloat8, FLOAT8_LARGEST, type Float8Format } from "../ffi/float8.ts";
import type { GpuDevice, KernelSource } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import { readFloat32 } from "./cpu.ts";
import { Float8Tensor } from "./float8_tensor.ts";
import { gpuOf, launch, vectorWidth } from "./gpu.ts";
import { inFlight, RESIDENT_THREADS } from "./launch_shapes.ts";
import QUANTIZE_FLOAT8_CU from "./quantize_float8.cu" with { type: "text" };
import { launchRows, rowsOf } from "./rows.ts";

const SOURCE = { name: "quantize_float8.cu", text: QUANTIZE_FLOAT8_CU };
/**
 * What a row's largest absolute value becomes, and what those of a row of weights sum to at most, so that products can be summed in
 * f16: common.cuh says why.
 */
export const FLOAT8_ROW_LARGEST = 28;
export const FLOAT8_ROW_SUM = Math.fround(49152 / FLOAT8_ROW_LARGEST);
/** As the smallest largest value: rows of zeros have a scale too. */
const SMALLEST = Math.fround(1e-12);
const BLOCK = 256;

/**
 * Casts to E4M3 with a scale for each row: its largest absolute value / {@link FLOAT8_ROW_LARGEST}. A value is multiplied by the
 * reciprocal of its scale and rounded to nearest, ties to even. A NaN stays one and counts for no scale; an infinity makes its
 * row NaN when it is multiplied by the scale again.
 *
 * @param x `[..., k]`, f32 or bf16, with dense rows.
 * @returns `x`'s shape, with as many scales as it has rows.
 */
export function quantizeRows(x: Tensor): Float8Tensor {
  return quantizeRowsBy({ entry: "quantizeRows", source: SOURCE, reference: quantizeReference }, x);
}

/** A way to cast rows: a kernel, which has the operator's name, and its reference, which is what the CPU does. */
export interface RowQuantizer {
  readonly entry: string;
  /** Of a kernel with the arguments of quantize_float8.cu's quantizeRows. */
  readonly source: KernelSource;
  /** What its text leaves open beside rows' own constants. */
  readonly constants?: Readonly<Record<string, number>>;
  readonly reference: Reference;
}

/** {@link quantizeReference} or the like, with what it has for the rest. */
type Reference = (values: Uint8Array, scales: Float32Array, x: Float32Array, k: number) => void;

/** {@link quantizeRows} by a way of its own. */
export function quantizeRowsBy(
  { entry, source, constants = {}, reference }: RowQuantizer,
  x: Tensor,
): Float8Tensor {
  const k = x.shape.at(-1)!;
  const out = emptyFor(entry, x, true);
  const { values, scales } = out;
  const gpu = gpuOf(x);
  if (gpu === undefined) {
    onCpu(out, x, k, reference);
    return out;
  }
  gpu.scope(() => {
    const { source: rows, count, inner, outerStride, innerStride } = rowsOf(x);
    launchRows(gpu, source, {
      entry,
      types: { T: x.dtype },
      constants,
      rows: count,
      length: k,
      width: vectorWidth(k, [values, rows]),
      out: values,
      inputs: [rows],
      args: [values, scales, rows, count, k, inner, BigInt(outerStride), BigInt(innerStride)],
    });
  });
  return out;
}

/**
 * As {@link quantizeRows} with one scale for the whole tensor, its largest absolute value / 448 (240 where the GPU's E4M3 ends
 * there).
 *
 * @param x f32 or bf16 of any shape; strided ones are copied first.
 * @returns `x`'s shape, with one scale.
 */
export function quantizeTensor(x: Tensor): Float8Tensor {
  const out = emptyFor("quantizeTensor", x, false);
  const gpu = gpuOf(x);
  if (gpu === undefined) {
    onCpu(out, x, x.size, (...of) => quantizeReference(...of, FLOAT8_LARGEST.ocp));
  } else gpu.scope(() => quantizeOnGpu(gpu, out, contiguous(x)));
  return out;
}

function quantizeOnGpu(gpu: GpuDevice, { values, scales }: Float8Tensor, x: Tensor): void {
  const flat = [values, x].map((tensor) => tensor.reshape([tensor.size]));
  const width = vectorWidth(x.size, flat);
  const count = x.size / width;
  const constants = { THREADS: BLOCK, BLOCK, VECTORS: inFlight(gpu, count), N: width };
  const blocks = Math.max(1, Math.ceil(count / (BLOCK * constants.VECTORS)));
  // No more parts than blocks that run at a time: each block of the second kernel reads all of them.
  const partCount = Math.min(blocks, gpu.limits.multiprocessors * RESIDENT_THREADS / BLOCK);
  const parts = Tensor.empty(gpu, [partCount], "f32");
  const types: Record<string, DType> = { T: x.dtype };
  launch(gpu, SOURCE, {
    entry: "largestOfParts",
    types,
    constants,
    grid: partCount,
    block: BLOCK,
    args: [parts, x, BigInt(count)],
  });
  launch(gpu, SOURCE, {
    entry: "quantizeTensor",
    types,
    constants,
    grid: blocks,
    block: BLOCK,
    args: [values, scales, x, BigInt(count), parts, partCount],
  });
}

function emptyFor(op: string, x: Tensor, rowwise: boolean): Float8Tensor {
  expect(x.dtype === "f32" || x.dtype === "bf16", op, () => `takes f32 and bf16, not ${x}`);
  return Float8Tensor.alloc(x.device, x.shape, x.dtype, { rowwise });
}

function onCpu(
  { values, scales }: Float8Tensor,
  x: Tensor,
  k: number,
  reference: Reference,
): void {
  reference(
    viewOf(values, "f8e4m3", values.size),
    viewOf(scales, "f32", scales.size),
    readFloat32(x),
    k,
  );
}

/**
 * `x` in groups of `k` that share a scale: rows, or all of it. `values` are E4M3's codes in `format`.
 *
 * @param largest what the largest value of a group becomes.
 */
export function quantizeReference(
  values: Uint8Array,
  scales: Float32Array,
  x: Float32Array,
  k: number,
  largest: number = FLOAT8_ROW_LARGEST,
  format: Float8Format = "ocp",
): void {
  const scaled = new Float32Array(k);
  for (const group of scales.keys()) {
    const start = group * k;
    scales[group] = scaleOfLargest(x.subarray(start, start + k), largest);
    const factor = Math.fround(1 / scales[group]);
    for (let i = 0; i < k; i++) scaled[i] = x[start + i] * factor;
    float32ToFloat8(scaled, values.subarray(start, start + k), format);
  }
}

/** What makes the largest absolute value `becomes`. NaN does not count. */
export function scaleOfLargest(x: Float32Array, becomes: number): number {
  let largest = 0;
  for (let i = 0; i < x.length; i++) if (Math.abs(x[i]) > largest) largest = Math.abs(x[i]);
  return Math.fround(Math.max(largest, SMALLEST) / becomes);
}
