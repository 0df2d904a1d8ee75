/**
 * NVRTC, the run-time compiler of CUDA C++, by FFI. It needs no GPU.
 *
 * Source: `nvrtc.h` of CUDA 13.0 (functions and results are the same in 12).
 */
import { dirname, join } from "node:path";
import type { DiskCache } from "../cache.ts";
import { FfiError } from "../errors.ts";
import type { KernelSource } from "../gpu.ts";
import { type OpenedLibrary, openLibrary, pinLibrary } from "../library.ts";
import { cudaSonames } from "./versions.ts";

const NVRTC = {
  // const char *nvrtcGetErrorString(nvrtcResult result)
  nvrtcGetErrorString: { parameters: ["i32"], result: "pointer" },
  // nvrtcResult nvrtcVersion(int *major, int *minor)
  nvrtcVersion: { parameters: ["buffer", "buffer"], result: "i32" },
  // nvrtcResult nvrtcCreateProgram(nvrtcProgram *prog, const char *src, const char *name, int numHeaders,
  //     const char *const *headers, const char *const *includeNames)
  nvrtcCreateProgram: {
    parameters: ["buffer", "buffer", "buffer", "i32", "buffer", "buffer"],
    result: "i32",
  },
  // nvrtcResult nvrtcDestroyProgram(nvrtcProgram *prog)
  nvrtcDestroyProgram: { parameters: ["buffer"], result: "i32" },
  // nvrtcResult nvrtcCompileProgram(nvrtcProgram prog, int numOptions, const char *const *options)
  nvrtcCompileProgram: { parameters: ["u64", "i32", "buffer"], result: "i32" },
  // nvrtcResult nvrtcGetCUBINSize(nvrtcProgram prog, size_t *cubinSizeRet)
  nvrtcGetCUBINSize: { parameters: ["u64", "buffer"], result: "i32" },
  // nvrtcResult nvrtcGetCUBIN(nvrtcProgram prog, char *cubin)
  nvrtcGetCUBIN: { parameters: ["u64", "buffer"], result: "i32" },
  // nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram prog, size_t *logSizeRet)
  nvrtcGetProgramLogSize: { parameters: ["u64", "buffer"], result: "i32" },
  // nvrtcResult nvrtcGetProgramLog(nvrtcProgram prog, char *log)
  nvrtcGetProgramLog: { parameters: ["u64", "buffer"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** Of nvrtcResult: an option that this version does not know, and errors in the program. */
const NVRTC_ERROR_INVALID_OPTION = 5;
const NVRTC_ERROR_COMPILATION = 6;
/** How many errors of a log a message repeats. */
const MOST_ERRORS = 4;

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

/** The compiler, open. Throws {@link LibraryNotFoundError} without NVRTC. */
export class Nvrtc implements Disposable {
  readonly #library: OpenedLibrary<typeof NVRTC>;
  readonly #nvrtc: OpenedLibrary<typeof NVRTC>["symbols"];
  readonly #out = new BigUint64Array(1);
  readonly version: readonly [major: number, minor: number];
  readonly includeFolders: readonly string[];

  /** @param newest the newest major version of CUDA that the driver takes: it refuses what a newer compiler made. */
  constructor(newest: number) {
    this.#library = openLibrary("NVRTC", NVRTC, {
      sonames: cudaSonames("libnvrtc", newest),
      hint: newest >= 13
        ? "pip install nvidia-cuda-nvrtc, or install the CUDA toolkit"
        : "pip install nvidia-cuda-nvrtc-cu12, or install the CUDA toolkit 12",
    });
    this.#nvrtc = this.#library.symbols;
    const [major, minor] = [new Int32Array(1), new Int32Array(1)];
    this.#check(this.#nvrtc.nvrtcVersion(major, minor), "nvrtcVersion");
    this.version = [major[0], minor[0]];
    // NVRTC opens its builtins by their bare name when it compiles. The loader finds them in a wheel's folder only when
    // they are loaded already.
    const folder = this.#library.path.includes("/") ? `${dirname(this.#library.path)}/` : "";
    pinLibrary(`${folder}libnvrtc-builtins.so.${this.version.join(".")}`);
    this.includeFolders = cudaIncludeFolders(this.#library.path, this.version);
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

  /**
   * Compiles a file to a cubin for `arch`, or takes it from the cache.
   *
   * @throws {FfiError} with the first errors of the compiler's log
   */
  compile(source: KernelSource, arch: string, cache?: DiskCache): Uint8Array<ArrayBuffer> {
    const options = this.options(arch);
    const build = () => this.#compile(source, arch, options);
    if (cache === undefined) return build();
    return cache.get(["nvrtc", this.version.join("."), ...options, source.name, source.text], build);
  }

  [Symbol.dispose](): void {
    this.#library.close();
  }

  #compile(source: KernelSource, arch: string, options: readonly string[]): Uint8Array<ArrayBuffer> {
    const handle = new BigUint64Array(1);
    this.#check(
      this.#nvrtc.nvrtcCreateProgram(handle, cString(source.text), cString(source.name), 0, null, null),
      "nvrtcCreateProgram",
    );
    const [program] = handle;
    try {
      const strings = options.map(cString); // held until the call is over
      const pointers = new BigUint64Array(strings.length);
      strings.forEach((string, i) => {
        pointers[i] = Deno.UnsafePointer.value(Deno.UnsafePointer.of(string));
      });
      const status = this.#nvrtc.nvrtcCompileProgram(program, strings.length, pointers);
      if (status !== 0) {
        const why = firstErrors(this.#log(program));
        if (status === NVRTC_ERROR_COMPILATION) {
          throw new FfiError(`${source.name} does not compile for ${arch}: ${why}`);
        }
        const hint = status === NVRTC_ERROR_INVALID_OPTION
          ? `NVRTC ${this.version.join(".")} may be older than this GPU: install a newer one`
          : undefined;
        this.#check(status, `nvrtcCompileProgram of ${source.name} for ${arch}`, `, ${why}`, hint);
      }
      this.#check(this.#nvrtc.nvrtcGetCUBINSize(program, this.#out), "nvrtcGetCUBINSize");
      const cubin = new Uint8Array(Number(this.#out[0]));
      this.#check(this.#nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN");
      return cubin;
    } finally {
      this.#check(this.#nvrtc.nvrtcDestroyProgram(handle), "nvrtcDestroyProgram");
    }
  }

  #log(program: bigint): string {
    this.#check(this.#nvrtc.nvrtcGetProgramLogSize(program, this.#out), "nvrtcGetProgramLogSize");
    const log = new Uint8Array(Number(this.#out[0]));
    this.#check(this.#nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog");
    return new TextDecoder().decode(log.subarray(0, -1)); // without the final 0
  }

  #check(status: number, call: string, why = "", hint?: string): void {
    if (status === 0) return;
    const pointer = this.#nvrtc.nvrtcGetErrorString(status);
    const name = pointer === null ? "no text" : new Deno.UnsafePointerView(pointer).getCString();
    throw new FfiError(`${call} failed: ${name} (${status})${why}`, hint === undefined ? {} : { hint });
  }
}

/** The log's lines that say `error`, the first few, in one line; all of it where none does. */
export function firstErrors(log: string): string {
  const lines = log.split("\n").map((line) => line.trim()).filter((line) => line !== "");
  const errors = lines.filter((line) => /\berror\b/.test(line) && !/errors? detected/.test(line));
  if (errors.length === 0) return lines.join("; ");
  const more = errors.length - MOST_ERRORS;
  return errors.slice(0, MOST_ERRORS).join("; ") + (more > 0 ? `; and ${more} more` : "");
}

function cString(text: string): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(`${text}\0`);
}
