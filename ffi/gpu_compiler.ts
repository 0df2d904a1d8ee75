/**
 * NVRTC and hipRTC, the vendors' run-time compilers, by FFI: they have the same functions under two prefixes and the same
 * results. They need no GPU.
 *
 * Source: `nvrtc.h` of CUDA 13.0 and `hiprtc.h` of ROCm 6.2; all results up to 11 have equal numbers.
 */
import type { DiskCache } from "./cache.ts";
import { CompileError, FfiError } from "./errors.ts";
import type { KernelSource } from "./gpu.ts";
import { type OpenedLibrary, openLibrary, type OpenOptions, textAt } from "./library.ts";

/** The C functions of a compiler; what it makes is asked for by `prefix` + Get + `code`. */
function functionsOf(prefix: string, code: string) {
  return {
    // const char *GetErrorString(Result result)
    getErrorString: { name: `${prefix}GetErrorString`, parameters: ["i32"], result: "pointer" },
    // Result Version(int *major, int *minor)
    version: { name: `${prefix}Version`, parameters: ["buffer", "buffer"], result: "i32" },
    // Result CreateProgram(Program *prog, const char *src, const char *name, int numHeaders,
    //     const char *const *headers, const char *const *includeNames)
    createProgram: {
      name: `${prefix}CreateProgram`,
      parameters: ["buffer", "buffer", "buffer", "i32", "buffer", "buffer"],
      result: "i32",
    },
    // Result DestroyProgram(Program *prog)
    destroyProgram: { name: `${prefix}DestroyProgram`, parameters: ["buffer"], result: "i32" },
    // Result CompileProgram(Program prog, int numOptions, const char *const *options)
    compileProgram: { name: `${prefix}CompileProgram`, parameters: ["u64", "i32", "buffer"], result: "i32" },
    // The same on a thread of its own.
    compileProgramAside: {
      name: `${prefix}CompileProgram`,
      parameters: ["u64", "i32", "buffer"],
      result: "i32",
      nonblocking: true,
    },
    // Result Get...Size(Program prog, size_t *sizeRet)
    getCodeSize: { name: `${prefix}Get${code}Size`, parameters: ["u64", "buffer"], result: "i32" },
    // Result Get...(Program prog, char *code)
    getCode: { name: `${prefix}Get${code}`, parameters: ["u64", "buffer"], result: "i32" },
    // Result GetProgramLogSize(Program prog, size_t *logSizeRet)
    getProgramLogSize: { name: `${prefix}GetProgramLogSize`, parameters: ["u64", "buffer"], result: "i32" },
    // Result GetProgramLog(Program prog, char *log)
    getProgramLog: { name: `${prefix}GetProgramLog`, parameters: ["u64", "buffer"], result: "i32" },
  } as const satisfies Deno.ForeignLibraryInterface;
}

/** Values of the results' enums, under NVRTC's names without the prefix; tests compare them with both headers. */
export const RESULTS = { ERROR_INVALID_OPTION: 5, ERROR_COMPILATION: 6 } as const;
/** How many errors of a log a message repeats. */
const MOST_ERRORS = 4;

/** What differs between the compilers. */
export interface CompilerNames {
  /** For people: "NVRTC". */
  readonly name: string;
  /** Of functions. */
  readonly prefix: string;
  /** What functions call the result: "CUBIN". */
  readonly code: string;
}

/** A file on its way through the compiler, and what that reads until it is destroyed. */
interface Program {
  readonly source: KernelSource;
  readonly arch: string;
  readonly handle: BigUint64Array<ArrayBuffer>;
  readonly options: readonly Uint8Array[];
  /** The arguments of CompileProgram, with addresses of {@link options}. */
  readonly call: readonly [program: bigint, count: number, options: BigUint64Array<ArrayBuffer>];
}

/** A compiler, open. */
export abstract class RuntimeCompiler implements Disposable {
  readonly version: readonly [major: number, minor: number];
  /** Where the library was found: a path, or a bare soname. */
  protected readonly path: string;
  readonly #names: CompilerNames;
  readonly #library: OpenedLibrary<ReturnType<typeof functionsOf>>;
  readonly #out = new BigUint64Array(1);
  /** Compilations on other threads. */
  #running = 0;
  #closed = false;

  /** Throws {@link LibraryNotFoundError}. */
  constructor(names: CompilerNames, options: OpenOptions) {
    this.#names = names;
    this.#library = openLibrary(names.name, functionsOf(names.prefix, names.code), options);
    this.path = this.#library.path;
    const [major, minor] = [new Int32Array(1), new Int32Array(1)];
    this.#check(this.#library.symbols.version(major, minor), "Version");
    this.version = [major[0], minor[0]];
  }

  /** The options of every compilation for an architecture. */
  abstract options(arch: string): string[];

