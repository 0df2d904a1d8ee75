import { Float, type GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import ACTIVATION_CU from "./activation.cu" with { type: "text" };
import ACTIVATION_WAT from "./activation.wat" with { type: "text" };
import { expect, expectShape } from "./check.ts";
import { launchTuned } from "./coordinate_descent.ts";
import { onCpu } from "./cpu.ts";
import { blockSize, gpuOf, launch, vectorWidth } from "./gpu.ts";
import { inFlight, MOST_BLOCKS_Y } from "./launch_shapes.ts";
import { rowsOf } from "./rows.ts";
import { address, elementSize, share, wasmKernels } from "./wasm.ts";

const SOURCE = { name: "activation.cu", text: ACTIVATION_CU };
/** Threads of a block, at most, where nothing is measured. */
const MOST_THREADS = 256;

/** How a launch shares out its work: pieces that a thread loads before it uses the first, and a block's most threads. */
interface Shape extends Record<string, number> {
  readonly VECTORS: number;
  readonly most: number;
}

/** What 07_tuning tries. */
const SHAPES = { VECTORS: [1, 2, 4, 8], most: [128, 256, 512] };

/**
 * `x * sigmoid(c1 x + c3 x^3)` element by element, which SiLU and both GELUs are; `reference` computes the same.
 *
 * @param out where the result is stored, in `x`'s shape and dtype, which may be `x` itself: dense, or on a GPU the columns
 *   of a wider tensor; allocated when left out.
 * @returns `out`: `x`'s shape and dtype, computed in f32.
 * @throws ShapeError for an `out` that does not fit.
 */
export function activate(
  x: Tensor,
  c1: number,
  c3: number,
  reference: (out: Float32Array, x: Float32Array) => void,
  out: Tensor = Tensor.empty(x.device, x.shape, x.dtype),
): Tensor {
  expectShape("activation", "out", out, x.shape);
  expect(out.dtype === x.dtype, "activation", () => `out is ${out}, x is ${x}`);
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    activateOnGpu(gpu, out, x, c1, c3);
    return out;
  }
  expect(out.isContiguous, "activation", () => `the CPU does not store into strided ${out}`);
  const wasm = wasmKernels("activation.wat", ACTIVATION_WAT, out, [x]);
  if (wasm === undefined) return onCpu(out, [x], reference);
  const { perJob, jobs } = share(x.size, 1);
  wasm.runner.run(
    wasm.kernels.activate,
    jobs,
    [address(x), address(out), x.size, perJob, elementSize(x), c1, c3],
  );
  return out;
}

function activateOnGpu(gpu: GpuDevice, out: Tensor, x: Tensor, c1: number, c3: number): void {
  if (out.size === 0) return;
  gpu.scope(() => {
    const source = x.isContiguous ? x : rowsOf(x).source;
    const dense = out.isContiguous && source.isContiguous;
    const [to, from] = [out, source].map((tensor) =>
      rowsOf(dense ? tensor.reshape([1, tensor.size]) : tensor)
    );
    expect(to.source.memory === out.memory, "activation", () => `the rows of out, ${out}, are not dense`);
    const columns = out.size / to.count;
    const width = vectorWidth(columns, [to.source, from.source]);
    const count = columns / width;
    const rows = [to, from].flatMap(({ inner, outerStride, innerStride }) => [
      inner,
      BigInt(outerStride),
      BigInt(innerStride),
    ]);
    const issue = ({ VECTORS, most }: Shape) => {
      // As many threads in each of a row's blocks, so that the last one is not mostly idle.
      const threads = Math.ceil(count / VECTORS);
      const block = blockSize(gpu, Math.ceil(threads / Math.ceil(threads / most)));
      launch(gpu, SOURCE, {
        entry: "activate",
        types: { T: x.dtype },
        constants: { N: width, VECTORS },
        grid: [Math.ceil(count / (block * VECTORS)), Math.min(to.count, MOST_BLOCKS_Y)],
        block,
        args: [out, source, BigInt(count), to.count, ...rows, new Float(c1), new Float(c3)],
      });
    };
    launchTuned<Shape>(gpu, {
      key: `activate ${x} [${x.strides}] to [${out.strides}] by ${width}`,
      out,
      inputs: [source],
      start: { VECTORS: inFlight(gpu, count * to.count), most: MOST_THREADS },
      values: SHAPES,
      issue,
    });
  });
}
