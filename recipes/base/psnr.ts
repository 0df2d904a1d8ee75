import { ShapeError } from "../../ffi/errors.ts";

/** Peak signal-to-noise ratio of 8-bit pictures of one size in dB; infinite for equal ones. */
export function psnr(actual: Uint8Array, expected: Uint8Array): number {
  if (actual.length !== expected.length || expected.length === 0) {
    throw new ShapeError(
      `psnr: ${actual.length} and ${expected.length} bytes: give two pictures of one size`,
    );
  }
  const squares = expected.reduce((sum, value, i) => sum + (value - actual[i]) ** 2, 0);
  return 10 * Math.log10(255 ** 2 * expected.length / squares);
}
