/**
 * CUDA's own headers, wherever the toolkit or Python's wheels put them, and a C compiler to hold our constants and
 * stand-in libraries against them. A test that needs either is skipped, with a word, where it is missing.
 */
import { candidatePaths } from "../../ffi/library.ts";

/** Folders with headers: `include` beside each place where {@link candidatePaths} looks for libraries. */
export function includeFolders(): string[] {
  const env = (name: string) =>
    Deno.permissions.querySync({ name: "env", variable: name }).state === "granted"
      ? Deno.env.get(name)
      : undefined;
  const folders = candidatePaths([], env, list).flatMap(({ folder }) =>
    folder === undefined ? [] : [folder.replace(/\/[^/]*$/, "/include")]
  );
  return [...new Set(folders)].filter((folder) =>
    list(folder)?.some((name) => /^(cu|nv|library_)/.test(name))
  );
}

/** Why `headers` cannot be compiled here, or undefined where they can. */
export async function missingHeaders(...headers: string[]): Promise<string | undefined> {
  const { state } = Deno.permissions.querySync({ name: "run", command: "g++" });
  if (state !== "granted") return "this process may not run g++";
  try {
    const text = headers.map((header) => `#include <${header}>\n`).join("");
    const error = await compileC(text, ["-fsyntax-only"]);
    return error === undefined ? undefined : `${headers.join(", ")} cannot be compiled here`;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return "no g++";
    throw error;
  }
}

/** Compiles C with CUDA's headers in reach; returns what the compiler said against it, or undefined. */
export async function compileC(source: string, args: readonly string[]): Promise<string | undefined> {
  const includes = includeFolders().map((folder) => `-I${folder}`);
  const child = new Deno.Command("g++", {
    args: ["-x", "c", ...includes, ...args, "-"],
    stdin: "piped",
    stdout: "null",
    stderr: "piped",
  }).spawn();
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode(source));
  await writer.close();
  const { success, stderr } = await child.output();
  return success ? undefined : new TextDecoder().decode(stderr);
}

/**
 * What differs between `constants`, whose names are C expressions, and the headers: the compiler's complaints, or
 * undefined where all are equal.
 */
export function compareWithHeaders(
  headers: readonly string[],
  constants: Readonly<Record<string, number>>,
): Promise<string | undefined> {
  const checks = Object.entries(constants).map(([name, value]) =>
    `_Static_assert((${name}) == ${value}, "${name} is not ${value}");\n`
  );
  const includes = ["stddef.h", ...headers].map((header) => `#include <${header}>\n`);
  return compileC(includes.join("") + checks.join(""), ["-fsyntax-only"]);
}

function list(folder: string): string[] | undefined {
  if (Deno.permissions.querySync({ name: "read", path: folder }).state !== "granted") return undefined;
  try {
    return Array.from(Deno.readDirSync(folder), (entry) => entry.name);
  } catch {
    return undefined;
  }
}
