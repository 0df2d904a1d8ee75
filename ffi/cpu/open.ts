import { DiskCache } from "../cache.ts";
import { FfiError } from "../errors.ts";
import { loadAssembler } from "./assembler.ts";
import { threadCount } from "./describe.ts";
import { CpuDevice } from "./device.ts";
import { OneDnnProvider } from "./onednn_provider.ts";
import type { CpuProvider } from "./provider.ts";
import { SCRATCH_BYTES, WasmRunner } from "./runner.ts";
import { WasmProvider } from "./wasm.ts";

/** What computes matrix products and convolutions: "auto" is oneDNN where it opens, else WebAssembly. */
export type CpuProviderName = "auto" | "onednn" | "wasm";

export interface OpenCpuOptions {
  /** Default "auto". */
  readonly provider?: CpuProviderName;
  /** Default: `FLUX_CPU_THREADS` where it may be read, else one per core. */
  readonly threads?: number;
  /** Folder that keeps assembled kernels from run to run; nothing is kept when left out. */
  readonly cacheDir?: string;
  /** Gets a line about a cache that cannot be used. */
  readonly onWarning?: (message: string) => void;
}

/**
 * Opens the CPU as a device. `properties().providers` says what does the work and, where oneDNN was looked for and not
 * taken, why.
 *
 * @throws {FfiError} with provider "onednn" when no oneDNN 2.x opens; for a `FLUX_CPU_THREADS` that makes no sense
 */
export async function openCpu(options: OpenCpuOptions = {}): Promise<CpuDevice> {
  const { provider = "auto", threads = threadCount() } = options;
  const cache = options.cacheDir === undefined
    ? undefined
    : new DiskCache(options.cacheDir, options.onWarning);
  const assembler = await loadAssembler(cache);
  return new CpuDevice(
    (device) => openProvider(device, device.runner!, provider, threads),
    (device) => {
      const scratch = device.reserve(threads * SCRATCH_BYTES).byteOffset;
      return new WasmRunner(device.wasmMemory, assembler, { threads, scratch });
    },
  );
}

function openProvider(
  device: CpuDevice,
  runner: WasmRunner,
  provider: CpuProviderName,
  threads: number,
): CpuProvider {
  if (provider === "wasm") return new WasmProvider(device, runner);
  try {
    return new OneDnnProvider(device, runner, threads);
  } catch (error) {
    if (provider === "onednn" || !(error instanceof FfiError)) throw error;
    const [reason] = error.message.split(". Searched:"); // one line for --verbose: without the list of places
    const hint = error.hint === undefined ? "" : `; ${error.hint}`;
    return new WasmProvider(device, runner, `${reason}${hint}`);
  }
}
