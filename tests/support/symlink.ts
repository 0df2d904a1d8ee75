import assert from "node:assert/strict";
import { LIBC_SONAMES, openLibrary } from "../../ffi/library.ts";

/** Makes a symbolic link through libc: Deno.symlink asks for unscoped read and write permission. */
export function symlink(target: string, path: string): void {
  const symbols = { symlink: { parameters: ["buffer", "buffer"], result: "i32" } } as const;
  using libc = openLibrary("libc", symbols, { sonames: LIBC_SONAMES, search: "system" });
  const text = (value: string) => new TextEncoder().encode(`${value}\0`);
  assert.equal(libc.symbols.symlink(text(target), text(path)), 0);
}
