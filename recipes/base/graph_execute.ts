import type { Memory } from "../../ffi/device.ts";
import { OutOfMemoryError } from "../../ffi/errors.ts";
import type { GpuDevice, Graph } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { copyInto } from "../../kernels/copy_into.ts";
import type { Execute, Plan } from "./plan.ts";
import { mapTensors } from "./tensors.ts";

/** Shapes of each part that are kept; the one that was not used for the longest time goes first. */
const MOST_SHAPES = 8;

/** A recorded part: inputs are copied to fixed places, outputs from fixed places. */
interface Recording extends Disposable {
  readonly inputs: readonly Tensor[];
  readonly outputs: unknown;
  readonly graph: Graph;
}

/** What is known of a part for some shapes: its recording, or that memory does not suffice for one. */
type Known = Recording | "eager";

/**
 * Runs each part as one graph. The first call for some dtypes and shapes runs eagerly, which compiles kernels and plans
 * products, and is recorded right after, on the same memory; later calls copy their inputs in, replay, and copy the outputs out. So
 * all that changes has to be an input: a recorded number or address stays what it was.
 *
 * A recording needs memory of its own. Where that runs out, the other recordings are dropped, and if it still does not
 * suffice, the part goes on running eagerly for these shapes.
 *
 * Recordings belong to the plan that runs, since another plan has other weights and operators, and go with it.
 */
export function graphExecute(device: GpuDevice): Required<Pick<Plan, "execute" | "forget">> {
  const plans = new WeakMap<Plan, Map<string, Known>>();
  const forgotten = new FinalizationRegistry<Map<string, Known>>(dropAll);
  const execute: Execute = (plan, part, inputs, body) => {
    let recordings = plans.get(plan);
    if (recordings === undefined) {
      plans.set(plan, recordings = new Map());
      forgotten.register(plan, recordings);
    }
    const key = `${part} ${inputs.map(String).join(" ")}`;
    const known = recordings.get(key);
    if (known !== undefined) {
      recordings.delete(key); // and to the end, as the latest
      recordings.set(key, known);
      if (known === "eager") return device.scope(() => body(inputs));
      return replay(device, known, inputs) as ReturnType<typeof body>;
    }
    const result = device.scope(() =>
      mapTensors(
        device.amongRecordings(() => body(inputs)),
        (made) => copyOf(device, made),
      )
    ) as ReturnType<typeof body>;
    dropOldest(recordings, part);
    const recording = recordIfItFits(device, inputs, body);
    if (recording === undefined) dropAll(recordings);
    recordings.set(key, recording ?? recordIfItFits(device, inputs, body) ?? "eager");
    return result;
  };
  return { execute, forget: (plan) => dropAll(plans.get(plan) ?? new Map()) };
}

/** Undefined where memory runs out. */
function recordIfItFits<O>(
  device: GpuDevice,
  inputs: readonly Tensor[],
  body: (inputs: readonly Tensor[]) => O,
): Recording | undefined {
  try {
    return record(device, inputs, body);
  } catch (error) {
    if (error instanceof OutOfMemoryError) return undefined;
    throw error;
  }
}

function record<O>(
  device: GpuDevice,
  inputs: readonly Tensor[],
  body: (inputs: readonly Tensor[]) => O,
): Recording {
  const memories: Memory[] = [];
  const fixed = ({ shape, dtype }: Tensor) => {
    const place = Tensor.empty(device, shape, dtype, "weights"); // lives as long as the recording
    memories.push(place.memory);
    return place;
  };
  const free = () => memories.forEach((memory) => device.free(memory));
  try {
    const places = inputs.map(fixed);
    let outputs: unknown;
    const graph = device.record(() =>
      device.scope(() => {
        outputs = mapTensors(body(places), (made) => {
          const place = fixed(made);
          copyInto(place, made);
          return place;
        });
      })
    );
    return {
      inputs: places,
      outputs,
      graph,
      [Symbol.dispose]: () => {
        graph[Symbol.dispose]();
        free();
      },
    };
  } catch (error) {
    free();
    throw error;
  }
}

function replay(device: GpuDevice, { inputs, outputs, graph }: Recording, given: readonly Tensor[]): unknown {
  inputs.forEach((place, i) => copyInto(place, given[i]));
  graph.replay();
  return mapTensors(outputs, (place) => copyOf(device, place));
}

function copyOf(device: GpuDevice, tensor: Tensor): Tensor {
  const copy = Tensor.empty(device, tensor.shape, tensor.dtype);
  copyInto(copy, tensor);
  return copy;
}

function dropOldest(recordings: Map<string, Known>, part: string): void {
  const keys = [...recordings.keys()].filter((key) => key.startsWith(`${part} `));
  for (const key of keys.slice(0, Math.max(0, keys.length - MOST_SHAPES + 1))) drop(recordings, key);
}

function dropAll(recordings: Map<string, Known>): void {
  for (const key of [...recordings.keys()]) drop(recordings, key);
}

function drop(recordings: Map<string, Known>, key: string): void {
  const known = recordings.get(key);
  if (known !== undefined && known !== "eager") known[Symbol.dispose]();
  recordings.delete(key);
}
