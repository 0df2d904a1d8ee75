import type { DType } from "../ffi/dtype.ts";
import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import { launch, vectorWidth } from "./gpu.ts";
import { rowLaunch } from "./rows.ts";
import SOFTMAX_CU from "./softmax.cu" with { type: "text" };

const SOURCE = { name: "softmax.cu", text: SOFTMAX_CU };
/** Keys of a row that the threads of a block hold in registers: 32 each. */
const MOST_HELD = 32 * 1024;
const LONG_ROW_BLOCK = 1024;

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
    if (keys > MOST_HELD) {
      launch(gpu, SOURCE, {
        entry: "softmaxLongRows",
        types,
        constants: { N: width, THREADS: LONG_ROW_BLOCK, BLOCK: LONG_ROW_BLOCK, VECTORS: 1 },
        grid: heads * rows,
        block: LONG_ROW_BLOCK,
        args: [out, logits, added, keys, ...options],
      });
    } else {
      const { constants, grid, block } = rowLaunch(gpu.limits, heads * rows, keys / width);
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
