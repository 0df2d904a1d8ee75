import type { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { readFloat32 } from "./cpu.ts";
import { gpuOf } from "./gpu.ts";
import { partials } from "./partials.ts";
import RELATIVE_CHANGE_CU from "./relative_change.cu" with { type: "text" };

const SOURCE = { name: "relative_change.cu", text: RELATIVE_CHANGE_CU };

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
  const partial = partials(gpu, SOURCE, "relativeChange", [x, before], 2);
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
