import { loadAssembler } from "./assembler.ts";
import { threadCount } from "./describe.ts";
import { CpuDevice } from "./device.ts";
import { SCRATCH_BYTES, WasmRunner } from "./runner.ts";
import { WasmProvider } from "./wasm.ts";

/** What computes matrix products and convolutions: "auto" is oneDNN where it opens, else WebAssembly. */
export type CpuProviderName = "auto" | "onednn" | "wasm";

export interface OpenCpuOptions {
  readonly provider?: CpuProviderName;
  /** Default: `FLUX_CPU_THREADS`, else one per core. */
  readonly threads?: number;
}

export async function openCpu(options: OpenCpuOptions = {}): Promise<CpuDevice> {
  const threads = options.threads ?? threadCount();
  const assembler = await loadAssembler();
  return new CpuDevice(
    (device) => new WasmProvider(device, device.runner!),
    (device) => {
      const scratch = device.reserve(threads * SCRATCH_BYTES).byteOffset;
      return new WasmRunner(device.wasmMemory, assembler, { threads, scratch });
    },
  );
}
