import { ShapeError } from "../ffi/errors.ts";
import { Tensor } from "../ffi/tensor.ts";
import { copyInto } from "./copy_into.ts";

/**
 * Tensors behind one another along dimension `dim`; all other sizes and the dtype agree.
 *
 * @returns a dense tensor.
 */
export function concat(tensors: readonly Tensor[], dim: number): Tensor {
  const [first] = tensors;
  const at = dim < 0 ? first.rank + dim : dim;
  for (const tensor of tensors) {
    const fits = tensor.dtype === first.dtype && tensor.rank === first.rank &&
      tensor.shape.every((size, i) => i === at || size === first.shape[i]);
    if (!fits) throw new ShapeError(`concat: ${tensor} does not fit behind ${first} along dimension ${at}`);
  }
  const length = tensors.reduce((sum, tensor) => sum + tensor.shape[at], 0);
  const out = Tensor.empty(first.device, first.shape.with(at, length), first.dtype);
  let start = 0;
  for (const tensor of tensors) {
    copyInto(out.narrow(at, start, tensor.shape[at]), tensor);
    start += tensor.shape[at];
  }
  return out;
}
