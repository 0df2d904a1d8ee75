import { ShapeError } from "../../ffi/errors.ts";

/** Peak signal-to-noise ratio of 8-bit pictures of one size in dB; infinite for equal ones. */
export function psnr(actual: Uint8Array, expected: Uint8Array): number {
  expectPictures("psnr", actual, expected);
  const squares = expected.reduce((sum, value, i) => sum + (value - actual[i]) ** 2, 0);
  return 10 * Math.log10(255 ** 2 * expected.length / squares);
}

/** The largest difference of two 8-bit pictures of one size: 0 to 255. */
export function largestError(actual: Uint8Array, expected: Uint8Array): number {
  expectPictures("largestError", actual, expected);
  return expected.reduce((largest, value, i) => Math.max(largest, Math.abs(value - actual[i])), 0);
}

function expectPictures(what: string, actual: Uint8Array, expected: Uint8Array): void {
  if (actual.length === expected.length && expected.length > 0) return;
  throw new ShapeError(
    `${what}: ${actual.length} and ${expected.length} bytes: give two pictures of one size`,
  );
}
