/**
 * The hosts that a download from the hub talks to, as Deno's `--allow-net` wants them. The tasks in deno.json run this file
 * first, with no permission but the one variable, so that they may reach these hosts and no other.
 */

export const HUB = "https://huggingface.co";
/** Where the hub sends those who ask for a large file. */
const STORES = "*.hf.co:443";

/**
 * Host and port of the hub, or of the mirror that `HF_ENDPOINT` names instead, and of the stores that both send large files
 * from. An endpoint that is no URL adds nothing: the program says what is wrong with it.
 */
export function hubHosts(endpoint: string = HUB): string[] {
  try {
    const { protocol, hostname, port } = new URL(endpoint || HUB);
    return [`${hostname}:${port || (protocol === "http:" ? 80 : 443)}`, STORES];
  } catch {
    return [STORES];
  }
}

if (import.meta.main) console.log(hubHosts(Deno.env.get("HF_ENDPOINT")).join(","));
