import { DiskCache } from "../cache.ts";
import { FfiError } from "../errors.ts";
import type { OpenGpuOptions } from "../gpu_open.ts";
import { HipDevice } from "./device.ts";
import { openRuntime } from "./runtime.ts";

/**
 * Opens an AMD GPU as a device. Libraries for matrix products, convolutions and compiling are opened when they are first
 * needed.
 *
 * @param index counts the GPUs that `HIP_VISIBLE_DEVICES` leaves visible.
 * @throws {FfiError} without ROCm or a GPU, and for an index that no GPU has (the message lists those there are)
 */
export function openHip(index: number, options: OpenGpuOptions = {}): HipDevice {
  const runtime = openRuntime();
  try {
    const count = runtime.getDeviceCount();
    if (index >= count) {
      const names = Array.from({ length: count }, (_, i) => `hip:${i} ${runtime.deviceGetName(i)}`);
      throw new FfiError(`there is no GPU hip:${index}; there are: ${names.join(", ") || "none"}`, {
        hint: "rocminfo lists the GPUs that ROCm sees; HIP_VISIBLE_DEVICES may hide some",
      });
    }
    const cache = options.cacheDir === undefined
      ? undefined
      : new DiskCache(options.cacheDir, options.onWarning);
    return new HipDevice(runtime, index, cache, options.onMeasured, options.onWarning);
  } catch (error) {
    runtime[Symbol.dispose]();
    throw error;
  }
}
