/**
 * Finding and opening native libraries, at the moment of their first use and never on import.
 *
 * A user's machine may have a library on the loader's path, in a toolkit folder or inside a Python wheel; the
 * wheels' folders are on nobody's default path. {@link candidatePaths} lists the places in one fixed order,
 * {@link openLibrary} tries them, and one {@link LibraryNotFoundError} names all that was tried.
 */
import { FfiError, messageOf } from "./errors.ts";

/** A place where a library may be: a folder, or the dynamic loader's own search (`folder` undefined). */
export interface Place {
  /** Who names this place, for messages: "FLUX_LIB_PATH", "the loader", "CUDA toolkit", "python package", ... */
  readonly from: string;
  readonly folder: string | undefined;
  /** What to hand to dlopen, in order: the sonames that the folder has, or bare sonames for the loader. */
  readonly paths: readonly string[];
}

/** Reads one environment variable; undefined when it is unset or may not be read. */
export type ReadEnv = (name: string) => string | undefined;

/** Names of a folder's entries; undefined when the folder is missing or may not be read. */
export type ListFolder = (folder: string) => readonly string[] | undefined;

/** What {@link openLibrary} needs to know besides the symbols. */
export interface OpenOptions {
  /** File names to look for, the preferred one first, e.g. `["libdnnl.so.3", "libdnnl.so.2"]`. */
  readonly sonames: readonly string[];
  /** What the user can do when it is not there, e.g. "apt-get install libdnnl2". */
  readonly hint?: string;
  /**
   * "all" (default) searches overrides, toolkits and Python packages too. "system" asks the loader and the system's
   * folders only: right for libc, of which a process must never get a second, different copy.
   */
  readonly search?: "all" | "system";
}

/** An opened library. It stays open until {@link close}; most callers keep it for the life of the process. */
export interface OpenedLibrary<S extends Deno.ForeignLibraryInterface> extends Disposable {
  readonly name: string;
  /** The path or the bare soname that dlopen took. */
  readonly path: string;
  readonly symbols: Deno.DynamicLibrary<S>["symbols"];
  close(): void;
}

/** One thing handed to dlopen, and what the loader said. */
export interface FailedAttempt {
  readonly path: string;
  readonly reason: string;
}

/** No place had a library that opens. The message names every place; `hint` is to ask the doctor, then the caller's advice. */
export class LibraryNotFoundError extends FfiError {
  constructor(
    /** Human name of the library, e.g. "oneDNN". */
    readonly library: string,
    /** Every place that was searched, in order. */
    readonly places: readonly Place[],
    /** Every dlopen that failed, in order. A file that exists but does not open is in here with its reason. */
    readonly attempts: readonly FailedAttempt[],
    sonames: readonly string[],
    hint: string | undefined,
  ) {
    const broken = attempts.filter((attempt) => attempt.path.includes("/") && !isAbsent(attempt));
    const headline = broken.length > 0
      ? `${library} was found but could not be opened: ${broken.map(describe).join("; ")}`
      : `${library} was not found (looked for ${sonames.join(", ")})`;
    const searched = places.map((place) => place.folder ? `${place.folder} (${place.from})` : place.from);
    const said = attempts.filter((attempt) => !attempt.path.includes("/")).map(describe);
    super(
      `${headline}. Searched: ${searched.join(", ") || "nowhere"}.` +
        (said.length > 0 ? ` The loader said: ${said.join("; ")}.` : ""),
      { hint: hint === undefined ? ASK_DOCTOR : `${ASK_DOCTOR}; ${hint}` },
    );
  }
}

/** The first advice where a library is missing. */
const ASK_DOCTOR = "deno task doctor shows what is found and how to install the rest";

function describe(attempt: FailedAttempt): string {
  return attempt.reason.includes(attempt.path) ? attempt.reason : `${attempt.path}: ${attempt.reason}`;
}

/** The loader found no such file (when a dependency is what is absent, the reason names that other file). */
function isAbsent({ path, reason }: FailedAttempt): boolean {
  return reason.includes(path) && /no such file/i.test(reason);
}

/** Folders of the system's own libraries. Named one by one for loaders that were set up without them. */
const SYSTEM_FOLDERS: readonly string[] = [
  `/usr/lib/${Deno.build.arch}-linux-gnu`,
  `/lib/${Deno.build.arch}-linux-gnu`,
  "/usr/lib64",
  "/usr/lib",
  "/lib",
  "/usr/local/lib",
  "/opt/homebrew/lib",
];

