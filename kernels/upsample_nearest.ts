import { isAligned, viewOf } from "../ffi/cpu/device.ts";
import { dtypeBytes } from "../ffi/dtype.ts";
import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import { onCpu } from "./cpu.ts";
import { gpuOf, launch } from "./gpu.ts";
import { IN_FLIGHT, rowBlock, wordBytes } from "./launch_shapes.ts";
import { isChannelsLast, NCHW, NHWC } from "./layout.ts";
import UPSAMPLE_NEAREST_CU from "./upsample_nearest.cu" with { type: "text" };

const SOURCE = { name: "upsample_nearest.cu", text: UPSAMPLE_NEAREST_CU };

/**
 * Each pixel becomes a square of 2 x 2.
 *
 * @param x `[batch, channels, height, width]`.
 * @returns `[batch, channels, 2 height, 2 width]`, `x`'s dtype, dense; on a GPU with the channels last where `x` is so.
 */
export function upsampleNearest(x: Tensor): Tensor {
  expectShape("upsampleNearest", "x", x, [null, null, null, null]);
  const [batch, channels, height, width] = x.shape;
  const gpu = gpuOf(x);
  if (gpu !== undefined && isChannelsLast(x)) {
    const out = Tensor.empty(gpu, [batch, 2 * height, 2 * width, channels], x.dtype);
    upsampleInterleaved(gpu, out, x.permute(NHWC));
    return out.permute(NCHW);
  }
  const out = Tensor.empty(x.device, [batch, channels, 2 * height, 2 * width], x.dtype);
  if (gpu !== undefined) {
    gpu.scope(() => upsamplePlanar(gpu, out, contiguous(x)));
    return out;
  }
  const unit = ({ 2: "bf16", 4: "i32" } as const)[dtypeBytes(x.dtype)]; // elements move as they are, bit by bit
  if (unit === undefined || !x.isContiguous || !isAligned(x, dtypeBytes(x.dtype))) {
    return onCpu(out, [x], (o, xs) => upsampleNearestReference(o, xs, width));
  }
  upsampleNearestReference(viewOf(out, unit, out.size), viewOf(x, unit, x.size), width);
  return out;
}

/** `out` and `x` dense `[batch, channels, ...]`. */
function upsamplePlanar(gpu: GpuDevice, out: Tensor, x: Tensor): void {
  const [batch, channels, height, width] = x.shape;
  const rows = batch * channels * height;
  const size = dtypeBytes(x.dtype);
  // What a thread stores at a time is twice what it loads.
  const stored = wordBytes([out.pointer, 2n * x.pointer, 2 * width * size]);
  const pixels = stored / 2 / size;
  const block = rowBlock(width / pixels);
  launch(gpu, SOURCE, {
    entry: "upsampleNearest",
    types: { T: x.dtype },
    constants: { N: pixels, ROWS: IN_FLIGHT },
    grid: Math.ceil(rows / (block[1] * IN_FLIGHT)),
    block,
    args: [out, x, rows, width],
  });
}

/** `out` and `x` dense `[batch, ..., channels]`. */
function upsampleInterleaved(gpu: GpuDevice, out: Tensor, x: Tensor): void {
  const [batch, height, width, channels] = x.shape;
  const rows = batch * height;
  const size = dtypeBytes(x.dtype);
  const N = wordBytes([out.pointer, x.pointer, channels * size]) / size;
  const vectors = width * channels / N;
  const block = rowBlock(vectors);
  launch(gpu, SOURCE, {
    entry: "upsampleNearestInterleaved",
    types: { T: x.dtype },
    constants: { N, ROWS: IN_FLIGHT },
    grid: [Math.ceil(rows / (block[1] * IN_FLIGHT)), Math.ceil(vectors / block[0])],
    block,
    args: [out, x, rows, width, channels],
  });
}

/** `x` `[rows, width]`, all pictures' rows behind one another; elements of any type. */
export function upsampleNearestReference<A extends Float32Array | Int32Array | Uint16Array>(
  out: A,
  x: A,
  width: number,
): void {
  for (let row = 0; row < x.length / width; row++) {
    const at = row * 4 * width;
    for (let i = 0; i < width; i++) out[at + 2 * i] = out[at + 2 * i + 1] = x[row * width + i];
    out.copyWithin(at + 2 * width, at, at + 2 * width);
  }
}
