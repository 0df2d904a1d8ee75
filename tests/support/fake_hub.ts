/**
 * A server on 127.0.0.1 that behaves like the Hugging Face hub for one model, as far as a download asks: the API's listing
 * in pages, small files from the hub itself, large ones by a redirect to a store on another port, ranges, etags, and its
 * errors with their headers. A test can have it misbehave.
 */
import { createHash } from "node:crypto";
import { join } from "node:path";

export interface Asked {
  readonly server: "hub" | "store";
  readonly path: string;
  readonly range: string | null;
  readonly authorization: string | null;
}

/** Answers instead of the server where it returns something. `count` is how often this path was asked for, from 1. */
export type Trouble = (
  asked: Asked & { readonly count: number },
) => Response | undefined | Promise<Response | undefined>;

export interface FakeHub extends AsyncDisposable {
  /** For HF_ENDPOINT. */
  readonly endpoint: string;
  readonly commit: string;
  readonly asked: Asked[];
  /** Bytes of files that were sent, of both servers. */
  sent: number;
  trouble: Trouble | undefined;
  /** Only who has this token may read files. */
  gated: string | undefined;
  /** A large file's transfer stops after so many bytes, once for each entry. */
  readonly cuts: number[];
  /** The store sends whole files whatever range was asked for. */
  ignoresRanges: boolean;
  /** What a file's content is, other than what the listing says. */
  readonly swapped: Map<string, Uint8Array<ArrayBuffer>>;
  /** Most files that were in transfer at a time. */
  most: number;
}

const LARGE = /\.safetensors$/;
const PAGE = 7;

/** Files of a folder by their paths in it, and more of them. */
function filesOf(folder: string, extra: Record<string, string>): Map<string, Uint8Array<ArrayBuffer>> {
  const files = new Map<string, Uint8Array<ArrayBuffer>>();
  const walk = (at: string, prefix: string) => {
    for (const { name, isDirectory } of Deno.readDirSync(at)) {
      const path = join(at, name);
      if (isDirectory) walk(path, `${prefix}${name}/`);
      else files.set(prefix + name, Deno.readFileSync(path));
    }
  };
  walk(folder, "");
  for (const [path, text] of Object.entries(extra)) files.set(path, new TextEncoder().encode(text));
  return files;
}

export function sha256(bytes: Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}

/** Git's name for a file's content. */
export function gitHash(bytes: Uint8Array): string {
  return createHash("sha1").update(`blob ${bytes.length}\0`).update(bytes).digest("hex");
}