/**
 * Where `sonames` may be, in search order: `FLUX_LIB_PATH` (the user's override, folders between colons),
 * `LD_LIBRARY_PATH`, the loader's default, `/opt/rocm*`, `/usr/local/cuda*`, the `nvidia/<package>/lib` and
 * `_rocm_sdk_<package>/lib` wheels of every Python in sight (`VIRTUAL_ENV`, `CONDA_PREFIX`, the folders of `PATH`, pyenv, the user's and the system's), system folders.
 *
 * Pure: it looks at the world through `env` and `listFolder` only. Overrides are always listed, even when they hold
 * nothing, so that an error can name them; discovered folders are listed when they exist.
 */
export function candidatePaths(
  sonames: readonly string[],
  env: ReadEnv,
  listFolder: ListFolder,
  search: "all" | "system" = "all",
): Place[] {
  const places: Place[] = [];
  const seen = new Set<string>();
  const add = (from: string, folder: string, always = false) => {
    if (seen.has(folder)) return;
    const entries = listFolder(folder);
    if (entries === undefined && !always) return;
    seen.add(folder);
    // A folder that the user named but that cannot be listed (no --allow-read) may still have it: ask the loader.
    const here = sonames.filter((name) => entries === undefined || entries.includes(name));
    places.push({ from, folder, paths: here.map((name) => `${folder}/${name}`) });
  };

  if (search === "all") {
    for (const variable of ["FLUX_LIB_PATH", "LD_LIBRARY_PATH"]) {
      for (const folder of splitPath(env(variable))) add(variable, folder, true);
    }
  }
  places.push({ from: "the loader's default path", folder: undefined, paths: [...sonames] });
  if (search === "all") {
    for (const rocm of matching(listFolder, "/opt", /^rocm/)) add("ROCm", `${rocm}/lib`);
    for (const cuda of matching(listFolder, "/usr/local", /^cuda/)) {
      for (const lib of ["lib64", "extras/CUPTI/lib64"]) add("CUDA toolkit", `${cuda}/${lib}`);
    }
    const conda = env("CONDA_PREFIX");
    if (conda) add("CONDA_PREFIX", `${conda}/lib`);
    for (const packages of sitePackages(env, listFolder)) {
      for (const wheel of matching(listFolder, `${packages}/nvidia`, /./)) {
        add("python package", `${wheel}/lib`);
      }
      for (const wheel of matching(listFolder, packages, /^_rocm_sdk_/)) {
        add("python package", `${wheel}/lib`);
      }
    }
  }
  for (const folder of SYSTEM_FOLDERS) add("system", folder);
  return places;
}

/**
 * Where Python packages have files at `paths` within site-packages (`"torch/lib/libtorch.so"`), in search order: folders of
 * `FLUX_LIB_PATH` that are laid out alike, then every Python in sight. Places without any are in it, with no paths. Pure.
 */
export function packagePlaces(paths: readonly string[], env: ReadEnv, listFolder: ListFolder): Place[] {
  const named = splitPath(env("FLUX_LIB_PATH")).map((folder) => ({ from: "FLUX_LIB_PATH", folder }));
  const found = sitePackages(env, listFolder).filter((folder) => listFolder(folder) !== undefined)
    .map((folder) => ({ from: "python package", folder }));
  return [...named, ...found].map(({ from, folder }) => {
    const there = paths.map((path) => `${folder}/${path}`).filter((path) => {
      const end = path.lastIndexOf("/");
      return listFolder(path.slice(0, end))?.includes(path.slice(end + 1));
    });
    return { from, folder, paths: there };
  });
}

/** The `site-packages` and `dist-packages` folders of the Pythons that `env` points at, in the order of use. */
function sitePackages(env: ReadEnv, listFolder: ListFolder): string[] {
  const home = env("HOME");
  const prefixes = [env("VIRTUAL_ENV"), env("CONDA_PREFIX")];
  for (const folder of splitPath(env("PATH"))) {
    if (!listFolder(folder)?.some((name) => /^python3?(\.\d+)?$/.test(name))) continue;
    prefixes.push(folder.replace(/\/[^/]+$/, ""));
    // pyenv puts shims on PATH; the Pythons themselves are in versions/ beside the shims.
    if (folder.endsWith("/shims")) {
      prefixes.push(...matching(listFolder, folder.replace(/shims$/, "versions"), /^3/));
    }
  }
  prefixes.push(home && `${home}/.local`, "/usr/local", "/usr", "/opt/conda");
  const folders: string[] = [];
  for (const prefix of prefixes) {
    if (!prefix) continue;
    for (const lib of ["lib", "lib64"]) {
      for (const python of matching(listFolder, `${prefix}/${lib}`, /^python3/)) {
        folders.push(`${python}/site-packages`, `${python}/dist-packages`);
      }
    }
  }
  return [...new Set(folders)];
}

