/** A piece of the emulated GPU's memory: host bytes between guards, all ones (NaN) until somebody writes them. */
import type { Device, Memory, MemoryPurpose } from "../../ffi/device.ts";
import { FfiError } from "../../ffi/errors.ts";
import { addressOf } from "./emulated_arguments.ts";

/** NaN in every float dtype, -1 as an integer. */
export const POISON = 0xff;
/** Bytes of poison in front of and behind each allocation. */
const GUARD = 256;
/** As a GPU aligns what it allocates. */
const ALIGNMENT = 256;

/** What {@link GpuDevice.alloc} gives: host bytes between guards. */
export interface EmulatedMemory extends Memory {
  readonly purpose: MemoryPurpose | "deposited";
  /** The bytes with their guards. */
  readonly guarded: Uint8Array<ArrayBuffer>;
}

/** Fresh memory. */
export function allocate(device: Device, byteLength: number, purpose: MemoryPurpose): EmulatedMemory {
  const bytes = new Uint8Array(byteLength + 2 * GUARD + ALIGNMENT).fill(POISON);
  const address = addressOf(bytes);
  const lead = Number(-address & BigInt(ALIGNMENT - 1));
  return {
    device,
    pointer: address + BigInt(lead + GUARD),
    byteLength,
    purpose,
    guarded: bytes.subarray(lead, lead + byteLength + 2 * GUARD),
  };
}

/** Gives the host's bytes back now. */
export function giveBack(memory: Memory): void {
  (memory as EmulatedMemory).guarded.buffer.transfer(0);
}

/** An allocation's bytes, without its guards. */
export function bytesOf(memory: Memory): Uint8Array<ArrayBuffer> {
  return (memory as EmulatedMemory).guarded.subarray(GUARD, GUARD + memory.byteLength);
}

/** Fails where a guard was written, and repairs it, so that the next launch is not blamed. */
export function requireGuards(what: string, memory: Memory): void {
  const { guarded } = memory as EmulatedMemory;
  const [before, after] = [guarded.subarray(0, GUARD), guarded.subarray(guarded.length - GUARD)];
  const low = before.findLastIndex((byte) => byte !== POISON);
  const high = after.findIndex((byte) => byte !== POISON);
  if (low < 0 && high < 0) return;
  before.fill(POISON);
  after.fill(POISON);
  const where = low >= 0 ? `${GUARD - low} bytes before the start` : `${high} bytes behind the end`;
  throw new FfiError(`${what} wrote ${where} of a tensor's memory (${memory.byteLength} bytes)`);
}
