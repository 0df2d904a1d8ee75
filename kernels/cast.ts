import type { Memory } from "../ffi/device.ts";
import type { DType } from "../ffi/dtype.ts";
import { Tensor } from "../ffi/tensor.ts";
import { convert, eachPiece, readFloat32, writeFloat32 } from "./cpu.ts";

/**
 * The same values in another dtype, rounded to nearest, ties to even. The tensor itself where it has the dtype.
 *
 * @param memory where the result is stored; allocated as an activation when left out.
 * @returns a dense tensor. @throws ShapeError for a target that nothing computes in (float8 comes with its recipe).
 */
export function cast(x: Tensor, dtype: DType, memory?: Memory): Tensor {
  if (x.dtype === dtype) return x;
  const out = memory === undefined
    ? Tensor.empty(x.device, x.shape, dtype)
    : new Tensor(memory, dtype, x.shape);
  if (x.isContiguous) eachPiece(out, [x], convert);
  else writeFloat32(out, readFloat32(x));
  return out;
}