/** Serves the model of a folder as `id`. @param extra files that are there besides. */
export function serveHub(id: string, folder: string, extra: Record<string, string> = {}): FakeHub {
  const files = filesOf(folder, extra);
  const commit = gitHash(new TextEncoder().encode(id));
  let inTransfer = 0;

  const body = (path: string, bytes: Uint8Array<ArrayBuffer>): ReadableStream<Uint8Array> => {
    const cut = LARGE.test(path) ? hub.cuts.shift() : undefined;
    let at = 0;
    hub.most = Math.max(hub.most, ++inTransfer);
    return new ReadableStream({
      async pull(controller) {
        await new Promise((resolve) => setTimeout(resolve, 1));
        if (cut !== undefined && at >= cut) {
          inTransfer--;
          return controller.close(); // too early for the Content-Length: the connection breaks
        }
        const chunk = bytes.slice(at, Math.min(at + 16_384, cut ?? Infinity));
        at += chunk.length;
        hub.sent += chunk.length;
        if (chunk.length > 0) controller.enqueue(chunk);
        if (at >= bytes.length) {
          inTransfer--;
          controller.close();
        }
      },
      cancel: () => void inTransfer--,
    });
  };

  const send = (path: string, { range }: Asked, headers: Record<string, string>): Response => {
    const bytes = hub.swapped.get(path) ?? files.get(path)!;
    const [, first, last] = (hub.ignoresRanges ? null : range)?.match(/^bytes=(\d+)-(\d+)$/) ?? [];
    if (first === undefined) {
      return new Response(body(path, bytes), {
        headers: { ...headers, "Content-Length": `${bytes.length}` },
      });
    }
    const part = bytes.slice(Number(first), Number(last) + 1);
    if (part.length === 0) return new Response(null, { status: 416 });
    return new Response(body(path, part), {
      status: 206,
      headers: {
        ...headers,
        "Content-Length": `${part.length}`,
        "Content-Range": `bytes ${first}-${Number(first) + part.length - 1}/${bytes.length}`,
      },
    });
  };

  const refuse = (status: number, code: string) =>
    Response.json({ error: code }, { status, headers: { "X-Error-Code": code } });

  const note = (server: Asked["server"], request: Request): Asked => {
    const asked = {
      server,
      path: new URL(request.url).pathname,
      range: request.headers.get("Range"),
      authorization: request.headers.get("Authorization"),
    };
    hub.asked.push(asked);
    return asked;
  };
  const troubled = (asked: Asked) =>
    hub.trouble?.({
      ...asked,
      count: hub.asked.filter(({ path, server }) => path === asked.path && server === asked.server).length,
    });

  const store = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async (request) => {
    const asked = note("store", request);
    const path = [...files.keys()].find((name) => `/${sha256(files.get(name)!)}` === asked.path)!;
    return await troubled(asked) ?? send(path, asked, { ETag: `"${sha256(files.get(path)!)}"` });
  });

  const answer = (asked: Asked, url: URL): Response => {
    const { path } = asked;
    const [, revision] = path.match(/\/(?:revision|tree|resolve)\/([^/]+)/) ?? [];
    if (!path.startsWith(`/api/models/${id}/`) && !path.startsWith(`/${id}/`)) {
      return refuse(asked.authorization === null ? 401 : 404, "RepoNotFound");
    }
    if (![commit, "main", "v1"].includes(revision)) return refuse(404, "RevisionNotFound");
    if (path.includes("/revision/")) {
      return Response.json({
        _id: "1",
        id,
        sha: commit,
        private: false,
        lastModified: "2024-08-01T00:00:00.000Z",
      });
    }
    if (path.includes("/tree/")) {
      const page = Number(url.searchParams.get("page") ?? 0);
      const names = [...files.keys()].sort();
      const entries = names.slice(page * PAGE, (page + 1) * PAGE).map((name) => {
        const bytes = files.get(name)!;
        const lfs = { oid: sha256(bytes), size: bytes.length, pointerSize: 134 };
        const pointer = new TextEncoder().encode(
          `version https://git-lfs.github.com/spec/v1\noid sha256:${lfs.oid}\nsize ${lfs.size}\n`,
        );
        return LARGE.test(name)
          ? { type: "file", path: name, size: bytes.length, oid: gitHash(pointer), lfs }
          : { type: "file", path: name, size: bytes.length, oid: gitHash(bytes) };
      });
      entries.unshift({ type: "directory", path: "transformer", size: 0, oid: commit });
      const next = (page + 1) * PAGE < names.length
        ? { Link: `<${hub.endpoint}${path}?recursive=true&page=${page + 1}>; rel="next"` }
        : undefined;
      return Response.json(entries, next && { headers: next });
    }
    if (hub.gated !== undefined && asked.authorization !== `Bearer ${hub.gated}`) {
      return refuse(asked.authorization === null ? 401 : 403, "GatedRepo");
    }
    const name = path.replace(`/${id}/resolve/${revision}/`, "");
    const bytes = files.get(name);
    if (bytes === undefined) return refuse(404, "EntryNotFound");
    if (!LARGE.test(name)) return send(name, asked, { ETag: `"${gitHash(bytes)}"` });
    return new Response(null, {
      status: 302,
      headers: {
        Location: `http://127.0.0.1:${store.addr.port}/${sha256(bytes)}`,
        "X-Linked-ETag": `"${sha256(bytes)}"`,
        "X-Linked-Size": `${bytes.length}`,
      },
    });
  };
  const front = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async (request) => {
    const asked = note("hub", request);
    return await troubled(asked) ?? answer(asked, new URL(request.url));
  });

  const hub: FakeHub = {
    endpoint: `http://127.0.0.1:${front.addr.port}`,
    commit,
    asked: [],
    sent: 0,
    trouble: undefined,
    gated: undefined,
    cuts: [],
    ignoresRanges: false,
    swapped: new Map(),
    most: 0,
    [Symbol.asyncDispose]: async () => {
      await Promise.all([front.shutdown(), store.shutdown()]);
    },
  };
  return hub;
}
