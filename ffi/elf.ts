/**
 * What a shared library's file says of it before it is opened: the symbols that it takes from others, and its constants.
 * Reads ELF files of 64-bit little-endian machines, which are all that PyTorch runs on under Linux (System V ABI, "Object
 * Files").
 */
import { FfiError, FileError, messageOf } from "./errors.ts";

export interface SharedLibraryFile {
  /** Symbols that others must have when it is opened, or at the latest when it first calls them; none that it can lack. */
  readonly imports: readonly string[];
  /** The section `.rodata`: string literals and other constants. */
  readonly constants: Uint8Array<ArrayBuffer>;
}

interface Section {
  readonly name: string;
  readonly type: number;
  readonly offset: number;
  readonly size: number;
  /** Of a symbol table: the section with its names. */
  readonly link: number;
}

// Values of elf.h.
const MAGIC = 0x464c457f;
const ELFCLASS64 = 2;
const ELFDATA2LSB = 1;
const SHT_DYNSYM = 11;
const STB_WEAK = 2;
const SHN_UNDEF = 0;
const HEADER_BYTES = 64;
const SECTION_BYTES = 64;
const SYMBOL_BYTES = 24;

/**
 * Reads the parts of a library's file that {@link SharedLibraryFile} has.
 *
 * @throws {FileError} where it cannot be read @throws {FfiError} for another kind of file, or a damaged one
 */
export function readSharedLibrary(path: string): SharedLibraryFile {
  let file: Deno.FsFile;
  try {
    file = Deno.openSync(path);
  } catch (error) {
    throw new FileError(`${path} could not be read: ${messageOf(error)}`, { cause: error });
  }
  using _ = file;
  try {
    return readParts(file);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new FfiError(`${path} is no whole library for 64-bit Linux: ${error.message}`);
  }
}

/** Throws RangeErrors for what is not where the file says that it is. */
function readParts(file: Deno.FsFile): SharedLibraryFile {
  const { size } = file.statSync();
  const read = (offset: number, length: number): DataView<ArrayBuffer> => {
    if (offset + length > size) throw new RangeError(`it ends at byte ${size}`);
    const bytes = new Uint8Array(length);
    file.seekSync(offset, Deno.SeekMode.Start);
    for (let done = 0; done < length;) {
      const count = file.readSync(bytes.subarray(done));
      if (count === null) throw new RangeError("it has become shorter meanwhile");
      done += count;
    }
    return new DataView(bytes.buffer);
  };

  const header = read(0, HEADER_BYTES);
  const fits = header.getUint32(0, true) === MAGIC && header.getUint8(4) === ELFCLASS64 &&
    header.getUint8(5) === ELFDATA2LSB;
  if (!fits) throw new RangeError("it begins otherwise");
  const sections = sectionsOf(header, read);
  const constants = sections.find(({ name }) => name === ".rodata");
  return {
    imports: sections.filter(({ type }) => type === SHT_DYNSYM).flatMap(({ offset, size, link }) => {
      const names = sections[link];
      if (names === undefined) throw new RangeError(`it has no section ${link}`);
      return importsOf(read(offset, size), read(names.offset, names.size));
    }),
    constants: constants === undefined
      ? new Uint8Array(0)
      : new Uint8Array(read(constants.offset, constants.size).buffer),
  };
}

function sectionsOf(
  header: DataView,
  read: (offset: number, length: number) => DataView<ArrayBuffer>,
): Section[] {
  const count = header.getUint16(60, true);
  const table = read(Number(header.getBigUint64(40, true)), count * SECTION_BYTES);
  const sections = Array.from({ length: count }, (_, i) => {
    const at = i * SECTION_BYTES;
    return {
      nameAt: table.getUint32(at, true),
      type: table.getUint32(at + 4, true),
      offset: Number(table.getBigUint64(at + 24, true)),
      size: Number(table.getBigUint64(at + 32, true)),
      link: table.getUint32(at + 40, true),
    };
  });
  const names = sections[header.getUint16(62, true)];
  if (names === undefined) return []; // stripped of all that is not needed to run
  const text = read(names.offset, names.size);
  return sections.map(({ nameAt, ...section }) => ({ ...section, name: textAt(text, nameAt) }));
}

function importsOf(symbols: DataView, names: DataView<ArrayBuffer>): string[] {
  const imports: string[] = [];
  for (let at = SYMBOL_BYTES; at < symbols.byteLength; at += SYMBOL_BYTES) { // the first one is no symbol
    const binding = symbols.getUint8(at + 4) >> 4;
    if (binding === STB_WEAK || symbols.getUint16(at + 6, true) !== SHN_UNDEF) continue;
    imports.push(textAt(names, symbols.getUint32(at, true)));
  }
  return imports;
}

function textAt(table: DataView<ArrayBuffer>, start: number): string {
  const bytes = new Uint8Array(table.buffer, start);
  return new TextDecoder().decode(bytes.subarray(0, bytes.indexOf(0)));
}
