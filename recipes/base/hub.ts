/**
 * Models of the Hugging Face hub by their ids: out of the cache that huggingface_hub keeps too, else downloaded into it.
 *
 * Its layout (huggingface_hub's docs, "Understand caching"): `models--<owner>--<name>/` has `blobs/` with the contents, by
 * their hashes; `snapshots/<commit>/` with links to them by their names; and `refs/<branch>`, which says what commit a
 * branch was at. So Python finds what was downloaded here, and the other way round.
 */
import { existsSync, statfsSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { writeError, writeFileAtomic } from "../../ffi/files.ts";
import { gigabytes } from "./command_line.ts";
import { FileError, FluxError, ModelError, UsageError } from "./errors.ts";
import { hubFetch, type HubRequest } from "./hub_client.ts";
import type { RemoteFile } from "./hub_download.ts";
import { type FileList, smallFiles, type Wanted, weightFiles, WHOLE_MODEL } from "./hub_files.ts";
import { type HubSettings, hubSettings } from "./hub_settings.ts";

/** How a model is fetched from the Hugging Face hub. */
export interface HubOptions {
  /** A branch, tag or commit; "main" when left out. */
  readonly revision?: string | undefined;
  /** Which parts of the model; all when left out. */
  readonly wanted?: Wanted | undefined;
  /** Those of the environment when left out. */
  readonly settings?: HubSettings | undefined;
  /** Stops the download; what has arrived is kept for the next time. */
  readonly signal?: AbortSignal | undefined;
  /** Called now and then with how many bytes have arrived. */
  readonly onProgress?: ((event: DownloadProgress) => void) | undefined;
  /** Called with things worth knowing that do not stop the download. */
  readonly onNote?: ((message: string) => void) | undefined;
  /** Milliseconds before something that failed is tried again. */
  readonly patience?: number | undefined;
}

/** How far a download is. */
export interface DownloadProgress {
  /** Bytes that are there, and of how many. */
  readonly doneBytes: number;
  /** Bytes of all files together. */
  readonly totalBytes: number;
  /** Those that were there before: an interrupted download's. */
  readonly keptBytes: number;
}

/** Files that are downloaded at a time. */
const AT_ONCE = 8;

/**
 * The folder with a model's files: that of the cache if all that is wanted is there, without asking the network; else what
 * is missing is downloaded first.
 *
 * @throws UsageError for an id that the hub does not know; ModelError for a gated model, one that is not in diffusers' layout
 * and one that arrives damaged; FileError for a disk that is full; FluxError for a network that fails. What has
 * arrived is kept in each case, and when the signal aborts.
 */
export async function hubModel(id: string, options: HubOptions = {}): Promise<string> {
  const {
    revision = "main",
    wanted = WHOLE_MODEL,
    settings = hubSettings(),
    signal,
    onNote: note,
    patience,
  } = options;
  if (!/^\w[\w./-]*$/.test(revision) || revision.includes("..")) {
    throw new UsageError(`${JSON.stringify(revision)} is no revision: give a branch, a tag or a commit`);
  }
  const repository = join(settings.cache, `models--${id.replace("/", "--")}`);
  const cached = cachedSnapshot(repository, revision);
  if (cached !== undefined && isComplete(cached, wanted)) return cached;
  if (settings.offline) {
    const what = cached === undefined ? "is not" : "is not complete";
    throw new UsageError(`${id} ${what} in ${settings.cache}, and HF_HUB_OFFLINE forbids to download it`, {
      hint: "unset HF_HUB_OFFLINE, or set HF_HOME or HF_HUB_CACHE to where the model is",
    });
  }
  return await download(
    repository,
    wanted,
    { settings, id, revision, signal, note, patience },
    options.onProgress,
  );
}

/** The folder of a revision in the cache, whether all is in it or not. */
function cachedSnapshot(repository: string, revision: string): string | undefined {
  const commit = isCommit(revision) ? revision : readRef(join(repository, "refs", revision));
  if (commit === undefined || !isCommit(commit)) return undefined;
  const folder = join(repository, "snapshots", commit);
  return existsSync(folder) ? folder : undefined;
}

function readRef(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(path).trim();
  } catch {
    return undefined;
  }
}

function isComplete(folder: string, wanted: Wanted): boolean {
  const list: FileList = { has: (path) => existsSync(join(folder, path)) };
  if (smallFiles(list, wanted).missing.length > 0) return false;
  const readIndex = (path: string) => Deno.readTextFileSync(join(folder, path));
  return weightFiles(list, wanted, readIndex).missing.length === 0;
}

async function download(
  repository: string,
  wanted: Wanted,
  request: HubRequest,
  onProgress: HubOptions["onProgress"],
): Promise<string> {
  const { commit, files } = await listRemote(request);
  const list: FileList = { has: (path) => files.has(path) };
  const small = smallFiles(list, wanted);
  refuseMissing(request, small.missing);
  const snapshot = join(repository, "snapshots", commit);
  let [doneBytes, totalBytes, keptBytes] = [0, 0, 0];
  const bring = async (paths: readonly string[]) => {
    const missing = paths.filter((path) => !existsSync(join(snapshot, path))).map((path) => files.get(path)!);
    totalBytes += missing.reduce((sum, { size }) => sum + size, 0);
    checkRoom(request, repository, missing);
    const report = (bytes: number, kept = false) => {
      doneBytes += bytes;
      if (kept) keptBytes += bytes;
      onProgress?.({ doneBytes, totalBytes, keptBytes });
    };
    await together(missing, request.signal, async (file, signal) => {
      if (blobSize(repository, file.etag) === file.size) report(file.size, true);
      else {
        const { downloadBlob } = await import("./hub_download.ts");
        await downloadBlob(repository, file, commit, { ...request, signal }, report);
      }
      link(repository, snapshot, file);
    });
  };
  // Indexes tell what shards there are. model_index.json is the last of these, so that no folder looks finished too early.
  await bring(small.files);
  const weights = weightFiles(list, wanted, (path) => Deno.readTextFileSync(join(snapshot, path)));
  refuseMissing(request, weights.missing);
  await bring(weights.files);
  if (!isCommit(request.revision)) await writeRef(join(repository, "refs", request.revision), commit);
  return snapshot;
}

