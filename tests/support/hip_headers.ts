/**
 * HIP's own headers, to hold our constants against: Debian's, which are of ROCm 5.2, and newer ones where there are some: in
 * /opt/rocm, or in the Python package `triton`, which carries them for its own launcher.
 */
import { existsSync } from "node:fs";
import { packagePlaces, readEnv } from "../../ffi/library.ts";
import { compileC, missingHeaders } from "./cuda_headers.ts";

const DEBIANS = "/usr/include";
const RUNTIME = "hip/hip_runtime_api.h";

/** A folder with headers. */
export interface HipHeaders {
  readonly folder: string;
  /** Why they are not there, or undefined where they are. */
  readonly missing: string | undefined;
}

export async function debiansHeaders(): Promise<HipHeaders> {
  const compiler = await missingHeaders("stddef.h");
  const missing = compiler ??
    (existsSync(`${DEBIANS}/${RUNTIME}`) ? undefined : "no HIP headers; apt-get install libamdhip64-dev");
  return { folder: DEBIANS, missing };
}

/** The first folder with HIP's headers and with `header`. */
export async function newerHeaders(header = RUNTIME): Promise<HipHeaders> {
  const compiler = await missingHeaders("stddef.h");
  const inPackages = packagePlaces(["triton/backends/amd/include"], readEnv, list).flatMap(({ paths }) =>
    paths
  );
  const folder = [...inPackages, ...(list("/opt") ?? []).map((name) => `/opt/${name}/include`)]
    .find((path) => existsSync(`${path}/${RUNTIME}`) && existsSync(`${path}/${header}`));
  const advice = header === RUNTIME
    ? "no headers of ROCm 6 or newer; pip install triton has some"
    : `no ${header} of ROCm 6 or newer`;
  return { folder: folder ?? "", missing: compiler ?? (folder === undefined ? advice : undefined) };
}

/**
 * What differs between `constants`, whose names are C expressions, and the headers; undefined where all are equal. HIP's own are
 * compiled as C, where pointers are constants, too; hipBLASLt's and MIOpen's have to be C++.
 */
export async function compareWithHip(
  { folder }: HipHeaders,
  headers: readonly string[],
  constants: Readonly<Record<string, number>>,
  language: "c" | "c++" = "c",
): Promise<string | undefined> {
  const checks = Object.entries(constants).map(([name, value]) =>
    `_Static_assert((${name}) == ${value}, "${name} is not ${value}");\n`
  );
  const text = `#ifdef __cplusplus\n#define _Static_assert static_assert\n#endif\n${checks.join("")}`;
  return await compileWith(folder, ["stddef.h", ...headers], text, language);
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
    const { name: called = name, parameters, result } = symbol as Deno.ForeignFunction;
    const types = parameters.map((type) => SIZES[type as string]);
    // A template takes a function's type apart: C has nothing like it.
    return `static_assert(sizesAre<${
      [SIZES[result as string], ...types].join(", ")
    }>(&${called}), "${called}");\n`;
  });
  const text = `template <typename T> constexpr int sizeOf() { return sizeof(T); }
template <> constexpr int sizeOf<void>() { return 0; }
template <int result, int... sizes, typename R, typename... P> constexpr bool sizesAre(R (*)(P...)) {
  if constexpr (sizeof...(sizes) != sizeof...(P)) return false;
  else return sizeOf<R>() == result && ((sizeOf<P>() == sizes) && ...);
}
${checks.join("")}`;
  return await compileWith(folder, headers, text, "c++");
}

function compileWith(
  folder: string,
  headers: readonly string[],
  text: string,
  language: "c" | "c++",
): Promise<string | undefined> {
  const defines = "#define __HIP_PLATFORM_AMD__ 1\n#define __HIP_DISABLE_CPP_FUNCTIONS__ 1\n";
  const includes = headers.map((header) => `#include <${header}>\n`).join("");
  const dialect = language === "c" ? [] : ["-x", "c++", "-std=c++17"];
  return compileC(defines + includes + text, ["-fsyntax-only", ...dialect, `-I${folder}`]);
}

/** Bytes of what Deno passes. */
const SIZES: Readonly<Record<string, number>> = {
  void: 0,
  u8: 1,
  i32: 4,
  u32: 4,
  u64: 8,
  i64: 8,
  usize: 8,
  buffer: 8,
  pointer: 8,
};

function list(folder: string): string[] | undefined {
  try {
    return Array.from(Deno.readDirSync(folder), ({ name }) => name);
  } catch {
    return undefined;
  }
}
