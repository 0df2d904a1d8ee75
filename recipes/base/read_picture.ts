/**
 * Pictures from PNG and JPEG files, as diffusers' `load_image` reads them: 8-bit RGB, turned as their Exif orientation
 * says, transparency dropped. Pixels through imagescript, which gives PNG's exactly and JPEG's within 3/255 of libjpeg's.
 */
import { FileError, messageOf, UsageError } from "./errors.ts";
import type { Picture } from "./pipeline.ts";

/** More than any camera takes; decoded, they are half a gigabyte. */
const MOST_PIXELS = 2 ** 27;
const PNG = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const JPEG = [0xff, 0xd8, 0xff];
/** JPEG's frame headers: baseline, extended, progressive, ...; not DHT (c4), JPG (c8) and DAC (cc). */
const FRAMES = [0xc0, 0xc1, 0xc2, 0xc3, 0xc5, 0xc6, 0xc7, 0xc9, 0xca, 0xcb, 0xcd, 0xce, 0xcf];

/**
 * Reads a picture.
 *
 * @throws UsageError for a file that is neither PNG nor JPEG, or too large; FileError for one that is missing, damaged, or
 * of a kind that the decoder does not take. The message names the file.
 */
export async function readPicture(path: string): Promise<Picture> {
  let bytes: Uint8Array;
  try {
    bytes = await Deno.readFile(path);
  } catch (cause) {
    const reason = cause instanceof Deno.errors.NotFound ? "there is no such file" : messageOf(cause);
    throw new FileError(`the picture ${path} cannot be read: ${reason}`, { cause });
  }
  return await decodePicture(bytes, path);
}

/** {@link readPicture} of a file's bytes. @param name of the file, for messages. */
export async function decodePicture(bytes: Uint8Array, name: string): Promise<Picture> {
  const startsWith = (signature: readonly number[]) => signature.every((byte, i) => bytes[i] === byte);
  const header = startsWith(PNG) ? pngHeader(bytes) : startsWith(JPEG) ? jpegHeader(bytes) : undefined;
  if (header === undefined) {
    throw new UsageError(`${name} is neither a PNG nor a JPEG`, {
      hint: "convert the picture to one of them",
    });
  }
  const { width, height, orientation } = header;
  if (!(width > 0 && height > 0)) throw new FileError(`${name} is damaged: it tells no size`);
  if (width * height > MOST_PIXELS) {
    throw new UsageError(`${name} has ${width} x ${height} pixels: give one of at most ${MOST_PIXELS}`);
  }
  // Imported here because the package opens a native library (of its other codecs) on import.
  const { Image } = await import("imagescript");
  let decoded: { width: number; height: number; bitmap: Uint8ClampedArray };
  try {
    decoded = await Image.decode(bytes);
  } catch (cause) {
    throw new FileError(`the picture ${name} cannot be decoded: ${messageOf(cause)}`, {
      cause,
      hint: "it is damaged, or of a rare kind: open and save it with another program",
    });
  }
  if (decoded.width !== width || decoded.height !== height) {
    throw new FileError(`${name} is damaged: it has not the ${width} x ${height} pixels that it tells`);
  }
  return turned(decoded.bitmap, width, height, orientation);
}

interface Header {
  readonly width: number;
  readonly height: number;
  /** Exif's: 1 to 8, 1 being upright. */
  readonly orientation: number;
}

/** Size and orientation of a PNG (W3C Recommendation, 11.2.1 and 11.3.3.6); zeros where it ends too early. */
function pngHeader(bytes: Uint8Array): Header {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 24) return { width: 0, height: 0, orientation: 1 };
  let orientation = 1;
  for (let at = 8; at + 12 <= bytes.length;) {
    const length = view.getUint32(at);
    if (view.getUint32(at + 4) === 0x65584966) { // eXIf
      orientation = orientationOf(bytes.subarray(at + 8, at + 8 + length));
    }
    at += 12 + length;
  }
  return { width: view.getUint32(16), height: view.getUint32(20), orientation };
}

/** Size and orientation of a JPEG (ITU-T T.81, annex B); zeros where it has no frame. */
function jpegHeader(bytes: Uint8Array): Header {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let orientation = 1;
  for (let at = 2; at + 9 <= bytes.length;) {
    if (bytes[at] !== 0xff) break;
    const marker = bytes[at + 1];
    if (marker === 0xff) { // fill bytes may stand before a marker
      at++;
      continue;
    }
    if (FRAMES.includes(marker)) {
      return { width: view.getUint16(at + 7), height: view.getUint16(at + 5), orientation };
    }
    const end = at + 2 + view.getUint16(at + 2);
    if (marker === 0xe1 && view.getUint32(at + 4) === 0x45786966) { // APP1 with "Exif", NUL, NUL
      orientation = orientationOf(bytes.subarray(at + 10, end));
    }
    at = end;
  }
  return { width: 0, height: 0, orientation: 1 };
}

/** The orientation in a TIFF structure (Exif 2.32, 4.6.4: tag 0x112 of the first directory), or 1. */
function orientationOf(tiff: Uint8Array): number {
  const view = new DataView(tiff.buffer, tiff.byteOffset, tiff.byteLength);
  if (tiff.length < 8) return 1;
  const little = view.getUint16(0) === 0x4949;
  const directory = view.getUint32(4, little);
  if (directory + 2 > tiff.length) return 1;
  const entries = view.getUint16(directory, little);
  for (let i = 0; i < entries; i++) {
    const at = directory + 2 + 12 * i;
    if (at + 12 > tiff.length) return 1;
    if (view.getUint16(at, little) !== 0x112) continue;
    const value = view.getUint16(at + 8, little);
    return value >= 1 && value <= 8 ? value : 1;
  }
  return 1;
}

/** RGBA as upright RGB. */
function turned(rgba: Uint8ClampedArray, width: number, height: number, orientation: number): Picture {
  const swapped = orientation >= 5;
  const [toWidth, toHeight] = swapped ? [height, width] : [width, height];
  // Which way to walk through the stored picture: orientations 2, 3, 7, 8 from the right, 3, 4, 6, 7 from the bottom.
  const fromRight = [2, 3, 7, 8].includes(orientation);
  const fromBottom = [3, 4, 6, 7].includes(orientation);
  const rgb = new Uint8Array(toWidth * toHeight * 3);
  for (let row = 0, to = 0; row < toHeight; row++) {
    for (let column = 0; column < toWidth; column++) {
      const [x, y] = swapped ? [row, column] : [column, row];
      const from = 4 * ((fromBottom ? height - 1 - y : y) * width + (fromRight ? width - 1 - x : x));
      rgb[to++] = rgba[from];
      rgb[to++] = rgba[from + 1];
      rgb[to++] = rgba[from + 2];
    }
  }
  return { width: toWidth, height: toHeight, rgb };
}
