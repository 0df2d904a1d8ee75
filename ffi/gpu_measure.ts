import type { GpuContext } from "./gpu_context.ts";

/** Bytes that are overwritten before each run: more than the GPU's second-level cache, as other layers would. */
const FLUSHED_BYTES = 128 * 2 ** 20;
/** Timed runs of each way; all ways take turns, so that clocks and heat are the same for all. */
const ROUNDS = 9;
/** Of these, the first: until clocks are what they are under steady work. */
const WARM_UP = 2;

/**
 * Times several ways to do the same work on the device, and returns the index of the fastest by its median. A way issues
 * the work once and returns false where the library refuses it. Ways are tried in their order; nearly equal ones (within
 * 1 %) count as equal, and the first of them wins.
 *
 * All runs are issued at once, and waited for at the end: a GPU that rests between two runs has higher clocks than one
 * under steady work, and other ways win there.
 *
 * @throws what a way throws
 */
export function fastest(context: GpuContext, ways: readonly (() => boolean)[]): number {
  const { driver, stream } = context;
  const works = ways.map((way) => way()); // loads kernels too
  const runs: { readonly way: number; readonly start: bigint; readonly end: bigint }[] = [];
  const times: number[][] = ways.map(() => []);
  using events = new DisposableStack();
  const event = () => {
    const made = driver.eventCreate(true);
    events.defer(() => driver.eventDestroy(made));
    return made;
  };
  for (let round = 0; round < ROUNDS; round++) {
    ways.forEach((run, way) => {
      if (!works[way]) return;
      const [start, end] = [event(), event()];
      driver.memsetD8Async(context.workspace(FLUSHED_BYTES), round, FLUSHED_BYTES, stream);
      driver.eventRecord(start, stream);
      run();
      driver.eventRecord(end, stream);
      if (round >= WARM_UP) runs.push({ way, start, end });
    });
  }
  for (const { way, start, end } of runs) {
    driver.eventSynchronize(end);
    times[way].push(driver.eventElapsedTime(start, end));
  }
  const medians = times.map((all) => all.sort((a, b) => a - b)[all.length >> 1] ?? Infinity);
  const best = Math.min(...medians);
  return Math.max(0, medians.findIndex((median) => median <= 1.01 * best));
}
