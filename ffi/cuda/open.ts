import { DiskCache } from "../cache.ts";
import { FfiError } from "../errors.ts";
import type { OpenGpuOptions } from "../gpu_open.ts";
import { CudaDevice } from "./device.ts";
import { openDriver } from "./driver.ts";
import { readLibrariesAhead } from "./read_ahead.ts";

/**
 * Opens an NVIDIA GPU as a device. Libraries for matrix products, convolutions and compiling are opened when they are
 * first needed.
 *
 * @param index counts the GPUs that `CUDA_VISIBLE_DEVICES` leaves visible.
 * @throws {FfiError} without a driver or a GPU, and for an index that no GPU has (the message lists those there are)
 */
export function openCuda(index: number, options: OpenGpuOptions = {}): CudaDevice {
  const driver = openDriver();
  try {
    if (options.readAhead) void readLibrariesAhead(driver.driverGetVersion()[0]);
    const count = driver.deviceGetCount();
    if (index >= count) {
      const names = Array.from(
        { length: count },
        (_, i) => `cuda:${i} ${driver.deviceGetName(driver.deviceGet(i))}`,
      );
      throw new FfiError(`there is no GPU cuda:${index}; there are: ${names.join(", ") || "none"}`, {
        hint: "nvidia-smi lists the GPUs that the driver sees; CUDA_VISIBLE_DEVICES may hide some",
      });
    }
    const cache = options.cacheDir === undefined
      ? undefined
      : new DiskCache(options.cacheDir, options.onWarning);
    return new CudaDevice(driver, index, cache, options.onMeasured);
  } catch (error) {
    driver[Symbol.dispose]();
    throw error;
  }
}
