import { openCpu, type OpenCpuOptions } from "./cpu/open.ts";
import type { Device } from "./device.ts";
import { FfiError } from "./errors.ts";

/** The names that {@link openDevice} knows, `N` being the index of a GPU. */
export const DEVICE_NAMES: readonly string[] = ["cpu", "cuda", "cuda:N", "hip", "hip:N"];

/**
 * Opens a device by name: `"cpu"`; `"cuda"`, `"cuda:0"`, `"hip:1"`, ... are for builds that have them.
 *
 * @throws {FfiError} for a device that this build lacks, and for an unknown name (the message lists the known ones)
 */
export async function openDevice(
  name: string,
  options: Pick<OpenCpuOptions, "cacheDir" | "onWarning"> = {},
): Promise<Device> {
  if (name === "cpu") return await openCpu(options);
  const gpu = /^(cuda|hip)(:\d+)?$/.exec(name);
  if (gpu !== null) {
    throw new FfiError(`device "${name}": this build runs on the CPU only; ${gpu[1]} is not available yet`, {
      hint: "--device cpu",
    });
  }
  throw new FfiError(`there is no device "${name}"; known are ${DEVICE_NAMES.join(", ")}`);
}
