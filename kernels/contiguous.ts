import { Tensor } from "../ffi/tensor.ts";
import { copyInto } from "./copy_into.ts";

/** The same elements laid out densely in row-major order: the tensor itself where it is so already, else a copy. */
export function contiguous(x: Tensor): Tensor {
  if (x.isContiguous) return x;
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  copyInto(out, x);
  return out;
}

/** `x` `[..., k]` as `[rows, k]`: a view where its dimensions before the last are one, else of a dense copy. */
export function asMatrix(x: Tensor): Tensor {
  const dims = x.shape.map((size, dim) => ({ size, stride: x.strides[dim] })).slice(0, -1)
    .filter(({ size }) => size > 1);
  const merge = dims.slice(1).every(({ size, stride }, i) => dims[i].stride === size * stride);
  return (merge ? x : contiguous(x)).reshape([-1, x.shape.at(-1)!]);
}

/** The tensor itself where its last dimension is dense, whatever the other strides are, else a dense copy. */
export function denseRows(x: Tensor): Tensor {
  return x.strides.at(-1) === 1 || x.shape.at(-1) === 1 ? x : contiguous(x);
}
