import { Tensor } from "../ffi/tensor.ts";
import { expect } from "./check.ts";
import { eachPiece, onCpu } from "./cpu.ts";

/**
 * Sum of two tensors. `b`'s shape equals `a`'s or its last dimensions (a position embedding `[tokens, hidden]` under
 * `[batch, tokens, hidden]`).
 *
 * @returns `a`'s shape and dtype.
 */
export function add(a: Tensor, b: Tensor): Tensor {
  const suffix = a.shape.slice(a.rank - b.rank);
  expect(
    b.rank <= a.rank && suffix.every((size, dim) => size === b.shape[dim]),
    "add",
    () => `${b} is not a suffix of ${a}`,
  );
  const out = Tensor.empty(a.device, a.shape, a.dtype);
  if (b.size === a.size && a.isContiguous && b.isContiguous) {
    eachPiece(out, [a, b], (o, x, y) => void onCpu(o, [x, y], addReference));
    return out;
  }
  return onCpu(out, [a, b], addReference);
}

/** `b` repeats along `a`. */
export function addReference(out: Float32Array, a: Float32Array, b: Float32Array): void {
  for (let start = 0; start < a.length; start += b.length) {
    for (let i = 0; i < b.length; i++) out[start + i] = a[start + i] + b[i];
  }
}
