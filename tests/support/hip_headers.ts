/**
 * HIP's own headers, to hold our constants against: Debian's, which are of ROCm 5.2, and newer ones where there are some: in
 * /opt/rocm, or in the Python package `triton`, which carries them for its own launcher.
 */
import { packagePlaces, readEnv } from "../../ffi/library.ts";
import { compileC, missingHeaders } from "./cuda_headers.ts";

const DEBIANS = "/usr/include";
const NEWER_MARK = "include/hip/hip_runtime_api.h";

/** A folder with `hip/hip_runtime_api.h`. */
export interface HipHeaders {
  readonly folder: string;
  /** Why they are not there, or undefined where they are. */
  readonly missing: string | undefined;
}

export async function debiansHeaders(): Promise<HipHeaders> {
  const compiler = await missingHeaders("stddef.h");
  const missing = compiler ??
    (exists(`${DEBIANS}/hip/hip_runtime_api.h`)
      ? undefined
      : "no HIP headers; apt-get install libamdhip64-dev");
  return { folder: DEBIANS, missing };
}

export async function newerHeaders(): Promise<HipHeaders> {
  const compiler = await missingHeaders("stddef.h");
  const inPackages = packagePlaces([`triton/backends/amd/${NEWER_MARK}`], readEnv, list)
    .flatMap(({ paths }) => paths);
  const found = [...inPackages, ...(list("/opt") ?? []).map((name) => `/opt/${name}/${NEWER_MARK}`)].find(
    exists,
  );
  return {
    folder: found?.slice(0, -"/hip/hip_runtime_api.h".length) ?? "",
    missing: compiler ??
      (found === undefined ? "no headers of ROCm 6 or newer; pip install triton has some" : undefined),
  };
}

/** What differs between `constants`, whose names are C expressions, and the headers; undefined where all are equal. */
export async function compareWithHip(
  { folder }: HipHeaders,
  headers: readonly string[],
  constants: Readonly<Record<string, number>>,
): Promise<string | undefined> {
  const checks = Object.entries(constants).map(([name, value]) =>
    `_Static_assert((${name}) == ${value}, "${name} is not ${value}");\n`
  );
  const includes = ["stddef.h", ...headers].map((header) => `#include <${header}>\n`);
  const text = ["#define __HIP_PLATFORM_AMD__ 1\n", ...includes, ...checks].join("");
  return await compileC(text, ["-fsyntax-only", `-I${folder}`]);
}

/**
 * What differs between the functions of a table of symbols and their declarations: the number of parameters and the size of
 * each, by calls that a compiler has to check.
 */
export async function compareFunctions(
  { folder }: HipHeaders,
  headers: readonly string[],
  functions: Deno.ForeignLibraryInterface,
): Promise<string | undefined> {
  const checks = Object.entries(functions).map(([name, symbol]) => {
    const { parameters, result } = symbol as Deno.ForeignFunction;
    const types = parameters.map((type) => SIZES[type as string]);
    // A template takes a function's type apart: C has nothing like it.
    return `static_assert(sizesAre<${
      [SIZES[result as string], ...types].join(", ")
    }>(&${name}), "${name}");\n`;
  });
  const includes = headers.map((header) => `#include <${header}>\n`);
  const text = `#define __HIP_PLATFORM_AMD__ 1\n#define __HIP_DISABLE_CPP_FUNCTIONS__ 1\n${includes.join("")}
template <typename T> constexpr int sizeOf() { return sizeof(T); }
template <> constexpr int sizeOf<void>() { return 0; }
template <int result, int... sizes, typename R, typename... P> constexpr bool sizesAre(R (*)(P...)) {
  if constexpr (sizeof...(sizes) != sizeof...(P)) return false;
  else return sizeOf<R>() == result && ((sizeOf<P>() == sizes) && ...);
}
${checks.join("")}`;
  return await compileC(text, ["-fsyntax-only", "-x", "c++", "-std=c++17", `-I${folder}`]);
}

/** Bytes of what Deno passes. */
const SIZES: Readonly<Record<string, number>> = {
  void: 0,
  u8: 1,
  i32: 4,
  u32: 4,
  u64: 8,
  usize: 8,
  buffer: 8,
  pointer: 8,
};

function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch {
    return false;
  }
}

function list(folder: string): string[] | undefined {
  try {
    return Array.from(Deno.readDirSync(folder), ({ name }) => name);
  } catch {
    return undefined;
  }
}
