import { FluxError, messageOf, ModelError, UsageError } from "./errors.ts";
import type { HubSettings } from "./hub_settings.ts";

/** Whose requests these are, and what is done while one has to wait. */
export interface HubRequest {
  readonly settings: HubSettings;
  /** `owner/name`, for messages. */
  readonly id: string;
  readonly revision: string;
  readonly signal?: AbortSignal | undefined;
  readonly note?: ((message: string) => void) | undefined;
  /** Milliseconds before the first attempt is repeated; twice as long before each one after it. */
  readonly patience?: number | undefined;
}

const PATIENCE = 1000;
/** Times that a request is repeated. */
const RETRIES = 5;
/** The hub may ask for so many seconds of patience; who asks for more is told to come back. */
const LONGEST_WAIT = 300;

/** The server has sent a whole file where the rest of one was asked for. */
export class RangeIgnored extends Error {}

/**
 * A `fetch` for @huggingface/hub: adds the token where it belongs, repeats what a moment's trouble has stopped (a lost
 * connection, 429 with its Retry-After, 5xx), and ends in an error that says what to do.
 *
 * @throws ModelError, UsageError; {@link RangeIgnored}; the signal's reason.
 */
export function hubFetch(request: HubRequest): typeof fetch {
  const { settings: { endpoint, token }, signal } = request;
  return async (input, init) => {
    const url = new URL(input instanceof Request ? input.url : input);
    const headers = new Headers(init?.headers);
    // To the hub itself only, and not in the clear; where it redirects to another host, fetch drops it.
    if (token !== undefined && url.origin === new URL(endpoint).origin && isPrivate(url)) {
      headers.set("Authorization", `Bearer ${token}`);
    }
    for (let attempt = 0;; attempt++) {
      const outcome = await attemptOnce(url, { ...init, headers, ...(signal && { signal }) });
      signal?.throwIfAborted();
      if (outcome instanceof Response && outcome.ok) {
        if (headers.has("Range") && outcome.status !== 206) {
          await outcome.body?.cancel();
          throw new RangeIgnored(`${url.host} sends no parts of files`);
        }
        return outcome;
      }
      const wait = outcome instanceof Response ? waitAsked(outcome) : 0;
      if (wait === undefined) throw await refusal(outcome as Response, request);
      if (attempt === RETRIES || wait > LONGEST_WAIT) throw await giveUp(outcome, url, wait);
      if (outcome instanceof Response) await outcome.body?.cancel();
      if (wait > 1) request.note?.(`${url.host} asks to wait for ${Math.ceil(wait)} s`);
      else if (attempt === 0) request.note?.(`${url.host} does not answer as it should; trying again`);
      await delay(Math.max(1000 * wait, patienceOf(request) * 2 ** attempt), signal);
    }
  };
}

export function patienceOf({ patience = PATIENCE }: HubRequest): number {
  return patience;
}

/** Resolves after so many milliseconds; rejects with the signal's reason. */
export function delay(milliseconds: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal!.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", stop, { once: true });
  });
}

function isPrivate({ protocol, hostname }: URL): boolean {
  return protocol === "https:" || ["127.0.0.1", "localhost", "[::1]"].includes(hostname);
}

/** The response, or why there is none. Throws what no repetition helps against. */
async function attemptOnce(url: URL, init: RequestInit): Promise<Response | Error> {
  try {
    return await fetch(url, init);
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) {
      const host = error.message.match(/"([^"]+)"/)?.[1] ?? url.host; // of a redirection another one
      throw new FluxError(`Deno may not connect to ${host}`, {
        cause: error,
        hint:
          `run it by "deno task", with HF_ENDPOINT set where that is your hub; else add --allow-net=${host}`,
      });
    }
    if (!(error instanceof Error)) throw error;
    return error;
  }
}

/** Seconds to wait before it is worth to ask again; undefined where it is not. */
function waitAsked({ status, headers }: Response): number | undefined {
  if (status !== 429 && status !== 408 && status < 500) return undefined;
  const after = headers.get("Retry-After") ?? "";
  if (/^\d+$/.test(after)) return Number(after);
  const date = Date.parse(after);
  return Number.isNaN(date) ? 0 : Math.max(0, (date - Date.now()) / 1000);
}

async function giveUp(outcome: Response | Error, url: URL, wait: number): Promise<FluxError> {
  if (outcome instanceof Error) {
    return new FluxError(`${url.host} cannot be reached: ${messageOf(outcome)}`, {
      cause: outcome,
      hint: "check the network; what was downloaded so far is kept, and the same command goes on from there",
    });
  }
  await outcome.body?.cancel();
  const hint = outcome.status === 429
    ? `it asks to come back${
      wait > 0 ? ` in ${Math.ceil(wait)} s` : " later"
    }; with HF_TOKEN set it allows more requests`
    : "try again later; what was downloaded so far is kept";
  return new FluxError(
    `${url.host} answers ${outcome.status}${outcome.status === 429 ? " (too many requests)" : ""}`,
    {
      hint,
    },
  );
}

/** Why the hub does not give what was asked for, and what to do about it. */
async function refusal(response: Response, { settings, id, revision }: HubRequest): Promise<FluxError> {
  await response.body?.cancel();
  const { status, headers, url } = response;
  const code = headers.get("X-Error-Code");
  const { endpoint, token } = settings;
  const page = `${endpoint}/${id}`;
  if (code === "GatedRepo" || (status === 403 && code !== "RepoNotFound")) {
    const agree = `open ${page}, log in and click "Agree and access repository"`;
    if (token === undefined) {
      return new ModelError(`${id} is gated: who wants to download it has to accept its licence first`, {
        hint: `1. ${agree}; 2. make a token that may read at ${endpoint}/settings/tokens; ` +
          "3. set HF_TOKEN=hf_... (or run hf auth login), and start again",
      });
    }
    return new ModelError(`${id} is gated, and this token's account has no access to it`, {
      hint: `${agree}, as the user whose token it is; a fine-grained token also needs ` +
        `"Read access to contents of all public gated repos you can access" (${endpoint}/settings/tokens)`,
    });
  }
  if (status === 401 && token !== undefined) {
    return new ModelError(`${new URL(endpoint).host} does not take the token of HF_TOKEN or hf auth login`, {
      hint: `make a new one at ${endpoint}/settings/tokens, or unset it: most models need none`,
    });
  }
  if (code === "RevisionNotFound") {
    return new UsageError(`${id} has no revision ${JSON.stringify(revision)}`, {
      hint: `its branches and tags are listed at ${page}/tree/main`,
    });
  }
  if (status === 401 || code === "RepoNotFound" || (status === 404 && code === null)) {
    return new UsageError(`there is no model ${id} at ${new URL(endpoint).host}, or it is private`, {
      hint:
        "check the spelling (owner/name); for a private model set HF_TOKEN. A folder is not there by this name either",
    });
  }
  return new ModelError(`${url} answers ${status}${code === null ? "" : ` (${code})`}`, {
    hint: "is it a model in diffusers' layout? Try again later",
  });
}
