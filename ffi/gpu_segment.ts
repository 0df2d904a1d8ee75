import { Arena } from "./arena.ts";
import { OutOfMemoryError } from "./errors.ts";
import type { GpuRuntime } from "./gpu_runtime.ts";

/** What kernels and libraries may rely on, as with what a vendor's own allocator gives. */
export const ALIGNMENT = 256;

/**
 * A growing piece of a GPU's memory at addresses that never change. The addresses are reserved once, as many as the GPU
 * has bytes; memory is put behind them from the start on, chunk by chunk, as blocks need it. So there is one heap
 * without gaps between chunks, and what is free in it can serve any later request.
 */
export class Segment implements Disposable {
  readonly #driver: GpuRuntime;
  readonly #base: bigint;
  readonly #addresses: number;
  readonly #granularity: number;
  readonly #chunkBytes: number;
  readonly #arena: Arena;
  /** Sizes of the chunks, in the order of their addresses: only whole ones can be taken away. */
  readonly #chunks: number[] = [];
  #mapped = 0;
  #used = 0;

  /** @param limit bytes that it may grow to. @param chunkBytes how much it grows at a time, where there is so much. */
  constructor(driver: GpuRuntime, limit: number, chunkBytes: number) {
    this.#driver = driver;
    this.#granularity = driver.memGetAllocationGranularity();
    this.#chunkBytes = this.#rounded(chunkBytes);
    this.#addresses = this.#rounded(limit);
    this.#base = driver.memAddressReserve(this.#addresses);
    this.#arena = new Arena(0, this.#addresses, ALIGNMENT);
  }

  /** Bytes of the blocks in use. */
  get used(): number {
    return this.#used;
  }

  /** Bytes of the GPU's memory that it holds. */
  get mapped(): number {
    return this.#mapped;
  }

  /** Puts memory behind the first `bytes` addresses at once, if the GPU has it; else it grows as blocks need it. */
  reserve(bytes: number): void {
    const missing = this.#rounded(bytes) - this.#mapped;
    if (missing > 0) this.#grow(missing);
  }

  /** Address of a block. */
  pointer(offset: number): bigint {
    return this.#base + BigInt(offset);
  }

  /** Offset of a new block, or undefined where the GPU has not enough memory left. */
  alloc(byteLength: number): number | undefined {
    const offset = this.#arena.alloc(byteLength);
    if (offset === undefined) return undefined;
    const missing = this.#rounded(this.#arena.end - this.#mapped);
    // Where there is no room for a whole chunk, there may be for what is missing.
    if (missing > 0 && !this.#grow(Math.max(missing, this.#chunkBytes)) && !this.#grow(missing)) {
      this.#arena.free(offset);
      return undefined;
    }
    this.#used += this.#arena.blockSize(byteLength);
    return offset;
  }

  /** Gives a block back. Work that was issued to the one stream before may still use it. */
  free(offset: number): void {
    this.#used -= this.#arena.free(offset);
  }

  /** Gives chunks behind the last block back to the GPU; no work may use them any more. Returns their bytes. */
  trim(): number {
    const before = this.#mapped;
    while (this.#chunks.length > 0 && this.#mapped - this.#chunks.at(-1)! >= this.#arena.end) {
      const bytes = this.#chunks.pop()!;
      this.#mapped -= bytes;
      this.#driver.memUnmap(this.pointer(this.#mapped), bytes);
    }
    return before - this.#mapped;
  }

  /** Gives all back. No work may use it any more. */
  [Symbol.dispose](): void {
    for (const bytes of this.#chunks.splice(0).reverse()) {
      this.#mapped -= bytes;
      this.#driver.memUnmap(this.pointer(this.#mapped), bytes);
    }
    this.#driver.memAddressFree(this.#base, this.#addresses);
  }

  /** Puts memory behind the next `bytes` addresses; false where there is not enough. */
  #grow(bytes: number): boolean {
    if (this.#mapped + bytes > this.#addresses) return false;
    const address = this.pointer(this.#mapped);
    if (!mapMemory(this.#driver, address, bytes)) return false;
    this.#chunks.push(bytes);
    this.#mapped += bytes;
    this.#driver.memSetAccess(address, bytes);
    return true;
  }

  #rounded(bytes: number): number {
    return Math.ceil(bytes / this.#granularity) * this.#granularity;
  }
}

/** Puts new memory behind addresses; false where the GPU has not enough. Access to it is still to be given. */
export function mapMemory(driver: GpuRuntime, address: bigint, bytes: number): boolean {
  try {
    const memory = driver.memCreate(bytes);
    try {
      driver.memMap(address, bytes, memory);
    } finally {
      driver.memRelease(memory); // the mapping keeps it
    }
    return true;
  } catch (error) {
    if (error instanceof OutOfMemoryError) return false;
    throw error;
  }
}
