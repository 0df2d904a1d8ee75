import type { GpuContext } from "../gpu_context.ts";
import type { HipRuntime } from "./runtime.ts";

/** What libraries that work on a HIP device (hipBLASLt, MIOpen, AITER) need to know of it. */
export interface HipContext extends GpuContext<HipRuntime> {
  /** E.g. `"gfx942"`. */
  readonly architecture: string;
  readonly multiprocessors: number;
}
