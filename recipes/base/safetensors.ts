/**
 * Reader and writer of the safetensors format: an 8-byte little-endian header size, a JSON header, then the tensors'
 * bytes in row-major order, little-endian, without gaps.
 *
 * Source of the rules: https://github.com/huggingface/safetensors, README ("Format") and safetensors/src/tensor.rs
 * (commit 24b0b28). Stricter than that implementation where its README is: the header must begin with `{`, and
 * duplicate keys are refused; also unknown keys of a tensor are, because they show that a file means something else.
 */
import { mapFile, type MappedFile } from "../../ffi/cpu/libc.ts";
import { replaceFile, writeAll } from "../../ffi/files.ts";
import { FluxError, messageOf } from "./errors.ts";
import { JsonNumber, parseStrictJson, type StrictJson, StrictJsonError } from "./strict_json.ts";

/**
 * Every dtype of the format with its size in bits and this project's name for it. In the order of the reference's
 * `enum Dtype`, which is the order (from last to first) in which writers sort tensors: increasing alignment.
 */
const DTYPES = {
  BOOL: { bits: 8, name: "bool" },
  F4: { bits: 4, name: "f4" }, // OCP MX formats: two elements a byte
  F6_E2M3: { bits: 6, name: "f6e2m3" },
  F6_E3M2: { bits: 6, name: "f6e3m2" },
  U8: { bits: 8, name: "u8" },
  I8: { bits: 8, name: "i8" },
  F8_E5M2: { bits: 8, name: "f8e5m2" },
  F8_E4M3: { bits: 8, name: "f8e4m3" },
  F8_E8M0: { bits: 8, name: "f8e8m0" },
  F8_E4M3FNUZ: { bits: 8, name: "f8e4m3fnuz" },
  F8_E5M2FNUZ: { bits: 8, name: "f8e5m2fnuz" },
  I16: { bits: 16, name: "i16" },
  U16: { bits: 16, name: "u16" },
  F16: { bits: 16, name: "f16" },
  BF16: { bits: 16, name: "bf16" },
  I32: { bits: 32, name: "i32" },
  U32: { bits: 32, name: "u32" },
  F32: { bits: 32, name: "f32" },
  C64: { bits: 64, name: "c64" },
  F64: { bits: 64, name: "f64" },
  I64: { bits: 64, name: "i64" },
  U64: { bits: 64, name: "u64" },
} as const;

/** A dtype as the format spells it, e.g. "BF16". */
export type SafetensorsDType = keyof typeof DTYPES;

/** A dtype as this project spells it, e.g. "bf16": the names of ffi/dtype.ts and those that only files have. */
export type FileDType =
  | "bool"
  | "f4"
  | "f6e2m3"
  | "f6e3m2"
  | "u8"
  | "i8"
  | "f8e5m2"
  | "f8e4m3"
  | "f8e8m0"
  | "f8e4m3fnuz"
  | "f8e5m2fnuz"
  | "i16"
  | "u16"
  | "f16"
  | "bf16"
  | "i32"
  | "u32"
  | "f32"
  | "c64"
  | "f64"
  | "i64"
  | "u64";

/** All dtypes of the format, in the reference's order of increasing alignment. */
export const SAFETENSORS_DTYPES: readonly SafetensorsDType[] = Object.keys(DTYPES) as SafetensorsDType[];

const BY_NAME: ReadonlyMap<FileDType, SafetensorsDType> = new Map(
  SAFETENSORS_DTYPES.map((dtype) => [DTYPES[dtype].name, dtype]),
);

/** "BF16" to "bf16". */
export function fromSafetensorsDType(dtype: SafetensorsDType): FileDType {
  return DTYPES[dtype].name;
}

/** "bf16" to "BF16". */
export function toSafetensorsDType(name: FileDType): SafetensorsDType {
  return BY_NAME.get(name)!; // the map was made from the table that FileDType was made from
}

/** Size of one element in bits: 4 and 6 for the sub-byte dtypes. */
export function fileDTypeBits(name: FileDType): number {
  return DTYPES[toSafetensorsDType(name)].bits;
}

