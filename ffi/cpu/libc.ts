/**
 * Read-only memory maps of files, through libc's mmap: 24 GB of weights open in microseconds, without a copy, and
 * pages come from the disk when they are touched. Where FFI is not permitted or no libc is known, the same
 * {@link MappedFile} holds the file's bytes read into memory, and `mapped` says so.
 */
import { FfiError } from "../errors.ts";
import {
  ffiAllowed,
  LIBC_SONAMES,
  LibraryNotFoundError,
  type OpenedLibrary,
  openLibrary,
} from "../library.ts";

const LIBC = {
  // int open(const char *path, int flags): variadic in C, but a mode is only read with O_CREAT
  open: { parameters: ["buffer", "i32"], result: "i32" },
  // int close(int fd)
  close: { parameters: ["i32"], result: "i32" },
  // off_t lseek(int fd, off_t offset, int whence): the size of an open file, without fstat's struct layouts
  lseek: { parameters: ["i32", "i64", "i32"], result: "i64" },
  // void *mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
  mmap: { parameters: ["pointer", "usize", "i32", "i32", "i32", "i64"], result: "pointer" },
  // The same on another thread, which with MAP_POPULATE reads the file.
  mmapAside: {
    name: "mmap",
    parameters: ["pointer", "usize", "i32", "i32", "i32", "i64"],
    result: "pointer",
    nonblocking: true,
  },
  // int munmap(void *addr, size_t length)
  munmap: { parameters: ["pointer", "usize"], result: "i32" },
  // ssize_t pread(int fd, void *buf, size_t count, off_t offset): on another thread, so that reads go side by side
  pread: { parameters: ["i32", "pointer", "usize", "i64"], result: "isize", nonblocking: true },
} as const satisfies Deno.ForeignLibraryInterface;

// Values of sys/mman.h and fcntl.h. All but O_CLOEXEC are the same on Linux (glibc, musl) and macOS.
const O_RDONLY = 0;
const O_CLOEXEC = Deno.build.os === "darwin" ? 0x1000000 : 0x80000;
const SEEK_END = 2;
const PROT_READ = 1;
const MAP_PRIVATE = 2;
const MAP_POPULATE = 0x8000; // Linux only
const MAP_FAILED = 0xffff_ffff_ffff_ffffn;

let libc: OpenedLibrary<typeof LIBC> | null | undefined;

/** libc, opened once; null where there is none that we know (then files are read instead of mapped). */
function openLibc(): OpenedLibrary<typeof LIBC> | null {
  if (!ffiAllowed()) return null;
  if (libc === undefined) {
    try {
      libc = openLibrary("libc", LIBC, { sonames: LIBC_SONAMES, search: "system" });
    } catch (error) {
      if (!(error instanceof LibraryNotFoundError)) throw error;
      libc = null;
    }
  }
  return libc;
}

/** Which file a buffer shows. */
const FILES = new WeakMap<ArrayBufferLike, MappedFile>();

/** The mapped file that `bytes` is a view of, or undefined for ordinary memory. */
export function mappedFileOf(bytes: Uint8Array): MappedFile | undefined {
  return FILES.get(bytes.buffer);
}

/** A file's bytes. Dispose it (`using`) when nothing looks at them any more. */
export class MappedFile implements Disposable {
  #bytes: Uint8Array<ArrayBuffer> | undefined;
  readonly #unmap: (() => void) | undefined;

  readonly #identity: string;

  /**
   * Made by {@link mapFile}; `unmap` is undefined when the bytes lie in ordinary memory. `identity` is the same as long
   * as the path leads to the same file.
   */
  constructor(
    readonly path: string,
    bytes: Uint8Array<ArrayBuffer>,
    unmap: (() => void) | undefined,
    identity: string,
  ) {
    this.#bytes = bytes;
    this.#unmap = unmap;
    this.#identity = identity;
    this.byteLength = bytes.byteLength;
    this.mapped = unmap !== undefined;
    if (this.mapped) FILES.set(bytes.buffer, this);
  }

  /** Size of the file. */
  readonly byteLength: number;

  /** Whether this is a memory map; false for a copy in memory (no FFI, no libc, or an empty file). */
  readonly mapped: boolean;

  /**
   * The whole file, without a copy when {@link mapped}. Read-only: the pages are protected, so writing through this
   * view ends the process with SIGSEGV. So does reading (SIGBUS) after another program has shortened the file.
   *
   * @throws {FfiError} after disposal. Views that were taken earlier have length 0 from then on.
   */
  get bytes(): Uint8Array<ArrayBuffer> {
    if (this.#bytes === undefined) {
      throw new FfiError(`${this.path} was closed; its bytes cannot be used any more`, {
        hint: "keep the file (or the model that it belongs to) open for as long as its tensors are in use",
      });
    }
    return this.#bytes;
  }

  /**
   * Address of the first byte, 0n for an empty file. A mapping starts on a page boundary.
   *
   * @throws {FfiError} after disposal, or without --allow-ffi
   */
  get pointer(): bigint {
    const bytes = this.bytes;
    if (bytes.byteLength === 0) return 0n;
    if (!ffiAllowed()) {
      throw new FfiError(`${this.path} has no address: this process may not use FFI`, {
        hint: "run deno with --allow-ffi",
      });
    }
    return Deno.UnsafePointer.value(Deno.UnsafePointer.of(bytes));
  }

