import type { Tensor } from "../tensor.ts";
import type { CpuMemory } from "./device.ts";

/** The elements of a small f32 or bf16 tensor of one dimension (a bias), at any stride and any alignment, as f32. */
export function readVector(tensor: Tensor): Float32Array<ArrayBuffer> {
  const { buffer, byteOffset } = tensor.memory as CpuMemory;
  const bytes = new DataView(buffer, byteOffset);
  const values = new Float32Array(tensor.size);
  const step = tensor.strides[0];
  if (tensor.dtype === "f32") {
    for (let i = 0; i < values.length; i++) {
      values[i] = bytes.getFloat32((tensor.offset + i * step) * 4, true);
    }
  } else {
    const bits = new Uint32Array(values.buffer);
    for (let i = 0; i < bits.length; i++) {
      bits[i] = bytes.getUint16((tensor.offset + i * step) * 2, true) << 16;
    }
  }
  return values;
}
