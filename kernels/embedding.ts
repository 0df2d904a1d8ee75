import { viewOf } from "../ffi/cpu/device.ts";
import { dtypeBytes } from "../ffi/dtype.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";

/**
 * Rows of a table by index.
 *
 * @param ids i32, any shape. @param table `[vocabulary, hidden]`.
 * @returns `[...ids, hidden]` in the table's dtype. @throws ShapeError for an index outside the table.
 */
export function embedding(ids: Tensor, table: Tensor): Tensor {
  expectShape("embedding", "table", table, [null, null]);
  expect(ids.dtype === "i32" && ids.isContiguous, "embedding", () => `ids are ${ids}, expected dense i32`);
  const [vocabulary, hidden] = table.shape;
  const out = Tensor.empty(ids.device, [...ids.shape, hidden], table.dtype);
  const rowBytes = hidden * dtypeBytes(table.dtype);
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
