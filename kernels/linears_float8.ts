import type { Tensor } from "../ffi/tensor.ts";
import { columnsOf, joinedView } from "./joined_linears.ts";
import type { Float8Matrix } from "./float8_tensor.ts";
import { linearQuantized, quantizeAs } from "./linear_float8.ts";

/** A Linear layer with a float8 weight `[out, in]` and a bias `[out]`. */
export interface Float8Layer {
  readonly weight: Float8Matrix;
  readonly bias?: Tensor | undefined;
}

/**
 * Several Linear layers of one input by float8 weights, all scaled alike: the input is quantized once, and weights that
 * lie behind one another in one memory (as 03_fuse_qkv lays them) are multiplied with at once.
 *
 * @param x `[..., in]`. @returns `[..., out]` for each layer; dtypes as those of linearFloat8.
 */
export function linearsFloat8(x: Tensor, layers: readonly Float8Layer[]): Tensor[] {
  return x.device.scope(() => {
    const quantized = quantizeAs(layers[0].weight, x);
    const weight = joinedMatrix(layers.map((layer) => layer.weight));
    const biases = layers.map(({ bias }) => bias).filter((bias) => bias !== undefined);
    const bias = biases.length === layers.length ? joinedView(biases) : undefined;
    if (weight === undefined || (bias === undefined && biases.length > 0)) {
      return layers.map((layer) => linearQuantized(quantized, layer.weight, layer.bias));
    }
    return columnsOf(
      linearQuantized(quantized, weight, bias),
      layers.map((layer) => layer.weight.values),
    );
  });
}

/** Parts of one quantized matrix as the whole; undefined where they are not. */
function joinedMatrix(parts: readonly Float8Matrix[]): Float8Matrix | undefined {
  const [{ rowwise, scales }] = parts;
  const values = joinedView(parts.map((part) => part.values));
  const joined = rowwise
    ? joinedView(parts.map((part) => part.scales))
    : parts.every((part) => part.scales === scales)
    ? scales
    : undefined;
  return values === undefined || joined === undefined ? undefined : { values, scales: joined, rowwise };
}