/** The rule of the format that a file breaks. */
export type SafetensorsRule =
  | "open"
  | "closed"
  | "file-size"
  | "header-size"
  | "header-start"
  | "utf-8"
  | "json"
  | "duplicate-key"
  | "metadata"
  | "tensor-keys"
  | "dtype"
  | "shape"
  | "offsets"
  | "byte-size"
  | "truncated"
  | "overlap"
  | "gap"
  | "trailing-bytes"
  | "unknown-tensor"
  | "tensor-name";

/** A safetensors file that cannot be read or written: says which file, which tensor and which rule. */
export class SafetensorsError extends FluxError {
  /** An error of one file. @param file its path. @param rule the one that is broken. @param what is wrong. */
  constructor(
    readonly file: string,
    readonly rule: SafetensorsRule,
    what: string,
    options: { readonly tensor?: string; readonly cause?: unknown; readonly hint?: string } = {},
  ) {
    const where = options.tensor === undefined ? file : `${file}: tensor ${printable(options.tensor)}`;
    super(`${where}: ${what} (rule: ${rule})`, {
      hint: options.hint ?? "the file is damaged or not a safetensors file: download or write it again",
      ...("cause" in options ? { cause: options.cause } : {}),
    });
    this.tensor = options.tensor;
  }

  /** The tensor at fault, if it is one tensor. */
  readonly tensor: string | undefined;
}

/** A name from a file as it can be shown: quoted, at most 100 characters, all but printable ASCII escaped. */
export function printable(name: string): string {
  const short = name.length > 100 ? `${name.slice(0, 100)}...` : name;
  const escape = (char: string) => `\\u{${char.codePointAt(0)!.toString(16)}}`;
  return `"${short.replace(/[^\x20-\x7e]/gu, escape)}"`;
}

/** Where a tensor lies in its file. */
export interface TensorInfo {
  /** Of its elements. */
  readonly dtype: FileDType;
  /** Sizes of the dimensions; `[]` is a scalar, a 0 makes an empty tensor. */
  readonly shape: readonly number[];
  /** First byte, counted from the start of the file. */
  readonly byteOffset: number;
  /** How many there are. */
  readonly byteLength: number;
}

/** A checked header. */
export interface SafetensorsHeader {
  /** The `__metadata__` entry, empty when there is none. */
  readonly metadata: ReadonlyMap<string, string>;
  /** Tensors by name, in the order of their bytes. */
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** Where the tensors' bytes begin, counted from the start of the file. */
  readonly dataOffset: number;
}

const SIZE_BYTES = 8;

/** The reference's limit on the header, "100 MB": enough for a million tensors. */
export const MAX_HEADER_BYTES = 100_000_000;

/**
 * Checks a file's header against every rule of the format.
 *
 * @param bytes the file from its first byte on, at least to the end of the header
 * @param fileSize size of the whole file in bytes
 * @param file name for messages
 * @returns tensors whose byte ranges cover `[dataOffset, fileSize)` exactly, each range once
 * @throws {SafetensorsError} for the first broken rule
 */
export function parseHeader(bytes: Uint8Array, fileSize: number, file: string): SafetensorsHeader {
  const headerEnd = readHeaderEnd(bytes, fileSize, file);
  const header = readHeaderJson(bytes.subarray(SIZE_BYTES, headerEnd), file);
  const metadata = readMetadata(header.get("__metadata__"), file);
  header.delete("__metadata__");

  const tensors = Array.from(
    header,
    ([name, value]): [string, TensorInfo] => [name, readTensorInfo(name, value, headerEnd, fileSize, file)],
  );
  // Empty tensors share their offset with a neighbour: the shorter range comes first.
  tensors.sort(([, a], [, b]) => a.byteOffset - b.byteOffset || a.byteLength - b.byteLength);
  checkCoverage(tensors, headerEnd, fileSize, file);
  return { metadata, tensors: new Map(tensors), dataOffset: headerEnd };
}

