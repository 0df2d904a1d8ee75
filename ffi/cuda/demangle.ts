import { LibraryNotFoundError, openLibrary } from "../library.ts";

const SYMBOLS = {
  // char *__cxa_demangle(const char *mangled_name, char *output_buffer, size_t *length, int *status)
  __cxa_demangle: { parameters: ["buffer", "pointer", "pointer", "buffer"], result: "pointer" },
  // void free(void *ptr): libc's, which the C++ library brings along
  free: { parameters: ["pointer"], result: "void" },
} as const satisfies Deno.ForeignLibraryInterface;

let symbols: Deno.StaticForeignLibraryInterface<typeof SYMBOLS> | null | undefined;

/**
 * The name of a function of C++ as it stands in the source, e.g. `"void scale<float>(float*, int)"` for
 * `_Z5scaleIfEvPT_i`. Other names, and all of them on machines without the C++ library, stay as they are.
 */
export function demangle(name: string): string {
  if (!name.startsWith("_Z")) return name;
  if (symbols === undefined) {
    try {
      symbols =
        openLibrary("the C++ library", SYMBOLS, { sonames: ["libstdc++.so.6"], search: "system" }).symbols;
    } catch (error) {
      if (!(error instanceof LibraryNotFoundError)) throw error;
      symbols = null;
    }
  }
  if (symbols === null) return name;
  const text = symbols.__cxa_demangle(new TextEncoder().encode(`${name}\0`), null, null, new Int32Array(1));
  if (text === null) return name;
  try {
    return new Deno.UnsafePointerView(text).getCString();
  } finally {
    symbols.free(text);
  }
}
