import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { onCpu } from "./cpu.ts";

/**
 * Rotary position embedding (Su et al. 2021) on neighbouring pairs: `(x0, x1)` turns by the angle of its position and
 * frequency, `(x0 cos - x1 sin, x1 cos + x0 sin)`.
 *
 * @param x `[batch, tokens, heads, headDim]`. @param cos `[tokens, headDim]` f32, each value twice, as diffusers has
 * it. @param sin `[tokens, headDim]` f32.
 * @returns `x`'s shape and dtype.
 */
export function rope(x: Tensor, cos: Tensor, sin: Tensor): Tensor {
  const [, tokens, heads, headDim] = x.shape;
  expect(headDim % 2 === 0, "rope", () => `head dim ${headDim} is odd`);
  expectShape("rope", "cos", cos, [tokens, headDim]);
  expectShape("rope", "sin", sin, [tokens, headDim]);
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  return onCpu(out, [x, cos, sin], (o, xs, c, s) => ropeReference(o, xs, c, s, heads, headDim));
}

/** `x` `[batch, tokens, heads, headDim]`, `cos` and `sin` `[tokens, headDim]`. */
export function ropeReference(
  out: Float32Array,
  x: Float32Array,
  cos: Float32Array,
  sin: Float32Array,
  heads: number,
  headDim: number,
): void {
  const tokens = cos.length / headDim;
  for (let row = 0; row < x.length / headDim; row++) {
    const at = row * headDim;
    const table = (Math.floor(row / heads) % tokens) * headDim;
    for (let i = 0; i < headDim; i += 2) {
      const [x0, x1] = [x[at + i], x[at + i + 1]];
      out[at + i] = x0 * cos[table + i] - x1 * sin[table + i];
      out[at + i + 1] = x1 * cos[table + i + 1] + x0 * sin[table + i + 1];
    }
  }
}
