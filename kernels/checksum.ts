import { viewOf } from "../ffi/cpu/device.ts";
import type { Device, Memory } from "../ffi/device.ts";
import { isGpu } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import CHECKSUM_CU from "./checksum.cu" with { type: "text" };
import { launch } from "./gpu.ts";

const SOURCE = { name: "checksum.cu", text: CHECKSUM_CU };
const BLOCK = 256;
/** Blocks for each multiprocessor: enough to read at the memory's rate. */
const BLOCKS = 8;
/** Bytes that a thread loads at a time. */
const VECTOR_BYTES = 16;

/**
 * A checksum of each memory's bytes, where they are: on a GPU at the rate of its memory. It finds damage, not forgery: a
 * changed byte for certain, any other damage but once in 2^64.
 *
 * @returns 16 hexadecimal digits for each.
 */
export async function checksums(device: Device, memories: readonly Memory[]): Promise<string[]> {
  const bytes = memories.map((memory) => new Tensor(memory, "u8", [memory.byteLength]));
  if (!isGpu(device)) return bytes.map((all) => digits(checksumReference(viewOf(all, "u8", all.size))));
  if (memories.length === 0) return [];
  const sums = device.scope(() => {
    const out = Tensor.fromInt32(device, new Int32Array(2 * memories.length), [memories.length, 2]);
    bytes.forEach((all, i) => {
      const { size } = all;
      launch(device, SOURCE, {
        entry: "checksum",
        types: {},
        constants: { BLOCK },
        grid: Math.min(
          device.limits.multiprocessors * BLOCKS,
          Math.max(1, Math.ceil(size / (VECTOR_BYTES * BLOCK))),
        ),
        block: BLOCK,
        args: [out.narrow(0, i, 1), all, BigInt(size)],
      });
    });
    return out;
  });
  try {
    const words = new Uint32Array((await device.download(sums)).buffer);
    return memories.map((_, i) => digits([words[2 * i], words[2 * i + 1]]));
  } finally {
    sums.dispose();
  }
}

/** The two sums of checksum.cu; see there. */
export function checksumReference(bytes: Uint8Array): [sum: number, weighted: number] {
  let [sum, weighted] = [0, 0];
  for (let place = 0; 4 * place < bytes.length; place++) {
    const at = 4 * place;
    // Behind the end there are zeros.
    const word = bytes[at] | bytes[at + 1] << 8 | bytes[at + 2] << 16 | bytes[at + 3] << 24;
    let hash = word ^ Math.imul(place, 0x9e3779b1);
    hash = Math.imul(hash ^ hash >>> 16, 0x85ebca6b);
    hash = Math.imul(hash ^ hash >>> 13, 0xc2b2ae35);
    hash ^= hash >>> 16;
    sum = sum + hash | 0;
    weighted = weighted + Math.imul(hash, 2 * place + 1) | 0;
  }
  return [sum >>> 0, weighted >>> 0];
}

function digits(sums: readonly number[]): string {
  return sums.map((sum) => sum.toString(16).padStart(8, "0")).join("");
}
