import { homedir } from "node:os";
import { isAbsolute, join } from "node:path";
import { UsageError } from "./errors.ts";
import { HUB } from "./hub_hosts.ts";

/** Where the hub is, and what this machine keeps of it. */
export interface HubSettings {
  /** Without a slash at the end. */
  readonly endpoint: string;
  /** The folder with `models--<owner>--<name>` in it. */
  readonly cache: string;
  /** Who asks; undefined for nobody in particular. */
  readonly token: string | undefined;
  /** Nothing is asked of the network. */
  readonly offline: boolean;
}

/**
 * The settings by huggingface_hub's environment variables (its docs, "Environment variables"), with its defaults, so that
 * Python and this program share one cache: HF_HUB_CACHE (or HUGGINGFACE_HUB_CACHE), HF_HOME, XDG_CACHE_HOME; HF_TOKEN, or
 * the file that HF_TOKEN_PATH names and `hf auth login` writes; HF_ENDPOINT; HF_HUB_OFFLINE.
 *
 * @param variable reads one; empty ones count as unset. @throws UsageError for an endpoint that is no address.
 */
export function hubSettings(
  variable: (name: string) => string | undefined = (name) => Deno.env.get(name),
): HubSettings {
  const get = (name: string) => variable(name)?.trim() || undefined;
  const folder = (name: string) => {
    const path = get(name);
    return path === undefined ? undefined : path.replace(/^~(?=\/|$)/, () => homeOf(get));
  };
  const xdg = get("XDG_CACHE_HOME");
  const home = folder("HF_HOME") ??
    join(xdg !== undefined && isAbsolute(xdg) ? xdg : join(homeOf(get), ".cache"), "huggingface");
  return {
    endpoint: endpointOf(get("HF_ENDPOINT") ?? HUB),
    cache: folder("HF_HUB_CACHE") ?? folder("HUGGINGFACE_HUB_CACHE") ?? join(home, "hub"),
    token: get("HF_TOKEN") ?? readToken(folder("HF_TOKEN_PATH") ?? join(home, "token")),
    offline: /^(1|on|yes|true)$/i.test(get("HF_HUB_OFFLINE") ?? ""),
  };
}

function homeOf(get: (name: string) => string | undefined): string {
  return get("HOME") ?? homedir();
}

function endpointOf(text: string): string {
  const url = URL.canParse(text) ? new URL(text) : undefined;
  if (url === undefined || !/^https?:$/.test(url.protocol)) {
    throw new UsageError(`HF_ENDPOINT is ${JSON.stringify(text)}, which is no address of a hub`, {
      hint: `give one such as ${HUB}, or unset it`,
    });
  }
  return url.href.replace(/\/+$/, "");
}

function readToken(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(path).trim() || undefined;
  } catch {
    return undefined; // most people have none, and most models need none
  }
}
