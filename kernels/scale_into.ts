import { Float } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect } from "./check.ts";
import { copyInto } from "./copy_into.ts";
import { onCpu } from "./cpu.ts";
import { gpuOf, launch } from "./gpu.ts";
import SCALE_INTO_CU from "./scale_into.cu" with { type: "text" };

const SOURCE = { name: "scale_into.cu", text: SCALE_INTO_CU };
const BLOCK = 256;

/**
 * Stores `scale * x` into the upper left corner of `out`, rounded to its dtype, and zeros into the rest of it. One compiled
 * kernel serves all sizes, so that a new one costs no time.
 *
 * @param out `[rows, columns]`, f32 or bf16, rows dense at any distance. @param x `[at most rows, at most columns]`, f32, bf16
 * or f16, dense.
 */
export function scaleInto(out: Tensor, x: Tensor, scale: number): void {
  const [rows, columns] = out.shape;
  const [xRows, xColumns] = x.shape;
  expect(
    out.rank === 2 && x.rank === 2 && xRows <= rows && xColumns <= columns && x.isContiguous &&
      (out.strides[1] === 1 || columns === 1),
    "scaleInto",
    () => `${x} is no dense matrix that fits into ${out}`,
  );
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    launch(gpu, SOURCE, {
      entry: "scaleInto",
      types: { T: out.dtype, U: x.dtype },
      grid: Math.ceil(rows * columns / BLOCK),
      block: BLOCK,
      args: [out, x, new Float(scale), rows, columns, BigInt(out.strides[0]), xRows, xColumns],
    });
    return;
  }
  out.device.scope(() => {
    const dense = Tensor.empty(out.device, out.shape, out.dtype);
    copyInto(out, onCpu(dense, [x], (o, values) => scaleIntoReference(o, values, scale, columns, xColumns)));
  });
}

/** `x` of rows of `xColumns` into `out`, dense, of rows of `columns`. */
export function scaleIntoReference(
  out: Float32Array,
  x: Float32Array,
  scale: number,
  columns: number,
  xColumns: number,
): void {
  out.fill(0);
  const factor = Math.fround(scale);
  for (let row = 0; row * xColumns < x.length && xColumns > 0; row++) {
    for (let column = 0; column < xColumns; column++) {
      out[row * columns + column] = factor * x[row * xColumns + column];
    }
  }
}
