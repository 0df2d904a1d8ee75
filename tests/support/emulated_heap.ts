/** All of the emulated GPU's memory: what is allocated, freed or deposited, how much that is, and what is left. */
import type { Device, Memory, MemoryPurpose, MemoryUse } from "../../ffi/device.ts";
import { FfiError, OutOfMemoryError } from "../../ffi/errors.ts";
import type { Deposit } from "../../ffi/gpu.ts";
import { MemoryScopes } from "../../ffi/scope.ts";
import { allocate, bytesOf, type EmulatedMemory, giveBack, POISON } from "./emulated_memory.ts";

export class EmulatedHeap {
  readonly #scopes = new MemoryScopes((memory) => this.free(memory));
  readonly #live = new WeakSet<Memory>();
  /** Weights go when nothing refers to them any more. */
  readonly #collected = new FinalizationRegistry<number>((byteLength) => this.#weights -= byteLength);
  /** What takes a memory out of its deposit; false where it is not there any more. */
  readonly #depositedMemory = new WeakMap<Memory, () => boolean>();
  #current = 0;
  #peak = 0;
  #weights = 0;
  /** Where {@link keepFreed} puts what is freed now. */
  #kept: Set<Memory> | undefined;

  /** @param limit bytes that it has. */
  constructor(
    private readonly device: Device,
    private readonly limit: number,
    private readonly requireOpen: () => void,
  ) {}

  use(): MemoryUse {
    const reserved = this.#current + this.#weights;
    return { current: this.#current, peak: this.#peak, reserved, weights: this.#weights };
  }

  alloc(byteLength: number, purpose: MemoryPurpose): Memory {
    this.requireOpen();
    this.#requireRoom(byteLength);
    const memory = allocate(this.device, byteLength, purpose);
    this.#live.add(memory);
    if (purpose === "weights") {
      this.#weights += byteLength;
      this.#collected.register(memory, byteLength, memory);
    } else {
      this.#current += byteLength;
      this.#peak = Math.max(this.#peak, this.#current);
      this.#scopes.add(memory);
    }
    return memory;
  }

  #requireRoom(byteLength: number): void {
    if (this.#current + this.#weights + byteLength <= this.limit) return;
    throw new OutOfMemoryError(
      `${this.device.name}: out of memory: asked for ${byteLength} bytes, ${
        this.#current + this.#weights
      } of ${this.limit} are used`,
    );
  }

  free(memory: Memory): void {
    const { purpose, byteLength } = memory as EmulatedMemory;
    if (purpose === "deposited") {
      if (!this.#depositedMemory.get(memory)?.()) {
        throw new FfiError(`${this.device.name}: memory was freed twice`);
      }
      if (this.#live.delete(memory)) this.#weights -= byteLength;
      return;
    }
    if (!this.#live.delete(memory)) throw new FfiError(`${this.device.name}: memory was freed twice`);
    this.#scopes.remove(memory);
    if (purpose === "weights") {
      this.#weights -= byteLength;
      this.#collected.unregister(memory);
    } else this.#current -= byteLength;
    if (this.#kept !== undefined) this.#kept.add(memory);
    else giveBack(memory);
  }

  scope<T>(body: () => T): T {
    return this.#scopes.run(body);
  }

  /** Runs `body`. What it frees keeps its bytes, for {@link withFreed}, and is added to `freed`. */
  keepFreed(freed: Set<Memory>, body: () => void): void {
    this.#kept = freed;
    try {
      body();
    } finally {
      this.#kept = undefined;
    }
  }

  /** Runs `body`, in which memory that was kept when it was freed may be used. */
  withFreed(freed: ReadonlySet<Memory>, body: () => void): void {
    for (const memory of freed) this.#live.add(memory);
    try {
      body();
    } finally {
      for (const memory of freed) this.#live.delete(memory);
    }
  }

  deposit(requireNotRecording: (what: string) => void): Deposit {
    const held = new Map<Memory, Uint8Array>();
    let present = false;
    return {
      add: (memory) => {
        this.requireLive(memory, "deposit");
        requireNotRecording("deposit");
        if (present) {
          throw new FfiError(`${this.device.name}: weights are added to a deposit that is on the GPU`);
        }
        const bytes = bytesOf(memory);
        const moved = { ...memory as EmulatedMemory, purpose: "deposited" as const };
        held.set(moved, bytes.slice());
        this.#depositedMemory.set(moved, () => held.delete(moved));
        this.#live.delete(memory);
        this.#weights -= memory.byteLength;
        this.#collected.unregister(memory);
        bytes.fill(POISON);
        return moved;
      },
      bring: () => {
        requireNotRecording("bringing weights");
        if (present) return;
        const all = held.keys().reduce((sum, { byteLength }) => sum + byteLength, 0);
        this.#requireRoom(all);
        this.#weights += all;
        for (const [memory, bytes] of held) {
          this.#live.add(memory);
          bytesOf(memory).set(bytes);
        }
        present = true;
      },
      leave: () => {
        requireNotRecording("offloading");
        if (!present) return;
        for (const memory of held.keys()) {
          this.#live.delete(memory);
          this.#weights -= memory.byteLength;
          bytesOf(memory).fill(POISON);
        }
        present = false;
      },
    };
  }

  /** Fails unless memory is this device's, and was not freed. */
  requireLive(memory: Memory, what: string): void {
    this.requireOpen();
    if (memory.device !== this.device) throw new FfiError(`${what}: a tensor lies on ${memory.device.name}`);
    if (!this.#live.has(memory)) throw new FfiError(`${what}: a tensor's memory was freed`);
  }
}
