import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import { onCpu } from "./cpu.ts";
import { gpuOf, launch, vectorWidth } from "./gpu.ts";
import { tokenLaunch } from "./launch_shapes.ts";
import MODULATE_CU from "./modulate.cu" with { type: "text" };

const SOURCE = { name: "modulate.cu", text: MODULATE_CU };

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
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    if (out.size === 0) return out;
    gpu.scope(() => {
      const [xs, a, b] = [x, scale, shift].map(denseRows);
      const width = vectorWidth(hidden, [out, xs, a, b]);
      const strides = [xs.strides[0], xs.strides[1], a.strides[0], b.strides[0]].map(BigInt);
      launch(gpu, SOURCE, {
        entry: "modulate",
        types: { T: x.dtype, S: scale.dtype, B: shift.dtype },
        ...tokenLaunch(gpu, x.shape, width),
        args: [out, xs, a, b, tokens, hidden, ...strides],
      });
    });
    return out;
  }
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
