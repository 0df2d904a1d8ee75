/**
 * What an AMD code object says of its kernels: it is ELF with a note of MessagePack (LLVM's User Guide for AMDGPU Backend, "Code
 * Object Metadata"). Only what a launch of somebody else's kernel has to be checked against is read, by looking for the key.
 */

/** Of a kernel. */
export interface KernelMetadata {
  /** Bytes of its arguments. */
  readonly argumentBytes: number;
}

const [UINT8, UINT16, UINT32] = [0xcc, 0xcd, 0xce];

/** The metadata of the code object's kernel; undefined where there is none, or several that differ. */
export function kernelMetadata(image: Uint8Array): KernelMetadata | undefined {
  const found = new Set(numbersBehind(image, ".kernarg_segment_size"));
  const [argumentBytes] = found;
  return found.size === 1 ? { argumentBytes } : undefined;
}

/** The numbers that stand behind a key. */
function* numbersBehind(image: Uint8Array, key: string): Generator<number> {
  const view = new DataView(image.buffer, image.byteOffset, image.byteLength);
  const text = new TextEncoder().encode(key);
  for (let at = image.indexOf(text[0]); at >= 0; at = image.indexOf(text[0], at + 1)) {
    const end = at + text.length;
    if (end + 5 > image.length || !text.every((byte, i) => image[at + i] === byte)) continue;
    const tag = image[end];
    if (tag < 0x80) yield tag;
    else if (tag === UINT8) yield view.getUint8(end + 1);
    else if (tag === UINT16) yield view.getUint16(end + 1);
    else if (tag === UINT32) yield view.getUint32(end + 1);
  }
}