/** Full paths of the entries of `folder` whose name fits, in name order so that the search is the same each time. */
function matching(listFolder: ListFolder, folder: string, pattern: RegExp): string[] {
  return [...(listFolder(folder) ?? [])].filter((name) => pattern.test(name)).sort()
    .map((name) => `${folder}/${name}`);
}

function splitPath(value: string | undefined): string[] {
  // An empty entry means "here" to the loader; opening libraries from the current folder is nobody's intention.
  return (value ?? "").split(":").filter((folder) => folder.startsWith("/"))
    .map((folder) => folder.replace(/(.)\/+$/, "$1"));
}

/**
 * Opens the first of `options.sonames` that {@link candidatePaths} finds and that has all `symbols`.
 *
 * @param name human name of the library for messages, e.g. "oneDNN"
 * @param symbols statically typed table of the C functions, as Deno.dlopen takes it
 * @throws {LibraryNotFoundError} when none opens. A library in a `FLUX_LIB_PATH` folder that does not open ends the
 *   search: the user asked for that one, another one in its place would be a surprise.
 * @throws {FfiError} when the process may not use FFI at all (--allow-ffi is missing)
 */
export function openLibrary<const S extends Deno.ForeignLibraryInterface>(
  name: string,
  symbols: S,
  options: OpenOptions,
): OpenedLibrary<S> {
  requireFfi(name);
  const places = candidatePaths(options.sonames, readEnv, listFolder, options.search);
  const attempts: FailedAttempt[] = [];
  for (const place of places) {
    for (const path of place.paths) {
      try {
        return opened(name, path, symbols);
      } catch (error) {
        const attempt = { path, reason: loaderReason(error) };
        attempts.push(attempt);
        if (place.from === "FLUX_LIB_PATH" && !isAbsent(attempt)) {
          const hint =
            `take ${place.folder} out of FLUX_LIB_PATH, or put a library there that fits this machine`;
          throw new LibraryNotFoundError(name, [place], attempts, options.sonames, hint);
        }
      }
    }
  }
  throw new LibraryNotFoundError(name, places, attempts, options.sonames, options.hint);
}

/** Opens the library at a path that is known. @throws {FfiError} with the loader's reason where it does not open */
export function openLibraryAt<const S extends Deno.ForeignLibraryInterface>(
  name: string,
  path: string,
  symbols: S,
  hint: string,
): OpenedLibrary<S> {
  requireFfi(name);
  try {
    return opened(name, path, symbols);
  } catch (error) {
    const reason = describe({ path, reason: loaderReason(error) });
    throw new FfiError(`${name} could not be opened: ${reason}`, { hint: `${ASK_DOCTOR}; ${hint}` });
  }
}

function opened<const S extends Deno.ForeignLibraryInterface>(
  name: string,
  path: string,
  symbols: S,
): OpenedLibrary<S> {
  const library = Deno.dlopen(path, symbols);
  const close = () => library.close();
  return { name, path, symbols: library.symbols, close, [Symbol.dispose]: close };
}

/**
 * The places that have some of the files at `paths` within Python's site-packages, of which there is at least one. Opens
 * nothing. @throws {LibraryNotFoundError} where there is none
 */
export function findInPackages(name: string, paths: readonly string[], hint: string): Place[] {
  const places = packagePlaces(paths, readEnv, listFolder);
  const having = places.filter((place) => place.paths.length > 0);
  if (having.length === 0) throw new LibraryNotFoundError(name, places, [], paths, hint);
  return having;
}

/**
 * A file within Python's site-packages, or at one of the paths that the user has `named`, which come first. Opens nothing.
 *
 * @returns its path, and the folder of packages that it is in. @throws {LibraryNotFoundError} where there is none
 */
export function findFileInPackages(
  name: string,
  path: string,
  hint: string,
  named: readonly { readonly from: string; readonly path: string }[] = [],
): { readonly path: string; readonly folder: string | undefined } {
  const places = named.map(({ from, path }): Place => {
    const end = path.lastIndexOf("/");
    const there = listFolder(path.slice(0, end))?.includes(path.slice(end + 1));
    return { from, folder: path.slice(0, end), paths: there ? [path] : [] };
  });
  const found = places.find(({ paths }) => paths.length > 0);
  if (found !== undefined) return { path: found.paths[0], folder: undefined };
  const packages = packagePlaces([path], readEnv, listFolder);
  const having = packages.find(({ paths }) => paths.length > 0);
  if (having === undefined) throw new LibraryNotFoundError(name, [...places, ...packages], [], [path], hint);
  return { path: having.paths[0], folder: having.folder };
}

