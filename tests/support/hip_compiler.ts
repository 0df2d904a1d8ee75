/** Debian's clang as a compiler of HIP for a GPU that is not there, with HIP's own headers. */
import { join } from "node:path";
import { FfiError } from "../../ffi/errors.ts";
import { Hiprtc } from "../../ffi/hip/hiprtc.ts";

/** What came out. */
export interface Compiled {
  /** Undefined where it does not compile. */
  readonly assembly: string | undefined;
  readonly log: string;
}

export interface HipCompiler {
  /** Compiles device code, with `args` beside those that it always gets. */
  compile(text: string, args: readonly string[]): Promise<Compiled>;
}

/** The first version that knows an architecture. */
const FIRST: Readonly<Record<string, number>> = { gfx942: 17, gfx950: 20 };
/** Debian 12 has these. */
const VERSIONS = [22, 19];
const HEADERS = "/usr/include/hip/hip_runtime.h";

/** The compiler for an architecture, or why there is none. */
export function clangFor(architecture: string): HipCompiler | string {
  const found = VERSIONS.filter((version) => version >= FIRST[architecture]).find(starts);
  if (found === undefined) {
    const newest = VERSIONS.find(starts);
    return newest === undefined
      ? `no clang; apt-get install clang-${VERSIONS[0]}`
      : `clang-${newest} does not know ${architecture}; apt-get install clang-${VERSIONS[0]}`;
  }
  try {
    Deno.statSync(HEADERS);
  } catch {
    return "no HIP headers; apt-get install libamdhip64-dev";
  }
  return { compile: (text, args) => compile(found, architecture, text, args) };
}

function starts(version: number): boolean {
  try {
    return clang(version, ["--version"]).outputSync().success;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotCapable) return false;
    throw error;
  }
}

/** It gets no LD_LIBRARY_PATH: Deno starts a program with one only where all programs may be started. */
function clang(version: number, args: string[]): Deno.Command {
  const env = { PATH: Deno.env.get("PATH") ?? "/usr/bin:/bin" };
  return new Deno.Command(`clang-${version}`, { args, env, clearEnv: true, stdout: "null", stderr: "piped" });
}

async function compile(
  version: number,
  architecture: string,
  text: string,
  args: readonly string[],
): Promise<Compiled> {
  const folder = await Deno.makeTempDir();
  try {
    const [source, assembly] = [join(folder, "kernels.hip"), join(folder, "kernels.s")];
    await Deno.writeTextFile(source, text);
    const { success, stderr } = await clang(version, [
      "-x",
      "hip",
      `--offload-arch=${architecture}`,
      "--offload-device-only",
      "-nogpulib",
      "-std=c++17",
      "-ffp-contract=on",
      // Of the headers of ROCm 5.2, which newer compilers do not define any more.
      ...(version > 20 ? ["-D__AMDGCN_WAVEFRONT_SIZE=64"] : []),
      "-include",
      "hip/hip_runtime.h",
      ...args,
      "-S",
      source,
      "-o",
      assembly,
    ]).output();
    const log = new TextDecoder().decode(stderr);
    return { assembly: success ? await Deno.readTextFile(assembly) : undefined, log };
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** Debian's hipRTC, which is a part of HIP's runtime, or why there is none. */
export function debiansHiprtc(): Hiprtc | string {
  try {
    return new Hiprtc(["libamdhip64.so.5"]);
  } catch (error) {
    if (error instanceof FfiError) return error.message.split(". ")[0];
    throw error;
  }
}
