/** Parts as graphs: replays see new inputs, and where memory runs out a part stays eager. */
import assert from "node:assert/strict";
import type { GpuDevice } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { add } from "../../kernels/add.ts";
import { graphExecute } from "../../recipes/base/graph_execute.ts";
import { eagerPlan, type Plan } from "../../recipes/base/plan.ts";
import { weightsFrom } from "../../recipes/base/weights.ts";
import { missingCompiler } from "../support/emulated_compiler.ts";
import { openEmulatedGpu } from "../support/emulated_gpu.ts";
import { valuesOf } from "../support/golden.ts";
import { ownDevice, testOn } from "../support/test_device.ts";

/** Bytes that the guards around an allocation do not count as. */
const KIB = 1024;

/** A plan of a model without weights. */
function emptyPlan(device: GpuDevice): Plan {
  const weights = weightsFrom(new Map());
  const all = { text_encoder: weights, text_encoder_2: weights, transformer: weights, vae: weights };
  return eagerPlan(device, all);
}

/** Doubles as many kilobytes of numbers as a part of its own; counts how often the body ran. */
function doubling(device: GpuDevice) {
  const { execute } = graphExecute(device);
  const plan = emptyPlan(device);
  let runs = 0;
  const double = async (kilobytes: number, value: number): Promise<void> => {
    const count = 256 * kilobytes;
    const x = Tensor.fromFloat32(device, new Float32Array(count).fill(value), [count]);
    const sum = execute(plan, "sum", [x], ([given]) => (runs++, add(given, given)));
    x.dispose();
    const values = await valuesOf(sum);
    sum.dispose();
    assert.ok(values.every((one) => one === 2 * value), `twice ${value} is not ${values[0]}`);
  };
  return { double, runs: () => runs };
}

const withMemory = (kilobytes: number) =>
  ownDevice("emulated GPU", () => openEmulatedGpu({ memoryBytes: kilobytes * KIB }), missingCompiler());

testOn(withMemory(1000), "graphExecute: a recording is replayed with new inputs", async (device) => {
  const { double, runs } = doubling(device);
  for (const value of [1, 2, 3]) await double(64, value);
  assert.equal(runs(), 2, "once eagerly, once to record");
  await double(32, 4);
  assert.equal(runs(), 4, "another size is another recording");
});

testOn(
  withMemory(3 * 64 + 32),
  "graphExecute: without memory for a recording a part stays eager",
  async (device) => {
    const { double, runs } = doubling(device);
    await double(64, 1);
    const afterFirst = runs();
    for (const value of [2, 3]) await double(64, value);
    assert.equal(runs() - afterFirst, 2, "eager each time");
    assert.equal(device.memoryUse().current, 0);
    assert.equal(device.memoryUse().weights, 0, "what a recording took is given back");
  },
);

testOn(withMemory(400), "graphExecute: older recordings make room for a new one", async (device) => {
  const { double, runs } = doubling(device);
  await double(64, 1);
  await double(80, 2);
  const before = runs();
  await double(80, 3);
  assert.equal(runs(), before, "the new one is replayed");
});

testOn(
  withMemory(400),
  "graphExecute: the first run is among recordings, and its result is not",
  async (device) => {
    const { amongRecordings } = device;
    const there: unknown[] = [];
    device.amongRecordings = (body) => {
      const made = amongRecordings.call(device, body) as ReturnType<typeof body>;
      there.push((made as Tensor).memory);
      return made;
    };
    const { execute } = graphExecute(device);
    const plan = emptyPlan(device);
    const x = Tensor.fromFloat32(device, [1, 2], [2]);
    for (const run of ["first", "second"]) {
      const sum = execute(plan, "sum", [x], ([given]) => add(given, given));
      assert.deepEqual([...await valuesOf(sum)], [2, 4], run);
      assert.equal(there.length, 1);
      assert.ok(!there.includes(sum.memory), run);
      sum.dispose();
    }
    x.dispose();
    assert.equal(device.memoryUse().current, 0);
  },
);
