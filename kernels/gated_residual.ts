import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import { onCpu } from "./cpu.ts";
import GATED_RESIDUAL_CU from "./gated_residual.cu" with { type: "text" };
import { gpuOf, launch, vectorWidth } from "./gpu.ts";
import { tokenLaunch } from "./launch_shapes.ts";

const SOURCE = { name: "gated_residual.cu", text: GATED_RESIDUAL_CU };

/**
 * Residual connection with adaLN-Zero's gate: `residual + gate * x`, one gate for each sample.
 *
 * @param residual `[batch, tokens, hidden]`. @param x `[batch, tokens, hidden]`. @param gate `[batch, hidden]`.
 * @returns `residual`'s shape and dtype.
 */
export function gatedResidual(residual: Tensor, x: Tensor, gate: Tensor): Tensor {
  const [batch, tokens, hidden] = residual.shape;
  expectShape("gatedResidual", "x", x, residual.shape);
  expectShape("gatedResidual", "gate", gate, [batch, hidden]);
  const out = Tensor.empty(x.device, x.shape, residual.dtype);
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    if (out.size === 0) return out;
    gpu.scope(() => {
      const [r, xs, g] = [residual, x, gate].map(denseRows);
      const width = vectorWidth(hidden, [out, r, xs, g]);
      const strides = [r.strides[0], r.strides[1], xs.strides[0], xs.strides[1], g.strides[0]].map(BigInt);
      launch(gpu, SOURCE, {
        entry: "gatedResidual",
        types: { T: residual.dtype, X: x.dtype, G: gate.dtype },
        ...tokenLaunch(gpu, x.shape, width),
        args: [out, r, xs, g, tokens, hidden, ...strides],
      });
    });
    return out;
  }
  return onCpu(
    out,
    [residual, x, gate],
    (o, r, xs, g) => gatedResidualReference(o, r, xs, g, tokens, hidden),
  );
}

/** `residual` and `x` `[batch, tokens, hidden]`, `gate` `[batch, hidden]`. */
export function gatedResidualReference(
  out: Float32Array,
  residual: Float32Array,
  x: Float32Array,
  gate: Float32Array,
  tokens: number,
  hidden: number,
): void {
  for (let row = 0; row < x.length / hidden; row++) {
    const at = row * hidden;
    const sample = Math.floor(row / tokens) * hidden;
    for (let i = 0; i < hidden; i++) out[at + i] = residual[at + i] + gate[sample + i] * x[at + i];
  }
}
