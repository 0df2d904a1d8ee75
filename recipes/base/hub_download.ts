import { downloadFile } from "@huggingface/hub";
import { createHash, type Hash } from "node:crypto";
import { dirname, join } from "node:path";
import { writeAll, writeError } from "../../ffi/files.ts";
import { FileError, FluxError, messageOf, ModelError } from "./errors.ts";
import { delay, hubFetch, type HubRequest, patienceOf, RangeIgnored } from "./hub_client.ts";

/** A file of a repository. */
export interface RemoteFile {
  readonly path: string;
  /** In bytes. */
  readonly size: number;
  /** What its blob is called: SHA-256 of large files, git's SHA-1 of the others. Hexadecimal. */
  readonly etag: string;
}

/** Times that a transfer goes on after it broke off, without a byte arriving in between. */
const RETRIES = 5;
/** Bytes that are written at a time. */
const BATCH = 4 << 20;
/** A connection without a byte for so long counts as lost. */
const STALLED = 60_000;

/**
 * Brings one file into `<repository>/blobs/<etag>`, by way of `<etag>.incomplete` beside it, where huggingface_hub keeps
 * what has arrived so far too: what is there already is not downloaded again, whoever has begun. A lock keeps other
 * processes from the same file meanwhile.
 *
 * @param commit that the file is read at. @param onBytes told of bytes that have arrived, and whether they were there before; of those
 * that were thrown away again as a negative number.
 * @throws ModelError for content that is not what the hub says it is, and was not at a second attempt either;
 * FileError for a disk that takes no more, which leaves what has arrived where it is; what {@link hubFetch} throws.
 */
export async function downloadBlob(
  repository: string,
  file: RemoteFile,
  commit: string,
  request: HubRequest,
  onBytes: (bytes: number, kept?: boolean) => void,
): Promise<void> {
  const blob = join(repository, "blobs", file.etag);
  const partial = `${blob}.incomplete`;
  const lockPath = join(dirname(repository), ".locks", repository.split("/").at(-1)!, `${file.etag}.lock`);
  try {
    await Deno.mkdir(dirname(blob), { recursive: true });
    await Deno.mkdir(dirname(lockPath), { recursive: true });
    using lock = await Deno.open(lockPath, { create: true, write: true });
    await unlessAborted(lock.lock(true), request.signal);
    if (await sizeOf(blob) === file.size) return onBytes(file.size, true); // another process has brought it meanwhile
    using target = await Deno.open(partial, { create: true, read: true, write: true });
    for (let attempt = 0;; attempt++) {
      const found = await fill(target, file, commit, request, onBytes);
      if (found === file.etag) break;
      await target.truncate(0);
      onBytes(-file.size);
      if (attempt > 0) throw wrongHash(request, file, found);
    }
    await target.sync();
    await Deno.rename(partial, blob);
  } catch (error) {
    request.signal?.throwIfAborted();
    if (error instanceof FluxError || !isDiskError(error)) throw error;
    throw writeError(blob, error, "what has arrived so far is kept: the same command goes on from there");
  }
}

/** Appends what is missing and returns the hash of all; an etag's own kind. */
async function fill(
  target: Deno.FsFile,
  file: RemoteFile,
  commit: string,
  request: HubRequest,
  onBytes: (bytes: number, kept?: boolean) => void,
): Promise<string> {
  let { hash, done } = await hashOfStart(target, file);
  onBytes(done, true);
  for (let failures = 0; done < file.size;) {
    const before = done;
    let failure: unknown;
    try {
      for await (const chunk of rest(file, done, commit, request)) {
        if (done + chunk.length > file.size) {
          throw new Error(`more bytes than the ${file.size} that were announced`);
        }
        const written = writeAll(target, chunk); // on another thread, meanwhile
        hash.update(chunk);
        await written;
        done += chunk.length;
        onBytes(chunk.length);
      }
      if (done < file.size) failure = new Error("the connection was closed too early");
    } catch (error) {
      request.signal?.throwIfAborted();
      if (error instanceof FluxError || isDiskError(error)) throw error;
      failure = error;
    }
    if (failure === undefined) break;
    if (failure instanceof RangeIgnored) {
      await target.truncate(0);
      await target.seek(0, Deno.SeekMode.Start);
      onBytes(-done);
      hash = newHash(file);
      done = 0;
      continue;
    }
    failures = done > before ? 0 : failures + 1;
    if (failures > RETRIES) {
      throw new FluxError(`${file.path} of ${request.id} cannot be downloaded: ${messageOf(failure)}`, {
        cause: failure,
        hint: "check the network; what has arrived so far is kept, and the same command goes on from there",
      });
    }
    await delay(patienceOf(request) * 2 ** failures, request.signal);
  }
  return hash.digest("hex");
}

