import type { GpuDevice, KernelSource } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { contiguous } from "./contiguous.ts";
import { launch, vectorWidth } from "./gpu.ts";

const BLOCK = 256;
/** Blocks for each multiprocessor: enough to read at the memory's rate. */
const BLOCKS = 4;

/**
 * Launches a kernel that reads tensors of one size and dtype element by element, and stores what each block found: what is
 * left to reduce on the host is a few numbers.
 *
 * @param entry a kernel of `(float* out, const T* ..., long vectors)`, specialised by T, N (elements of a vector) and BLOCK.
 * @param numbers how many each block stores. @returns `[blocks, numbers]` f32, its caller's to free.
 */
export function partials(
  gpu: GpuDevice,
  source: KernelSource,
  entry: string,
  tensors: readonly Tensor[],
  numbers: number,
): Tensor {
  const [{ size, dtype }] = tensors;
  return gpu.scope(() => {
    const flat = tensors.map((tensor) => contiguous(tensor).reshape([size]));
    const width = vectorWidth(size, flat);
    const blocks = Math.min(gpu.limits.multiprocessors * BLOCKS, Math.ceil(size / (width * BLOCK)));
    const out = Tensor.empty(gpu, [blocks, numbers], "f32");
    launch(gpu, source, {
      entry,
      types: { T: dtype },
      constants: { N: width, BLOCK },
      grid: blocks,
      block: BLOCK,
      args: [out, ...flat, BigInt(size / width)],
    });
    return out;
  });
}
