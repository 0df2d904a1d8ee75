import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import { readFloat32 } from "./cpu.ts";
import { gpuOf, launch, vectorWidth } from "./gpu.ts";
import RELATIVE_CHANGE_CU from "./relative_change.cu" with { type: "text" };

const SOURCE = { name: "relative_change.cu", text: RELATIVE_CHANGE_CU };
const BLOCK = 256;
/** Blocks for each multiprocessor: enough to read at the memory's rate. */
const BLOCKS = 4;

/**
 * How much `x` differs from what it was `before`, of the same shape and dtype: `mean |x - before| / mean |before|`. Only a
 * few numbers come to the host.
 *
 * @returns NaN where something is NaN, or where all of both is 0.
 * @throws ShapeError
 */
export async function relativeChange(x: Tensor, before: Tensor): Promise<number> {
  expectShape("relativeChange", "before", before, x.shape);
  expect(x.dtype === before.dtype, "relativeChange", () => `${x} and ${before} have different dtypes`);
  const gpu = gpuOf(x);
  if (gpu === undefined) return relativeChangeReference(readFloat32(x), readFloat32(before));
  const partial = gpu.scope(() => {
    const [now, then] = [x, before].map((one) => contiguous(one).reshape([one.size]));
    const width = vectorWidth(x.size, [now, then]);
    const blocks = Math.min(gpu.limits.multiprocessors * BLOCKS, Math.ceil(x.size / (width * BLOCK)));
    const out = Tensor.empty(gpu, [blocks, 2], "f32");
    launch(gpu, SOURCE, {
      entry: "relativeChange",
      types: { T: x.dtype },
      constants: { N: width, BLOCK },
      grid: blocks,
      block: BLOCK,
      args: [out, now, then, BigInt(x.size / width)],
    });
    return out;
  });
  try {
    const sums = new Float32Array((await gpu.download(partial)).buffer);
    let [difference, size] = [0, 0];
    for (let i = 0; i < sums.length; i += 2) {
      difference += sums[i];
      size += sums[i + 1];
    }
    return difference / size;
  } finally {
    partial.dispose();
  }
}

/** Sums in double precision. */
export function relativeChangeReference(x: Float32Array, before: Float32Array): number {
  let [difference, size] = [0, 0];
  for (let i = 0; i < x.length; i++) {
    difference += Math.abs(x[i] - before[i]);
    size += Math.abs(before[i]);
  }
  return difference / size;
}
