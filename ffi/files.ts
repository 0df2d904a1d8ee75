/** Writing a file so that its path holds either the old content or all of the new one. */

import { basename, dirname, join } from "node:path";
import { FileError, messageOf } from "./errors.ts";

/** Between two chunks an abort is noticed. */
const CHUNK_BYTES = 1 << 20;

/**
 * Puts what `write` writes into the place of `path`: into a temporary file beside it, which is flushed to the disk and
 * renamed over `path`, with an existing file's mode; a symbolic link stays and its target is replaced. After any failure
 * or abort the temporary file is gone and an existing file is as it was. A process that is killed outright can leave a
 * temporary file (".name.xxxxxxxx.tmp"), never a half-written `path`.
 * @throws FileError where `path` is a folder or a device; what `write` throws; the signal's reason when it is aborted
 * before the rename; Deno's errors of the disk.
 */
export async function replaceFile(
  path: string,
  write: (file: Deno.FsFile) => Promise<void>,
  signal?: AbortSignal,
): Promise<void> {
  const target = await targetOf(path);
  const temporary = temporaryBeside(target.path);
  const file = await Deno.open(temporary, { write: true, createNew: true });
  try {
    if (target.mode !== undefined) await Deno.chmod(temporary, target.mode);
    await write(file);
    await file.sync();
    signal?.throwIfAborted();
    file.close();
    // Synchronous: nothing can come between the last look at the signal and the rename.
    Deno.renameSync(temporary, target.path);
  } catch (error) {
    discard(file, temporary);
    throw error;
  }
}

/** Writes all of `bytes` in chunks; throws the signal's reason between two of them when it is aborted. */
export async function writeAll(file: Deno.FsFile, bytes: Uint8Array, signal?: AbortSignal): Promise<void> {
  for (let offset = 0; offset < bytes.length;) {
    offset += await file.write(bytes.subarray(offset, offset + CHUNK_BYTES));
    signal?.throwIfAborted();
  }
}

/**
 * Writes `bytes` to `path` as {@link replaceFile} does. A program that wants to leave nothing behind on Ctrl-C listens
 * for SIGINT and aborts `signal`.
 * @throws FileError with path and reason: missing folder, no permission, full disk, not a regular file.
 * @throws the signal's reason when it is aborted before the rename.
 */
export async function writeFileAtomic(
  path: string,
  bytes: Uint8Array,
  options: { signal?: AbortSignal } = {},
): Promise<void> {
  const { signal } = options;
  signal?.throwIfAborted();
  try {
    await replaceFile(path, (file) => writeAll(file, bytes, signal), signal);
  } catch (error) {
    if (error instanceof FileError || (signal?.aborted && error === signal.reason)) throw error;
    throw writeError(path, error);
  }
}

/** As {@link writeFileAtomic}, at once: for small files such as cache entries. */
export function writeFileAtomicSync(path: string, bytes: Uint8Array): void {
  const temporary = temporaryBeside(path);
  let file: Deno.FsFile | undefined;
  try {
    file = Deno.openSync(temporary, { write: true, createNew: true });
    for (let offset = 0; offset < bytes.length;) offset += file.writeSync(bytes.subarray(offset));
    file.syncSync();
    file.close();
    Deno.renameSync(temporary, path);
  } catch (error) {
    if (file !== undefined) discard(file, temporary);
    throw writeError(path, error);
  }
}

/**
 * Finds out before long work whether {@link writeFileAtomic} will be able to write `path`, by making and removing a
 * temporary file beside it.
 * @throws FileError with path and reason.
 */
export async function checkWritable(path: string): Promise<void> {
  try {
    const probe = temporaryBeside((await targetOf(path)).path);
    (await Deno.open(probe, { write: true, createNew: true })).close();
    await Deno.remove(probe);
  } catch (error) {
    if (error instanceof FileError) throw error;
    throw writeError(path, error);
  }
}

/** What the disk has against writing `path`, in words. */
export function writeError(path: string, error: unknown, hint?: string): FileError {
  return new FileError(`cannot write ${path}: ${reasonOf(error, path)}`, {
    cause: error,
    ...(hint === undefined ? {} : { hint }),
  });
}

function temporaryBeside(path: string): string {
  return join(dirname(path), `.${basename(path)}.${crypto.randomUUID().slice(0, 8)}.tmp`);
}

/**
 * The file that a write to `path` replaces, behind any symbolic link, and its mode; no mode where there is none yet.
 * Anything but a regular file is refused: a rename would put a regular file in the place of /dev/null or a pipe.
 */
async function targetOf(path: string): Promise<{ path: string; mode: number | undefined }> {
  let info: Deno.FileInfo;
  try {
    info = await Deno.stat(path);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return { path, mode: undefined };
    throw error;
  }
  if (info.isDirectory) throw new FileError(`cannot write ${path}: it is a folder; give a file name`);
  if (!info.isFile) throw new FileError(`cannot write ${path}: it is not a regular file; give another path`);
  return { path: await Deno.realPath(path), mode: info.mode === null ? undefined : info.mode & 0o777 };
}

function discard(file: Deno.FsFile, temporary: string): void {
  try {
    file.close();
  } catch {
    // Closed before the rename failed.
  }
  try {
    Deno.removeSync(temporary);
  } catch {
    // The error that brought us here is the one to report.
  }
}

function reasonOf(error: unknown, path: string): string {
  const code = error instanceof Error && "code" in error ? error.code : undefined;
  if (error instanceof Deno.errors.NotFound) {
    return `the folder ${dirname(path)} does not exist; create it or give another path`;
  }
  if (error instanceof Deno.errors.NotADirectory) {
    return `${dirname(path)} is not a folder; give another path`;
  }
  if (error instanceof Deno.errors.PermissionDenied || code === "EROFS") {
    return `no permission to write into ${dirname(path)}; give another path`;
  }
  if (error instanceof Deno.errors.NotCapable) {
    return `Deno has no permission for ${dirname(path)}; run with --allow-read and --allow-write for it`;
  }
  if (code === "ENOSPC" || code === "EDQUOT") return "the disk is full; free some space or give another path";
  if (code === "ENAMETOOLONG") return "the file name is too long; give a shorter one";
  return messageOf(error);
}
