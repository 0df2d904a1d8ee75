import { Float } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { onCpu } from "./cpu.ts";
import { launchElementwise } from "./elementwise.ts";
import { gpuOf } from "./gpu.ts";
import SCALE_SHIFT_CU from "./scale_shift.cu" with { type: "text" };

const SOURCE = { name: "scale_shift.cu", text: SCALE_SHIFT_CU };

/** `x * scale + shift` with two numbers; `x`'s shape and dtype, computed in f32. */
export function scaleShift(x: Tensor, scale: number, shift: number): Tensor {
  const out = Tensor.empty(x.device, x.shape, x.dtype);
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    launchElementwise(gpu, SOURCE, {
      entry: "scaleShift",
      types: { T: x.dtype },
      out,
      inputs: [x],
      args: [new Float(scale), new Float(shift)],
    });
    return out;
  }
  return onCpu(out, [x], (o, xs) => scaleShiftReference(o, xs, scale, shift));
}

/** Element by element. */
export function scaleShiftReference(out: Float32Array, x: Float32Array, scale: number, shift: number): void {
  for (let i = 0; i < x.length; i++) out[i] = x[i] * scale + shift;
}
