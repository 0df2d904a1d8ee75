import assert from "node:assert/strict";
import { Float, type GpuActivity, type GpuDevice } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { compile } from "../../recipes/02_compile.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { type Span, tracePicture } from "../../recipes/base/trace.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { goldenPath, valuesOf } from "./golden.ts";
import { type TestDevice, testOn } from "./test_device.ts";

const SOURCE = {
  name: "scale.cu",
  text: `extern "C" __global__ void scaleInPlace(float *x, int count, float factor) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) x[i] *= factor;
  }`,
};

/** Milliseconds that a GPU's clock may be off the host's: profilers translate one into the other. */
const CLOCKS = 0.5;
/** Milliseconds that the end of a kernel may lie behind the start of the next: the clock's steps. */
const STEPS = 0.002;

/** Of activities in the order of their starts, each stream's one behind the other. */
function assertApart(
  spans: readonly { readonly stream: number; readonly start: number; readonly end: number }[],
) {
  const ends = new Map<number, number>();
  for (const { stream, start, end } of spans) {
    assert.ok(end >= start, `${end} before ${start}`);
    assert.ok(start >= (ends.get(stream) ?? -Infinity) - STEPS, `${start} before ${ends.get(stream)}`);
    ends.set(stream, Math.max(end, ends.get(stream) ?? end));
  }
}

const namesOf = (activities: readonly GpuActivity[]) =>
  activities.filter(({ kind }) => kind === "kernel").map(({ name }) => name);

/** A GPU's profiler, and the trace of a picture made with it. Defines the tests on a device. */
export function profilerSuite(target: TestDevice<GpuDevice>): void {
  testOn(target, "the profiler sees each kernel of each replay of a graph", async (device) => {
    const x = Tensor.fromFloat32(device, new Float32Array(1000).fill(1), [1000]);
    const [a, b, out] = [64, 64, 64].map((size) =>
      Tensor.fromFloat32(device, new Float32Array(size * size), [size, size])
    );
    const kernel = device.kernel(SOURCE, "scaleInPlace");
    const scale = (factor: number) =>
      device.launch(kernel, { grid: 4, block: 256 }, [x, x.size, new Float(factor)]);
    device.matmul({ a, b, out }); // a library's first call does more than its others
    await using profiler = await device.openProfiler();
    using graph = device.record(() => {
      scale(2);
      device.matmul({ a, b, out });
      scale(0.25);
    });
    const before = performance.now();
    const { activities, lost } = await profiler.profile(() => {
      for (let i = 0; i < 3; i++) graph.replay();
    });
    const after = performance.now();
    assert.equal(lost, 0);
    assert.deepEqual(await valuesOf(x), new Float32Array(1000).fill(1 / 8));

    const names = namesOf(activities);
    assert.equal(names.length % 3, 0);
    const once = names.slice(0, names.length / 3);
    assert.deepEqual(names, [...once, ...once, ...once]);
    assert.deepEqual([once[0], once.at(-1)], ["scaleInPlace", "scaleInPlace"]);
    const products = once.slice(1, -1);
    assert.ok(
      products.length > 0 && products.every((name) => name !== "scaleInPlace" && name.length > 2),
      `${once}`,
    );
    const [{ details }] = activities.filter(({ name }) => name === "scaleInPlace");
    assert.deepEqual([details.grid, details.block], ["4x1x1", "256x1x1"]);

    assertApart(activities);
    const total = activities.reduce((sum, { start, end }) => sum + end - start, 0);
    assert.ok(total > 0 && total <= after - before, `${total} of ${after - before} ms`);
    assert.ok(activities[0].start >= before - CLOCKS && activities.at(-1)!.end <= after + CLOCKS);
  });

  testOn(target, "the profiler sees nothing of before and after", async (device) => {
    const x = Tensor.fromFloat32(device, [1], [1]);
    const kernel = device.kernel(SOURCE, "scaleInPlace");
    const scale = () => device.launch(kernel, { grid: 1, block: 32 }, [x, 1, new Float(2)]);
    for (let i = 0; i < 2; i++) {
      await using profiler = await device.openProfiler();
      for (const count of [2, 0, 1]) {
        scale();
        const { activities } = await profiler.profile(() => {
          for (let j = 0; j < count; j++) scale();
        });
        assert.deepEqual(namesOf(activities), Array(count).fill("scaleInPlace"));
      }
    }
    scale();
    assert.deepEqual(await valuesOf(x), Float32Array.of(2 ** 13));
  });

  testOn(target, "a trace has the GPU's kernels inside the parts that they belong to", async (device) => {
    using model = await Model.load(goldenPath("schnell-like"), device);
    const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), bfloat16, compile));
    const warnings: string[] = [];
    const drawing = {
      prompt: "a",
      seed: 1,
      height: 32,
      width: 32,
      numInferenceSteps: 3,
      maxSequenceLength: 16,
    };
    await pipeline.generate(drawing); // recorded without a profiler, as the timed pictures of a benchmark
    const events = await tracePicture(pipeline, {
      ...drawing,
      onWarning: (message) => warnings.push(message),
    });
    assert.deepEqual(warnings, []);

    const lines = events.filter((event) => event.ph === "M").map(({ args }) => args.name);
    assert.deepEqual(lines.slice(0, 4), ["host", "pipeline", "operators (host)", device.name]);
    assert.match(lines[4], /^GPU stream \d+$/);
    const spans = events.filter((event): event is Span => event.ph === "X");
    const kernels = spans.filter(({ cat }) => cat === "kernel");
    const steps = spans.filter(({ name }) => name === "denoising_step");
    assert.equal(steps.length, 3);
    const named = (name: string) => kernels.filter((kernel) => kernel.name === name);

    // All steps were replayed: each has the same kernels, among them one Euler step, at its time.
    assert.equal(named("eulerStep").length, 3);
    for (const [i, { ts, dur }] of named("eulerStep").entries()) {
      const end = steps[i].ts + steps[i].dur;
      assert.ok(
        ts >= steps[i].ts - 1000 * CLOCKS && ts + dur <= end + 1000 * CLOCKS,
        `step ${i}: ${ts}, ${end}`,
      );
    }
    for (const name of ["jointQkNormRope", "adaLayerNorm", "gatedAdaLayerNorm"]) {
      assert.ok(named(name).length > 0 && named(name).length % 3 === 0, `${name}: ${named(name).length}`);
    }
    for (const name of ["embedding", "addRmsNorm", "upsampleNearest", "toPixels"]) {
      assert.ok(named(name).length > 0, name);
    }
    assert.equal(spans.filter(({ cat, name }) => cat === "operator" && name === "eulerStep").length, 0);

    const onGpu = spans.filter(({ cat }) => cat !== "part" && cat !== "operator");
    assertApart(onGpu.map(({ tid, ts, dur }) => ({ stream: tid, start: ts / 1000, end: (ts + dur) / 1000 })));
    const whole = spans.filter(({ cat }) => cat === "part").reduce((sum, { dur }) => sum + dur, 0);
    const busy = onGpu.reduce((sum, { dur }) => sum + dur, 0);
    assert.ok(busy > 0 && busy <= whole, `${busy} of ${whole} us`);
  });
}
