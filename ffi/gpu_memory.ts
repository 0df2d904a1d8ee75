import type { Device, Memory, MemoryPurpose, MemoryUse } from "./device.ts";
import { During } from "./during.ts";
import { FfiError, OutOfMemoryError } from "./errors.ts";
import { DepositSegment } from "./gpu_deposit.ts";
import type { Deposit } from "./gpu.ts";
import type { GpuRuntime } from "./gpu_runtime.ts";
import { ALIGNMENT, Segment } from "./gpu_segment.ts";
import { MemoryScopes } from "./scope.ts";

const MIB = 2 ** 20;
/** How much a segment grows at a time: activations come and go, weights come by the gigabyte. */
const ACTIVATION_CHUNK = 64 * MIB;
const WEIGHT_CHUNK = 256 * MIB;

/** How many bytes the segments held. */
export type MemoryPlan = Record<"activations" | "recorded" | "weights", number>;

/** GPU memory: a block of one of the device's segments, or of a deposit. */
export class GpuMemory implements Memory {
  readonly pointer: bigint;
  /** Whether it was not freed so far. */
  live = true;

  constructor(
    readonly device: Device,
    readonly byteLength: number,
    readonly segment: Segment | DepositSegment,
    readonly offset: number,
  ) {
    this.pointer = segment.pointer(offset);
  }
}

/** What the memory has to know of its device. */
export interface MemoryOwner {
  readonly device: Device;
  readonly driver: GpuRuntime;
  readonly totalBytes: number;
  /** What else frees memory: which tool lists the programs that use the GPU. */
  readonly tool: string;
  isRecording(): boolean;
  /** Whether recorded graphs are in use. */
  hasGraphs(): boolean;
  /** Waits for all work. */
  wait(): void;
}

/**
 * All of a device's memory, planned by the order of its one stream. Activations, weights and recordings have a
 * {@link Segment} each; the book-keeping is done on the host, best fit first, and a freed block is handed out again at once:
 * work that still uses it was issued before the work that gets it next, and the stream keeps them apart. Nothing depends on
 * timing, so the same sequence of requests gets the same addresses each time: a step that is repeated needs no memory beyond
 * its first run. A recorded step needs no care from the others, since what it allocates is in nobody else's way. The
 * addresses of the segments never move, as growing only puts memory behind further ones.
 */
export class GpuHeap {
  readonly #owner: MemoryOwner;
  readonly #activations: Segment;
  readonly #weights: Segment;
  /** What recorded work allocates while it is recorded, or when it runs before: the same for all recordings. */
  readonly #recorded: Segment;
  /** With what frees a deposit's memory when nothing refers to it any more. */
  readonly #deposits = new Map<DepositSegment, FinalizationRegistry<number>>();
  readonly #scopes = new MemoryScopes((memory) => this.free(memory));
  readonly #collected = new FinalizationRegistry<number>((offset) => this.#weights.free(offset));
  /** The libraries' scratch, and smaller ones before it that graphs still use. They lie among the weights. */
  readonly #workspaces: GpuMemory[] = [];
  #workspaceBytes = 0;
  readonly #amongRecordings = new During();
  #peak = 0;

  constructor(owner: MemoryOwner) {
    this.#owner = owner;
    const { driver, totalBytes } = owner;
    this.#activations = new Segment(driver, totalBytes, ACTIVATION_CHUNK);
    this.#weights = new Segment(driver, totalBytes, WEIGHT_CHUNK);
    this.#recorded = new Segment(driver, totalBytes, ACTIVATION_CHUNK);
  }

