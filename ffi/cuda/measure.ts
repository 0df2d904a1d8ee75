import type { CudaContext } from "./context.ts";

/** Bytes that are overwritten before each run: more than the GPU's second-level cache, as other layers would. */
const FLUSHED_BYTES = 128 * 2 ** 20;
/** Timed runs of each way; all ways take turns, so that clocks and heat are the same for all. */
const ROUNDS = 7;

/**
 * Times several ways to do the same work on the device, and returns the index of the fastest by its median. A way issues
 * the work once and returns false where the library refuses it. Ways are tried in their order; nearly equal ones (within
 * 1 %) count as equal, and the first of them wins.
 *
 * @throws what a way throws
 */
export function fastest(context: CudaContext, ways: readonly (() => boolean)[]): number {
  const { driver, stream } = context;
  const works = ways.map((way) => way()); // loads kernels too
  const times: number[][] = ways.map(() => []);
  const [start, end] = [driver.eventCreate(true), driver.eventCreate(true)];
  try {
    for (let round = 0; round < ROUNDS; round++) {
      ways.forEach((way, i) => {
        if (!works[i]) return;
        driver.memsetD8Async(context.workspace(FLUSHED_BYTES), round, FLUSHED_BYTES, stream);
        driver.eventRecord(start, stream);
        way();
        driver.eventRecord(end, stream);
        driver.eventSynchronize(end);
        times[i].push(driver.eventElapsedTime(start, end));
      });
    }
  } finally {
    driver.eventDestroy(start);
    driver.eventDestroy(end);
  }
  const medians = times.map((all) => all.sort((a, b) => a - b)[ROUNDS >> 1] ?? Infinity);
  const best = Math.min(...medians);
  return Math.max(0, medians.findIndex((median) => median <= 1.01 * best));
}
