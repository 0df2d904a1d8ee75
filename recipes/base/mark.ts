import { setImmediate } from "node:timers";
import type { Device } from "../../ffi/device.ts";
import { type GpuEvent, isGpu } from "../../ffi/gpu.ts";

/** A point in the order of a device's work. */
export interface Mark extends Disposable {
  /** When it was made, on the clock of `performance.now()`; on the CPU the work before it is done then. */
  readonly made: number;
  /** Resolves when the work before it is done; other work of this process goes on meanwhile. */
  reached(): Promise<void>;
  /** Milliseconds from `earlier` to this one, both of which were reached. */
  since(earlier: Mark): number;
}

/** Marks the end of the work issued so far, without waiting for it. */
export function mark(device: Device): Mark {
  return isGpu(device) ? new GpuMark(device.event()) : new HostMark();
}

/** The clock of the GPU: it knows when it was there, whenever somebody asks. */
class GpuMark implements Mark {
  readonly made = performance.now();

  constructor(private readonly event: GpuEvent) {}

  async reached(): Promise<void> {
    // A timer of its own would wake up a millisecond late.
    while (!this.event.reached) await new Promise((resolve) => setImmediate(resolve));
  }

  since(earlier: Mark): number {
    return this.event.since((earlier as GpuMark).event);
  }

  [Symbol.dispose](): void {
    this.event[Symbol.dispose]();
  }
}

/** The CPU's work is done when it was issued. */
class HostMark implements Mark {
  readonly made = performance.now();

  reached(): Promise<void> {
    return Promise.resolve();
  }

  since(earlier: Mark): number {
    return this.made - earlier.made;
  }

  [Symbol.dispose](): void {}
}