function readHeaderEnd(bytes: Uint8Array, fileSize: number, file: string): number {
  if (fileSize < SIZE_BYTES || bytes.byteLength < SIZE_BYTES) {
    throw new SafetensorsError(
      file,
      "file-size",
      `${fileSize} bytes are too few: the header's size alone has 8`,
    );
  }
  const size = new DataView(bytes.buffer, bytes.byteOffset, SIZE_BYTES).getBigUint64(0, true);
  if (size > BigInt(MAX_HEADER_BYTES)) {
    throw new SafetensorsError(
      file,
      "header-size",
      `the header says that it has ${size} bytes, the limit is 100 MB`,
    );
  }
  const end = SIZE_BYTES + Number(size);
  if (end > fileSize || end > bytes.byteLength) {
    const what = `the header says that it has ${size} bytes, but the file has ${fileSize} in all`;
    throw new SafetensorsError(file, "header-size", what);
  }
  return end;
}

function readHeaderJson(bytes: Uint8Array, file: string): Map<string, StrictJson> {
  if (bytes[0] !== 0x7b) {
    throw new SafetensorsError(file, "header-start", "the header does not begin with {");
  }
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (cause) {
    throw new SafetensorsError(file, "utf-8", "the header is not valid UTF-8", { cause });
  }
  try {
    // It begins with {, so the value is an object. Three levels are all that the format has.
    return parseStrictJson(text, 3) as Map<string, StrictJson>;
  } catch (cause) {
    if (!(cause instanceof StrictJsonError)) throw cause;
    if (cause.duplicateKey !== undefined) {
      const what = `the header has the key ${printable(cause.duplicateKey)} twice`;
      throw new SafetensorsError(file, "duplicate-key", what, { cause });
    }
    throw new SafetensorsError(file, "json", `the header is not valid JSON: ${cause.message}`, { cause });
  }
}

function readMetadata(value: StrictJson | undefined, file: string): Map<string, string> {
  if (value === undefined) return new Map();
  const refuse = (what: string): never => {
    throw new SafetensorsError(file, "metadata", `__metadata__ ${what}`);
  };
  if (!(value instanceof Map)) return refuse("is not an object");
  const metadata = new Map<string, string>();
  for (const [key, text] of value) {
    metadata.set(
      key,
      typeof text === "string" ? text : refuse(`has a value that is no string at ${printable(key)}`),
    );
  }
  return metadata;
}

const TENSOR_KEYS: readonly string[] = ["dtype", "shape", "data_offsets"];

/** Checks one tensor by itself: keys, dtype, shape, and that its range has the right size and ends in the file. */
function readTensorInfo(
  name: string,
  value: StrictJson,
  dataOffset: number,
  fileSize: number,
  file: string,
): TensorInfo {
  const refuse = (rule: SafetensorsRule, what: string): never => {
    throw new SafetensorsError(file, rule, what, { tensor: name });
  };
  if (!(value instanceof Map)) {
    return refuse("tensor-keys", "is not an object with dtype, shape and data_offsets");
  }
  for (const key of TENSOR_KEYS) {
    if (!value.has(key)) refuse("tensor-keys", `has no ${key}`);
  }
  for (const key of value.keys()) {
    if (!TENSOR_KEYS.includes(key)) refuse("tensor-keys", `has the unknown key ${printable(key)}`);
  }

  const dtype = value.get("dtype");
  if (typeof dtype !== "string") return refuse("dtype", "has a dtype that is no string");
  if (!isSafetensorsDType(dtype)) {
    return refuse(
      "dtype",
      `has the unknown dtype ${printable(dtype)} (known: ${SAFETENSORS_DTYPES.join(" ")})`,
    );
  }

  const shape = readIntegers(value.get("shape"));
  if (shape === undefined) {
    return refuse("shape", "has a shape that is no list of non-negative integers below 2^53");
  }
  const byteLength = sizeInBytes(dtype, shape);
  if (byteLength === undefined) {
    return refuse(
      "shape",
      `${dtype} [${shape.join(", ")}] has too many elements, or no whole number of bytes`,
    );
  }

  const offsets = readIntegers(value.get("data_offsets"));
  if (offsets === undefined || offsets.length !== 2) {
    return refuse("offsets", "has data_offsets that are no pair of non-negative integers below 2^53");
  }
  const [begin, end] = offsets;
  if (begin > end) refuse("offsets", `has data_offsets that end (${end}) before they begin (${begin})`);
  if (end - begin !== byteLength) {
    const takes = `${dtype} [${shape.join(", ")}] takes ${byteLength} bytes`;
    refuse("byte-size", `${takes}, but data_offsets [${begin}, ${end}] have ${end - begin}`);
  }
  if (end > fileSize - dataOffset) {
    const missing = end - (fileSize - dataOffset);
    refuse("truncated", `ends ${missing} bytes behind the end of the file (${fileSize} bytes)`);
  }
  return { dtype: fromSafetensorsDType(dtype), shape, byteOffset: dataOffset + begin, byteLength };
}

