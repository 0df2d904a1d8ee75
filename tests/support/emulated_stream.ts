/**
 * The emulated GPU's stream: work is done when it is issued, or recorded. Its tensors' memory is looked at before and after,
 * and a profiler sees it.
 */
import type { Memory } from "../../ffi/device.ts";
import { dtypeBytes } from "../../ffi/dtype.ts";
import { FfiError } from "../../ffi/errors.ts";
import type { GpuActivity, GpuEvent, GpuProfiler, Graph } from "../../ffi/gpu.ts";
import type { Tensor } from "../../ffi/tensor.ts";
import type { EmulatedHeap } from "./emulated_heap.ts";
import { giveBack, requireGuards } from "./emulated_memory.ts";

export class EmulatedStream {
  /** Work that {@link record} collects now. */
  #recorded: (() => void)[] | undefined;
  /** What a profiler has seen so far. */
  #seen: GpuActivity[] | undefined;

  /** @param name of the device. */
  constructor(
    private readonly name: string,
    private readonly heap: EmulatedHeap,
    private readonly requireOpen: () => void,
  ) {}

  /** Runs or records work on tensors, and looks at what lies around them afterwards. */
  run(what: string, tensors: readonly Tensor[], details: GpuActivity["details"], work: () => void): void {
    this.requireOpen();
    const checked = () => {
      for (const tensor of tensors) {
        this.heap.requireLive(tensor.memory, what);
        requireInside(what, tensor);
      }
      const start = performance.now();
      work();
      const name = what.split(":").at(-1)!.trim(); // a GPU knows no files
      this.#seen?.push({ kind: "kernel", name, stream: 1, start, end: performance.now(), details });
      for (const { memory } of tensors) requireGuards(what, memory);
    };
    if (this.#recorded === undefined) return checked();
    for (const tensor of tensors) this.heap.requireLive(tensor.memory, what);
    this.#recorded.push(checked);
  }

  record(body: () => void): Graph {
    this.requireNotRecording("record");
    const recorded: (() => void)[] = this.#recorded = [];
    const freed = new Set<Memory>(); // while recording: it belongs to the graph
    try {
      this.heap.keepFreed(freed, body);
    } finally {
      this.#recorded = undefined;
    }
    let disposed = false;
    return {
      replay: () => {
        if (disposed) throw new FfiError(`${this.name}: the graph was disposed`);
        this.requireNotRecording("replay");
        this.heap.withFreed(freed, () => {
          for (const work of recorded) work();
        });
      },
      [Symbol.dispose]: () => {
        disposed = true;
        for (const memory of freed) giveBack(memory);
        freed.clear();
      },
    };
  }

  requireNotRecording(what: string): void {
    if (this.#recorded !== undefined) throw new FfiError(`${this.name}: ${what} cannot be recorded`);
  }

  event(): GpuEvent {
    this.requireNotRecording("event");
    return new EmulatedEvent();
  }

  profiler(): GpuProfiler {
    return {
      profile: async (body) => {
        const activities: GpuActivity[] = this.#seen = [];
        try {
          await body();
        } finally {
          this.#seen = undefined;
        }
        return { activities, lost: 0 };
      },
      [Symbol.asyncDispose]: () => Promise.resolve(),
    };
  }
}

class EmulatedEvent implements GpuEvent {
  readonly reached = true; // its work is done when it was issued
  readonly #time = performance.now();

  since(earlier: GpuEvent): number {
    return this.#time - (earlier as EmulatedEvent).#time;
  }

  [Symbol.dispose](): void {}
}

function requireInside(what: string, tensor: Tensor): void {
  const last = tensor.shape.reduce((sum, size, dim) => sum + (size - 1) * tensor.strides[dim], tensor.offset);
  if (tensor.size > 0 && (last + 1) * dtypeBytes(tensor.dtype) > tensor.memory.byteLength) {
    throw new FfiError(`${what}: ${tensor} reaches beyond its memory of ${tensor.memory.byteLength} bytes`);
  }
}
