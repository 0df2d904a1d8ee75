/**
 * PNG files that carry how they were made: pixels through imagescript, text chunks by us, in the way of
 * AUTOMATIC1111's web UI, whose `parameters` text other image tools read.
 *
 * PNG: a signature, then chunks of length, type, data, CRC-32 (W3C Recommendation, sections 5 and 11.3.3).
 */

import { crc32 } from "node:zlib";
import { concatBytes } from "../../ffi/concat_bytes.ts";
import { FileError, UsageError } from "./errors.ts";

const SIGNATURE = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);

/**
 * Encodes pixels as an opaque 8-bit RGBA PNG (imagescript's format), the same bytes for the same input.
 * @param rgb uint8 [height, width, 3].
 * @param metadata keyword to text, as tEXt chunks where Latin-1 holds the text and as iTXt (UTF-8) elsewhere.
 *   Keywords have 1 to 79 Latin-1 characters. NUL, which PNG forbids, becomes U+FFFD.
 * @throws UsageError for a wrong size or keyword.
 */
export async function encodePng(
  rgb: Uint8Array | Uint8ClampedArray,
  width: number,
  height: number,
  metadata: Record<string, string> = {},
): Promise<Uint8Array<ArrayBuffer>> {
  if (!(Number.isSafeInteger(width) && Number.isSafeInteger(height) && width > 0 && height > 0)) {
    throw new UsageError(`encodePng: size ${width}x${height}: give two whole numbers of 1 or more`);
  }
  if (rgb.length !== width * height * 3) {
    throw new UsageError(
      `encodePng: ${rgb.length} bytes for ${width}x${height} pixels of RGB, which have ${width * height * 3}`,
    );
  }
  const text = Object.entries(metadata).map(([keyword, value]) => textChunk(keyword, value));

  // Imported here because the package opens a native library (of its other codecs) on import.
  const { Image } = await import("imagescript");
  const image = new Image(width, height);
  const { bitmap } = image;
  for (let from = 0, to = 0; from < rgb.length; from += 3, to += 4) {
    bitmap[to] = rgb[from];
    bitmap[to + 1] = rgb[from + 1];
    bitmap[to + 2] = rgb[from + 2];
    bitmap[to + 3] = 255;
  }
  // imagescript's own text, its name and the time, would make two runs of one seed differ.
  const chunks = [...readChunks(await image.encode())].filter(({ type }) => type !== "tEXt").map(({ raw }) =>
    raw
  );
  const [header, ...rest] = chunks; // IHDR must come first
  return concatBytes([SIGNATURE, header, ...text, ...rest]);
}

/**
 * The uncompressed text chunks of a PNG (tEXt and iTXt), keyword to text; of a repeated keyword the last.
 * @throws FileError when the bytes are no PNG, are cut off, or a chunk's CRC is wrong.
 */
export function readPngText(bytes: Uint8Array): Record<string, string> {
  const found = new Map<string, string>();
  for (const { type, data } of readChunks(bytes)) {
    if (type !== "tEXt" && type !== "iTXt") continue;
    const keywordEnd = data.indexOf(0);
    if (keywordEnd === -1) continue;
    const keyword = fromLatin1(data.subarray(0, keywordEnd));
    if (type === "tEXt") {
      found.set(keyword, fromLatin1(data.subarray(keywordEnd + 1)));
    } else if (data[keywordEnd + 1] === 0) { // not compressed; then method, language NUL, translated keyword NUL
      const languageEnd = data.indexOf(0, keywordEnd + 3);
      const translatedEnd = data.indexOf(0, languageEnd + 1);
      if (languageEnd === -1 || translatedEnd === -1) continue;
      found.set(
        keyword,
        new TextDecoder("utf-8", { ignoreBOM: true }).decode(data.subarray(translatedEnd + 1)),
      );
    }
  }
  return Object.fromEntries(found);
}

/** How an image was made. */
export interface Parameters {
  /** What was drawn. */
  prompt: string;
  /** Denoising steps. */
  steps: number;
  /** Of the noise. */
  seed: bigint | number;
  /** In pixels. */
  width: number;
  /** In pixels. */
  height: number;
  /** Name of the model. */
  model: string;
  /** FLUX.1-dev's distilled guidance; not given for models without it. */
  guidance?: number;
  /** Name in the list; default "Euler". */
  sampler?: string;
  /** Further settings, in order. */
  extra?: Record<string, string | number | boolean>;
}

