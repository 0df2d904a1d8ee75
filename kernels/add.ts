import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import ADD_CU from "./add.cu" with { type: "text" };
import { expect, expectShape } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import { eachPiece, onCpu } from "./cpu.ts";
import { blockSize, gpuOf, launch, vectorWidth } from "./gpu.ts";
import { inFlight, MOST_BLOCKS_Y } from "./launch_shapes.ts";
import { isChannelsLast, NCHW, NHWC } from "./layout.ts";

const SOURCE = { name: "add.cu", text: ADD_CU };

/**
 * Sum of two tensors. `b`'s shape equals `a`'s or its last dimensions (a position embedding `[tokens, hidden]` under
 * `[batch, tokens, hidden]`).
 *
 * @param place where the sum is stored, of `a`'s shape and dtype and laid out as the result is; it may be `a`. Allocated when
 * left out.
 * @returns `a`'s shape and dtype; dense, or with the channels last where both are pictures and `a` is so.
 */
export function add(a: Tensor, b: Tensor, place?: Tensor): Tensor {
  const suffix = a.shape.slice(a.rank - b.rank);
  expect(
    b.rank <= a.rank && suffix.every((size, dim) => size === b.shape[dim]),
    "add",
    () => `${b} is not a suffix of ${a}`,
  );
  if (place !== undefined) expectShape("add", "place", place, a.shape);
  if (isChannelsLast(a) && b.rank === a.rank) {
    return add(a.permute(NHWC), b.permute(NHWC), place?.permute(NHWC)).permute(NCHW);
  }
  const out = place ?? Tensor.empty(a.device, a.shape, a.dtype);
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    addOnGpu(gpu, out, a, b);
    return out;
  }
  if (b.size === a.size && a.isContiguous && b.isContiguous) {
    eachPiece(out, [a, b], (o, x, y) => void onCpu(o, [x, y], addReference));
    return out;
  }
  return onCpu(out, [a, b], addReference);
}

function addOnGpu(gpu: GpuDevice, out: Tensor, a: Tensor, b: Tensor): void {
  if (out.size === 0) return;
  gpu.scope(() => {
    const [to, x, y] = [out, contiguous(a), contiguous(b)].map((tensor) => tensor.reshape([tensor.size]));
    const width = vectorWidth(b.size, [to, x, y]);
    const count = b.size / width;
    const repeats = a.size / b.size;
    const VECTORS = inFlight(gpu, count * repeats);
    const block = blockSize(gpu, Math.ceil(count / VECTORS));
    launch(gpu, SOURCE, {
      entry: "add",
      types: { T: a.dtype, U: b.dtype },
      constants: { N: width, VECTORS },
      grid: [Math.ceil(count / (block * VECTORS)), Math.min(repeats, MOST_BLOCKS_Y)],
      block,
      args: [to, x, y, BigInt(count), BigInt(repeats)],
    });
  });
}

/** `b` repeats along `a`. */
export function addReference(out: Float32Array, a: Float32Array, b: Float32Array): void {
  for (let start = 0; start < a.length; start += b.length) {
    for (let i = 0; i < b.length; i++) out[start + i] = a[start + i] + b[i];
  }
}
