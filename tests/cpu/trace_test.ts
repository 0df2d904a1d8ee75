/** Traces of pictures: on the CPU, and on the emulated GPU with and without a profiler. */
import assert from "node:assert/strict";
import { openDevice } from "../../ffi/open.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { encodeTrace, type Span, tracePicture } from "../../recipes/base/trace.ts";
import { openEmulatedGpu } from "../support/emulated_gpu.ts";
import { goldenPath } from "../support/golden.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { profilerSuite } from "../support/profiler_suite.ts";
import { ownDevice, testOn } from "../support/test_device.ts";

const DRAWING = { prompt: "a", height: 32, width: 32, numInferenceSteps: 2 };
const HOST_LINES = ["host", "pipeline", "operators (host)"];

Deno.test("a trace has the parts behind one another, and operators inside them", async () => {
  using device = await openDevice("cpu");
  using model = await Model.load(goldenPath("schnell-like"), device);
  const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), bfloat16));
  const events = await tracePicture(pipeline, DRAWING);
  const names = events.filter((event) => event.ph === "M");
  assert.deepEqual(names.map(({ args }) => args.name), HOST_LINES);
  assert.deepEqual(events.slice(0, names.length), names);
  const spans = events.filter((event): event is Span => event.ph === "X");
  for (const [i, { ts, dur, pid, tid }] of spans.entries()) {
    assert.ok(ts >= 0 && dur >= 0 && (i === 0 || ts >= spans[i - 1].ts), `${i}: ${ts}, ${dur}`);
    assert.ok(names.some((line) => line.name === "thread_name" && line.pid === pid && line.tid === tid));
  }

  const parts = spans.filter(({ cat }) => cat === "part");
  assert.deepEqual(parts.map(({ name }) => name), [
    "prompt_encoding",
    "denoising_step",
    "denoising_step",
    "decoding",
    "postprocessing",
  ]);
  for (const [i, part] of parts.entries()) {
    assert.ok(part.dur > 0);
    const next = parts[i + 1];
    if (next !== undefined) assert.ok(Math.abs(part.ts + part.dur - next.ts) < 1);
  }
  const inside = (name: string) => {
    const part = parts.find((event) => event.name === name)!;
    return spans.filter(({ cat, ts }) => cat === "operator" && ts >= part.ts && ts < part.ts + part.dur);
  };
  assert.ok(inside("prompt_encoding").some(({ name }) => name === "embedding"));
  assert.ok(inside("denoising_step").some(({ name }) => name === "jointAttention"));
  assert.ok(inside("decoding").some(({ name }) => name === "conv2d"));
  assert.deepEqual(inside("postprocessing").map(({ name }) => name), ["toPixels"]);
  assert.ok(inside("denoising_step").some(({ args }) => `${args?.shapes}`.startsWith("1x")));

  const plain = await encodeTrace(events, "trace.json");
  assert.deepEqual(JSON.parse(new TextDecoder().decode(plain)).traceEvents, events);
  const packed = new Blob([await encodeTrace(events, "trace.json.gz")]).stream();
  const unpacked = await new Response(packed.pipeThrough(new DecompressionStream("gzip"))).json();
  assert.deepEqual(unpacked.traceEvents, events);
});

profilerSuite(TEST_GPU);

testOn(
  ownDevice("emulated GPU", () => openEmulatedGpu({ profiler: false }), TEST_GPU.skip),
  "without a profiler a trace has no kernels, and one line says why",
  async (device) => {
    using model = await Model.load(goldenPath("schnell-like"), device);
    const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), bfloat16));
    const warnings: string[] = [];
    const onWarning = (message: string) => warnings.push(message);
    const events = await tracePicture(pipeline, { ...DRAWING, numInferenceSteps: 1, onWarning });
    assert.deepEqual(warnings, [
      "the trace is written without the GPU's kernels: cuda:emulated: no profiler; install one",
    ]);
    assert.deepEqual(events.flatMap((event) => event.ph === "M" ? [event.args.name] : []), HOST_LINES);
    const spans = events.filter((event) => event.ph === "X");
    assert.deepEqual([...new Set(spans.map(({ cat }) => cat))].sort(), ["operator", "part"]);
    assert.ok(spans.some(({ name }) => name === "eulerStep"));
  },
);
