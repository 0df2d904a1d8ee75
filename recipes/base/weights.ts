import type { Device, Memory } from "../../ffi/device.ts";
import { type DType, dtypeBytes, isDType } from "../../ffi/dtype.ts";
import { float8FormatOf } from "../../ffi/float8.ts";
import { isGpu } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { cast } from "../../kernels/cast.ts";
import { copyInto } from "../../kernels/copy_into.ts";
import { joinedView } from "../../kernels/joined_linears.ts";
import type { LinearLayer } from "../../kernels/linears.ts";
import type { ComponentWeights } from "./component_weights.ts";
import { ModelError, UsageError } from "./errors.ts";
import type { Ops } from "./ops.ts";

/** A component's weights on a device, by their names in the checkpoint. */
export interface Weights {
  /** All names. */
  readonly names: readonly string[];
  /** Whether there is one of this name. */
  has(name: string): boolean;
  /** Throws {@link ModelError} when there is none of this name, {@link UsageError} when it was freed. */
  get(name: string): Tensor;
  /** Gives a weight's memory back, with the last of the names that share it. Once more does nothing. */
  free(name: string): void;
  /**
   * Stores other values of weights, each in the form in which it is kept: rounded to its dtype, as a part of what was
   * joined, quantized anew. Addresses stay, so that recorded graphs go on with the new values; only on the CPU, where a
   * weight of a mapped file cannot be written to, it gets a memory of its own, and other plans keep the old one.
   *
   * @param values f32 or bf16, dense, with the shapes that the checkpoint has. @throws UsageError for weights that
   * can be stored together with others only, which are missing.
   */
  assign(values: ReadonlyMap<string, Tensor>): void;
}

/** Weights out of a map; several names may share a memory. */
export function weightsFrom(given: ReadonlyMap<string, Tensor>): Weights {
  const tensors = new Map(given);
  const freed = new Set<string>();
  const names = new Map<Memory, number>();
  for (const { memory } of tensors.values()) names.set(memory, (names.get(memory) ?? 0) + 1);
  const find = (name: string) => {
    const tensor = tensors.get(name);
    if (tensor === undefined) throw new ModelError(`the model has no weight ${name}`);
    return tensor;
  };
  const get = (name: string) => {
    const tensor = find(name);
    if (freed.has(name)) {
      throw new UsageError(
        `the weight ${name} is gone from ${tensor.device.name}: a recipe with another dtype or layout took the ` +
          "model's weights, or the model was disposed",
        { hint: "load the model once for each dtype and layout, or give all pipelines the same plan" },
      );
    }
    return tensor;
  };
  return {
    names: [...tensors.keys()],
    has: (name) => tensors.has(name),
    get,
    free(name) {
      const { memory } = find(name);
      if (freed.has(name)) return;
      freed.add(name);
      const left = names.get(memory)! - 1;
      names.set(memory, left);
      if (left === 0) memory.device.free(memory);
    },
    assign(values) {
      for (const [name, value] of values) {
        let place = get(name);
        if (place.memory.readOnly) {
          place = writableLike(place);
          tensors.set(name, place);
          names.set(place.memory, 1);
        }
        store(place, value);
      }
    },
  };
}

/** A memory of the same size for a weight. */
function writableLike({ device, shape, dtype }: Tensor): Tensor {
  return Tensor.empty(device, shape, dtype, "weights");
}

/** Overwrites a weight. */
export function store(place: Tensor, value: Tensor): void {
  place.device.scope(() => copyInto(place, cast(value, place.dtype)));
  place.device.changed(place.memory);
}

/** Gives the memory of all weights back. */
export function freeAll(weights: Weights): void {
  for (const name of weights.names) weights.free(name);
}

/** Weights to make available: those named, of one component's files. */
export interface Placement {
  readonly checkpoint: ComponentWeights;
  readonly names: Iterable<string>;
}

/**
 * Makes the named weights of all `parts` available on the device, and returns each part's; on the CPU they stay in the
 * mapped files. All parts together, since a GPU's stream of copies takes a while to start and to end.
 *
 * @param onBytes called now and then with how many bytes are in place so far.
 * @throws ModelError for a dtype that no operator takes, or not on this GPU
 */
export async function placeWeights(
  device: Device,
  parts: readonly Placement[],
  onBytes?: (bytes: number) => void,
): Promise<Weights[]> {
  const wanted = parts.map(({ checkpoint, names }) =>
    Array.from(names, (name) => {
      const { dtype, shape, bytes } = checkpoint.get(name);
      if (!isDType(dtype)) {
        throw new ModelError(`${checkpoint.folder}: weight ${name} is ${dtype}, which no operator takes`);
      }
      if (dtype === "f8e4m3" && isGpu(device) && float8FormatOf(device.limits.architecture) !== "ocp") {
        throw new ModelError(
          `${checkpoint.folder}: weight ${name} is ${dtype}, whose numbers ${device.name} (${device.limits.architecture}) ` +
            "does not multiply: it has E4M3 of another kind",
          { hint: "take the checkpoint in bfloat16: 06_float8 quantizes it for this GPU" },
        );
      }
      return { name, dtype, shape, bytes };
    })
  );
  const memories = (await device.placeAll(wanted.flat().map(({ bytes }) => bytes), onBytes)).values();
  return wanted.map((part) =>
    weightsFrom(
      new Map(part.map(({ name, dtype, shape }) => [name, new Tensor(memories.next().value!, dtype, shape)])),
    )
  );
}

/** The name of a quantized weight's scales, as in published checkpoints: `m.weight_scale` beside `m.weight`. */
export function scaleName(weight: string): string {
  return `${weight}_scale`;
}

