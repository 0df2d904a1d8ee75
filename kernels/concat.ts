import { ShapeError } from "../ffi/errors.ts";
import { Tensor } from "../ffi/tensor.ts";
import { copyStrided } from "./cpu.ts";
import { gpuOf } from "./gpu.ts";
import { copyStridedOnGpu } from "./strided_copy.ts";

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
  const gpu = gpuOf(out);
  let start = 0;
  for (const tensor of tensors) {
    const part = out.narrow(at, start, tensor.shape[at]);
    if (gpu !== undefined) copyStridedOnGpu(gpu, part, tensor);
    else copyStrided(part, tensor);
    start += tensor.shape[at];
  }
  return out;
}
