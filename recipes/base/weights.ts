import type { Device } from "../../ffi/device.ts";
import { type DType, dtypeBytes, isDType } from "../../ffi/dtype.ts";
import { Tensor } from "../../ffi/tensor.ts";
import type { ComponentWeights } from "./checkpoint.ts";
import { ModelError } from "./errors.ts";
import type { Ops } from "./ops.ts";

/** A component's weights on a device, by their names in the checkpoint. */
export interface Weights {
  readonly names: readonly string[];
  has(name: string): boolean;
  /** Throws {@link ModelError} when there is none of this name. */
  get(name: string): Tensor;
}

/** Weights out of a map. */
export function weightsFrom(tensors: ReadonlyMap<string, Tensor>): Weights {
  return {
    names: [...tensors.keys()],
    has: (name) => tensors.has(name),
    get(name) {
      const tensor = tensors.get(name);
      if (tensor === undefined) throw new ModelError(`the model has no weight ${name}`);
      return tensor;
    },
  };
}

/** Makes the named weights of a checkpoint available on the device; on the CPU they stay in the mapped file. */
export function placeWeights(device: Device, component: ComponentWeights, names: Iterable<string>): Weights {
  const tensors = new Map<string, Tensor>();
  for (const name of names) {
    const { dtype, shape, bytes } = component.get(name);
    if (!isDType(dtype)) {
      throw new ModelError(`${component.folder}: weight ${name} is ${dtype}, which no operator takes`);
    }
    tensors.set(name, new Tensor(device.place(bytes), dtype, shape));
  }
  return weightsFrom(tensors);
}

/**
 * The same weights in `dtype`; those that have it already are shared. New ones go with the plan that holds them, when
 * nothing refers to it any more. The old ones stay (a mapped file takes no memory; a recipe on a GPU frees what it
 * replaces).
 */
export function castWeights(weights: Weights, dtype: DType, ops: Ops): Weights {
  return weightsFrom(
    new Map(weights.names.map((name) => {
      const weight = weights.get(name);
      if (weight.dtype === dtype) return [name, weight];
      const memory = weight.device.alloc(weight.size * dtypeBytes(dtype), "weights");
      return [name, ops.cast(weight, dtype, memory)];
    })),
  );
}

/** The weights below a module: `under(w, "transformer_blocks.0").get("attn.to_q.weight")`. */
export function under(weights: Weights, module: string): Weights {
  const prefix = `${module}.`;
  return {
    get names() {
      return weights.names.filter((name) => name.startsWith(prefix)).map((name) => name.slice(prefix.length));
    },
    has: (name) => weights.has(prefix + name),
    get: (name) => weights.get(prefix + name),
  };
}

/** A Linear layer of the checkpoint, with its bias where it has one: `[..., in]` to `[..., out]`. */
export function dense(ops: Ops, weights: Weights, module: string, x: Tensor): Tensor {
  return ops.linear(x, weights.get(`${module}.weight`), optional(weights, `${module}.bias`));
}

/** A weight that not every model has. */
export function optional(weights: Weights, name: string): Tensor | undefined {
  return weights.has(name) ? weights.get(name) : undefined;
}

/** Names and shapes of the weights that a component reads, built up module by module. */
export class WeightShapes extends Map<string, readonly number[]> {
  /** A Linear layer, `weight` `[out, in]`. */
  linear(module: string, outFeatures: number, inFeatures: number, bias = true): this {
    this.set(`${module}.weight`, [outFeatures, inFeatures]);
    return bias ? this.set(`${module}.bias`, [outFeatures]) : this;
  }

  /** A square convolution, `weight` `[out, in, size, size]`. */
  conv(module: string, outChannels: number, inChannels: number, size: number): this {
    return this.set(`${module}.weight`, [outChannels, inChannels, size, size]).set(`${module}.bias`, [
      outChannels,
    ]);
  }

  /** A norm with weight and bias. */
  norm(module: string, features: number): this {
    return this.set(`${module}.weight`, [features]).set(`${module}.bias`, [features]);
  }
}
