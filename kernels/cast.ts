import type { Memory } from "../ffi/device.ts";
import type { DType } from "../ffi/dtype.ts";
import { Tensor } from "../ffi/tensor.ts";
import CAST_CU from "./cast.cu" with { type: "text" };
import { expect } from "./check.ts";
import { convert, eachPiece, readFloat32, writeFloat32 } from "./cpu.ts";
import { launchElementwise } from "./elementwise.ts";
import { gpuOf } from "./gpu.ts";

const SOURCE = { name: "cast.cu", text: CAST_CU };
/** What the kernel rounds to. */
const TARGETS: readonly DType[] = ["f32", "bf16", "f16", "f8e4m3"];

/**
 * The same values in another dtype, rounded to nearest, ties to even; in E4M3, which has no infinities, what is larger
 * than the largest (448, or 240 on GPUs whose E4M3 ends there) becomes that. The tensor itself where it has the dtype.
 *
 * @param memory where the result is stored; allocated as an activation when left out.
 * @returns a dense tensor. @throws ShapeError for a target that no kernel writes.
 */
export function cast(x: Tensor, dtype: DType, memory?: Memory): Tensor {
  if (x.dtype === dtype) return x;
  const out = memory === undefined
    ? Tensor.empty(x.device, x.shape, dtype)
    : new Tensor(memory, dtype, x.shape);
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    expect(TARGETS.includes(dtype), "cast", () => `no kernel writes ${dtype}, only ${TARGETS.join(", ")}`);
    launchElementwise(gpu, SOURCE, { entry: "cast", types: { T: dtype, U: x.dtype }, out, inputs: [x] });
    return out;
  }
  if (x.isContiguous) eachPiece(out, [x], convert);
  else writeFloat32(out, readFloat32(x));
  return out;
}
