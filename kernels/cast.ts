import type { DType } from "../ffi/dtype.ts";
import { Tensor } from "../ffi/tensor.ts";
import { readFloat32, writeFloat32 } from "./cpu.ts";

/**
 * The same values in another dtype, rounded to nearest, ties to even. The tensor itself where it has the dtype.
 *
 * @returns a dense tensor. @throws ShapeError for a target that nothing computes in (float8 comes with its recipe).
 */
export function cast(x: Tensor, dtype: DType): Tensor {
  if (x.dtype === dtype) return x;
  const out = Tensor.empty(x.device, x.shape, dtype);
  writeFloat32(out, readFloat32(x));
  return out;
}