/**
 * The bytes of a file from `start` on, some at a time; those before a failure come before it is thrown. A piece is valid until
 * the next one is asked for.
 */
async function* rest(
  { path, size, etag }: RemoteFile,
  start: number,
  commit: string,
  request: HubRequest,
): AsyncGenerator<Uint8Array> {
  const stalled = new AbortController();
  const { signal: outer } = request;
  const signal = outer === undefined ? stalled.signal : AbortSignal.any([outer, stalled.signal]);
  const ask = hubFetch({ ...request, signal });
  let refused: unknown; // the library's stream keeps an error's text only
  const { id, settings: { endpoint } } = request;
  const blob = await downloadFile({
    repo: { type: "model", name: id },
    path,
    downloadInfo: { size, etag, url: `${endpoint}/${id}/resolve/${commit}/${path}` }, // known from the listing
    xet: false, // plain HTTP, which goes on in the middle of a file
    fetch: async (input, init) => {
      try {
        return await ask(input, init);
      } catch (error) {
        refused = error;
        throw error;
      }
    },
  });
  const reader = blob!.slice(start).stream().getReader();
  let arrived = performance.now();
  const watch = setInterval(() => {
    if (performance.now() - arrived > STALLED) stalled.abort(new Error(`no byte for ${STALLED / 1000} s`));
  }, STALLED / 10);
  // Small pieces as the network gives them would cost a call to the disk each.
  const gathered = new Uint8Array(BATCH);
  let length = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      arrived = performance.now();
      for (let piece = value; piece !== undefined && piece.length > 0;) {
        const part = piece.subarray(0, BATCH - length);
        gathered.set(part, length);
        length += part.length;
        piece = piece.subarray(part.length);
        if (length < BATCH) continue;
        length = 0;
        yield gathered;
      }
      if (!done) continue;
      if (length > 0) yield gathered.subarray(0, length);
      return;
    }
  } catch (error) {
    if (length > 0) yield gathered.subarray(0, length);
    throw refused ?? error;
  } finally {
    clearInterval(watch);
    stalled.abort();
    await reader.cancel().catch(() => {}); // of a stream that has failed already
  }
}

/** The hash so far of what is in the file, which is left at its end; an overlong one begins anew. */
async function hashOfStart(target: Deno.FsFile, file: RemoteFile): Promise<{ hash: Hash; done: number }> {
  const hash = newHash(file);
  const { size } = await target.stat();
  if (size > file.size) await target.truncate(0);
  await target.seek(0, Deno.SeekMode.Start);
  const buffer = new Uint8Array(4 << 20);
  let done = 0;
  for (let count; (count = await target.read(buffer)) !== null; done += count) {
    hash.update(buffer.subarray(0, count));
  }
  return { hash, done };
}

/** Of a kind that an etag's length tells. Git's covers a line before the content (git-hash-object). */
function newHash({ etag, size }: RemoteFile): Hash {
  return etag.length === 64 ? createHash("sha256") : createHash("sha1").update(`blob ${size}\0`);
}

function wrongHash({ id }: HubRequest, { path, etag }: RemoteFile, found: string): ModelError {
  return new ModelError(
    `${path} of ${id} was downloaded twice, and both times its hash is ${found}, not ${etag}`,
    {
      hint:
        "something between here and the hub changes files: try another network, or HF_ENDPOINT if that is set",
    },
  );
}

async function sizeOf(path: string): Promise<number | undefined> {
  try {
    return (await Deno.stat(path)).size;
  } catch {
    return undefined;
  }
}

/** Whether the disk is to blame, not the network. */
function isDiskError(error: unknown): boolean {
  if (error instanceof FileError || error instanceof Deno.errors.NotCapable) return true;
  const code = error instanceof Error && "code" in error ? String(error.code) : "";
  return /^E(NOSPC|DQUOT|IO|ROFS|FBIG|ACCES|PERM|NOENT|NOTDIR|ISDIR)$/.test(code);
}

/** The promise's result, or the signal's reason if that comes first. */
async function unlessAborted<T>(promise: Promise<T>, signal?: AbortSignal): Promise<T> {
  if (signal === undefined) return await promise;
  signal.throwIfAborted();
  const aborted = Promise.withResolvers<never>();
  const stop = () => aborted.reject(signal.reason);
  signal.addEventListener("abort", stop, { once: true });
  try {
    return await Promise.race([promise, aborted.promise]);
  } finally {
    signal.removeEventListener("abort", stop);
  }
}