  /**
   * Compiles a file for `arch`, or takes it from the cache.
   *
   * @throws {CompileError} with the compiler's log, its first errors in the message; {FfiError} for other failures
   */
  compile(source: KernelSource, arch: string, cache?: DiskCache): Uint8Array<ArrayBuffer> {
    const build = () => {
      const program = this.#create(source, arch);
      try {
        return this.#codeOf(program, this.#library.symbols.compileProgram(...program.call));
      } finally {
        this.#destroy(program);
      }
    };
    return cache === undefined ? build() : cache.get(this.#keyOf(source, arch), build);
  }

  /** The same while other code runs: the compiler works on a thread of its own, several at a time where there are cores. */
  async compileAside(
    source: KernelSource,
    arch: string,
    cache?: DiskCache,
  ): Promise<Uint8Array<ArrayBuffer>> {
    const key = this.#keyOf(source, arch);
    const known = cache?.find(key);
    if (known !== undefined) return known;
    const program = this.#create(source, arch);
    this.#running++;
    try {
      const code = this.#codeOf(program, await this.#library.symbols.compileProgramAside(...program.call));
      cache?.keep(key, code);
      return code;
    } finally {
      this.#destroy(program);
      if (--this.#running === 0 && this.#closed) this.#library.close();
    }
  }

  /** What still compiles on other threads goes on: the library is closed behind it. */
  [Symbol.dispose](): void {
    this.#closed = true;
    if (this.#running === 0) this.#library.close();
  }

  /** Everything that compiled code depends on. */
  #keyOf({ name, text }: KernelSource, arch: string): string[] {
    return [this.#names.prefix, this.version.join("."), ...this.options(arch), name, text];
  }

  #create(source: KernelSource, arch: string): Program {
    const handle = new BigUint64Array(1);
    this.#check(
      this.#library.symbols.createProgram(handle, cString(source.text), cString(source.name), 0, null, null),
      "CreateProgram",
    );
    const options = this.options(arch).map(cString);
    // A buffer made first: V8 may move what a small typed array makes for itself.
    const pointers = new BigUint64Array(new ArrayBuffer(8 * options.length));
    options.forEach((option, i) => {
      pointers[i] = Deno.UnsafePointer.value(Deno.UnsafePointer.of(option));
    });
    return { source, arch, handle, options, call: [handle[0], options.length, pointers] };
  }

  #destroy({ handle }: Program): void {
    this.#check(this.#library.symbols.destroyProgram(handle), "DestroyProgram");
  }

  /** What a program was compiled to. Throws what {@link compile} throws. @param status of the compilation. */
  #codeOf({ source, arch, handle: [program] }: Program, status: number): Uint8Array<ArrayBuffer> {
    const { getCodeSize, getCode } = this.#library.symbols;
    const { name, code } = this.#names;
    if (status !== 0) {
      const log = this.#log(program);
      const why = firstErrors(log);
      if (status === RESULTS.ERROR_COMPILATION) {
        throw new CompileError(`${source.name} does not compile for ${arch}: ${why}`, log.trim());
      }
      const hint = status === RESULTS.ERROR_INVALID_OPTION
        ? `${name} ${this.version.join(".")} may be older than this GPU: install a newer one`
        : undefined;
      this.#check(status, "CompileProgram", ` of ${source.name} for ${arch}`, `, ${why}`, hint);
    }
    this.#check(getCodeSize(program, this.#out), `Get${code}Size`);
    const image = new Uint8Array(Number(this.#out[0]));
    this.#check(getCode(program, image), `Get${code}`);
    return image;
  }

  #log(program: bigint): string {
    const { getProgramLogSize, getProgramLog } = this.#library.symbols;
    this.#check(getProgramLogSize(program, this.#out), "GetProgramLogSize");
    const log = new Uint8Array(Number(this.#out[0]));
    this.#check(getProgramLog(program, log), "GetProgramLog");
    return new TextDecoder().decode(log.subarray(0, -1)); // without the final 0
  }

  #check(status: number, call: string, what = "", why = "", hint?: string): void {
    if (status === 0) return;
    const name = textAt(this.#library.symbols.getErrorString(status)) ?? "no text";
    throw new FfiError(
      `${this.#names.prefix}${call}${what} failed: ${name} (${status})${why}`,
      hint === undefined ? {} : { hint },
    );
  }
}

/** The log's lines that say `error`, the first few, in one line; all of it where none does. */
export function firstErrors(log: string): string {
  const lines = log.split("\n").map((line) => line.trim()).filter((line) => line !== "");
  const errors = lines.filter((line) => /\berror\b/.test(line) && !/errors? (detected|generated)/.test(line));
  if (errors.length === 0) return lines.join("; ");
  const more = errors.length - MOST_ERRORS;
  return errors.slice(0, MOST_ERRORS).join("; ") + (more > 0 ? `; and ${more} more` : "");
}

function cString(text: string): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(`${text}\0`);
}
