import { OutOfMemoryError } from "./errors.ts";
import type { GpuRuntime } from "./gpu_runtime.ts";
import { ALIGNMENT, mapMemory } from "./gpu_segment.ts";

/** Host memory is locked by so many bytes at a time: each call takes a while, and locked memory is everybody's loss. */
const SLAB_BYTES = 64 * 2 ** 20;

/** A piece of page-locked host memory, and where in the deposit its bytes belong. */
interface Slab {
  readonly host: bigint;
  readonly offset: number;
  readonly capacity: number;
  used: number;
}

/**
 * Blocks of bytes that lie in page-locked host memory, and on the GPU between {@link bring} and {@link leave}. Their
 * addresses on the GPU are reserved from the beginning and stay the same: memory is put behind them and taken away, so that what
 * knows them, a recorded graph above all, never has to be told.
 */
export class DepositSegment implements Disposable {
  readonly #driver: GpuRuntime;
  readonly #stream: bigint;
  readonly #base: bigint;
  readonly #addresses: number;
  readonly #granularity: number;
  readonly #slabs: Slab[] = [];
  /** Behind the last block. */
  #end = 0;
  #blocks = 0;
  #mapped = 0;
  #closed = false;

  /** @param limit bytes that it may grow to. */
  constructor(driver: GpuRuntime, stream: bigint, limit: number) {
    this.#driver = driver;
    this.#stream = stream;
    this.#granularity = driver.memGetAllocationGranularity();
    this.#addresses = this.#rounded(limit);
    this.#base = driver.memAddressReserve(this.#addresses);
  }

  /** Bytes of the GPU's memory that it holds. */
  get mapped(): number {
    return this.#mapped;
  }

  /** Bytes that it takes on the GPU. */
  get end(): number {
    return this.#end;
  }

  /** Address of a block. */
  pointer(offset: number): bigint {
    return this.#base + BigInt(offset);
  }

  /**
   * Copies bytes of the GPU into a new block, on the host, and waits for that.
   *
   * @returns the block's offset. @throws OutOfMemoryError of the host.
   */
  add(source: bigint, byteLength: number): number {
    const bytes = Math.ceil(Math.max(byteLength, 1) / ALIGNMENT) * ALIGNMENT;
    if (this.#end + bytes > this.#addresses) {
      throw new OutOfMemoryError(`the offloaded weights are more than the GPU has memory`);
    }
    let slab = this.#slabs.at(-1);
    if (slab === undefined || slab.used + bytes > slab.capacity) {
      const capacity = Math.max(SLAB_BYTES, bytes);
      slab = { host: this.#driver.memHostAlloc(capacity), offset: this.#end, capacity, used: 0 };
      this.#slabs.push(slab);
    }
    const offset = slab.offset + slab.used;
    this.#driver.memcpyDtoHAsync(slab.host + BigInt(slab.used), source, byteLength, this.#stream);
    this.#driver.streamSynchronize(this.#stream);
    slab.used += bytes;
    this.#end = offset + bytes;
    this.#blocks++;
    return offset;
  }

  /** Puts memory behind the addresses and issues the copies; false where the GPU has not enough. */
  bring(): boolean {
    if (this.#mapped > 0 || this.#end === 0) return true;
    const bytes = this.#rounded(this.#end);
    if (!mapMemory(this.#driver, this.#base, bytes)) return false;
    this.#mapped = bytes;
    this.#driver.memSetAccess(this.#base, bytes);
    for (const { host, offset, used } of this.#slabs) {
      this.#driver.memcpyHtoDAsync(this.pointer(offset), host, used, this.#stream);
    }
    return true;
  }

  /** Waits for the work so far and takes the memory away. */
  leave(): void {
    if (this.#mapped === 0) return;
    this.#driver.streamSynchronize(this.#stream);
    this.#driver.memUnmap(this.#base, this.#mapped);
    this.#mapped = 0;
  }

  /** Gives a block up; all of it goes with the last one. */
  free(_offset: number): void {
    if (--this.#blocks === 0) this[Symbol.dispose]();
  }

  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    this.leave();
    for (const { host } of this.#slabs.splice(0)) this.#driver.memFreeHost(host);
    this.#driver.memAddressFree(this.#base, this.#addresses);
  }

  #rounded(bytes: number): number {
    return Math.ceil(bytes / this.#granularity) * this.#granularity;
  }
}
