import { Tensor } from "../ffi/tensor.ts";
import { contiguous } from "./contiguous.ts";
import { gpuOf } from "./gpu.ts";
import { linear } from "./linear.ts";
import type { LinearLayer } from "./linears.ts";

/**
 * {@link linears} as one product where the layers' weights lie behind one another in one memory, and their biases too,
 * as 03_fuse_qkv lays them; else one after another.
 *
 * @returns for each layer `[..., out]`: column slices of one dense result where it was one product.
 */
export function joinedLinears(x: Tensor, layers: readonly LinearLayer[]): Tensor[] {
  const weight = joinedView(layers.map(({ weight }) => weight));
  const biases = layers.map(({ bias }) => bias).filter((bias) => bias !== undefined);
  const bias = biases.length === layers.length ? joinedView(biases) : undefined;
  if (weight === undefined || (bias === undefined && biases.length > 0)) {
    return layers.map((layer) => linear(x, layer.weight, layer.bias));
  }
  const columns = columnsOf(linear(x, weight, bias), layers.map((layer) => layer.weight));
  // The CPU's operators read dense tensors much faster than strided ones.
  return gpuOf(x) === undefined ? columns.map(contiguous) : columns;
}

/** Each layer's columns of the product of joined weights. */
export function columnsOf(joint: Tensor, weights: readonly Tensor[]): Tensor[] {
  let start = 0;
  return weights.map(({ shape: [count] }) => {
    start += count;
    return joint.narrow(-1, start - count, count);
  });
}

/** The tensor that the given ones are the parts of, along the first dimension; undefined where they are not. */
export function joinedView(parts: readonly Tensor[]): Tensor | undefined {
  const [{ memory, dtype, shape, offset }] = parts;
  let end = offset;
  for (const part of parts) {
    if (part.memory !== memory || part.dtype !== dtype || part.offset !== end || !part.isContiguous) {
      return undefined;
    }
    end += part.size;
  }
  const rows = parts.reduce((sum, part) => sum + part.shape[0], 0);
  return new Tensor(memory, dtype, [rows, ...shape.slice(1)], undefined, offset);
}
