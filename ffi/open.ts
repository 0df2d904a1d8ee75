import { openCpu, type OpenCpuOptions } from "./cpu/open.ts";
import { openCuda, type OpenCudaOptions } from "./cuda/open.ts";
import type { Device } from "./device.ts";
import { FfiError } from "./errors.ts";

/** The names that {@link openDevice} knows, `N` being the index of a GPU. */
export const DEVICE_NAMES: readonly string[] = ["cpu", "cuda", "cuda:N", "hip", "hip:N"];

/**
 * Opens a device by name: `"cpu"`; `"cuda"` or `"cuda:0"`, `"cuda:1"`, ... for NVIDIA GPUs; `"hip"` for AMD's is for
 * builds that have it.
 *
 * @throws {FfiError} for a device that is not there (the message says what is missing) or that this build lacks, and for
 *   an unknown name (the message lists the known ones)
 */
export async function openDevice(
  name: string,
  options: Pick<OpenCpuOptions, "cacheDir" | "onWarning"> & OpenCudaOptions = {},
): Promise<Device> {
  if (name === "cpu") return await openCpu(options);
  const gpu = /^(cuda|hip)(?::(\d+))?$/.exec(name);
  if (gpu === null) {
    throw new FfiError(`there is no device "${name}"; known are ${DEVICE_NAMES.join(", ")}`);
  }
  const [, kind, index = "0"] = gpu;
  if (kind === "cuda") return openCuda(Number(index), options);
  throw new FfiError(`device "${name}": this build has no AMD GPUs; hip is not available yet`, {
    hint: "--device cpu",
  });
}
