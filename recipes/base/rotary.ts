import type { Device, MemoryPurpose } from "../../ffi/device.ts";
import { Tensor } from "../../ffi/tensor.ts";

/** Rotary tables of a sequence, f32 `[tokens, headDim]` each, every frequency twice (for the two of its pair). */
export interface Rotary {
  /** Cosines of the angles. */
  readonly cos: Tensor;
  /** Sines of the angles. */
  readonly sin: Tensor;
}

/** Base of the frequencies: FLUX.1's. */
const THETA = 10000;

/**
 * Rotary tables for positions on several axes (Black Forest Labs' EmbedND, diffusers' FluxPosEmbed): each axis turns
 * its own slice of a head. Angles in double precision, as diffusers has them.
 *
 * @param ids `[tokens, axes]` positions, row-major. @param axesDims widths of the slices; they add up to headDim.
 * @param purpose of the memory.
 */
export function rotaryEmbedding(
  device: Device,
  ids: Float32Array,
  axesDims: readonly number[],
  purpose: MemoryPurpose = "activations",
): Rotary {
  const { cos, sin } = rotaryTables(ids, axesDims);
  const headDim = axesDims.reduce((a, b) => a + b, 0);
  const shape = [ids.length / axesDims.length, headDim];
  const table = (values: Float32Array<ArrayBuffer>) =>
    Tensor.fromBytes(device, new Uint8Array(values.buffer), shape, "f32", purpose);
  return { cos: table(cos), sin: table(sin) };
}

/** The numbers of {@link rotaryEmbedding}, row-major. */
export function rotaryTables(
  ids: Float32Array,
  axesDims: readonly number[],
): { cos: Float32Array<ArrayBuffer>; sin: Float32Array<ArrayBuffer> } {
  const axes = axesDims.length;
  const tokens = ids.length / axes;
  const headDim = axesDims.reduce((a, b) => a + b, 0);
  const cos = new Float32Array(tokens * headDim);
  const sin = new Float32Array(tokens * headDim);
  const starts = axesDims.map((_, axis) => axesDims.slice(0, axis).reduce((a, b) => a + b, 0));
  axesDims.forEach((width, axis) => {
    const frequencies = Float64Array.from({ length: width / 2 }, (_, i) => 1 / THETA ** (2 * i / width));
    // Pictures have few positions on an axis, and many tokens: each slice is computed once and copied.
    const first = new Map<number, number>();
    for (let token = 0; token < tokens; token++) {
      const at = token * headDim + starts[axis];
      const position = ids[token * axes + axis];
      const known = first.get(position);
      if (known !== undefined) {
        cos.copyWithin(at, known, known + width);
        sin.copyWithin(at, known, known + width);
        continue;
      }
      first.set(position, at);
      frequencies.forEach((frequency, i) => {
        const angle = position * frequency;
        cos[at + 2 * i] = cos[at + 2 * i + 1] = Math.cos(angle);
        sin[at + 2 * i] = sin[at + 2 * i + 1] = Math.sin(angle);
      });
    }
  });
  return { cos, sin };
}
