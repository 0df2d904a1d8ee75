import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { onCpu } from "./cpu.ts";

/**
 * Adaptive scale and shift (Peebles & Xie 2022, DiT): `x * (1 + scale) + shift`, one scale and shift for each sample.
 *
 * @param x `[batch, tokens, hidden]`. @param scale `[batch, hidden]`. @param shift `[batch, hidden]`.
 * @returns `x`'s shape and dtype.
 */
export function modulate(x: Tensor, scale: Tensor, shift: Tensor): Tensor {
  const [batch, tokens, hidden] = x.shape;
  expectShape("modulate", "scale", scale, [batch, hidden]);
  expectShape("modulate", "shift", shift, [batch, hidden]);
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  return onCpu(out, [x, scale, shift], (o, xs, a, b) => modulateReference(o, xs, a, b, tokens, hidden));
}

/** `x` `[batch, tokens, hidden]`, `scale` and `shift` `[batch, hidden]`. */
export function modulateReference(
  out: Float32Array,
  x: Float32Array,
  scale: Float32Array,
  shift: Float32Array,
  tokens: number,
  hidden: number,
): void {
  for (let row = 0; row < x.length / hidden; row++) {
    const at = row * hidden;
    const sample = Math.floor(row / tokens) * hidden;
    for (let i = 0; i < hidden; i++) out[at + i] = x[at + i] * (1 + scale[sample + i]) + shift[sample + i];
  }
}
