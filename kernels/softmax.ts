import type { DType } from "../ffi/dtype.ts";
import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import { launch, vectorWidth } from "./gpu.ts";
import { rowLaunch } from "./rows.ts";
import SOFTMAX_CU from "./softmax.cu" with { type: "text" };

const SOURCE = { name: "softmax.cu", text: SOFTMAX_CU };
/** Rows of texts have up to so many keys, and always the same number; those of pictures have more. */
const MOST_TEXT = 512;
/** A picture's row: one kernel for all sizes of pictures, whose threads hold up to so many vectors each. */
const HELD = { THREADS: 512, BLOCK: 512, VECTORS: 8 };
/** One that is too long for these. */
const LONG = { THREADS: 1024, BLOCK: 1024, VECTORS: 1 };

/**
 * Softmax of attention logits on a GPU. What it computes is softmaxRows in attention.ts, for each head.
 *
 * @param logits dense f32 `[heads, rows, keys]`; they are overwritten.
 * @param dtype of the result. @param bias added to the logits, of the same shape.
 * @param causalStart row `i` of each head sees keys up to `causalStart + i`; all keys when left out.
 * @returns the same shape in `dtype`; for f32 it is `logits`.
 * @throws ShapeError for a bias of another shape.
 */
export function softmaxOnGpu(
  gpu: GpuDevice,
  logits: Tensor,
  dtype: DType,
  bias?: Tensor,
  causalStart?: number,
): Tensor {
  const [heads, rows, keys] = logits.shape;
  if (bias !== undefined) expectShape("softmax", "bias", bias, logits.shape);
  const out = dtype === "f32" ? logits : Tensor.empty(gpu, logits.shape, dtype);
  gpu.scope(() => {
    const added = bias === undefined ? undefined : denseRows(bias);
    const width = vectorWidth(keys, [out, logits, added]);
    const types = { T: dtype, B: added?.dtype ?? "f32" };
    const [biasHead, biasRow] = added?.strides ?? [0, 0];
    const options = [rows, BigInt(biasHead), BigInt(biasRow), causalStart ?? -1];
    const vectors = keys / width;
    if (keys > MOST_TEXT && vectors > HELD.BLOCK * HELD.VECTORS) {
      launch(gpu, SOURCE, {
        entry: "softmaxLongRows",
        types,
        constants: { ...LONG, N: width },
        grid: heads * rows,
        block: LONG.BLOCK,
        args: [out, logits, added, keys, ...options],
      });
    } else {
      const { constants, grid, block } = keys > MOST_TEXT
        ? { constants: HELD, grid: heads * rows, block: HELD.BLOCK }
        : rowLaunch(gpu.limits, heads * rows, vectors);
      launch(gpu, SOURCE, {
        entry: "softmaxRows",
        types,
        constants: { ...constants, N: width },
        grid,
        block,
        args: [out, logits, added, heads * rows, keys, ...options],
      });
    }
  });
  return out;
}
