/**
 * CUPTI's activity records, read from memory.
 *
 * Source: `cupti_activity.h` of CUDA 12.0 to 13.5. A record has grown at its end only, so that these fields are at the
 * same places in all versions since: `CUpti_ActivityKernel9` to `13`, `CUpti_ActivityMemcpy5` to `7`,
 * `CUpti_ActivityMemset4` and `5`.
 */
import { FfiError } from "../errors.ts";
import type { GpuActivity } from "../gpu.ts";

/** The oldest version whose records are known: CUDA 12.0's. */
export const OLDEST_VERSION = 18;

// Offsets of fields in bytes, and values of `CUpti_ActivityKind`; a test compares them with the header.

/** Of `CUpti_ActivityKernel9` and newer. */
export const KERNEL = {
  registersPerThread: 6,
  start: 16,
  end: 24,
  streamId: 48,
  gridX: 52,
  gridY: 56,
  gridZ: 60,
  blockX: 64,
  blockY: 68,
  blockZ: 72,
  staticSharedMemory: 76,
  dynamicSharedMemory: 80,
  name: 104,
} as const;

/** Of `CUpti_ActivityMemcpy5` and newer. */
export const COPY = {
  copyKind: 4,
  srcKind: 5,
  dstKind: 6,
  bytes: 8,
  start: 16,
  end: 24,
  streamId: 40,
} as const;

/** Of `CUpti_ActivityMemset4` and newer. */
export const FILL = { bytes: 8, start: 16, end: 24, streamId: 40 } as const;

export const KINDS = {
  CUPTI_ACTIVITY_KIND_MEMCPY: 1,
  CUPTI_ACTIVITY_KIND_MEMSET: 2,
  CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: 10,
} as const;

/** By `CUpti_ActivityMemcpyKind`; copies of arrays, which nothing here makes, have no name of their own. */
const COPIES: Readonly<Record<number, string>> = {
  1: "copy host to device",
  2: "copy device to host",
  8: "copy device to device",
  9: "copy host to host",
  10: "copy device to other device",
};

/** By `CUpti_ActivityMemoryKind`. */
const MEMORIES: readonly string[] = [
  "unknown",
  "pageable",
  "pinned",
  "device",
  "array",
  "managed",
  "device static",
  "managed static",
];

/** A record of work on the GPU. */
export interface ActivityRecord {
  readonly kind: GpuActivity["kind"];
  /** Address of a kernel's name, which ends with a 0; the name of what is no kernel. */
  readonly name: bigint | string;
  readonly stream: number;
  /** Nanoseconds on CUPTI's clock. Both are 0 where it had no room to note them. */
  readonly start: bigint;
  readonly end: bigint;
  readonly details: GpuActivity["details"];
}

/**
 * One record, or undefined where it is of another kind.
 *
 * @param record from its first byte on, and to nowhere beyond its last
 * @throws {FfiError} where it is too short for its kind
 */
export function readRecord(record: DataView): ActivityRecord | undefined {
  requireBytes(record, 4, "record");
  switch (record.getUint32(0, true)) {
    case KINDS.CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL:
      return readKernel(record);
    case KINDS.CUPTI_ACTIVITY_KIND_MEMCPY:
      return readCopy(record);
    case KINDS.CUPTI_ACTIVITY_KIND_MEMSET:
      return readFill(record);
    default:
      return undefined;
  }
}

function readKernel(record: DataView): ActivityRecord {
  requireBytes(record, KERNEL.name + 8, "kernel's record");
  const int = (offset: number) => record.getInt32(offset, true);
  return {
    kind: "kernel",
    name: record.getBigUint64(KERNEL.name, true),
    ...timeAndPlace(record, KERNEL),
    details: {
      grid: [KERNEL.gridX, KERNEL.gridY, KERNEL.gridZ].map(int).join("x"),
      block: [KERNEL.blockX, KERNEL.blockY, KERNEL.blockZ].map(int).join("x"),
      "registers per thread": record.getUint16(KERNEL.registersPerThread, true),
      "static shared memory": int(KERNEL.staticSharedMemory),
      "dynamic shared memory": int(KERNEL.dynamicSharedMemory),
    },
  };
}

function readCopy(record: DataView): ActivityRecord {
  requireBytes(record, COPY.streamId + 4, "copy's record");
  const memory = (offset: number) => MEMORIES[record.getUint8(offset)] ?? "unknown";
  return {
    kind: "copy",
    name: COPIES[record.getUint8(COPY.copyKind)] ?? "copy",
    ...timeAndPlace(record, COPY),
    details: {
      bytes: Number(record.getBigUint64(COPY.bytes, true)),
      from: memory(COPY.srcKind),
      to: memory(COPY.dstKind),
    },
  };
}

function readFill(record: DataView): ActivityRecord {
  requireBytes(record, FILL.streamId + 4, "fill's record");
  return {
    kind: "fill",
    name: "fill",
    ...timeAndPlace(record, FILL),
    details: { bytes: Number(record.getBigUint64(FILL.bytes, true)) },
  };
}

function timeAndPlace(
  record: DataView,
  { start, end, streamId }: { readonly start: number; readonly end: number; readonly streamId: number },
): Pick<ActivityRecord, "start" | "end" | "stream"> {
  return {
    stream: record.getUint32(streamId, true),
    start: record.getBigUint64(start, true),
    end: record.getBigUint64(end, true),
  };
}

function requireBytes(record: DataView, bytes: number, what: string): void {
  if (record.byteLength >= bytes) return;
  throw new FfiError(`cupti: a ${what} has ${record.byteLength} bytes, ${bytes} or more are expected`, {
    hint: "this version of CUPTI is not one of those that are known here: install CUDA 12's or 13's",
  });
}
