import { FfiError } from "./errors.ts";
import type { Tensor } from "./tensor.ts";

/** Throws {@link FfiError} where a tensor cannot be downloaded into these bytes. @param name of the device. */
export function checkDownload(name: string, tensor: Tensor, into: Uint8Array): void {
  if (!tensor.isContiguous) {
    throw new FfiError(`${name}: download takes a contiguous tensor, not strided ${tensor}`);
  }
  if (into.length !== tensor.byteLength) {
    throw new FfiError(
      `${name}: ${tensor} has ${tensor.byteLength} bytes, ${into.length} were given for them`,
    );
  }
}
