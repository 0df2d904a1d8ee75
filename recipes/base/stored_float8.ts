import type { Device } from "../../ffi/device.ts";
import type { DType } from "../../ffi/dtype.ts";
import { isGpu } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { cast } from "../../kernels/cast.ts";
import { copyInto } from "../../kernels/copy_into.ts";
import { dequantize } from "../../kernels/dequantize_float8.ts";
import { ModelError } from "./errors.ts";
import { isScale, scaleName, type Weights, weightsFrom } from "./weights.ts";

/**
 * Weights that a checkpoint has in float8 as the numbers that they stand for; all others as they are. The scales, one or
 * one for each row, under {@link scaleName}, are gone then.
 *
 * On a GPU each float8 weight is freed when it was read. @param dtype of the result.
 * @throws ModelError for scales that fit to no weight.
 */
export function widenStored(device: Device, weights: Weights, dtype: DType): Weights {
  const own = new Map<string, Tensor>();
  for (const name of weights.names) {
    if (isScale(weights, name)) continue;
    const weight = weights.get(name);
    const scale = weights.has(scaleName(name)) ? weights.get(scaleName(name)) : undefined;
    if (weight.dtype !== "f8e4m3" && weight.dtype !== "f8e5m2" && scale === undefined) {
      own.set(name, weight);
      continue;
    }
    const wide = Tensor.empty(device, weight.shape, dtype, "weights");
    device.scope(() => copyInto(wide, widened(name, weight, scale, dtype)));
    own.set(name, wide);
    if (!isGpu(device)) continue;
    // Memory is given out again in the order of the work, so nothing overwrites a weight before it was read.
    weights.free(name);
    if (scale !== undefined) weights.free(scaleName(name));
  }
  return weightsFrom(own);
}

function widened(name: string, weight: Tensor, scale: Tensor | undefined, dtype: DType): Tensor {
  if (scale === undefined) return cast(weight, dtype);
  const [rows] = weight.shape;
  if (weight.dtype !== "f8e4m3" || (scale.size !== 1 && scale.size !== rows)) {
    throw new ModelError(
      `${name} is ${weight} with scales ${scale}: one scale, or one for each row of E4M3, is read`,
    );
  }
  return dequantize({
    values: weight,
    scales: cast(scale, "f32").reshape([scale.size]),
    rowwise: scale.size > 1,
  }, dtype);
}
