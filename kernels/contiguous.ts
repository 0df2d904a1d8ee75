import { Tensor } from "../ffi/tensor.ts";
import { copyStrided } from "./cpu.ts";

/** The same elements laid out densely in row-major order: the tensor itself where it is so already, else a copy. */
export function contiguous(x: Tensor): Tensor {
  if (x.isContiguous) return x;
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  copyStrided(out, x);
  return out;
}
