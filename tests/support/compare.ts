import assert from "node:assert/strict";

/** `|| actual - expected || / || expected ||`; NaN when anything is NaN, so that no comparison passes. */
export function relativeError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  assert.equal(actual.length, expected.length, "lengths differ");
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i] - expected[i]) ** 2;
    norm += expected[i] ** 2;
  }
  return Math.sqrt(difference) / Math.sqrt(norm);
}

/** Fails unless the relative error is at most `limit`; NaN fails. */
export function assertClose(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  limit: number,
  what: string,
): void {
  const error = relativeError(actual, expected);
  assert.ok(error <= limit, `${what}: relative error ${error}, allowed ${limit}`);
}
