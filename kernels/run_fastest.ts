import type { GpuDevice } from "../ffi/gpu.ts";

/**
 * Does some work in the way that {@link GpuDevice.fastest} finds, of several with equal results.
 *
 * @param key what the work depends on. @param ways each does it, and may be run several times.
 */
export function runFastest<T>(gpu: GpuDevice, key: string, ways: readonly (() => T)[]): T {
  // What a way allocates while it is timed goes at once.
  return ways[gpu.fastest(key, ways.map((way) => () => gpu.scope(() => void way())))]();
}
