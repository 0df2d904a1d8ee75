import { openCpu } from "./cpu/open.ts";
import { openCuda } from "./cuda/open.ts";
import type { Device } from "./device.ts";
import { FfiError } from "./errors.ts";
import type { OpenGpuOptions } from "./gpu_open.ts";
import { openHip } from "./hip/open.ts";

/** The names that {@link openDevice} knows, `N` being the index of a GPU. */
export const DEVICE_NAMES: readonly string[] = ["cpu", "cuda", "cuda:N", "hip", "hip:N"];

/**
 * Opens a device by name: `"cpu"`; `"cuda"` or `"cuda:0"`, `"cuda:1"`, ... for NVIDIA GPUs; `"hip"` or `"hip:0"`, ... for
 * AMD's.
 *
 * @throws {FfiError} for a device that is not there (the message says what is missing), and for an unknown name (the
 *   message lists the known ones)
 */
export async function openDevice(
  name: string,
  options: OpenGpuOptions = {},
): Promise<Device> {
  if (name === "cpu") return await openCpu(options);
  const gpu = /^(cuda|hip)(?::(\d+))?$/.exec(name);
  if (gpu === null) {
    throw new FfiError(`there is no device "${name}"; known are ${DEVICE_NAMES.join(", ")}`);
  }
  const [, kind, index = "0"] = gpu;
  return kind === "cuda" ? openCuda(Number(index), options) : openHip(Number(index), options);
}
