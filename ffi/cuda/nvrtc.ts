/** NVRTC, the run-time compiler of CUDA C++: what it is called with. gpu_compiler.ts has its functions. */
import { dirname, join } from "node:path";
import { RuntimeCompiler } from "../gpu_compiler.ts";
import { pinLibrary } from "../library.ts";
import { cudaSonames } from "./versions.ts";

/**
 * What the compiler calls a GPU: `"sm_90a"`. From 9.0 on the `a` gives all that this very GPU has (on Hopper wgmma and
 * TMA); before, there is no such letter.
 */
export function architecture([major, minor]: readonly [major: number, minor: number]): string {
  return `sm_${major}${minor}${major >= 9 ? "a" : ""}`;
}

/**
 * Folders that may have the CUDA headers of the NVRTC at `library` (a path, or a bare soname that the loader found),
 * the likeliest first; `isFolder` says which exist. Wheels of CUDA 13 have one folder for all; those of CUDA 12 keep
 * the headers in the runtime's.
 */
export function cudaIncludeFolders(
  library: string,
  [major, minor]: readonly [major: number, minor: number],
  isFolder: (path: string) => boolean = folderExists,
): string[] {
  const beside = library.includes("/")
    ? [join(dirname(library), "../include"), join(dirname(library), "../../cuda_runtime/include")]
    : [];
  const toolkits = [`/usr/local/cuda-${major}.${minor}/include`, "/usr/local/cuda/include"];
  return [...new Set([...beside, ...toolkits])].filter(isFolder);
}

/** False also where it may not be read, without asking. */
function folderExists(path: string): boolean {
  if (Deno.permissions.querySync({ name: "read", path }).state !== "granted") return false;
  try {
    return Deno.statSync(path).isDirectory;
  } catch {
    return false;
  }
}

/** The compiler, open. */
export class Nvrtc extends RuntimeCompiler {
  readonly includeFolders: readonly string[];

  /**
   * @param newest the newest major version of CUDA that the driver takes: it refuses what a newer compiler made.
   * @throws {LibraryNotFoundError}
   */
  constructor(newest: number) {
    super({ name: "NVRTC", prefix: "nvrtc", code: "CUBIN" }, {
      sonames: cudaSonames("libnvrtc", newest),
      hint: newest >= 13
        ? "pip install nvidia-cuda-nvrtc, or install the CUDA toolkit"
        : "pip install nvidia-cuda-nvrtc-cu12, or install the CUDA toolkit 12",
    });
    // NVRTC opens its builtins by their bare name when it compiles. The loader finds them in a wheel's folder only when
    // they are loaded already.
    const folder = this.path.includes("/") ? `${dirname(this.path)}/` : "";
    pinLibrary(`${folder}libnvrtc-builtins.so.${this.version.join(".")}`);
    this.includeFolders = cudaIncludeFolders(this.path, this.version);
  }

  /** The options of every compilation for an {@link architecture}. Divisions and square roots stay exact. */
  options(arch: string): string[] {
    return [
      `--gpu-architecture=${arch}`,
      "-std=c++17",
      "-default-device",
      "-lineinfo", // for profilers and compute-sanitizer; the code stays the same
      ...this.includeFolders.map((folder) => `--include-path=${folder}`),
    ];
  }
}
