/**
 * SentencePiece's character normalization, as T5's tokenizer.json carries it (`precompiled_charsmap`): a table
 * from UTF-8 strings to replacements. It is close to NFKC but not equal to it, so the table itself is read.
 *
 * Layout (SentencePiece `normalizer.cc`, huggingface/spm_precompiled): a little-endian uint32 byte length, a
 * double-array trie of uint32 units (Aoe 1989, darts-clone's packing), then the replacements, each ended by NUL.
 */

import { ModelError } from "./errors.ts";

/** Graphemes of this many UTF-8 bytes or more are looked up character by character. */
const GRAPHEME_LIMIT = 6;

export class Charsmap {
  readonly #units: Uint32Array;
  readonly #replacements: Uint8Array;
  readonly #graphemes = new Intl.Segmenter("en", { granularity: "grapheme" });
  readonly #encoder = new TextEncoder();
  readonly #decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  /**
   * @param base64 the value of `precompiled_charsmap`.
   * @param where what error messages call it: the file's path.
   * @throws ModelError when it is not base64 or its length field does not fit.
   */
  constructor(base64: string, where: string) {
    let bytes: Uint8Array;
    try {
      bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
    } catch (cause) {
      throw new ModelError(`${where}: precompiled_charsmap is not base64; get the file again`, { cause });
    }
    const view = new DataView(bytes.buffer);
    const trieBytes = bytes.length < 4 ? -1 : view.getUint32(0, true);
    if (trieBytes < 4 || trieBytes % 4 !== 0 || 4 + trieBytes > bytes.length) {
      throw new ModelError(
        `${where}: precompiled_charsmap has ${bytes.length} bytes, which cannot hold its table; get the file again`,
      );
    }
    this.#units = Uint32Array.from({ length: trieBytes / 4 }, (_, i) => view.getUint32(4 + 4 * i, true));
    this.#replacements = bytes.subarray(4 + trieBytes);
  }

  /**
   * The text with every listed grapheme or character replaced. The order of look-ups is that of Hugging Face's
   * tokenizers (`normalizers/precompiled.rs`), which T5 users have always had: a short grapheme is replaced as a
   * whole by the *shortest* entry that begins it, so "e" with two accents loses the second one.
   */
  normalize(text: string): string {
    let out = "";
    for (const { segment } of this.#graphemes.segment(text)) {
      const bytes = this.#encoder.encode(segment);
      const whole = bytes.length < GRAPHEME_LIMIT ? this.#lookUp(bytes) : undefined;
      if (whole !== undefined) {
        out += whole;
      } else {
        for (const char of segment) out += this.#lookUp(this.#encoder.encode(char)) ?? char;
      }
    }
    return out;
  }

  /** The replacement of the shortest entry that is a prefix of `key`. */
  #lookUp(key: Uint8Array): string | undefined {
    const units = this.#units;
    let position = childOffset(units[0]);
    for (const byte of key) {
      if (byte === 0) return undefined;
      position ^= byte;
      const unit = units[position];
      if (unit === undefined || (unit & 0x800000ff) !== byte) return undefined;
      position ^= childOffset(unit);
      if ((unit & 0x100) !== 0) { // an entry ends here; its value stands in the next unit
        const start = units[position] & 0x7fffffff;
        const end = this.#replacements.indexOf(0, start);
        return this.#decoder.decode(this.#replacements.subarray(start, end === -1 ? undefined : end));
      }
    }
    return undefined;
  }
}

/** darts-clone: 22 bits of offset, in units of 256 if bit 9 is set. */
function childOffset(unit: number): number {
  return (unit >>> 10) << ((unit & 0x200) >>> 6);
}