/** Checks that the sorted tensors follow each other without overlap or gap, from the header to the file's end. */
function checkCoverage(
  tensors: readonly [string, TensorInfo][],
  dataOffset: number,
  fileSize: number,
  file: string,
): void {
  let covered = dataOffset;
  for (const [tensor, { byteOffset, byteLength }] of tensors) {
    const begin = byteOffset - dataOffset;
    if (byteOffset < covered) {
      throw new SafetensorsError(file, "overlap", `begins at ${begin}, inside another tensor`, { tensor });
    }
    if (byteOffset > covered) {
      const what = `begins at ${begin}, ${byteOffset - covered} bytes that belong to no tensor lie before it`;
      throw new SafetensorsError(file, "gap", what, { tensor });
    }
    covered = byteOffset + byteLength;
  }
  if (covered < fileSize) {
    const what = `${fileSize - covered} bytes behind the last tensor belong to none`;
    throw new SafetensorsError(file, "trailing-bytes", what);
  }
}

function isSafetensorsDType(dtype: string): dtype is SafetensorsDType {
  return Object.hasOwn(DTYPES, dtype);
}

/** A JSON list of plain non-negative integers (no sign, point or exponent) below 2^53; undefined for anything else. */
function readIntegers(value: StrictJson | undefined): number[] | undefined {
  if (!Array.isArray(value)) return undefined;
  const integers: number[] = [];
  for (const item of value) {
    if (!(item instanceof JsonNumber) || !/^[0-9]+$/.test(item.text)) return undefined;
    const integer = Number(item.text);
    if (!Number.isSafeInteger(integer)) return undefined;
    integers.push(integer);
  }
  return integers;
}

/** Bytes of a dense tensor; undefined when they are no whole number or a product passes 2^53. */
function sizeInBytes(dtype: SafetensorsDType, shape: readonly number[]): number | undefined {
  let bits = BigInt(DTYPES[dtype].bits);
  // As the reference does, multiply in the order of the dimensions: [2^40, 2^40, 0] overflows, [0, 2^40, 2^40] is 0.
  for (const size of shape) {
    bits *= BigInt(size);
    if (bits > 8n * BigInt(Number.MAX_SAFE_INTEGER)) return undefined;
  }
  return bits % 8n === 0n ? Number(bits / 8n) : undefined;
}

/**
 * An open safetensors file. The tensors are views of the file's memory map: no byte is copied, and none is read from
 * the disk before it is used. Dispose it (`using`) when no tensor of it is in use any more.
 */
export class SafetensorsFile implements Disposable {
  readonly #file: MappedFile;
  readonly #header: SafetensorsHeader;

  private constructor(file: MappedFile, header: SafetensorsHeader) {
    this.#file = file;
    this.#header = header;
  }

  /**
   * Maps a file and checks its header.
   *
   * @throws {SafetensorsError} when it cannot be opened (rule "open") or breaks a rule of the format
   */
  static open(path: string): SafetensorsFile {
    let file: MappedFile;
    try {
      file = mapFile(path);
    } catch (cause) {
      const reason = messageOf(cause);
      throw new SafetensorsError(path, "open", `cannot be opened: ${reason}`, {
        cause,
        hint: cause instanceof FluxError && cause.hint
          ? cause.hint
          : "check the path and that this user may read it",
      });
    }
    try {
      return new SafetensorsFile(file, parseHeader(file.bytes, file.byteLength, path));
    } catch (error) {
      file[Symbol.dispose]();
      throw error;
    }
  }

  /** The path that it was opened with. */
  get path(): string {
    return this.#file.path;
  }

  /** Whether the bytes are memory-mapped; false when the file had to be read into memory. */
  get mapped(): boolean {
    return this.#file.mapped;
  }

