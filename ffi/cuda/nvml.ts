/** NVML, the driver's management library: what the CUDA driver does not tell of itself. */
import { openLibrary, pinLibrary } from "../library.ts";

const NVML = {
  // nvmlReturn_t nvmlInit_v2(void): opens no GPU
  nvmlInit_v2: { parameters: [], result: "i32" },
  // nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length)
  nvmlSystemGetDriverVersion: { parameters: ["buffer", "u32"], result: "i32" },
  // nvmlReturn_t nvmlShutdown(void)
  nvmlShutdown: { parameters: [], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/**
 * Where the library is, and the driver's version, e.g. `"580.159.04"`; undefined where it does not tell.
 *
 * @throws {LibraryNotFoundError}
 */
export function askNvml(): { readonly path: string; readonly driverVersion: string | undefined } {
  const { path, symbols } = openLibrary("NVML", NVML, { sonames: ["libnvidia-ml.so.1"] });
  pinLibrary(path); // it is not made to be unmapped before the process ends
  if (symbols.nvmlInit_v2() !== 0) return { path, driverVersion: undefined };
  const text = new Uint8Array(80);
  const status = symbols.nvmlSystemGetDriverVersion(text, text.length);
  symbols.nvmlShutdown();
  const driverVersion = status === 0
    ? new TextDecoder().decode(text.subarray(0, text.indexOf(0)))
    : undefined;
  return { path, driverVersion };
}