  /**
   * The same file, open for reads that go side by side on other threads. Only of a {@link mapped} file.
   *
   * @throws {FfiError} when another file is at the path by now
   */
  openReader(): FileReader {
    const { symbols } = openLibc()!;
    const fd = symbols.open(new TextEncoder().encode(`${this.path}\0`), O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && identityAt(this.path) === this.#identity) {
      return { path: this.path, fd, [Symbol.dispose]: () => void symbols.close(fd) };
    }
    if (fd >= 0) symbols.close(fd);
    throw new FfiError(`${this.path} is not the file any more that it was when it was opened`, {
      hint: "another program has replaced or removed it: load the model again when that is done",
    });
  }

  /** Unmaps the file. Every view of it becomes empty first, so that a late reader finds nothing, not a segfault. */
  [Symbol.dispose](): void {
    if (this.#bytes === undefined) return;
    this.#bytes.buffer.transfer(0); // detaches: all views of this buffer have length 0 from here on
    this.#bytes = undefined;
    this.#unmap?.();
  }
}

/**
 * Maps a file into memory, read-only.
 *
 * @throws Deno's own NotFound, PermissionDenied or NotCapable when the file cannot be looked at
 * @throws {FfiError} when it is not a regular file, changes its size meanwhile, or the system refuses the mapping
 */
export function mapFile(path: string): MappedFile {
  // libc's open goes past Deno's permissions: this stat is also the check of --allow-read.
  const stat = Deno.statSync(path);
  if (!stat.isFile) throw new FfiError(`${path} is not a file${stat.isDirectory ? " but a folder" : ""}`);
  const { size } = stat;

  const library = openLibc();
  if (library === null || size === 0) {
    const bytes = Deno.readFileSync(path);
    if (bytes.byteLength !== size) throw changedSize(path, size, bytes.byteLength);
    return new MappedFile(path, bytes, undefined, identityOf(stat));
  }

  const { symbols } = library;
  const fd = symbols.open(new TextEncoder().encode(`${path}\0`), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    throw new FfiError(`${path} could not be opened for mapping`, {
      hint: "check that this user may read the file and how many files are open (ulimit -n)",
    });
  }
  try {
    const pointer = symbols.mmap(null, BigInt(size), PROT_READ, MAP_PRIVATE, fd, 0n);
    if (pointer === null || Deno.UnsafePointer.value(pointer) === MAP_FAILED) {
      throw new FfiError(`${path} (${size} bytes) could not be mapped into memory`, {
        hint: "check the limit on address space (ulimit -v) and that the file system allows memory maps",
      });
    }
    const unmap = () => void symbols.munmap(pointer, BigInt(size));
    // Asked of the open file and after mapping it, so that a change since the stat cannot slip through.
    const actual = Number(symbols.lseek(fd, 0n, SEEK_END));
    if (actual !== size) {
      unmap();
      throw changedSize(path, size, actual);
    }
    const bytes = new Uint8Array(Deno.UnsafePointerView.getArrayBuffer(pointer, size));
    return new MappedFile(path, bytes, unmap, identityOf(stat));
  } finally {
    symbols.close(fd); // the mapping holds the file by itself
  }
}

/**
 * Has the system read a file into its page cache, on another thread: who opens or maps it then does not wait for the disk.
 * Mapping all of it at once is faster than the kernel's own hints for that, of which each reads a few megabytes only.
 *
 * @returns whether it was read; where it cannot be, nothing is said
 */
export async function readAhead(path: string): Promise<boolean> {
  const library = Deno.build.os === "linux" ? openLibc() : null;
  if (library === null) return false;
  const { symbols } = library;
  try {
    if (!Deno.statSync(path).isFile) return false; // and the check of --allow-read
  } catch {
    return false;
  }
  const fd = symbols.open(new TextEncoder().encode(`${path}\0`), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  try {
    const size = symbols.lseek(fd, 0n, SEEK_END);
    if (size <= 0n) return false;
    const mapped = await symbols.mmapAside(null, size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0n);
    if (mapped === null || Deno.UnsafePointer.value(mapped) === MAP_FAILED) return false;
    symbols.munmap(mapped, size);
    return true;
  } finally {
    symbols.close(fd);
  }
}

/** A file that is open for {@link readInto}. */
export interface FileReader extends Disposable {
  readonly path: string;
  readonly fd: number;
}

/**
 * Reads `length` bytes from `offset` on into memory at the address `target`, on another thread. Neither the memory nor
 * the reader may go away before the promise settles.
 *
 * @throws {FfiError} when the file ends before that, or the disk fails
 */
export async function readInto(
  target: bigint,
  { path, fd }: FileReader,
  offset: number,
  length: number,
): Promise<void> {
  const { symbols } = openLibc()!;
  for (let done = 0; done < length;) {
    const pointer = Deno.UnsafePointer.create(target + BigInt(done));
    const count = Number(await symbols.pread(fd, pointer, BigInt(length - done), BigInt(offset + done)));
    if (count === 0) {
      throw new FfiError(
        `${path} has become shorter while it was read: nothing is at byte ${offset + done}`,
        {
          hint: "another program has written to it: load the model again when that is done",
        },
      );
    }
    if (count < 0) {
      throw new FfiError(`${path} could not be read at byte ${offset + done}`, {
        hint: "the system's log (dmesg) says what is wrong with the disk or the network drive",
      });
    }
    done += count;
  }
}

/** What stays the same while a path leads to the same file. */
function identityOf({ dev, ino }: Deno.FileInfo): string {
  return `${dev}:${ino}`;
}

function identityAt(path: string): string | undefined {
  try {
    return identityOf(Deno.statSync(path));
  } catch {
    return undefined; // gone, or closed to this user by now
  }
}

function changedSize(path: string, expected: number, actual: number): FfiError {
  return new FfiError(`${path} should have ${expected} bytes but has ${actual}`, {
    hint: "is it still being downloaded or copied? Wait for that to end, or download it again",
  });
}
