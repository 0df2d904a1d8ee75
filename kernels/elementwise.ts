import type { DType } from "../ffi/dtype.ts";
import type { GpuDevice, KernelArgument, KernelSource } from "../ffi/gpu.ts";
import type { Tensor } from "../ffi/tensor.ts";
import { contiguous } from "./contiguous.ts";
import { launchTuned } from "./coordinate_descent.ts";
import { blockSize, launch, vectorWidth } from "./gpu.ts";
import { inFlight } from "./launch_shapes.ts";

/** How a launch shares out its work. */
interface Shape extends Record<string, number> {
  /** Pieces that a thread loads before it uses the first. */
  readonly VECTORS: number;
  /** Threads. */
  readonly block: number;
}

/** What 07_tuning tries. */
const SHAPES = { VECTORS: [1, 2, 4, 8], block: [128, 256, 512] };

/** A kernel `entry(out, ...inputs, long long count, ...args)` that walks dense tensors of one size side by side. */
export interface Elementwise {
  readonly entry: string;
  readonly types: Readonly<Record<string, DType>>;
  /** Dense. */
  readonly out: Tensor;
  /** Of `out`'s size; strided ones are copied first. */
  readonly inputs: readonly Tensor[];
  readonly args?: readonly KernelArgument[];
}

/**
 * Launches a kernel that computes each element of `out` from the elements at the same place of `inputs`. It gets the
 * constants `N` and `VECTORS` and `count`, the number of pieces of `N` elements.
 */
export function launchElementwise(gpu: GpuDevice, source: KernelSource, options: Elementwise): void {
  const { entry, types, out, inputs, args = [] } = options;
  if (out.size === 0) return;
  gpu.scope(() => {
    const flat = [out, ...inputs.map(contiguous)].map((tensor) => tensor.reshape([tensor.size]));
    const width = vectorWidth(out.size, flat);
    const count = out.size / width;
    const issue = ({ VECTORS, block }: Shape) =>
      launch(gpu, source, {
        entry,
        types,
        constants: { N: width, VECTORS },
        grid: Math.ceil(count / (block * VECTORS)),
        block,
        args: [...flat, BigInt(count), ...args],
      });
    const VECTORS = inFlight(gpu, count);
    launchTuned<Shape>(gpu, {
      key: `${source.name}:${entry} ${Object.values(types)} [${out.size}] by ${width}`,
      out,
      inputs,
      start: { VECTORS, block: blockSize(gpu, Math.ceil(count / VECTORS)) },
      values: SHAPES,
      issue,
    });
  });
}