/** The version of a Python package in a folder of packages, as pip has noted it; undefined where nothing says it. */
export function packageVersion(folder: string, name: string): string | undefined {
  const infos = listFolder(folder)?.filter((entry) => /^[^-]+-.+\.dist-info$/.test(entry)) ?? [];
  return infos.map((entry) => entry.slice(0, -".dist-info".length).split("-"))
    .find(([named]) => named === name)?.[1];
}

/** Whether this process may call native code. Path-limited --allow-ffi=... is not enough: pointers need all of it. */
export function ffiAllowed(): boolean {
  return Deno.permissions.querySync({ name: "ffi" }).state === "granted";
}

function requireFfi(name: string): void {
  if (ffiAllowed()) return;
  throw new FfiError(`${name} cannot be opened: this process may not call native libraries`, {
    hint:
      "run deno with --allow-ffi (without a list of paths: reading through pointers needs the whole permission)",
  });
}

/** The loader's own words, without Deno's prefixes (which it repeats). */
function loaderReason(error: unknown): string {
  return messageOf(error).replace(/^(Could not open library: )+/, "").replace(
    /^Failed to register symbol \S+: /,
    "",
  )
    .trim();
}

/** The text at an address that a library gave; undefined at a null pointer. */
export function textAt(pointer: Deno.PointerValue): string | undefined {
  return pointer === null ? undefined : new Deno.UnsafePointerView(pointer).getCString();
}

// Queries come first because reading without permission would stop and ask the user at a terminal.
export function readEnv(variable: string): string | undefined {
  const allowed = Deno.permissions.querySync({ name: "env", variable }).state === "granted";
  return allowed ? Deno.env.get(variable) : undefined;
}

/** Names of a folder's entries; undefined where it is missing or may not be read. */
export function listFolder(folder: string): string[] | undefined {
  if (Deno.permissions.querySync({ name: "read", path: folder }).state !== "granted") return undefined;
  try {
    return Array.from(Deno.readDirSync(folder), (entry) => entry.name);
  } catch {
    return undefined; // missing, or closed to this user: nothing to open there either way
  }
}

// dlfcn.h of glibc, musl and Apple. NODELETE keeps the mapping after the last dlclose; NOLOAD only looks.
const DARWIN = Deno.build.os === "darwin";
const RTLD_NOW = 2;
const RTLD_NOLOAD = DARWIN ? 0x10 : 0x4;
const RTLD_NODELETE = DARWIN ? 0x80 : 0x1000;

const DLFCN = {
  // void *dlopen(const char *filename, int flags)
  dlopen: { parameters: ["buffer", "i32"], result: "pointer" },
} as const satisfies Deno.ForeignLibraryInterface;

/** File names of the C library: glibc (libdl for those before 2.34), musl, Apple. */
export const LIBC_SONAMES: readonly string[] = DARWIN
  ? ["libSystem.B.dylib"]
  : ["libc.so.6", "libdl.so.2", `libc.musl-${Deno.build.arch}.so.1`];

let dlfcn: OpenedLibrary<typeof DLFCN> | undefined;

/**
 * Keeps a library mapped until the process ends, through libc's `dlopen(path, RTLD_NOW | RTLD_NODELETE)`.
 *
 * Deno unmaps what it opened when it exits. A library whose own threads are still alive then (libgomp's pool) makes
 * the process crash at the very end; pinned, it stays.
 *
 * @param path soname or path, e.g. "libgomp.so.1"
 * @param options.onlyIfLoaded pin it if some library has brought it in already, never load it for this
 * @returns whether it is pinned now; false when the loader does not find it (or it is not loaded)
 * @throws {FfiError} without --allow-ffi; {@link LibraryNotFoundError} on a system without a known libc
 */
export function pinLibrary(path: string, options: { readonly onlyIfLoaded?: boolean } = {}): boolean {
  requireFfi(path);
  dlfcn ??= openLibrary("libc", DLFCN, { sonames: LIBC_SONAMES, search: "system" });
  const flags = RTLD_NOW | RTLD_NODELETE | (options.onlyIfLoaded ? RTLD_NOLOAD : 0);
  return dlfcn.symbols.dlopen(new TextEncoder().encode(`${path}\0`), flags) !== null;
}