  /** To be disposed, each, when no work uses them any more. */
  get segments(): readonly Disposable[] {
    return [...this.#growing, ...this.#deposits.keys()];
  }

  use(): MemoryUse {
    const deposited = this.#deposits.keys().reduce((sum, { mapped }) => sum + mapped, 0);
    return {
      current: this.#activations.used,
      peak: this.#peak,
      reserved: this.#activations.mapped + this.#recorded.mapped + this.#workspaceBytes,
      weights: this.#weights.used - this.#workspaceBytes + deposited,
    };
  }

  alloc(byteLength: number, purpose: MemoryPurpose): GpuMemory {
    if (purpose === "weights") {
      const memory = this.#take(this.#weights, byteLength, "weights");
      this.#collected.register(memory, memory.offset, memory);
      return memory;
    }
    const segment = this.#owner.isRecording() || this.#amongRecordings.on
      ? this.#recorded
      : this.#activations;
    const memory = this.#take(segment, byteLength, "activations");
    this.#scopes.add(memory);
    return memory;
  }

  free(memory: Memory): void {
    const mine = this.own(memory);
    if (!mine.live) throw new FfiError(`${this.#owner.device.name}: memory was freed twice`);
    mine.live = false;
    if (mine.segment === this.#weights) this.#collected.unregister(mine);
    else if (mine.segment instanceof DepositSegment) this.#deposits.get(mine.segment)?.unregister(mine);
    else this.#scopes.remove(mine);
    mine.segment.free(mine.offset);
  }

  scope<T>(body: () => T): T {
    return this.#scopes.run(body);
  }

  /** See {@link GpuDevice.amongRecordings}. */
  amongRecordings<T>(body: () => T): T {
    return this.#amongRecordings.run(body);
  }

  /** See {@link GpuDevice.deposit}. @param stream that copies. @param check called before each of its steps, with a word for it. */
  deposit(stream: bigint, check: (what: string) => void): Deposit {
    const { device, driver, totalBytes } = this.#owner;
    const segment = new DepositSegment(driver, stream, totalBytes);
    const collected = new FinalizationRegistry<number>((offset) => segment.free(offset));
    this.#deposits.set(segment, collected);
    return {
      add: (memory) => {
        check("offloading");
        const { pointer, byteLength } = this.own(memory);
        if (segment.mapped > 0) {
          throw new FfiError(`${device.name}: weights are added to a deposit that is on the GPU`);
        }
        const moved = new GpuMemory(device, byteLength, segment, segment.add(pointer, byteLength));
        collected.register(moved, moved.offset, moved);
        this.free(memory);
        return moved;
      },
      bring: () => {
        check("bringing weights");
        if (!segment.bring() && !(this.#trim() && segment.bring())) {
          throw this.#outOfMemory(segment.end, "weights that were offloaded");
        }
      },
      leave: () => {
        check("offloading");
        segment.leave();
      },
    };
  }

  /** Throws {@link FfiError} for memory of another device. */
  own(memory: Memory): GpuMemory {
    const { device } = this.#owner;
    if (memory instanceof GpuMemory && memory.device === device) return memory;
    throw new FfiError(`${device.name}: memory of ${memory.device.name} is not mine`);
  }

  /** See {@link GpuContext.workspace}. Recorded work keeps the piece that it was recorded with. */
  workspace(bytes: number): bigint {
    const last = this.#workspaces.at(-1);
    if (last !== undefined && last.byteLength >= bytes) return last.pointer;
    if (!this.#owner.isRecording() && !this.#owner.hasGraphs()) this.freeOldWorkspaces(0);
    const memory = this.#take(this.#weights, Math.ceil(bytes / ALIGNMENT) * ALIGNMENT, "a library's scratch");
    this.#workspaces.push(memory);
    this.#countWorkspaces();
    return memory.pointer;
  }

  /** Frees all pieces of scratch but the last `keep`. */
  freeOldWorkspaces(keep = 1): void {
    for (const memory of this.#workspaces.splice(0, this.#workspaces.length - keep)) this.free(memory);
    this.#countWorkspaces();
  }

  /** What to {@link reserve} in another process that does the same. */
  plan(): MemoryPlan {
    return {
      activations: this.#activations.mapped,
      recorded: this.#recorded.mapped,
      weights: this.#weights.used, // of a model that was larger before it was quantized, less than is mapped
    };
  }

  reserve({ activations, recorded, weights }: MemoryPlan): void {
    this.#weights.reserve(weights);
    this.#activations.reserve(activations);
    this.#recorded.reserve(recorded);
  }

  #take(segment: Segment, byteLength: number, what: string): GpuMemory {
    let offset = segment.alloc(byteLength);
    if (offset === undefined && this.#trim()) offset = segment.alloc(byteLength);
    if (offset === undefined) throw this.#outOfMemory(byteLength, what);
    this.#notePeak();
    return new GpuMemory(this.#owner.device, byteLength, segment, offset);
  }

  /** Gives unused memory at the ends of all segments back to the GPU; false where there is none to give. */
  #trim(): boolean {
    // Waiting would break a recording, and recorded work may use what is free outside of it.
    if (this.#owner.isRecording() || this.#owner.hasGraphs()) return false;
    this.#owner.wait();
    return this.#growing.reduce((bytes, segment) => bytes + segment.trim(), 0) > 0;
  }

  get #growing(): readonly Segment[] {
    return [this.#activations, this.#weights, this.#recorded];
  }

  #outOfMemory(byteLength: number, what: string): OutOfMemoryError {
    const { current, weights } = this.use();
    const { device, driver, tool } = this.#owner;
    const { free, total } = driver.memGetInfo();
    return new OutOfMemoryError(
      `${device.name}: out of memory: asked for ${mebibytes(byteLength)} for ${what}; ` +
        `${mebibytes(weights)} are used by weights, ${mebibytes(current)} by activations and ` +
        `${mebibytes(this.#workspaceBytes)} by libraries, ` +
        `${mebibytes(free)} of ${mebibytes(total)} are free on the GPU`,
      {
        hint: "A smaller --height and --width, fewer pictures at a time, bfloat16 instead of float32 (no " +
          `--disable_bf16), or closing other programs that use the GPU (${tool} lists them) leave more.`,
      },
    );
  }

  #countWorkspaces(): void {
    this.#workspaceBytes = this.#workspaces.reduce((sum, { byteLength }) => sum + byteLength, 0);
    this.#notePeak();
  }

  #notePeak(): void {
    const recorded = this.#recorded.mapped; // whether in use at the moment or not
    this.#peak = Math.max(this.#peak, this.#activations.used + recorded + this.#workspaceBytes);
  }
}

function mebibytes(bytes: number): string {
  return `${(bytes / MIB).toFixed(1)} MiB`;
}