  /** Names of the tensors, in the order of their bytes. */
  get names(): string[] {
    return [...this.#header.tensors.keys()];
  }

  /** The `__metadata__` entry, empty when there is none. */
  get metadata(): ReadonlyMap<string, string> {
    return this.#header.metadata;
  }

  /** Whether the file has a tensor of this name. */
  has(name: string): boolean {
    return this.#header.tensors.has(name);
  }

  /** Dtype, shape and place of a tensor. Throws {@link SafetensorsError} when the file has none of this name. */
  info(name: string): TensorInfo {
    const info = this.#header.tensors.get(name);
    if (info === undefined) {
      throw new SafetensorsError(this.path, "unknown-tensor", "is not in this file", {
        tensor: name,
        hint: "is this the right model? Its names are in the file's header",
      });
    }
    return info;
  }

  /**
   * A tensor's bytes: a read-only view of the file. It may begin at any byte (files of old writers are not aligned),
   * so a Float32Array over it can throw; {@link alignedBytes} helps.
   *
   * @throws {SafetensorsError} when the file has no such tensor (rule "unknown-tensor") or was closed ("closed")
   */
  bytes(name: string): Uint8Array<ArrayBuffer> {
    const { byteOffset, byteLength } = this.info(name);
    return this.#open(name).bytes.subarray(byteOffset, byteOffset + byteLength);
  }

  /** Address of a tensor's first byte, for native code. Throws as {@link bytes} does, and without --allow-ffi. */
  pointer(name: string): bigint {
    const { byteOffset } = this.info(name);
    return this.#open(name).pointer + BigInt(byteOffset);
  }

  #closed = false;

  /** Closes the file. Views of its tensors become empty. */
  [Symbol.dispose](): void {
    this.#closed = true;
    this.#file[Symbol.dispose]();
  }

  #open(tensor: string): MappedFile {
    if (this.#closed) {
      throw new SafetensorsError(this.path, "closed", "was asked for after the file was closed", {
        tensor,
        hint: "keep the model open for as long as its tensors are in use",
      });
    }
    return this.#file;
  }
}

/** The bytes themselves if they begin at a multiple of `alignment` in their buffer, else an aligned copy. */
export function alignedBytes(bytes: Uint8Array<ArrayBuffer>, alignment: number): Uint8Array<ArrayBuffer> {
  return bytes.byteOffset % alignment === 0 ? bytes : bytes.slice();
}

/** A tensor to write. */
export interface TensorToWrite {
  /** What it is called in the file. */
  readonly name: string;
  /** Of its elements. */
  readonly dtype: FileDType;
  /** Sizes of the dimensions; `[]` is a scalar. */
  readonly shape: readonly number[];
  /**
   * Its bytes, row-major and little-endian; or a function that makes them when their turn has come, so that a
   * checkpoint larger than memory can be written. The function must return as many bytes as dtype and shape say.
   */
  readonly bytes: Uint8Array | (() => Uint8Array | Promise<Uint8Array>);
}

/** How {@link writeSafetensors} reports, and how it is stopped. */
export interface WriteOptions {
  /** Stops the writing; nothing of the file is left. */
  readonly signal?: AbortSignal;
  /** Called before the first byte and again and again: how many bytes are written, of how many. */
  readonly onBytes?: (written: number, total: number) => void;
}

/**
 * Writes a file as the reference does: tensors sorted by alignment (largest first), then by name; the header padded
 * with spaces to a multiple of 8, so that every tensor is aligned. The bytes go to a temporary file beside `path`,
 * which replaces `path` when it is complete and on the disk: no reader ever sees half a file, and programs that have
 * the old one mapped keep it.
 *
 * @param metadata the `__metadata__` entry; left out of the file when empty
 * @returns the file's size in bytes
 * @throws {SafetensorsError} for tensors that make no valid file: a name twice, a size that does not fit
 * @throws Deno's own errors (PermissionDenied, no space) for a file that cannot be written
 * @throws the signal's reason when it is aborted before the file is complete
 */
