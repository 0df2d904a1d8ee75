import type { Driver } from "./driver.ts";

/** What libraries that work on a CUDA device (cuBLASLt, cuDNN, ...) need to know of it. */
export interface CudaContext {
  readonly driver: Driver;
  /** All work of the device is issued to this one stream, so its order is the order of the calls. */
  readonly stream: bigint;
  /** Compute capability, e.g. `[9, 0]`. */
  readonly capability: readonly [major: number, minor: number];
  /**
   * Address of at least `bytes` of scratch, aligned to 256. There is one piece for all calls on the stream: whoever
   * asks next gets the same bytes, so they are good for one call only.
   *
   * @throws {OutOfMemoryError}
   */
  workspace(bytes: number): bigint;
}
