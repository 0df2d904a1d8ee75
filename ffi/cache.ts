import { createHash } from "node:crypto";
import { join } from "node:path";
import { concatBytes } from "./concat_bytes.ts";
import { messageOf } from "./errors.ts";
import { writeFileAtomicSync } from "./files.ts";

/** Length of the SHA-256 that an entry begins with. */
const DIGEST_BYTES = 32;

/**
 * Compiled kernels on the disk, one file an entry: the SHA-256 of the content, then the content. A file's name is the
 * hash of everything that it depends on, so that nothing stale is ever found; a damaged entry is rebuilt.
 */
export class DiskCache {
  /** @param folder made at the first write. @param onWarning one line about an entry or folder that cannot be used. */
  constructor(readonly folder: string, private readonly onWarning: (message: string) => void = () => {}) {}

  /** Set at the first failure of the disk: one line is enough, and trying again for each entry helps nobody. */
  #unusable = false;

  /**
   * The entry of `parts` (source text, options, architecture, compiler version, ...), made by `build` when there is
   * none. Never fails because of the disk: a cache that cannot be read or written costs time only.
   */
  get(parts: readonly string[], build: () => Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
    const known = this.find(parts);
    if (known !== undefined) return known;
    const content = build();
    this.keep(parts, content);
    return content;
  }

  /** The entry of `parts`; undefined where there is none that can be read. */
  find(parts: readonly string[]): Uint8Array<ArrayBuffer> | undefined {
    return this.#unusable ? undefined : this.#read(this.#pathOf(parts));
  }

  /** Writes the entry of `parts`, if the disk takes it. */
  keep(parts: readonly string[], content: Uint8Array): void {
    if (this.#unusable) return;
    try {
      Deno.mkdirSync(this.folder, { recursive: true });
      writeFileAtomicSync(this.#pathOf(parts), concatBytes([digestOf(content), content]));
    } catch (error) {
      this.#giveUp("written", error);
    }
  }

  #pathOf(parts: readonly string[]): string {
    return join(this.folder, nameOf(parts));
  }

  #read(path: string): Uint8Array<ArrayBuffer> | undefined {
    let bytes: Uint8Array<ArrayBuffer>;
    try {
      bytes = Deno.readFileSync(path);
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) this.#giveUp("read", error);
      return undefined;
    }
    const content = bytes.subarray(DIGEST_BYTES);
    const digest = digestOf(content);
    if (bytes.length >= DIGEST_BYTES && digest.every((byte, i) => byte === bytes[i])) return content;
    this.onWarning(`${path} is damaged and is made again`);
    return undefined;
  }

  #giveUp(verb: string, error: unknown): void {
    this.#unusable = true;
    this.onWarning(`the cache in ${this.folder} cannot be ${verb}, going on without it: ${messageOf(error)}`);
  }
}

/** Each part is hashed with its length, so that ("ab", "c") and ("a", "bc") differ. */
function nameOf(parts: readonly string[]): string {
  const hash = createHash("sha256");
  for (const part of parts) hash.update(`${part.length}:${part}`);
  return hash.digest("hex");
}

function digestOf(bytes: Uint8Array): Uint8Array {
  return createHash("sha256").update(bytes).digest();
}
