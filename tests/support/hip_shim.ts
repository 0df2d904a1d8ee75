/**
 * hip_shim.cpp in the place of AMD's libraries: on a machine with an NVIDIA GPU over its own libraries, elsewhere over the
 * stand-ins of cuda_on_cpu.ts.
 */
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { FfiError } from "../../ffi/errors.ts";
import { candidatePaths, readEnv } from "../../ffi/library.ts";
import { cudaSonames, NEWEST_CUDA } from "../../ffi/cuda/versions.ts";
import { type CudaOnCpu, cudaOnCpu } from "./cuda_on_cpu.ts";
import { compile, missingCompiler } from "./fake_cuda.ts";

const LIBRARY_PATH = "FLUX_LIB_PATH";
/** What of AMD's the shim is. */
const NAMES = ["libamdhip64.so.7", "libhiprtc.so.7", "libhipblaslt.so.1", "libMIOpen.so.1"];

/**
 * Compiles the shim over the CUDA libraries at these paths, and has it found in the place of AMD's libraries from now on in
 * this process. Its folder goes when the process ends.
 */
export function useHipShim(cudaLibraries: readonly string[]): void {
  const folder = Deno.makeTempDirSync({ prefix: "flux-hip-shim-" });
  addEventListener("unload", () => Deno.removeSync(folder, { recursive: true }));
  buildHipShim(folder, cudaLibraries);
  const before = Deno.env.get(LIBRARY_PATH);
  Deno.env.set(LIBRARY_PATH, before === undefined ? folder : `${folder}:${before}`);
}

/** Compiles the shim over the CUDA libraries at these paths into a folder, under the names of AMD's libraries. */
export function buildHipShim(folder: string, cudaLibraries: readonly string[]): void {
  const missing = missingCompiler();
  if (missing !== undefined) throw new FfiError(`the shim for HIP cannot be compiled: ${missing}`);
  const library = join(folder, NAMES[0]);
  const source = fileURLToPath(new URL("hip_shim.cpp", import.meta.url));
  const folders = cudaLibraries.filter((path) => path.includes("/")).map((path) =>
    path.replace(/\/[^/]*$/, "")
  );
  const { success, text } = compile([
    "-std=c++17",
    "-O2",
    "-shared",
    "-fPIC",
    source,
    "-x",
    "none",
    "-Wl,--no-as-needed",
    ...cudaLibraries.map((path) => path.includes("/") ? path : `-l:${path}`),
    ...[...new Set(folders)].map((folder) => `-Wl,-rpath,${folder}`),
    "-o",
    library,
  ], "c++");
  if (!success) throw new Error(text);
  for (const name of NAMES.slice(1)) Deno.symlinkSync(library, join(folder, name));
}

/** {@link useHipShim} over stand-ins for CUDA's libraries: AMD's are found from now on, on a machine without any GPU. */
export function hipOnCpu(): CudaOnCpu {
  const cuda = cudaOnCpu();
  const names = ["libcuda.so.1", "libnvrtc.so.13", "libcublasLt.so.13"];
  useHipShim(names.map((name) => join(cuda.folder, name)));
  return cuda;
}

/** CUDA's libraries on this machine, for {@link useHipShim}. Throws {@link FfiError} where one is missing. */
export function findCudaLibraries(): string[] {
  const wanted = [
    ["libcuda.so.1"],
    cudaSonames("libnvrtc", NEWEST_CUDA),
    cudaSonames("libcublasLt", NEWEST_CUDA),
  ];
  return wanted.map((sonames) => {
    const paths = candidatePaths(sonames, readEnv, list).flatMap(({ folder, paths }) =>
      folder === undefined ? [] : paths
    );
    if (paths.length === 0) throw new FfiError(`${sonames.join(", ")}: not found`);
    return paths[0];
  });
}

function list(folder: string): string[] | undefined {
  try {
    return Array.from(Deno.readDirSync(folder), ({ name }) => name);
  } catch {
    return undefined;
  }
}

if (import.meta.main) buildHipShim(Deno.args[0], findCudaLibraries());
