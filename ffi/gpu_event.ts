import { FfiError } from "./errors.ts";
import type { GpuEvent } from "./gpu.ts";
import type { GpuRuntime } from "./gpu_runtime.ts";

/** A point in the stream. */
export class RuntimeEvent implements GpuEvent {
  #handle: bigint | undefined;

  constructor(private readonly driver: GpuRuntime, handle: bigint) {
    this.#handle = handle;
  }

  get reached(): boolean {
    return this.driver.eventQuery(this.#open);
  }

  since(earlier: GpuEvent): number {
    if (!(earlier instanceof RuntimeEvent)) throw new FfiError("events of two kinds of devices");
    this.driver.eventSynchronize(this.#open);
    return this.driver.eventElapsedTime(earlier.#open, this.#open);
  }

  get #open(): bigint {
    if (this.#handle === undefined) throw new FfiError("the event was disposed");
    return this.#handle;
  }

  [Symbol.dispose](): void {
    if (this.#handle === undefined) return;
    this.driver.eventDestroy(this.#handle);
    this.#handle = undefined;
  }
}
