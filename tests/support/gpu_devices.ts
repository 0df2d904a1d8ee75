import { FfiError } from "../../ffi/errors.ts";
import { type GpuDevice, isGpu } from "../../ffi/gpu.ts";
import { openDevice } from "../../ffi/open.ts";
import { defaultCacheDir } from "../../recipes/base/command_line.ts";
import { missingCompiler } from "./emulated_compiler.ts";
import { openEmulatedGpu } from "./emulated_gpu.ts";
import { findCudaLibraries, useHipShim } from "./hip_shim.ts";
import { ownDevice, type TestDevice, testOn } from "./test_device.ts";

/**
 * The GPU of this process's tests: in tests/gpu the real one, which all tests of a file share, since opening it takes
 * long, in files named hip_shim_... as the HIP device by the shim; elsewhere an emulated one for each test, in files named
 * hip_... one of AMD's.
 */
export const TEST_GPU: TestDevice<GpuDevice> = Deno.mainModule.includes("/tests/gpu/hip_shim_")
  ? await realGpu("hip")
  : Deno.mainModule.includes("/tests/gpu/")
  ? await realGpu("cuda")
  : Deno.mainModule.includes("/tests/cpu/hip_")
  ? ownDevice("emulated AMD GPU", () => openEmulatedGpu({ architecture: "gfx950" }), missingCompiler())
  : ownDevice("emulated GPU", openEmulatedGpu, missingCompiler());

/** The emulated GPU with a vendor's attention. */
export const GPU_WITH_ATTENTION: TestDevice<GpuDevice> = ownDevice(
  "emulated GPU with attention",
  () => openEmulatedGpu({ attention: true }),
  missingCompiler(),
);

/** Defines a test `<op>: <title> (<GPU>)`; skipped, with a word, where there is no such GPU. */
export type DefineGpuTest = (title: string, body: (device: GpuDevice) => void | Promise<void>) => void;

/** Calls `define` with how to define a test of `op` on {@link TEST_GPU}. */
export function forEachGpu(op: string, define: (test: DefineGpuTest) => void): void {
  define((title, body) => testOn(TEST_GPU, `${op}: ${title}`, body));
}

async function realGpu(kind: "cuda" | "hip"): Promise<TestDevice<GpuDevice>> {
  const name = kind === "cuda" ? "cuda" : "hip by the shim";
  try {
    if (kind === "hip") useHipShim(findCudaLibraries());
    const cacheDir = defaultCacheDir();
    const device = await openDevice(kind, cacheDir === undefined ? {} : { cacheDir });
    if (!isGpu(device)) throw new TypeError(`${device.name} is no GPU`);
    addEventListener("unload", () => device[Symbol.dispose]());
    // One piece of memory for all tests: where one grows beside another, as it does else, compute-sanitizer takes a bulk copy
    // across both for one out of bounds.
    device.free(device.alloc(2 ** 30));
    return { name, skip: undefined, use: async (body) => await body(device) };
  } catch (error) {
    if (!(error instanceof FfiError)) throw error;
    const [sentence] = error.message.split(". ");
    return { name, skip: sentence, use: () => Promise.resolve() };
  }
}
