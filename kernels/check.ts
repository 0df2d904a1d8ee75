import { ShapeError } from "../ffi/errors.ts";
import type { Tensor } from "../ffi/tensor.ts";

/** Throws a {@link ShapeError} that names the operator unless `tensor` has `shape` (null: any size). */
export function expectShape(
  op: string,
  what: string,
  tensor: Tensor,
  shape: readonly (number | null)[],
): void {
  const fits = tensor.rank === shape.length &&
    shape.every((size, dim) => size === null || size === tensor.shape[dim]);
  if (!fits) {
    throw new ShapeError(
      `${op}: ${what} is ${tensor}, expected [${shape.map((size) => size ?? "any").join(", ")}]`,
    );
  }
}

/** Throws a {@link ShapeError} with the operator's name unless `condition` holds. */
export function expect(condition: boolean, op: string, message: () => string): asserts condition {
  if (!condition) throw new ShapeError(`${op}: ${message()}`);
}
