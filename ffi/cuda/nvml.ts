/** NVML, the driver's management library: what the CUDA driver does not tell of itself. */
import type { PowerMeter } from "../gpu.ts";
import { openLibrary, pinLibrary } from "../library.ts";

const NVML = {
  // nvmlReturn_t nvmlInit_v2(void): opens no GPU
  nvmlInit_v2: { parameters: [], result: "i32" },
  // nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length)
  nvmlSystemGetDriverVersion: { parameters: ["buffer", "u32"], result: "i32" },
  // nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *pciBusId, nvmlDevice_t *device)
  nvmlDeviceGetHandleByPciBusId_v2: { parameters: ["buffer", "buffer"], result: "i32" },
  // nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *energy)
  nvmlDeviceGetTotalEnergyConsumption: { parameters: ["u64", "buffer"], result: "i32" },
  // nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, nvmlClockType_t type, unsigned int *clock)
  nvmlDeviceGetClockInfo: { parameters: ["u64", "u32", "buffer"], result: "i32" },
  // nvmlReturn_t nvmlShutdown(void)
  nvmlShutdown: { parameters: [], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

const NVML_CLOCK_SM = 1;

function openNvml() {
  const library = openLibrary("NVML", NVML, { sonames: ["libnvidia-ml.so.1"] });
  pinLibrary(library.path); // it is not made to be unmapped before the process ends
  return library;
}

/**
 * Where the library is, and the driver's version, e.g. `"580.159.04"`; undefined where it does not tell.
 *
 * @throws {LibraryNotFoundError}
 */
export function askNvml(): { readonly path: string; readonly driverVersion: string | undefined } {
  const { path, symbols } = openNvml();
  if (symbols.nvmlInit_v2() !== 0) return { path, driverVersion: undefined };
  const text = new Uint8Array(80);
  const status = symbols.nvmlSystemGetDriverVersion(text, text.length);
  symbols.nvmlShutdown();
  const driverVersion = status === 0
    ? new TextDecoder().decode(text.subarray(0, text.indexOf(0)))
    : undefined;
  return { path, driverVersion };
}

/**
 * What the GPU at this place draws, and its clock; undefined where NVML does not say (in some virtual machines).
 *
 * @param pciBusId as cuDeviceGetPCIBusId has it.
 * @throws {LibraryNotFoundError}
 */
export function openPowerMeter(pciBusId: string): PowerMeter | undefined {
  const { symbols } = openNvml();
  const device = new BigUint64Array(1);
  const id = new TextEncoder().encode(`${pciBusId}\0`);
  if (symbols.nvmlInit_v2() !== 0) return undefined;
  const [millijoules, megahertz] = [new BigUint64Array(1), new Uint32Array(1)];
  const meter = {
    joules: () => {
      const status = symbols.nvmlDeviceGetTotalEnergyConsumption(device[0], bytesOf(millijoules));
      return status === 0 ? Number(millijoules[0]) / 1000 : NaN;
    },
    megahertz: () => {
      const status = symbols.nvmlDeviceGetClockInfo(device[0], NVML_CLOCK_SM, bytesOf(megahertz));
      return status === 0 ? megahertz[0] : NaN;
    },
    [Symbol.dispose]: () => void symbols.nvmlShutdown(),
  };
  if (symbols.nvmlDeviceGetHandleByPciBusId_v2(id, bytesOf(device)) === 0) return meter;
  meter[Symbol.dispose]();
  return undefined;
}

function bytesOf(
  { buffer }: BigUint64Array<ArrayBuffer> | Uint32Array<ArrayBuffer>,
): Uint8Array<ArrayBuffer> {
  return new Uint8Array(buffer);
}
