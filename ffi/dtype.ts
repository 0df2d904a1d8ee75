/**
 * Element types of tensors and how many bytes each takes. The names are safetensors' own in lower case, with
 * `f8e4m3` for F8_E4M3 (OCP: bias 7, largest value 448, no infinities) and `f8e5m2` for F8_E5M2.
 */
export type DType = "f64" | "f32" | "bf16" | "f16" | "f8e4m3" | "f8e5m2" | "i64" | "i32" | "u8";

const BYTES: Readonly<Record<DType, number>> = {
  f64: 8,
  f32: 4,
  bf16: 2,
  f16: 2,
  f8e4m3: 1,
  f8e5m2: 1,
  i64: 8,
  i32: 4,
  u8: 1,
};

/** Bytes of one element of `dtype`. */
export function dtypeBytes(dtype: DType): number {
  return BYTES[dtype];
}

/** Whether `name` is a dtype that tensors can have. */
export function isDType(name: string): name is DType {
  return Object.hasOwn(BYTES, name);
}
