import type { GpuContext } from "../gpu_context.ts";
import type { Driver } from "./driver.ts";

/** What libraries that work on a CUDA device (cuBLASLt, cuDNN, ...) need to know of it. */
export interface CudaContext extends GpuContext<Driver> {
  /** Compute capability, e.g. `[9, 0]`. */
  readonly capability: readonly [major: number, minor: number];
}
