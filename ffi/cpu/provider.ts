import type { ConvPlan, DeviceProperties, MatmulPlan, Memory } from "../device.ts";
import { ShapeError } from "../errors.ts";
import type { Tensor } from "../tensor.ts";

/**
 * What computes matrix products and convolutions on the CPU: oneDNN where a libdnnl is found, else WebAssembly.
 * Calls return when the work is done. Plans have been checked by the operator's launcher.
 */
export interface CpuProvider extends Disposable {
  properties(): DeviceProperties;
  matmul(plan: MatmulPlan): void;
  conv(plan: ConvPlan): void;
  /** `memory` is being freed: what was made of it (packed weights) goes too. */
  forget?(memory: Memory): void;
  /** Bytes of packed weights, in the device's WebAssembly memory or outside of it. */
  packedBytes?(): number;
  /** Gives packed weights in the device's WebAssembly memory back; false where there are none. */
  trim?(): boolean;
}

/** Throws {@link ShapeError} with the name of the call unless all tensors are of a dtype that providers compute in. */
export function requireFloat(op: string, ...tensors: (Tensor | undefined)[]): void {
  for (const tensor of tensors) {
    if (tensor !== undefined && tensor.dtype !== "f32" && tensor.dtype !== "bf16") {
      throw new ShapeError(`${op}: takes f32 and bf16, not ${tensor}`);
    }
  }
}
