/**
 * The studio over HTTP: its page, what it offers, and jobs. A job is one request whose answer is a stream of lines, one
 * {@link StudioEvent} each; who goes away stops it.
 *
 * Only pages of the studio itself get an answer. Any page in the same browser can send requests to 127.0.0.1, and a name
 * that its owner points there later (DNS rebinding) would make such a page one of the same origin; so the Host has to be
 * this machine's, and an Origin has to be the studio's.
 */
import { FluxError, messageOf, UsageError } from "../base/errors.ts";
import HISTORY_JS from "./page/history.js" with { type: "text" };
import STUDIO_CSS from "./page/studio.css" with { type: "text" };
import INDEX_HTML from "./page/index.html" with { type: "text" };
import STUDIO_JS from "./page/studio.js" with { type: "text" };
import type { Offer } from "./engine.ts";
import { JobQueue } from "./queue.ts";
import { type Drawing, parseDrawing, type StudioEvent } from "./request.ts";

/** What draws: see {@link Engine}. */
export interface Studio {
  offer(): Offer;
  draw(drawing: Drawing, signal: AbortSignal, tell: (event: StudioEvent) => void): Promise<void>;
}

const MOST_WAITING = 16;
const MOST_BYTES = 64 * 1024;

const FILES: ReadonlyMap<string, { readonly text: string; readonly type: string }> = new Map([
  ["/", { text: INDEX_HTML, type: "text/html" }],
  ["/studio.css", { text: STUDIO_CSS, type: "text/css" }],
  ["/history.js", { text: HISTORY_JS, type: "text/javascript" }],
  ["/studio.js", { text: STUDIO_JS, type: "text/javascript" }],
]);

const HEADERS: Readonly<Record<string, string>> = {
  "cache-control": "no-store",
  "content-security-policy":
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; " +
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  "cross-origin-opener-policy": "same-origin",
  "cross-origin-resource-policy": "same-origin",
  "referrer-policy": "no-referrer",
  "x-content-type-options": "nosniff",
};

/** Answers requests to `http://127.0.0.1:port`. @param note is told of bugs. */
export function studioHandler(
  studio: Studio,
  port: number,
  note: (message: string) => void,
): (request: Request) => Promise<Response> {
  const queue = new JobQueue(MOST_WAITING);
  const hosts = [`127.0.0.1:${port}`, `localhost:${port}`];
  return async (request) => {
    const refusal = refuse(request, hosts);
    if (refusal !== undefined) return answer(403, `${refusal}\n`);
    const { pathname } = new URL(request.url);
    const file = FILES.get(pathname);
    if (file !== undefined) {
      return request.method === "GET" ? answer(200, file.text, file.type) : wrongMethod("GET");
    }
    if (pathname === "/api/offer") {
      return request.method === "GET"
        ? answer(200, JSON.stringify(studio.offer()), "application/json")
        : wrongMethod("GET");
    }
    if (pathname === "/api/draw") {
      return request.method === "POST" ? await startJob(studio, queue, request, note) : wrongMethod("POST");
    }
    return answer(404, "there is nothing here\n");
  };
}

/** Why a request is not one of the studio's own pages, or undefined where it is. Programs send no Origin. */
function refuse({ headers }: Request, hosts: readonly string[]): string | undefined {
  const host = headers.get("host") ?? "";
  if (!hosts.includes(host)) return `this is ${hosts[0]}, not ${JSON.stringify(host)}`;
  const origin = headers.get("origin");
  if (origin !== null && origin !== `http://${host}`) return `no requests from ${JSON.stringify(origin)}`;
  const site = headers.get("sec-fetch-site");
  // "none": typed in by the user. A link from another site may lead to the page, but nothing else.
  const opened = headers.get("sec-fetch-mode") === "navigate" && headers.get("sec-fetch-dest") === "document";
  if (site !== null && site !== "same-origin" && site !== "none" && !opened) {
    return "no requests from other sites";
  }
  return undefined;
}

async function startJob(
  studio: Studio,
  queue: JobQueue,
  request: Request,
  note: (message: string) => void,
): Promise<Response> {
  // Other sites cannot send this type without asking first, and are not told yes.
  if (request.headers.get("content-type")?.split(";")[0].trim() !== "application/json") {
    return answer(415, "send application/json\n");
  }
  let drawing: Drawing;
  try {
    drawing = parseDrawing(JSON.parse(await limitedText(request)));
  } catch (error) {
    if (error instanceof SyntaxError) return answer(400, "the request is no JSON\n");
    if (error instanceof UsageError) return answer(400, `${error.message}\n`);
    throw error;
  }
  const gone = new AbortController();
  const encoder = new TextEncoder();
  const body = new ReadableStream<Uint8Array<ArrayBuffer>>({
    async start(controller) {
      const tell = (event: StudioEvent) => {
        if (!gone.signal.aborted) controller.enqueue(encoder.encode(`${JSON.stringify(event)}\n`));
      };
      try {
        await queue.run(
          () => studio.draw(drawing, gone.signal, tell),
          gone.signal,
          (ahead) => tell({ type: "queued", ahead }),
        );
      } catch (error) {
        if (gone.signal.aborted) return;
        // A bug must not end the program, with what the other pages have waiting.
        if (!(error instanceof FluxError)) {
          note(error instanceof Error ? error.stack ?? error.message : messageOf(error));
        }
        const hint = error instanceof FluxError
          ? error.hint
          : "the studio's terminal has more; this is a bug";
        tell({ type: "error", message: messageOf(error), ...(hint === undefined ? {} : { hint }) });
      }
      if (!gone.signal.aborted) controller.close();
    },
    cancel: () => gone.abort(new DOMException("the page has gone", "AbortError")),
  });
  return new Response(body, { headers: { ...HEADERS, "content-type": "application/x-ndjson" } });
}

/** Throws {@link UsageError} for a body that is too long, before all of it has come. */
async function limitedText(request: Request): Promise<string> {
  const decoder = new TextDecoder();
  let [text, length] = ["", 0];
  for await (const chunk of request.body ?? []) {
    length += chunk.length;
    if (length > MOST_BYTES) throw new UsageError(`the request has more than ${MOST_BYTES} bytes`);
    text += decoder.decode(chunk, { stream: true });
  }
  return text + decoder.decode();
}

function answer(status: number, text: string, type = "text/plain"): Response {
  return new Response(text, { status, headers: { ...HEADERS, "content-type": `${type}; charset=utf-8` } });
}

function wrongMethod(allowed: string): Response {
  return new Response(`${allowed} only\n`, { status: 405, headers: { ...HEADERS, allow: allowed } });
}
