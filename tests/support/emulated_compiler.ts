/** Kernels for the emulated GPU: text of .cu files as libraries that g++ makes, behind simt.hpp. */
import { createHash } from "node:crypto";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { CompileError, FfiError } from "../../ffi/errors.ts";
import type { KernelSource } from "../../ffi/gpu.ts";
import { type OpenedLibrary, openLibrary } from "../../ffi/library.ts";

/** Whose GPU: NVIDIA's, or one of AMD's. */
export type Architecture = "emulated" | "gfx942" | "gfx950";

export const COMPILER_FLAGS = [
  "-std=c++17",
  "-shared",
  "-fPIC",
  // Kernels move bytes as vectors of other types, as nvcc lets them.
  "-fno-strict-aliasing",
  "-fno-exceptions",
  "-fno-rtti",
];
export const KERNEL_FLAGS = [
  "-O1",
  "-fvisibility=hidden",
  "-ffp-contract=off",
  "-fsanitize=alignment,bounds,signed-integer-overflow,integer-divide-by-zero",
  "-fsanitize-undefined-trap-on-error",
];

/** `extern __shared__ float name[];`: where a kernel has its dynamic shared memory. */
const DYNAMIC_SHARED =
  /\bextern\s+__shared__\s+(?:(?:__align__|alignas)\s*\([^)]*\)\s*)?([\w:]+(?:\s+[\w:]+)*?(?:<[^;]*>)?)\s+(\w+)\s*\[\s*\]\s*;/g;

let folder: string | undefined;

/** A folder for what this process compiles, removed when it ends. */
function buildFolder(): string {
  if (folder === undefined) {
    const made = folder = Deno.makeTempDirSync({ prefix: "flux-emulated-" });
    addEventListener("unload", () => Deno.removeSync(made, { recursive: true }));
  }
  return folder;
}

function supportFile(name: string): string {
  return fileURLToPath(new URL(name, import.meta.url));
}

/** What kernels and the runtime are compiled with for an architecture. */
const DEFINES: Readonly<Record<Architecture, readonly string[]>> = {
  emulated: [],
  gfx942: ["-DSIMT_HIP", "-DFLOAT8_FNUZ=1"],
  gfx950: ["-DSIMT_HIP"],
};

/** Path of the emulation's library; compiled once a process. */
export function runtimeLibrary(architecture: Architecture): string {
  const wide = architecture !== "emulated";
  const path = join(buildFolder(), wide ? "runtime_hip.so" : "runtime.so");
  if (!exists(path)) {
    const defines = wide ? ["-DSIMT_HIP"] : [];
    const source = supportFile("simt_runtime.cpp");
    // It stays loaded: its signal handlers do.
    compile("simt_runtime.cpp", ["-O3", "-march=native", ...defines, source, "-Wl,-z,nodelete", "-o", path]);
  }
  return path;
}

/** Path of a kernel's library; compiled once a process. */
export function compiledKernel(
  { name, text }: KernelSource,
  entry: string,
  architecture: Architecture,
): string {
  if (!/^\w+$/.test(entry)) throw new FfiError(`${name}: ${JSON.stringify(entry)} is no name of a kernel`);
  const hash = createHash("sha256").update(`${architecture}\n${entry}\n${text}`).digest("hex").slice(0, 32);
  const path = join(buildFolder(), `${hash}.so`);
  if (exists(path)) return path;
  const source = join(buildFolder(), `${hash}.cpp`);
  const body = text.replace(
    DYNAMIC_SHARED,
    (_, type, variable) =>
      `static ${type}* const ${variable} = reinterpret_cast<${type}*>(simtDynamicShared);`,
  );
  Deno.writeTextFileSync(
    source,
    `#include ${JSON.stringify(supportFile("simt.hpp"))}\n` +
      `namespace {\n#line 1 ${JSON.stringify(name)}\n${body}\n}\nSIMT_EXPORT(${entry})\n`,
  );
  compile(`${name}:${entry}`, [
    ...KERNEL_FLAGS,
    ...DEFINES[architecture],
    source,
    runtimeLibrary(architecture),
    "-o",
    path,
  ]);
  return path;
}

/** Puts what {@link compiledKernel} made elsewhere where it is found, by the names of the files. */
export function adoptKernels(prepared: ReadonlyMap<string, Uint8Array<ArrayBuffer>>): void {
  for (const [name, bytes] of prepared) {
    const path = join(buildFolder(), name);
    if (!exists(path)) Deno.writeFileSync(path, bytes);
  }
}

/** Opens what g++ made. */
export function openCompiled<const S extends Deno.ForeignLibraryInterface>(
  path: string,
  symbols: S,
): OpenedLibrary<S> {
  return openLibrary("emulated GPU", symbols, { sonames: [path], search: "system" });
}

/** Why the emulated GPU does not run here, or undefined where it does. */
export function missingCompiler(): string | undefined {
  if (Deno.build.os !== "linux") return "the emulated GPU runs on Linux only";
  try {
    const { success } = gpp(["--version"]);
    return success ? undefined : "g++ does not start";
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return "no g++";
    if (error instanceof Deno.errors.NotCapable) return "this process may not run g++";
    throw error;
  }
}

/** Runs g++. It gets no LD_LIBRARY_PATH: Deno starts a program with one only where all programs may be started. */
function gpp(args: readonly string[]): Deno.CommandOutput {
  const env = { PATH: Deno.env.get("PATH") ?? "/usr/bin:/bin" };
  return new Deno.Command("g++", { args: [...args], env, clearEnv: true }).outputSync();
}

function compile(what: string, args: readonly string[]): void {
  const { success, stderr } = gpp([...COMPILER_FLAGS, ...args]);
  if (success) return;
  const log = new TextDecoder().decode(stderr).trim();
  throw new CompileError(`${what} does not compile: ${log}`, log);
}

function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}
