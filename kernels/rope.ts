import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import { onCpu } from "./cpu.ts";
import { gpuOf, launch, vectorWidth } from "./gpu.ts";
import ROPE_CU from "./rope.cu" with { type: "text" };

const SOURCE = { name: "rope.cu", text: ROPE_CU };
/** Heads that a thread turns with the same part of the tables, if there are so many. */
const HEADS = 4;
/** Threads of a block along headDim, and all of them, at most. */
const MOST_LANES = 256;
const MOST_THREADS = 512;

/**
 * Rotary position embedding (Su et al. 2021) on neighbouring pairs: `(x0, x1)` turns by the angle of its position and
 * frequency, `(x0 cos - x1 sin, x1 cos + x0 sin)`.
 *
 * @param x `[batch, tokens, heads, headDim]`; on a GPU a strided view with a dense last dimension is read where it is.
 * @param cos `[tokens, headDim]` f32, each value twice, as diffusers has it. @param sin `[tokens, headDim]` f32.
 * @returns `x`'s shape (dense) and dtype.
 * @throws ShapeError where the sizes do not fit, or for tables of another dtype on a GPU.
 */
export function rope(x: Tensor, cos: Tensor, sin: Tensor): Tensor {
  const [batch, tokens, heads, headDim] = x.shape;
  expect(headDim % 2 === 0, "rope", () => `head dim ${headDim} is odd`);
  expectShape("rope", "cos", cos, [tokens, headDim]);
  expectShape("rope", "sin", sin, [tokens, headDim]);
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  const gpu = gpuOf(out);
  if (gpu === undefined) {
    return onCpu(out, [x, cos, sin], (o, xs, c, s) => ropeReference(o, xs, c, s, heads, headDim));
  }
  expect(
    cos.dtype === "f32" && sin.dtype === "f32",
    "rope",
    () => `the tables are ${cos.dtype} and ${sin.dtype}, expected f32`,
  );
  gpu.scope(() => {
    const [source, cosines, sines] = [x, cos, sin].map(denseRows);
    const aligned = vectorWidth(headDim, [cosines, sines]) > 1;
    const width = aligned ? vectorWidth(headDim, [out, source]) : 1;
    const lanes = Math.min(MOST_LANES, headDim / width);
    const groups = Math.min(Math.ceil(heads / HEADS), Math.floor(MOST_THREADS / lanes));
    launch(gpu, SOURCE, {
      entry: "rope",
      types: { T: x.dtype },
      constants: { N: width, LANES: lanes, GROUPS: groups, HEADS: Math.ceil(heads / groups) },
      grid: batch * tokens,
      block: lanes * groups,
      args: [
        out,
        source,
        cosines,
        sines,
        tokens,
        heads,
        headDim,
        ...source.strides.slice(0, 3).map(BigInt),
        BigInt(cosines.strides[0]),
        BigInt(sines.strides[0]),
      ],
    });
  });
  return out;
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
