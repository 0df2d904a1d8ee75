import type { Device } from "../../ffi/device.ts";
import { Tensor } from "../../ffi/tensor.ts";

/** Rotary tables of a sequence, f32 `[tokens, headDim]` each, every frequency twice (for the two of its pair). */
export interface Rotary {
  readonly cos: Tensor;
  readonly sin: Tensor;
}

/** Base of the frequencies: FLUX.1's. */
const THETA = 10000;

/**
 * Rotary tables for positions on several axes (Black Forest Labs' EmbedND, diffusers' FluxPosEmbed): each axis turns
 * its own slice of a head. Angles in double precision, as diffusers has them.
 *
 * @param ids `[tokens, axes]` positions, row-major. @param axesDims widths of the slices; they add up to headDim.
 */
export function rotaryEmbedding(device: Device, ids: Float32Array, axesDims: readonly number[]): Rotary {
  const { cos, sin } = rotaryTables(ids, axesDims);
  const headDim = axesDims.reduce((a, b) => a + b, 0);
  const shape = [ids.length / axesDims.length, headDim];
  return {
    cos: Tensor.fromFloat32(device, cos, shape),
    sin: Tensor.fromFloat32(device, sin, shape),
  };
}

/** The numbers of {@link rotaryEmbedding}, row-major. */
export function rotaryTables(
  ids: Float32Array,
  axesDims: readonly number[],
): { cos: Float32Array; sin: Float32Array } {
  const axes = axesDims.length;
  const tokens = ids.length / axes;
  const headDim = axesDims.reduce((a, b) => a + b, 0);
  const cos = new Float32Array(tokens * headDim);
  const sin = new Float32Array(tokens * headDim);
  const frequencies = axesDims.map((width) =>
    Float64Array.from({ length: width / 2 }, (_, i) => 1 / THETA ** (2 * i / width))
  );
  let at = 0;
  for (let token = 0; token < tokens; token++) {
    for (let axis = 0; axis < axes; axis++) {
      const position = ids[token * axes + axis];
      for (const frequency of frequencies[axis]) {
        const angle = position * frequency;
        cos[at] = cos[at + 1] = Math.cos(angle);
        sin[at] = sin[at + 1] = Math.sin(angle);
        at += 2;
      }
    }
  }
  return { cos, sin };
}
