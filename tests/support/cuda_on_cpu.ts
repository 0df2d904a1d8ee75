/**
 * CUDA's driver, NVRTC and cuBLASLt for a machine without a GPU, which run what they are given: fake_cuda.c with
 * cuda_on_cpu.cpp and cublaslt_on_cpu.c. With them a device's whole sequence of calls can be followed on the CPU.
 */
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { HEADER } from "../../ffi/cuda/cublaslt.ts";
import { COMPILER_FLAGS, KERNEL_FLAGS } from "./emulated_compiler.ts";
import { compile } from "./fake_cuda.ts";

const SYMBOLS = {
  // void fake_reset(u64 bytes, int count, int isPatient, int computeCapability)
  fake_reset: { parameters: ["u64", "i32", "i32", "i32"], result: "void" },
  // void fake_fail(const char *name, int status, int after)
  fake_fail: { parameters: ["buffer", "i32", "i32"], result: "void" },
  // int fake_alive(void)
  fake_alive: { parameters: [], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** The stand-ins, in place. */
export interface CudaOnCpu {
  /** With libcuda.so.1, libnvrtc.so.13 and libcublasLt.so.13. */
  readonly folder: string;
  /** A fresh machine with one GPU. */
  reset(): void;
  /** The next call of this function of the driver returns `status`. */
  fail(call: string, status: number): void;
  /** Handles and mappings that are alive, contexts too. */
  readonly alive: number;
}

let made: CudaOnCpu | undefined;

function supportFile(name: string): string {
  return fileURLToPath(new URL(name, import.meta.url));
}

/** Compiles the stand-ins at the first call; they go when the process ends. */
export function cudaOnCpu(): CudaOnCpu {
  if (made !== undefined) return made;
  const folder = Deno.makeTempDirSync({ prefix: "flux-cuda-on-cpu-" });
  addEventListener("unload", () => Deno.removeSync(folder, { recursive: true }));
  const library = join(folder, "libcuda.so.1");
  const values = Object.entries(HEADER).filter(([name]) => /^\w+$/.test(name))
    .map(([name, value]) => `-D${name}=${value}`);
  const command = ["g++", ...COMPILER_FLAGS, ...KERNEL_FLAGS, library].join(" ");
  const paths = Object.entries({ COMMAND: command, HEADER: supportFile("simt.hpp"), FOLDER: folder })
    .map(([name, value]) => `-DCPU_${name}=${JSON.stringify(value)}`);
  const build = (name: string, language: "c" | "c++", flags: readonly string[]) => {
    const object = join(folder, `${name}.o`);
    const { success, text } = compile(
      ["-O2", "-fPIC", "-pthread", ...flags, "-c", supportFile(name), "-o", object],
      language,
    );
    if (!success) throw new Error(text);
    return object;
  };
  const objects = [
    build("fake_cuda.c", "c", []),
    build("fake_cupti.c", "c", []),
    build("cublaslt_on_cpu.c", "c", ["-O3", "-DCUDA_ON_CPU", ...values]),
    build("cuda_on_cpu.cpp", "c++", ["-std=c++17", ...paths]),
    build("simt_runtime.cpp", "c++", ["-std=c++17", "-fno-strict-aliasing"]),
  ];
  const { success, text } = compile(["-x", "none", ...objects, "-shared", "-pthread", "-o", library], "c++");
  if (!success) throw new Error(text);
  for (const name of ["libnvrtc.so.13", "libcublasLt.so.13"]) Deno.symlinkSync(library, join(folder, name));
  const { symbols } = Deno.dlopen(library, SYMBOLS);
  return made = {
    folder,
    reset: () => symbols.fake_reset(2n ** 31n, 1, 0, 90),
    fail: (call, status) => symbols.fake_fail(cString(call), status, 0),
    get alive() {
      return symbols.fake_alive();
    },
  };
}

function cString(text: string): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(`${text}\0`);
}
