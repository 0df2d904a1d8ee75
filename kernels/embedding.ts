import { viewOf } from "../ffi/cpu/device.ts";
import { dtypeBytes } from "../ffi/dtype.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import EMBEDDING_CU from "./embedding.cu" with { type: "text" };
import { blockSize, gpuOf, launch } from "./gpu.ts";
import { wordBytes } from "./launch_shapes.ts";

const SOURCE = { name: "embedding.cu", text: EMBEDDING_CU };

/**
 * Rows of a table by index.
 *
 * @param ids i32, any shape. @param table `[vocabulary, hidden]`.
 * @returns `[...ids, hidden]` in the table's dtype. An index outside the table is a ShapeError on the CPU; on a GPU,
 * where the host cannot look at the ids without waiting, its row is NaN.
 * @throws ShapeError
 */
export function embedding(ids: Tensor, table: Tensor): Tensor {
  expectShape("embedding", "table", table, [null, null]);
  expect(ids.dtype === "i32" && ids.isContiguous, "embedding", () => `ids are ${ids}, expected dense i32`);
  const [vocabulary, hidden] = table.shape;
  const out = Tensor.empty(ids.device, [...ids.shape, hidden], table.dtype);
  const rowBytes = hidden * dtypeBytes(table.dtype);
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    if (out.size === 0) return out;
    gpu.scope(() => {
      const source = denseRows(table);
      const tableRow = source.strides[0] * dtypeBytes(table.dtype);
      const word = wordBytes([out.pointer, source.pointer, rowBytes, tableRow]);
      const words = rowBytes / word;
      launch(gpu, SOURCE, {
        entry: "embedding",
        types: {},
        constants: { BYTES: word },
        grid: ids.size,
        block: blockSize(gpu, words),
        args: [out, ids, source, vocabulary, words, BigInt(tableRow)],
      });
    });
    return out;
  }
  const rows = viewOf(table, "u8", table.byteLength);
  const target = viewOf(out, "u8", out.byteLength);
  viewOf(ids, "i32", ids.size).forEach((id, i) => {
    expect(
      id >= 0 && id < vocabulary,
      "embedding",
      () => `index ${id} is outside a table of ${vocabulary} rows`,
    );
    target.set(rows.subarray(id * rowBytes, (id + 1) * rowBytes), i * rowBytes);
  });
  return out;
}
