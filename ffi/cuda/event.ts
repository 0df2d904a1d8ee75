import { FfiError } from "../errors.ts";
import type { GpuEvent } from "../gpu.ts";
import type { Driver } from "./driver.ts";

/** A point in the stream. */
export class CudaEvent implements GpuEvent {
  #handle: bigint | undefined;

  constructor(private readonly driver: Driver, handle: bigint) {
    this.#handle = handle;
  }

  get reached(): boolean {
    return this.driver.eventQuery(this.#open);
  }

  since(earlier: GpuEvent): number {
    if (!(earlier instanceof CudaEvent)) throw new FfiError("cuda: events of two kinds of devices");
    this.driver.eventSynchronize(this.#open);
    return this.driver.eventElapsedTime(earlier.#open, this.#open);
  }

  get #open(): bigint {
    if (this.#handle === undefined) throw new FfiError("cuda: the event was disposed");
    return this.#handle;
  }

  [Symbol.dispose](): void {
    if (this.#handle === undefined) return;
    this.driver.eventDestroy(this.#handle);
    this.#handle = undefined;
  }
}