/** The commit that a revision is at, and the files there. */
async function listRemote(request: HubRequest): Promise<{ commit: string; files: Map<string, RemoteFile> }> {
  const { listFiles, modelInfo } = await import("@huggingface/hub");
  const { id, revision, settings: { endpoint } } = request;
  const asked = { hubUrl: endpoint, fetch: hubFetch(request) };
  const refuse = (what: string) =>
    new ModelError(`${new URL(endpoint).host} lists ${id} with ${what}`, {
      hint: "is that a hub? HF_ENDPOINT says where it is",
    });
  const files = new Map<string, RemoteFile>();
  try {
    const { sha: commit } = await modelInfo({ name: id, revision, additionalFields: ["sha"], ...asked });
    if (typeof commit !== "string" || !isCommit(commit)) throw refuse("a commit that is none");
    for await (
      const entry of listFiles({
        repo: { type: "model", name: id },
        revision: commit,
        recursive: true,
        ...asked,
      })
    ) {
      if (entry.type !== "file") continue;
      const etag = entry.lfs?.oid ?? entry.oid ?? "";
      const size = entry.lfs?.size ?? entry.size;
      if (!/^([0-9a-f]{40}|[0-9a-f]{64})$/.test(etag) || !Number.isSafeInteger(size) || size < 0) {
        throw refuse(`${JSON.stringify(entry.path)}, whose hash or size is none`);
      }
      files.set(entry.path, { path: entry.path, size, etag });
    }
    return { commit, files };
  } catch (error) {
    if (error instanceof FluxError || request.signal?.aborted) throw error;
    throw refuse("an answer that makes no sense"); // no JSON
  }
}

function refuseMissing({ id }: HubRequest, missing: readonly string[]): void {
  if (missing.length === 0) return;
  throw new ModelError(`${id} is no FLUX.1 model in diffusers' layout: it has no ${missing.join(", ")}`, {
    hint:
      "for a single file of a transformer give --transformer <file>, and in --ckpt the model that it was made from",
  });
}

/** Runs `work` for all files, some at a time; the first failure stops the others. */
async function together(
  files: readonly RemoteFile[],
  outer: AbortSignal | undefined,
  work: (file: RemoteFile, signal: AbortSignal) => Promise<void>,
): Promise<void> {
  const failed = new AbortController();
  const signal = outer === undefined ? failed.signal : AbortSignal.any([outer, failed.signal]);
  const waiting = files.values();
  const lane = async () => {
    for (const file of waiting) {
      signal.throwIfAborted();
      await work(file, signal);
    }
  };
  const lanes = Array.from({ length: Math.min(AT_ONCE, files.length) }, () =>
    lane().catch((error) => {
      failed.abort(error);
      throw error;
    }));
  const results = await Promise.allSettled(lanes);
  outer?.throwIfAborted();
  if (results.some(({ status }) => status === "rejected")) throw failed.signal.reason;
}

/** Bytes of a file among the blobs; undefined where it is not there. */
function blobSize(repository: string, name: string): number | undefined {
  try {
    return Deno.statSync(join(repository, "blobs", name)).size;
  } catch {
    return undefined;
  }
}

/** Makes the snapshot's link to a blob, in the place of one that leads nowhere. */
function link(repository: string, snapshot: string, { path, etag }: RemoteFile): void {
  const at = join(snapshot, path);
  const temporary = `${at}.${crypto.randomUUID().slice(0, 8)}.tmp`;
  try {
    Deno.mkdirSync(dirname(at), { recursive: true });
    Deno.symlinkSync(relative(dirname(at), join(repository, "blobs", etag)), temporary);
    Deno.renameSync(temporary, at);
  } catch (error) {
    throw writeError(at, error);
  }
}

async function writeRef(path: string, commit: string): Promise<void> {
  try {
    await Deno.mkdir(dirname(path), { recursive: true });
  } catch (error) {
    throw writeError(path, error);
  }
  await writeFileAtomic(path, new TextEncoder().encode(commit));
}

/** Says before a long download that it does not fit, as far as the system tells. */
function checkRoom(
  { id, settings: { cache } }: HubRequest,
  repository: string,
  files: readonly RemoteFile[],
): void {
  let free: number;
  try {
    Deno.mkdirSync(repository, { recursive: true });
    const { bavail, bsize } = statfsSync(repository);
    free = bavail * bsize;
  } catch {
    return; // what is wrong with the folder shows when the first file is written
  }
  const needed = files.reduce(
    (sum, { etag, size }) => {
      if (blobSize(repository, etag) === size) return sum;
      return sum + Math.max(0, size - (blobSize(repository, `${etag}.incomplete`) ?? 0));
    },
    0,
  );
  if (needed <= free) return;
  throw new FileError(
    `${id} takes ${gigabytes(needed)} GB more, and ${cache} has room for ${gigabytes(free)} GB`,
    {
      hint: "free some, or set HF_HOME to a folder on another disk",
    },
  );
}

function isCommit(text: string): boolean {
  return /^[0-9a-f]{40}$/.test(text);
}