/**
 * AUTOMATIC1111's `parameters`: the prompt, then a line "Steps: 4, Sampler: Euler, ..., Seed: 0, Size: 512x512,
 * Model: ...". Values with a comma, colon, quote or line break are JSON strings, as there
 * (`modules/infotext_utils.py`, `quote`); "Distilled CFG Scale" is Forge's name for FLUX's guidance.
 */
export function parametersText(parameters: Parameters): string {
  const { prompt, steps, seed, width, height, model, guidance, sampler = "Euler", extra = {} } = parameters;
  const settings: [string, unknown][] = [
    ["Steps", steps],
    ["Sampler", sampler],
    ["CFG scale", 1], // FLUX.1 is guidance-distilled: one pass per step
    ...(guidance === undefined ? [] : [["Distilled CFG Scale", guidance] as [string, unknown]]),
    ["Seed", seed],
    ["Size", `${width}x${height}`],
    ["Model", model],
    ...Object.entries(extra),
  ];
  return `${prompt}\n${settings.map(([name, value]) => `${name}: ${quote(String(value))}`).join(", ")}`;
}

function quote(value: string): string {
  return /[,:"\r\n]/.test(value) ? JSON.stringify(value) : value;
}

function textChunk(keyword: string, value: string): Uint8Array {
  // Printable Latin-1, no space at either end and no two together.
  if (!/^(?! )(?!.* {2})[\x20-\x7e\xa1-\xff]{1,79}(?<! )$/.test(keyword)) {
    throw new UsageError(
      `PNG keyword ${
        JSON.stringify(keyword)
      }: give 1 to 79 printable Latin-1 characters without stray spaces`,
    );
  }
  const text = value.toWellFormed().replaceAll("\0", "\ufffd");
  if (/^[\t\n\x20-\x7e\xa0-\xff]*$/.test(text)) {
    return chunk("tEXt", concatBytes([latin1(keyword), Uint8Array.of(0), latin1(text)]));
  }
  // Not compressed, method 0, no language, no translated keyword.
  return chunk("iTXt", concatBytes([latin1(keyword), new Uint8Array(5), new TextEncoder().encode(text)]));
}

function chunk(type: string, data: Uint8Array): Uint8Array {
  const raw = new Uint8Array(data.length + 12);
  const view = new DataView(raw.buffer);
  view.setUint32(0, data.length);
  raw.set(latin1(type), 4);
  raw.set(data, 8);
  view.setUint32(data.length + 8, crc32(raw.subarray(4, data.length + 8)));
  return raw;
}

interface Chunk {
  type: string;
  data: Uint8Array;
  /** The whole chunk, length to CRC. */
  raw: Uint8Array;
}

function* readChunks(bytes: Uint8Array): Generator<Chunk> {
  if (bytes.length < 8 || SIGNATURE.some((byte, i) => bytes[i] !== byte)) {
    throw new FileError("not a PNG: the first 8 bytes are not its signature");
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let offset = 8; offset < bytes.length;) {
    const length = offset + 12 <= bytes.length ? view.getUint32(offset) : 0;
    const end = offset + 12 + length;
    if (end > bytes.length) throw new FileError(`damaged PNG: the chunk at byte ${offset} is cut off`);
    const type = fromLatin1(bytes.subarray(offset + 4, offset + 8));
    if (crc32(bytes.subarray(offset + 4, end - 4)) !== view.getUint32(end - 4)) {
      throw new FileError(`damaged PNG: the ${type} chunk at byte ${offset} has a wrong CRC`);
    }
    yield { type, data: bytes.subarray(offset + 8, end - 4), raw: bytes.subarray(offset, end) };
    if (type === "IEND") return;
    offset = end;
  }
  throw new FileError("damaged PNG: it ends without an IEND chunk");
}

function latin1(text: string): Uint8Array {
  return Uint8Array.from(text, (char) => char.charCodeAt(0));
}

/** TextDecoder's "latin1" is windows-1252, which differs from 0x80 to 0x9f. */
function fromLatin1(bytes: Uint8Array): string {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return text;
}
