import { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import { onCpu } from "./cpu.ts";
import { launchElementwise } from "./elementwise.ts";
import EULER_STEP_CU from "./euler_step.cu" with { type: "text" };
import { gpuOf } from "./gpu.ts";

const SOURCE = { name: "euler_step.cu", text: EULER_STEP_CU };

/**
 * One explicit Euler step of the flow's ODE: `sample + dt * velocity`.
 *
 * @param sample f32, any shape. @param velocity the same shape, the model's output.
 * @param dt f32 `[1]`, `sigma_next - sigma`; on the device, so that one recorded graph serves every step.
 * @returns f32 in `sample`'s shape.
 */
export function eulerStep(sample: Tensor, velocity: Tensor, dt: Tensor): Tensor {
  expectShape("eulerStep", "velocity", velocity, sample.shape);
  expectShape("eulerStep", "dt", dt, [1]);
  const out = Tensor.empty(sample.device, sample.shape, "f32");
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    const floats = sample.dtype === "f32" && dt.dtype === "f32";
    expect(floats, "eulerStep", () => `sample is ${sample} and dt ${dt}, expected f32`);
    launchElementwise(gpu, SOURCE, {
      entry: "eulerStep",
      types: { T: velocity.dtype },
      out,
      inputs: [sample, velocity],
      args: [dt],
    });
    return out;
  }
  return onCpu(out, [sample, velocity, dt], eulerStepReference);
}

/** Element by element. */
export function eulerStepReference(
  out: Float32Array,
  sample: Float32Array,
  velocity: Float32Array,
  dt: Float32Array,
): void {
  const [step] = dt;
  for (let i = 0; i < sample.length; i++) out[i] = sample[i] + step * velocity[i];
}