export async function writeSafetensors(
  path: string,
  tensors: Iterable<TensorToWrite>,
  metadata: ReadonlyMap<string, string> | Readonly<Record<string, string>> = {},
  { signal, onBytes }: WriteOptions = {},
): Promise<number> {
  const sorted = [...tensors].sort((a, b) =>
    alignmentRank(b) - alignmentRank(a) || compareNames(a.name, b.name)
  );
  const { header, total } = encodeHeader(
    path,
    sorted,
    metadata instanceof Map ? metadata : new Map(Object.entries(metadata)),
  );

  let written = 0;
  onBytes?.(written, total);
  await replaceFile(path, async (file) => {
    const write = async (bytes: Uint8Array) => {
      await writeAll(file, bytes, signal);
      onBytes?.(written += bytes.length, total);
    };
    await write(header);
    for (const tensor of sorted) {
      const bytes = typeof tensor.bytes === "function" ? await tensor.bytes() : tensor.bytes;
      checkByteLength(path, tensor, bytes);
      await write(bytes);
    }
  }, signal);
  return total;
}

function encodeHeader(
  path: string,
  sorted: readonly TensorToWrite[],
  metadata: ReadonlyMap<string, string>,
): { header: Uint8Array<ArrayBuffer>; total: number } {
  // The text is put together by hand: an object would lose a tensor named "__proto__" and reorder one named "7".
  const entries = metadata.size === 0 ? [] : [
    `"__metadata__":{${Array.from(metadata, (pair) => pair.map(encodeText).join(":")).join(",")}}`,
  ];
  let offset = 0;
  for (const tensor of sorted) {
    const { name, shape } = tensor;
    const refuse = (rule: SafetensorsRule, what: string): never => {
      throw new SafetensorsError(path, rule, what, { tensor: name, hint: "nothing was written" });
    };
    if (name === "__metadata__") refuse("tensor-name", "is the name of the format's own entry");
    const dtype = toSafetensorsDType(tensor.dtype);
    const valid = dtype !== undefined && shape.every((size) => Number.isSafeInteger(size) && size >= 0);
    const byteLength = valid ? sizeInBytes(dtype, shape) : undefined;
    if (byteLength === undefined) {
      return refuse("shape", `${tensor.dtype} [${shape.join(", ")}] cannot be stored`);
    }
    if (typeof tensor.bytes !== "function") checkByteLength(path, tensor, tensor.bytes);
    const range = `[${offset},${offset + byteLength}]`;
    entries.push(
      `${encodeText(name)}:{"dtype":"${dtype}","shape":[${shape.join(",")}],"data_offsets":${range}}`,
    );
    offset += byteLength;
  }

  const json = new TextEncoder().encode(`{${entries.join(",")}}`);
  const padded = Math.ceil(json.byteLength / 8) * 8;
  const header = new Uint8Array(SIZE_BYTES + padded).fill(0x20);
  new DataView(header.buffer).setBigUint64(0, BigInt(padded), true);
  header.set(json, SIZE_BYTES);
  // What the reader refuses is not written: this finds names that come twice and a header that is too long.
  const total = header.byteLength + offset;
  parseHeader(header, total, path);
  return { header, total };
}

/** A JSON string. Half a surrogate pair stays an escape in it, which the reader then refuses. */
function encodeText(text: string): string {
  return JSON.stringify(text);
}

function checkByteLength(path: string, { name, dtype, shape }: TensorToWrite, bytes: Uint8Array): void {
  const expected = sizeInBytes(toSafetensorsDType(dtype), shape);
  if (bytes.byteLength === expected) return;
  const what = `${dtype} [${shape.join(", ")}] takes ${expected} bytes, ${bytes.byteLength} were given`;
  throw new SafetensorsError(path, "byte-size", what, { tensor: name, hint: "nothing was written" });
}

const RANK: ReadonlyMap<FileDType, number> = new Map([...BY_NAME.keys()].map((name, rank) => [name, rank]));

function alignmentRank(tensor: TensorToWrite): number {
  return RANK.get(tensor.dtype) ?? -1; // a dtype that does not exist is refused when the header is made
}

/** Order of the UTF-8 bytes, as Rust compares strings. (JavaScript's < orders by UTF-16 units: not the same.) */
function compareNames(a: string, b: string): number {
  const left = new TextEncoder().encode(a);
  const right = new TextEncoder().encode(b);
  const length = Math.min(left.length, right.length);
  for (let i = 0; i < length; i++) {
    if (left[i] !== right[i]) return left[i] - right[i];
  }
  return left.length - right.length;
}
