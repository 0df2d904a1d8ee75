import { Float } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import ACTIVATION_CU from "./activation.cu" with { type: "text" };
import ACTIVATION_WAT from "./activation.wat" with { type: "text" };
import { onCpu } from "./cpu.ts";
import { launchElementwise } from "./elementwise.ts";
import { gpuOf } from "./gpu.ts";
import { address, elementSize, share, wasmKernels } from "./wasm.ts";

const SOURCE = { name: "activation.cu", text: ACTIVATION_CU };

/**
 * `x * sigmoid(c1 x + c3 x^3)` element by element, which SiLU and both GELUs are; `reference` computes the same.
 *
 * @param out where the result is stored, which may be a dense `x` itself; allocated when left out.
 * @returns `x`'s shape (dense) and dtype, computed in f32.
 */
export function activate(
  x: Tensor,
  c1: number,
  c3: number,
  reference: (out: Float32Array, x: Float32Array) => void,
  out: Tensor = Tensor.empty(x.device, x.shape, x.dtype),
): Tensor {
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    launchElementwise(gpu, SOURCE, {
      entry: "activate",
      types: { T: x.dtype },
      out,
      inputs: [x],
      args: [new Float(c1), new Float(c3)],
    });
    return out;
  }
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
