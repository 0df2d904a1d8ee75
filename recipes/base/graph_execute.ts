import type { Memory } from "../../ffi/device.ts";
import { dtypeBytes } from "../../ffi/dtype.ts";
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

/**
 * Runs each part as one graph. The first call for some dtypes and shapes runs eagerly, which compiles kernels and plans
 * products, and is recorded right after; later calls copy their inputs in, replay, and copy the outputs out. So all that
 * changes has to be an input: a recorded number or address stays what it was.
 *
 * Recordings belong to the plan that runs, since another plan has other weights and operators, and go with it.
 */
export function graphExecute(device: GpuDevice): Execute {
  const plans = new WeakMap<Plan, Map<string, Recording>>();
  const forgotten = new FinalizationRegistry<Map<string, Recording>>((recordings) => {
    for (const recording of recordings.values()) recording[Symbol.dispose]();
  });
  return (plan, part, inputs, body) => {
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
      return replay(device, known, inputs) as ReturnType<typeof body>;
    }
    const result = device.scope(() => body(inputs));
    dropOldest(recordings, part);
    recordings.set(key, record(device, inputs, body));
    return result;
  };
}

function record<O>(
  device: GpuDevice,
  inputs: readonly Tensor[],
  body: (inputs: readonly Tensor[]) => O,
): Recording {
  const memories: Memory[] = [];
  const fixed = ({ shape, dtype, size }: Tensor) => {
    const memory = device.alloc(size * dtypeBytes(dtype), "weights"); // lives as long as the recording
    memories.push(memory);
    return new Tensor(memory, dtype, shape);
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
  return mapTensors(outputs, (place) => {
    const copy = Tensor.empty(device, place.shape, place.dtype);
    copyInto(copy, place);
    return copy;
  });
}

function dropOldest(recordings: Map<string, Recording>, part: string): void {
  const keys = [...recordings.keys()].filter((key) => key.startsWith(`${part} `));
  for (const key of keys.slice(0, Math.max(0, keys.length - MOST_SHAPES + 1))) {
    recordings.get(key)![Symbol.dispose]();
    recordings.delete(key);
  }
}
