/** Choosing by measuring, on times that the test makes up. */
import assert from "node:assert/strict";
import type { GpuContext } from "../../ffi/gpu_context.ts";
import { fastest } from "../../ffi/gpu_measure.ts";
import { openCuda } from "../../ffi/cuda/open.ts";
import { testFakeCuda } from "../support/fake_cuda.ts";

/** A context whose clock goes on by what each run takes. */
function contextWithClock(): { context: GpuContext; takes: (milliseconds: number) => void } {
  let now = 0;
  let events = 0n;
  const recorded = new Map<bigint, number>();
  const driver = {
    eventCreate: () => ++events,
    eventDestroy: (event: bigint) => assert.ok(recorded.delete(event), "an event is destroyed once"),
    eventRecord: (event: bigint) => recorded.set(event, now),
    eventSynchronize() {},
    eventElapsedTime: (start: bigint, end: bigint) => recorded.get(end)! - recorded.get(start)!,
    memsetD8Async: () => now += 100,
  };
  const context = { driver, stream: 0n, workspace: () => 0n } as unknown as GpuContext;
  return { context, takes: (milliseconds) => now += milliseconds };
}

Deno.test("fastest: the lowest median wins, whatever single runs say", () => {
  const { context, takes } = contextWithClock();
  const runs = [0, 0, 0];
  const ways = [[5, 1, 5, 5, 5, 1, 1], [4, 4, 4, 9, 4, 4, 9], [6]].map((times, way) => () => {
    takes(times[runs[way]++ % times.length]);
    return true;
  });
  assert.equal(fastest(context, ways), 1);
});

Deno.test("fastest: the first of nearly equal ways, and none that is refused", () => {
  const { context, takes } = contextWithClock();
  const way = (milliseconds: number, works = true) => () => {
    takes(milliseconds);
    return works;
  };
  assert.equal(fastest(context, [way(1.005), way(1)]), 0);
  assert.equal(fastest(context, [way(1.02), way(1)]), 1);
  assert.equal(fastest(context, [way(0.1, false), way(3), way(2)]), 2);
});

testFakeCuda("cuda: a choice is measured once, where it is asked for, and kept", {}, () => {
  const cacheDir = Deno.makeTempDirSync();
  let runs = 0;
  const ways = () =>
    [1, 2].map(() => () => {
      runs++;
      return true;
    });
  for (const expected of [true, false]) {
    const counts: number[] = [];
    using device = openCuda(0, { cacheDir, onMeasured: (count) => counts.push(count) });
    const { context } = device;
    assert.equal(context.choose("library 1 work", ways), 0);
    assert.equal(runs, 0, "not outside of measuring");
    device.measuring(() => context.choose("library 1 work", ways));
    assert.equal(runs > 0, expected);
    assert.deepEqual(counts, expected ? [1] : []);
    const measured = runs;
    device.measuring(() => device.record(() => void context.choose("library 1 work", ways)))
      [Symbol.dispose]();
    assert.equal(runs, measured, "known from then on");
    runs = 0;
    assert.throws(() =>
      device.measuring(() => {
        throw new RangeError("stop");
      }), RangeError);
    context.choose("other work", ways);
    assert.equal(runs, 0, "measuring ends with its body");
    device.measuring(() => device.record(() => void context.choose("recorded work", ways)))[Symbol.dispose]();
    assert.equal(runs, 0, "nothing is timed while work is recorded");
  }
  Deno.removeSync(cacheDir, { recursive: true });
});
