import assert from "node:assert/strict";
import { join } from "node:path";
import { LIBC_SONAMES, openLibrary } from "../../ffi/library.ts";
import { goldenPath } from "./golden.ts";

/** Runs `body` with a fresh folder that is removed afterwards. */
export async function inFolder<T>(body: (folder: string) => T | Promise<T>): Promise<T> {
  // The real path: where the temporary folder is itself behind a link, paths in messages would differ.
  const folder = Deno.realPathSync(Deno.makeTempDirSync({ prefix: "flux-test-" }));
  try {
    return await body(folder);
  } finally {
    Deno.removeSync(folder, { recursive: true });
  }
}

/** Runs `body` with a copy of a golden model folder, which it may change. */
export function withModelCopy<T>(model: string, body: (folder: string) => T | Promise<T>): Promise<T> {
  return inFolder((root) => {
    const folder = join(root, model);
    copyFolder(goldenPath(model), folder);
    return body(folder);
  });
}

/** Copies a folder with all that is in it. */
export function copyFolder(from: string, to: string): void {
  Deno.mkdirSync(to);
  for (const { name, isDirectory } of Deno.readDirSync(from)) {
    const copy = isDirectory ? copyFolder : Deno.copyFileSync;
    copy(join(from, name), join(to, name));
  }
}

/** Changes keys of a JSON file. */
export function editJson(path: string, changes: Record<string, unknown>): void {
  Deno.writeTextFileSync(path, JSON.stringify({ ...JSON.parse(Deno.readTextFileSync(path)), ...changes }));
}

/** A named pipe, which nobody writes to. */
export function mkfifo(path: string): void {
  const symbols = { mkfifo: { parameters: ["buffer", "u32"], result: "i32" } } as const;
  using libc = openLibrary("libc", symbols, { sonames: LIBC_SONAMES, search: "system" });
  assert.equal(libc.symbols.mkfifo(new TextEncoder().encode(`${path}\0`), 0o600), 0);
}
