/**
 * CUPTI's activity API by FFI: which kernels, copies and fills ran on the GPU, and when.
 *
 * Source: `cupti_activity.h`, `cupti_result.h` and `cupti_version.h` of CUDA 13.0; all functions are there since 12.0.
 *
 * Once it was used, CUPTI stays attached to the process: `cuptiFinalize`, which would detach it, is known to break
 * graphs before CUDA 12.6. For the same reason graphs have to be recorded after it was attached.
 */
import { FfiError } from "../errors.ts";
import type { GpuActivity, GpuProfile, GpuProfiler } from "../gpu.ts";
import { type OpenedLibrary, openLibrary, pinLibrary, textAt } from "../library.ts";
import { ActivityBuffers } from "./cupti_buffers.ts";
import { KINDS, OLDEST_VERSION, readRecord } from "./cupti_records.ts";
import { demangle } from "./demangle.ts";
import { cudaSonames, cuptiVersion } from "./versions.ts";

const CUPTI = {
  // CUptiResult cuptiGetVersion(uint32_t *version)
  cuptiGetVersion: { parameters: ["buffer"], result: "i32" },
  // CUptiResult cuptiGetResultString(CUptiResult result, const char **str)
  cuptiGetResultString: { parameters: ["i32", "buffer"], result: "i32" },
  // CUptiResult cuptiGetTimestamp(uint64_t *timestamp)
  cuptiGetTimestamp: { parameters: ["buffer"], result: "i32" },
  // CUptiResult cuptiActivityRegisterCallbacks(CUpti_BuffersCallbackRequestFunc funcBufferRequested,
  //     CUpti_BuffersCallbackCompleteFunc funcBufferCompleted)
  cuptiActivityRegisterCallbacks: { parameters: ["u64", "u64"], result: "i32" },
  // CUptiResult cuptiActivityEnable(CUpti_ActivityKind kind)
  cuptiActivityEnable: { parameters: ["i32"], result: "i32" },
  // CUptiResult cuptiActivityDisable(CUpti_ActivityKind kind)
  cuptiActivityDisable: { parameters: ["i32"], result: "i32" },
  // CUptiResult cuptiActivityFlushAll(uint32_t flag)
  cuptiActivityFlushAll: { parameters: ["u32"], result: "i32" },
  // CUptiResult cuptiActivityGetNextRecord(uint8_t *buffer, size_t validBufferSizeBytes, CUpti_Activity **record)
  cuptiActivityGetNextRecord: { parameters: ["buffer", "usize", "buffer"], result: "i32" },
  // CUptiResult cuptiActivityGetNumDroppedRecords(CUcontext context, uint32_t streamId, size_t *dropped)
  cuptiActivityGetNumDroppedRecords: { parameters: ["u64", "u32", "buffer"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** Values of the headers' enums; a test compares them with the headers. */
export const HEADER = {
  CUPTI_ERROR_MAX_LIMIT_REACHED: 12,
  CUPTI_ERROR_NOT_INITIALIZED: 15,
  CUPTI_ERROR_INVALID_KIND: 21,
  CUPTI_ERROR_INSUFFICIENT_PRIVILEGES: 35,
  CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED: 39,
  CUPTI_ERROR_UNKNOWN: 999,
  CUPTI_ACTIVITY_FLAG_FLUSH_FORCED: 1,
} as const;

const OTHER_VERSION =
  "CUPTI may be newer than the driver: install the version of the driver's CUDA, which nvidia-smi shows";

const HINTS: Readonly<Record<number, string>> = {
  [HEADER.CUPTI_ERROR_NOT_INITIALIZED]: OTHER_VERSION,
  [HEADER.CUPTI_ERROR_INSUFFICIENT_PRIVILEGES]:
    "profiling is for root only here: run as root, or load the driver with NVreg_RestrictProfilingToAdminUsers=0",
  [HEADER.CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED]:
    "another profiler or debugger (nsys, ncu, cuda-gdb) is attached: run without it",
  [HEADER.CUPTI_ERROR_UNKNOWN]: OTHER_VERSION,
};

/** How often the two clocks are read side by side; the quickest reading counts. */
const CLOCK_READINGS = 9;

/** What the profiler needs to know of the device. */
interface ProfiledDevice {
  /** Whether its context was lost; then nothing works any more, and somebody was told. */
  readonly isLost: boolean;
  /** Makes the context current. */
  enter(): void;
  synchronize(): Promise<void>;
}

/** The same moment on two clocks. */
interface ClockPair {
  /** CUPTI's, in nanoseconds. */
  readonly nanoseconds: bigint;
  /** That of `performance.now()`, in milliseconds. */
  readonly milliseconds: number;
}

/** Whose profiler is open: CUPTI records for the process, not for a device. */
let holder: Cupti | undefined;

/** The library, open. */
export class Cupti implements Disposable {
  /** E.g. `"13.0.1"`. */
  readonly version: string;
  readonly #library: OpenedLibrary<typeof CUPTI>;
  readonly #cupti: OpenedLibrary<typeof CUPTI>["symbols"];
  readonly #out = new BigUint64Array(1);

  /**
   * Finds and opens libcupti.
   *
   * @param newest the newest major version of CUDA that the driver takes.
   * @throws {FfiError} where it is not installed, or older than CUDA 12's
   */
  constructor(newest: number) {
    this.#library = openLibrary("CUPTI", CUPTI, {
      sonames: cudaSonames("libcupti", newest),
      hint: `pip install ${newest >= 13 ? "nvidia-cuda-cupti" : "nvidia-cuda-cupti-cu12"}`,
    });
    this.#cupti = this.#library.symbols;
    try {
      pinLibrary(this.#library.path); // its thread outlives this program's last look at it
      const version = new Uint32Array(1);
      this.#check(this.#cupti.cuptiGetVersion(version), "cuptiGetVersion");
      this.version = cuptiVersion(version[0]);
      if (version[0] < OLDEST_VERSION) {
        throw new FfiError(
          `CUPTI ${this.version} (${this.#library.path}) is older than CUDA 12's: its records are not known here`,
          { hint: "pip install nvidia-cuda-cupti, or nvidia-cuda-cupti-cu12 for a driver of CUDA 12" },
        );
      }
    } catch (error) {
      this.#library.close();
      throw error;
    }
  }

  /** See {@link GpuDevice.openProfiler}. */
  async openProfiler(device: ProfiledDevice): Promise<GpuProfiler> {
    if (holder !== undefined) throw new FfiError("cupti: a profiler is open already: dispose it first");
    holder = this;
    try {
      const buffers = await ActivityBuffers.start();
      device.enter();
      this.#enable(buffers);
      return new CuptiProfiler(this, device, buffers);
    } catch (error) {
      if (holder === this) holder = undefined;
      throw error;
    }
  }

  /** Ends recording, where it is this library's. */
  stop(): void {
    if (holder !== this) return;
    holder = undefined;
    for (const [name, kind] of Object.entries(KINDS)) {
      this.#check(this.#cupti.cuptiActivityDisable(kind), `cuptiActivityDisable of ${name}`);
    }
  }

  [Symbol.dispose](): void {
    this.stop();
    this.#library.close();
  }

  #enable(buffers: ActivityBuffers): void {
    const { requested, completed } = buffers.callbacks;
    this.#check(
      this.#cupti.cuptiActivityRegisterCallbacks(requested, completed),
      "cuptiActivityRegisterCallbacks",
    );
    for (const [name, kind] of Object.entries(KINDS)) {
      const status = this.#cupti.cuptiActivityEnable(kind);
      if (status === 0) continue;
      for (const other of Object.values(KINDS)) this.#cupti.cuptiActivityDisable(other); // none stays behind
      this.#check(status, `cuptiActivityEnable of ${name}`);
    }
  }

  /** The buffers with all records of work that is done, and was not collected before. */
  async collect(buffers: ActivityBuffers): Promise<Uint8Array<ArrayBuffer>[]> {
    const { CUPTI_ACTIVITY_FLAG_FLUSH_FORCED } = HEADER;
    this.#check(this.#cupti.cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED), "cuptiActivityFlushAll");
    return await buffers.take();
  }

  /** What buffers say. @param clocks read before the work began. */
  read(buffers: readonly Uint8Array<ArrayBuffer>[], clocks: ClockPair): GpuProfile {
    let lost = this.dropped();
    const activities: GpuActivity[] = [];
    const names = new Map<bigint, string>();
    const time = (nanoseconds: bigint) =>
      clocks.milliseconds + Number(nanoseconds - clocks.nanoseconds) / 1e6;
    for (const buffer of buffers) {
      const { records, complete } = this.recordsOf(buffer);
      if (!complete) lost++;
      for (const bytes of records) {
        const record = readRecord(bytes);
        if (record === undefined) continue;
        const { kind, name, stream, start, end, details } = record;
        if (start === 0n || end < start) {
          lost++; // it ran, but nobody knows when
          continue;
        }
        const text = typeof name === "string" ? name : kernelName(name, names);
        activities.push({ kind, name: text, stream, start: time(start), end: time(end), details });
      }
    }
    return { activities: activities.sort((a, b) => a.start - b.start), lost };
  }

  /** A buffer's records; not complete where CUPTI says that the next one is none. */
  recordsOf(buffer: Uint8Array<ArrayBuffer>): { records: DataView[]; complete: boolean } {
    const base = Deno.UnsafePointer.value(Deno.UnsafePointer.of(buffer));
    const starts: number[] = [];
    this.#out[0] = 0n; // from here on it is the record before
    let status: number;
    while (
      (status = this.#cupti.cuptiActivityGetNextRecord(buffer, BigInt(buffer.length), this.#out)) === 0
    ) {
      const start = Number(this.#out[0] - base);
      if (!(start > (starts.at(-1) ?? -1) && start < buffer.length)) {
        throw new FfiError(`cupti: a record at ${start} of a buffer of ${buffer.length} bytes`);
      }
      starts.push(start);
    }
    const complete = status === HEADER.CUPTI_ERROR_MAX_LIMIT_REACHED;
    if (!complete && status !== HEADER.CUPTI_ERROR_INVALID_KIND) {
      this.#check(status, "cuptiActivityGetNextRecord");
    }
    const records = starts.map((start, i) =>
      new DataView(buffer.buffer, buffer.byteOffset + start, (starts[i + 1] ?? buffer.length) - start)
    );
    return { records, complete };
  }

  /** How many records had no room since this was asked last. */
  dropped(): number {
    this.#out[0] = 0n;
    this.#check(
      this.#cupti.cuptiActivityGetNumDroppedRecords(0n, 0, this.#out),
      "cuptiActivityGetNumDroppedRecords",
    );
    return Number(this.#out[0]);
  }

  /** CUPTI's clock, which its records are by, beside the host's. */
  readClocks(): ClockPair {
    let best: ClockPair = { nanoseconds: 0n, milliseconds: 0 };
    let quickest = Infinity;
    for (let i = 0; i < CLOCK_READINGS; i++) {
      const before = performance.now();
      this.#check(this.#cupti.cuptiGetTimestamp(this.#out), "cuptiGetTimestamp");
      const took = performance.now() - before;
      if (took >= quickest) continue;
      quickest = took;
      best = { nanoseconds: this.#out[0], milliseconds: before + took / 2 };
    }
    return best;
  }

  #check(status: number, call: string): void {
    if (status === 0) return;
    this.#out[0] = 0n;
    this.#cupti.cuptiGetResultString(status, this.#out);
    const name = textAt(Deno.UnsafePointer.create(this.#out[0])) ?? "no text";
    const hint = HINTS[status];
    throw new FfiError(
      `cupti: ${call} failed: ${name} (${status})`,
      hint === undefined ? {} : { hint },
    );
  }
}

/** See {@link GpuProfiler}. */
class CuptiProfiler implements GpuProfiler {
  #closed = false;

  constructor(
    private readonly cupti: Cupti,
    private readonly device: ProfiledDevice,
    private readonly buffers: ActivityBuffers,
  ) {}

  async profile(body: () => void | Promise<void>): Promise<GpuProfile> {
    if (this.#closed || holder !== this.cupti) throw new FfiError("cupti: the profiler was disposed");
    // What came before belongs to nobody.
    await this.device.synchronize();
    await this.cupti.collect(this.buffers);
    this.cupti.dropped();
    const clocks = this.cupti.readClocks();
    await body();
    await this.device.synchronize();
    return this.cupti.read(await this.cupti.collect(this.buffers), clocks);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed || holder !== this.cupti) return;
    this.#closed = true;
    this.cupti.stop();
    if (!this.device.isLost) await this.cupti.collect(this.buffers); // so that they are not kept for nothing
  }
}

/** The name at an address of CUPTI's, which keeps one for each kernel. */
function kernelName(address: bigint, known: Map<bigint, string>): string {
  let name = known.get(address);
  if (name === undefined) {
    const pointer = Deno.UnsafePointer.create(address);
    name = pointer === null
      ? "kernel without a name"
      : demangle(new Deno.UnsafePointerView(pointer).getCString());
    known.set(address, name);
  }
  return name;
}
