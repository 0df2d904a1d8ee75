import { bfloat16ToFloat32 } from "./bfloat16.ts";
import { type DType, dtypeBytes } from "./dtype.ts";
import { type Float8Format, float8ToFloat32 } from "./float8.ts";

/**
 * Elements of a dtype, from their little-endian bytes, as f32: rounded where f64 and 64-bit integers have more digits.
 *
 * @param float8 what E4M3 is.
 */
export function valuesFromBytes(
  bytes: Uint8Array<ArrayBuffer>,
  dtype: DType,
  float8: Float8Format = "ocp",
): Float32Array {
  const { buffer, byteOffset, byteLength } = bytes.byteOffset % 8 === 0 ? bytes : bytes.slice();
  const count = byteLength / dtypeBytes(dtype);
  switch (dtype) {
    case "f32":
      return new Float32Array(buffer, byteOffset, count);
    case "f64":
      return Float32Array.from(new Float64Array(buffer, byteOffset, count));
    case "f16":
      return Float32Array.from(new Float16Array(buffer, byteOffset, count));
    case "i64":
      return Float32Array.from(new BigInt64Array(buffer, byteOffset, count), Number);
    case "i32":
      return Float32Array.from(new Int32Array(buffer, byteOffset, count));
    case "u8":
      return Float32Array.from(new Uint8Array(buffer, byteOffset, count));
    case "bf16": {
      const values = new Float32Array(count);
      bfloat16ToFloat32(new Uint16Array(buffer, byteOffset, count), values);
      return values;
    }
    case "f8e4m3":
    case "f8e5m2": {
      const values = new Float32Array(count);
      float8ToFloat32(new Uint8Array(buffer, byteOffset, count), values, dtype, float8);
      return values;
    }
  }
}

/**
 * A strided view's elements, row by row.
 *
 * @param memory elements from the view's first one on. @param strides in elements.
 */
export function gatherValues(
  memory: Float32Array,
  shape: readonly number[],
  strides: readonly number[],
): Float32Array {
  const values = new Float32Array(shape.reduce((product, size) => product * size, 1));
  let to = 0;
  const walk = (dim: number, from: number): void => {
    if (dim === shape.length) {
      values[to++] = memory[from];
      return;
    }
    for (let i = 0; i < shape[dim]; i++) walk(dim + 1, from + i * strides[dim]);
  };
  if (values.length > 0) walk(0, 0);
  return values;
}