/** Whether a name is that of the scales of one of these weights. */
export function isScale(weights: { has(name: string): boolean }, name: string): boolean {
  const suffix = scaleName("");
  return name.endsWith(suffix) && weights.has(name.slice(0, -suffix.length));
}

/** Whether a weight is quantized, or is the scales of one that is. */
function isQuantized(weights: Weights, name: string): boolean {
  return weights.has(scaleName(name)) || name.endsWith(scaleName(".weight"));
}

/**
 * The same weights in `dtype`; those that have it already are shared, and so are quantized ones. New ones go with the plan
 * that holds them, when nothing refers to it any more.
 *
 * On a GPU each old weight is freed as soon as its cast is issued, since a large model does not fit there twice:
 * `weights` is consumed, and asking it for one of those throws {@link UsageError}. On the CPU the old ones stay, as a
 * mapped file takes no memory.
 */
export function castWeights(weights: Weights, dtype: DType, ops: Ops): Weights {
  const made = new Map<Tensor, Tensor>();
  const convert = (weight: Tensor) => {
    let result = made.get(weight);
    if (result === undefined) {
      const memory = weight.device.alloc(weight.size * dtypeBytes(dtype), "weights");
      made.set(weight, result = ops.cast(weight, dtype, memory));
    }
    return result;
  };
  const own = new Map<string, Tensor>();
  for (const name of weights.names) {
    const weight = weights.get(name);
    if (weight.dtype === dtype || isQuantized(weights, name)) continue;
    own.set(name, convert(weight));
    // Memory is given out again in the order of the work, so nothing overwrites the weight before it was read.
    if (isGpu(weight.device)) weights.free(name);
  }
  return replaced(weights, own);
}

/** The same weights, with others under some of their names or beside them; they are freed with the new ones. */
export function replaced(weights: Weights, own: ReadonlyMap<string, Tensor>): Weights {
  let mine = weightsFrom(own);
  const holder = (name: string) => mine.has(name) ? mine : weights;
  return {
    names: [...new Set([...weights.names, ...own.keys()])],
    has: (name) => holder(name).has(name),
    get: (name) => holder(name).get(name),
    free: (name) => holder(name).free(name),
    assign(values) {
      const names = [...values.keys()];
      // Those below stay as they are for others who share them, where they cannot be written to.
      const mapped = names.filter((name) => !mine.has(name) && weights.get(name).memory.readOnly);
      if (mapped.length > 0) {
        const held = mine.names.map((name) => [name, mine.get(name)] as const);
        mine = weightsFrom(
          new Map([...held, ...mapped.map((name) => [name, writableLike(weights.get(name))] as const)]),
        );
      }
      for (const each of [mine, weights]) {
        const theirs = names.filter((name) => holder(name) === each);
        if (theirs.length > 0) each.assign(new Map(theirs.map((name) => [name, values.get(name)!])));
      }
    },
  };
}

/**
 * The same weights, those of each group of Linear layers behind one another in one memory: weights `[out, in]` of one
 * input size, and biases.
 *
 * @param groups names of the layers' ends, e.g. `["attn.to_q", "attn.to_k"]`; every module that has all of them has such
 *   a group, and a layer is joined by the first that fits. Those that lie so already stay. As in
 *   {@link castWeights}, `weights` is consumed on a GPU.
 */
export function joinWeights(weights: Weights, groups: readonly (readonly string[])[]): Weights {
  const own = new Map<string, Tensor>();
  const join = (names: readonly string[]) => {
    const parts = names.map((name) => weights.get(name));
    const [{ device, dtype, shape }] = parts;
    const rows = parts.reduce((sum, part) => sum + part.shape[0], 0);
    const whole = Tensor.empty(device, [rows, ...shape.slice(1)], dtype, "weights");
    let start = 0;
    parts.forEach((part, i) => {
      const place = whole.narrow(0, start, part.shape[0]);
      copyInto(place, part);
      start += part.shape[0];
      own.set(names[i], place);
      if (isGpu(device)) weights.free(names[i]); // as in castWeights
    });
  };
  for (const group of groups) {
    for (const name of weights.names) {
      if (!name.endsWith(`${group[0]}.weight`)) continue;
      const module = name.slice(0, -`${group[0]}.weight`.length);
      for (const kind of ["weight", "bias"]) {
        const names = group.map((layer) => `${module}${layer}.${kind}`);
        if (!names.every((one) => weights.has(one) && !own.has(one))) continue;
        if (joinedView(names.map((one) => weights.get(one))) === undefined) join(names);
      }
    }
  }
  return replaced(weights, own);
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
    free: (name) => weights.free(prefix + name),
    assign: (values) =>
      weights.assign(new Map(Array.from(values, ([name, value]) => [prefix + name, value] as const))),
  };
}

/** A Linear layer of the checkpoint, with its bias where it has one: `[..., in]` to `[..., out]`. */
export function dense(ops: Ops, weights: Weights, module: string, x: Tensor): Tensor {
  const { weight, bias } = layerOf(weights, module);
  return ops.linear(x, weight, bias);
}

/** Linear layers of one input; see {@link dense}. */
export function denseAll(ops: Ops, weights: Weights, modules: readonly string[], x: Tensor): Tensor[] {
  return ops.linears(x, modules.map((module) => layerOf(weights, module)));
}

/** A Linear layer's weights, as {@link dense} takes them. */
export function layerOf(weights: Weights, module: string): LinearLayer {
  return { weight: weights.get(`${module}.weight`), bias: optional(weights, `${module}.bias`) };
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
