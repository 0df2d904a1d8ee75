/**
 * Host bytes to GPU memory as fast as the machine allows: the disk or its cache is read, and the bus is fed, at the
 * same time, through a few page-locked buffers.
 *
 * Bytes of a mapped file are read from the file, with `pread` on other threads, and not through the mapping: reading
 * needs no page fault for every 4 KiB, and a file that another program shortens meanwhile is an error here, where the
 * mapping would end the process with SIGBUS.
 */
import { setImmediate } from "node:timers";
import { type FileReader, type MappedFile, mappedFileOf, readInto } from "./cpu/libc.ts";
import type { GpuRuntime } from "./gpu_runtime.ts";

/** What streaming asks of the driver. */
export type CopyDriver = Pick<
  GpuRuntime,
  | "eventCreate"
  | "eventDestroy"
  | "eventQuery"
  | "eventRecord"
  | "memcpyHtoDAsync"
  | "memFreeHost"
  | "memHostAlloc"
  | "streamCreate"
  | "streamDestroy"
  | "streamSynchronize"
  | "streamWaitEvent"
>;

/** Bytes of the host and the device address that they go to. */
export interface Transfer {
  readonly bytes: Uint8Array;
  readonly target: bigint;
}

const MIB = 2 ** 20;
/** So many reads go on at a time, as far as there is that much to read. */
const LANES = 12;

/**
 * How large each lane's buffer is: to lock 1 GB of memory takes 0.7 s, so that what is little gets small ones, though larger
 * ones are faster (22 GB/s with 16 MiB, 16 with 4).
 */
export function bufferBytesFor(total: number): number {
  if (total >= 4096 * MIB) return 16 * MIB;
  const loadsOfLane = 16;
  return Math.min(4, Math.max(1, Math.ceil(total / (LANES * loadsOfLane * MIB)))) * MIB;
}

/** A part of a transfer that goes through a buffer in one piece. */
interface Piece {
  readonly source: Uint8Array;
  readonly target: bigint;
  /** First byte in the buffer. */
  readonly at: number;
}

/** What fills a buffer at a time. */
interface Load {
  readonly pieces: Piece[];
  byteLength: number;
}

/**
 * Copies all transfers, behind the work that was issued to `stream`; they have arrived when the promise resolves.
 *
 * @param driver of the device that the targets lie on.
 * @param onBytes called with how many bytes have left the host so far.
 * @throws FfiError when a file cannot be read to its end, or a driver call fails; nothing is on its way any more then.
 */
export async function streamToDevice(
  driver: CopyDriver,
  stream: bigint,
  transfers: readonly Transfer[],
  onBytes?: (bytes: number) => void,
  bufferBytes = bufferBytesFor(transfers.reduce((sum, { bytes }) => sum + bytes.byteLength, 0)),
): Promise<void> {
  const loads = divide(transfers, bufferBytes);
  if (loads.length === 0) return;
  const cleanup = new DisposableStack();
  const failures: unknown[] = []; // a lost device fails in every call: the first failure says why
  const attempt = async (work: () => void | Promise<void>) => {
    try {
      await work();
    } catch (reason) {
      failures.push(reason);
    }
  };
  await attempt(async () => {
    const copies = driver.streamCreate();
    cleanup.defer(() => driver.streamDestroy(copies));
    // The targets may be memory that earlier work still reads.
    const issued = newEvent(driver, cleanup);
    driver.eventRecord(issued, stream);
    driver.streamWaitEvent(copies, issued);

    const files = new Files(cleanup);
    const waiting = loads.values();
    let sent = 0;
    const lane = async () => {
      const buffer = driver.memHostAlloc(bufferBytes);
      cleanup.defer(() => driver.memFreeHost(buffer));
      const copied = newEvent(driver, cleanup);
      for (const { pieces, byteLength } of waiting) {
        await fill(buffer, pieces, files);
        if (failures.length > 0) return;
        for (const { source, target, at } of pieces) {
          driver.memcpyHtoDAsync(target, buffer + BigInt(at), source.byteLength, copies);
        }
        driver.eventRecord(copied, copies);
        onBytes?.(sent += byteLength);
        while (!driver.eventQuery(copied)) await turn();
      }
    };
    await Promise.all(Array.from({ length: Math.min(LANES, loads.length) }, () => attempt(lane)));
    driver.streamSynchronize(copies); // after a failure too: buffers go when no copy reads them
  });
  await attempt(() => cleanup.dispose());
  if (failures.length > 0) throw failures[0];
}

/**
 * Divides transfers into loads of at most `limit` bytes: large ones are cut, small ones go together. In the order of
 * the files' bytes, so that small tensors that lie side by side are read at once.
 */
export function divide(transfers: readonly Transfer[], limit: number): readonly Load[] {
  const loads: Load[] = [];
  const files = Map.groupBy(transfers, ({ bytes }) => bytes.buffer);
  const ordered = [...files.values()].flatMap((ofFile) =>
    ofFile.sort((a, b) => a.bytes.byteOffset - b.bytes.byteOffset)
  );
  for (const { bytes, target } of ordered) {
    for (let start = 0; start < bytes.byteLength;) {
      let load = loads.at(-1);
      if (load === undefined || load.byteLength === limit) loads.push(load = { pieces: [], byteLength: 0 });
      const end = Math.min(bytes.byteLength, start + limit - load.byteLength);
      load.pieces.push({
        source: bytes.subarray(start, end),
        target: target + BigInt(start),
        at: load.byteLength,
      });
      load.byteLength += end - start;
      start = end;
    }
  }
  return loads;
}

/** Files that are open for reading, each once. */
class Files {
  readonly #open = new Map<MappedFile, FileReader>();

  constructor(private readonly cleanup: DisposableStack) {}

  reader(file: MappedFile): FileReader {
    let reader = this.#open.get(file);
    if (reader === undefined) this.#open.set(file, reader = this.cleanup.use(file.openReader()));
    return reader;
  }
}

/** Puts the pieces into the buffer, neighbours in a file with one read. */
async function fill(buffer: bigint, pieces: readonly Piece[], files: Files): Promise<void> {
  for (let first = 0; first < pieces.length;) {
    const { source, at } = pieces[first];
    const file = mappedFileOf(source);
    let length = source.byteLength;
    let next = first + 1;
    for (; next < pieces.length; next++) {
      const { source: neighbour } = pieces[next];
      if (neighbour.buffer !== source.buffer || neighbour.byteOffset !== source.byteOffset + length) break;
      length += neighbour.byteLength;
    }
    const target = buffer + BigInt(at);
    if (file === undefined) {
      hostBytes(target, length).set(new Uint8Array(source.buffer, source.byteOffset, length));
    } else {
      // A mapping starts at the file's first byte, so that a view's offset is the offset in the file.
      await readInto(target, files.reader(file), source.byteOffset, length);
    }
    first = next;
  }
}

function hostBytes(address: bigint, length: number): Uint8Array {
  return new Uint8Array(Deno.UnsafePointerView.getArrayBuffer(Deno.UnsafePointer.create(address)!, length));
}

function newEvent(driver: CopyDriver, cleanup: DisposableStack): bigint {
  const event = driver.eventCreate(false);
  cleanup.defer(() => driver.eventDestroy(event));
  return event;
}

/** Lets the reads of other lanes, timers and signals in. */
function turn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}
