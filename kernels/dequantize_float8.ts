import { viewOf } from "../ffi/cpu/device.ts";
import type { DType } from "../ffi/dtype.ts";
import { float8ToFloat32 } from "../ffi/float8.ts";
import { Tensor } from "../ffi/tensor.ts";
import { onCpu } from "./cpu.ts";
import DEQUANTIZE_FLOAT8_CU from "./dequantize_float8.cu" with { type: "text" };
import { blockSize, gpuOf, launch, vectorWidth } from "./gpu.ts";
import { inFlight } from "./launch_shapes.ts";
import type { Float8Matrix } from "./float8_tensor.ts";

const SOURCE = { name: "dequantize_float8.cu", text: DEQUANTIZE_FLOAT8_CU };

/**
 * `values * scales`, rounded to `dtype`: the numbers that float8 products multiply.
 *
 * @param quantized values `[..., k]` and a scale for each row, or one for all. @param dtype f32 or bf16.
 */
export function dequantize({ values, scales }: Float8Matrix, dtype: DType): Tensor {
  const k = values.shape.at(-1)!;
  const out = Tensor.empty(values.device, values.shape, dtype);
  const gpu = gpuOf(out);
  if (gpu === undefined) {
    const codes = viewOf(values, "f8e4m3", values.size);
    return onCpu(out, [scales], (o, s) => dequantizeReference(o, codes, s, k));
  }
  if (out.size === 0) return out;
  const width = Math.min(vectorWidth(k, [out]), vectorWidth(k, [values]));
  const count = out.size / width;
  const VECTORS = inFlight(gpu, count);
  const block = blockSize(gpu, Math.ceil(count / VECTORS));
  launch(gpu, SOURCE, {
    entry: "dequantize",
    types: { T: dtype },
    constants: { N: width, VECTORS },
    grid: Math.ceil(count / (block * VECTORS)),
    block,
    args: [out, values, scales, BigInt(count), k / width, scales.size > 1 ? 1 : 0],
  });
  return out;
}

/** `codes` `[rows, k]` in E4M3; a scale for each row, or one for all. */
export function dequantizeReference(
  out: Float32Array,
  codes: Uint8Array,
  scales: Float32Array,
  k: number,
): void {
  float8ToFloat32(codes, out, "f8e4m3");
  for (let i = 0; i < out.length; i++) out[i] *= scales.length > 1 ? scales[Math.floor(i / k)] : scales[0];
}
