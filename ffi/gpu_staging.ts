import type { GpuRuntime } from "./gpu_runtime.ts";

const SLOTS = 8;
const SLOT_BYTES = 2 ** 20;

/**
 * Page-locked host memory between the program's bytes and the GPU. Copies from it run beside the CPU, and the program's
 * own bytes are free as soon as they lie here. It is a ring of slots: small copies fill a slot one after another, and a
 * slot is written again when the copies out of it are done.
 */
export class Staging implements Disposable {
  readonly #driver: GpuRuntime;
  readonly #stream: bigint;
  readonly #address: bigint;
  readonly #bytes: Uint8Array<ArrayBuffer>;
  /** Each marks the end of the copies out of a slot. */
  readonly #events: bigint[] = [];
  #slot = 0;
  #filled = 0;

  constructor(driver: GpuRuntime, stream: bigint) {
    this.#driver = driver;
    this.#stream = stream;
    this.#address = driver.memHostAlloc(SLOTS * SLOT_BYTES);
    const pointer = Deno.UnsafePointer.create(this.#address)!;
    this.#bytes = new Uint8Array(Deno.UnsafePointerView.getArrayBuffer(pointer, SLOTS * SLOT_BYTES));
    for (let slot = 0; slot < SLOTS; slot++) this.#events.push(driver.eventCreate(false));
  }

  /** Issues a copy of host bytes to the device; they may change when this returns. Waits where the ring is full. */
  upload(bytes: Uint8Array, target: bigint): void {
    for (let at = 0; at < bytes.length;) {
      if (this.#filled === SLOT_BYTES) this.#nextSlot();
      const start = this.#slot * SLOT_BYTES + this.#filled;
      const count = Math.min(bytes.length - at, SLOT_BYTES - this.#filled);
      this.#bytes.set(bytes.subarray(at, at + count), start);
      this.#driver.memcpyHtoDAsync(target + BigInt(at), this.#address + BigInt(start), count, this.#stream);
      this.#filled = Math.min(SLOT_BYTES, Math.ceil((this.#filled + count) / 64) * 64);
      at += count;
    }
  }

  /** Waits for the work so far and copies device bytes to the host. */
  download(source: bigint, target: Uint8Array): void {
    this.#driver.streamSynchronize(this.#stream); // then all that was staged has left, and the whole ring is free
    for (let at = 0; at < target.length; at += this.#bytes.length) {
      const count = Math.min(target.length - at, this.#bytes.length);
      this.#driver.memcpyDtoHAsync(this.#address, source + BigInt(at), count, this.#stream);
      this.#driver.streamSynchronize(this.#stream);
      target.set(this.#bytes.subarray(0, count), at);
    }
  }

  [Symbol.dispose](): void {
    for (const event of this.#events) this.#driver.eventDestroy(event);
    this.#driver.memFreeHost(this.#address);
  }

  #nextSlot(): void {
    this.#driver.eventRecord(this.#events[this.#slot], this.#stream);
    this.#slot = (this.#slot + 1) % SLOTS;
    this.#driver.eventSynchronize(this.#events[this.#slot]);
    this.#filled = 0;
  }
}
