/**
 * 06 float8: the transformer's large Linear layers multiply 8-bit floats (E4M3).
 *
 * Idea: matrix units multiply float8 at twice bfloat16's rate, and the weights take half the memory. A weight is
 * quantized once, with a scale for each of its rows (of eight the one that leaves the least error) or one for all; what it
 * is multiplied with is quantized anew in each step, with a scale for each token or one for all. The scales are applied to
 * the sums.
 * By rows, the operators before those products give E4M3 themselves, so that no pass reads their bfloat16 again: adaptive
 * layer norms, and GELU with what stands beside it. Attention's output in the double blocks is quantized apart, since its
 * kernels have no whole rows. So is everything by tensors: nothing can be written before the largest value of all is known,
 * and to take an earlier step's instead (delayed scaling) would make pictures depend on the ones before.
 * The modulations, a quarter of the model, have a row for each step and are bound by reading weights. By rows of scales these are
 * E4M3, too; what they are multiplied with stays as it is, since their shifts, scales and gates act on every token.
 * Changes: most weights of the transformer, and `linear`, `linears` and `linearGelu` for those; by rows `adaLayerNorm`,
 * `gatedAdaLayerNorm`, `feedForward` and `parallelBranches` where those read the result; all else computes as before.
 * Exact: no. A value keeps 4 of bfloat16's 8 bits, and the picture's details change. Needs bfloat16 before it.
 * Measured on an H100: a step 110.9 to 73.5 ms, weights 33.8 to 25.9 GB, and 3.2 GB less with the modulations, which take 1.6
 * instead of 2.7 ms a picture.
 *
 *     deno run -A recipes/06_float8.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import type { Device } from "../ffi/device.ts";
import { isGpu } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { adaLayerNormFloat8 } from "../kernels/ada_layer_norm.ts";
import { cast } from "../kernels/cast.ts";
import { concat } from "../kernels/concat.ts";
import { copyInto } from "../kernels/copy_into.ts";
import { feedForwardFloat8 } from "../kernels/feed_forward.ts";
import type { Float8Matrix } from "../kernels/float8_tensor.ts";
import { gatedAdaLayerNormFloat8 } from "../kernels/gated_ada_layer_norm.ts";
import { joinedView } from "../kernels/joined_linears.ts";
import { linearFloat8 } from "../kernels/linear_float8.ts";
import { linearFloat8Weight, linearsFloat8Weight } from "../kernels/linear_float8_weight.ts";
import type { Readers } from "../kernels/linears.ts";
import { linearsFloat8 } from "../kernels/linears_float8.ts";
import { parallelBranchesFloat8 } from "../kernels/parallel_branches.ts";
import { quantizeTensor } from "../kernels/quantize_float8.ts";
import { quantizeWeightRows } from "../kernels/quantize_weight_rows.ts";
import { UsageError } from "./base/errors.ts";
import type { Plan, Recipe } from "./base/plan.ts";
import type { Ops } from "./base/ops.ts";
import { replaced, scaleName, type Weights } from "./base/weights.ts";

/** How 06_float8 quantizes. */
export interface Float8Options {
  /**
   * A scale for each row, of weights and of activations, or one for each tensor. With rows a large value costs the
   * others of its own row their precision, and no more than those.
   */
  readonly granularity?: "row" | "tensor";
}

/** A long sum for a few hundred text tokens: cuBLASLt (13.1) has no kernel for it with scales for rows. */
const NO_LIBRARY_KERNEL = /\.ff_context\.net\.2$/;

/** The Linear layers of the transformer that stay as they are. */
const KEPT: readonly RegExp[] = [
  /^x_embedder$/, // 64 numbers in: to quantize the latents would cost more than it saves
  /^context_embedder$/, // once a step, for the text only: next to nothing to gain
  /^time_text_embed\./, // one row, and all modulations follow from it
  /^norm_out\.linear$/, // the last shift and scale, of one layer
  /^proj_out$/, // 64 numbers out, and they are the result
  NO_LIBRARY_KERNEL,
];

/** The blocks' modulations: in float8 by rows only, and their weights alone. */
const MODULATION = /\.norm(1|1_context)?\.linear$/;

/** What float8 matrix units read at a time: sizes are multiples of it. */
const MULTIPLE = 16;

/** The recipe, for a granularity: a scale for each row when left out. */
export function float8({ granularity = "row" }: Float8Options = {}): Recipe {
  return {
    name: "06_float8",
    exact: false,
    devices: ["cpu", "cuda", "hip"],
    options: { granularity },
    preparesWeights: true,
    apply: (plan) =>
      granularity === "row"
        ? quantizePlan(plan, true, gainsFrom(KEPT))
        : quantizePlan(plan, false, gainsFrom([...KEPT, MODULATION])),
  };
}

/**
 * Quantizes, by rows, what {@link float8} has left to the library in bfloat16 for lack of a kernel.
 *
 * @throws UsageError for a plan that is not quantized by rows.
 */
export function quantizeRest(plan: Plan): Plan {
  if (!isQuantizedByRows(plan)) throw new UsageError("the plan's weights are not in float8 by rows");
  return quantizePlan(plan, true, gainsFrom(KEPT.filter((kept) => kept !== NO_LIBRARY_KERNEL)));
}

/** Whether a plan's transformer has weights in float8, with a scale for each row. */
export function isQuantizedByRows({ weights: { transformer } }: Plan): boolean {
  return transformer.names.some((name) =>
    transformer.has(scaleName(name)) &&
    transformer.get(scaleName(name)).size === transformer.get(name).shape[0]
  );
}

/**
 * The weights with those quantized that gain from it, and their scales beside them; quantized ones stay as they are. On a
 * GPU the bfloat16 weights are consumed, as by castPlan.
 *
 * @param chosen whether a weight gains from it.
 * @throws UsageError where they are of another dtype.
 */
export function quantizeWeights(
  device: Device,
  transformer: Weights,
  rowwise: boolean,
  chosen: (name: string, weight: Tensor) => boolean,
): Weights {
  const names = transformer.names.filter((name) =>
    chosen(name, transformer.get(name)) && !transformer.has(scaleName(name))
  );
  for (const name of names) {
    const { dtype } = transformer.get(name);
    if (dtype !== "bf16") {
      throw new UsageError(`06_float8 takes bfloat16 weights, and the transformer's ${name} is ${dtype}`, {
        hint: "apply 01_bfloat16 before it",
      });
    }
  }
  const own = new Map<string, Tensor>();
  const quantize = rowwise ? quantizeWeightRows : quantizeTensor;
  // Weights that 03_fuse_qkv has joined stay joined: they are quantized as one.
  for (const group of Map.groupBy(names, (name) => transformer.get(name).memory).values()) {
    const parts = group.map((name) => transformer.get(name));
    const quantized = quantize(joinedView(parts)!);
    const [values, scales] = [quantized.values, quantized.scales].map(weightOf);
    quantized.dispose();
    let start = 0;
    parts.forEach(({ shape: [rows] }, i) => {
      own.set(group[i], values.narrow(0, start, rows));
      own.set(scaleName(group[i]), rowwise ? scales.narrow(0, start, rows) : scales);
      start += rows;
      // One group at a time, since both do not fit. Nothing overwrites a weight before it was read: see castWeights.
      if (isGpu(device)) transformer.free(group[i]);
    });
  }
  return quantizing(replaced(transformer, own), rowwise);
}

/** The same weights; what is stored under the name of a quantized one is quantized as it was. */
function quantizing(weights: Weights, rowwise: boolean): Weights {
  const isOne = (name: string) => weights.has(scaleName(name));
  return {
    ...weights,
    assign(values) {
      const [quantized, others] = [true, false].map((yes) =>
        [...values.keys()].filter((name) => isOne(name) === yes)
      );
      if (others.length > 0) weights.assign(new Map(others.map((name) => [name, values.get(name)!])));
      const bf16 = (name: string) => cast(values.get(name)!, "bf16");
      if (rowwise) {
        for (const name of quantized) {
          quantizeInto(weights, [name], () => quantizeWeightRows(bf16(name)));
        }
      } else {
        for (const group of Map.groupBy(quantized, (name) => weights.get(name).memory).values()) {
          quantizeInto(
            weights,
            wholeGroup(weights, group),
            (names) => quantizeTensor(concat(names.map(bf16), 0)),
          );
        }
      }
    },
  };
}

/** All weights of a memory, which have one scale by tensors: in the order in which they lie. */
function wholeGroup(weights: Weights, names: readonly string[]): readonly string[] {
  const { memory } = weights.get(names[0]);
  const all = weights.names.filter((name) => weights.get(name).memory === memory);
  if (all.length === names.length) return all.sort((a, b) => weights.get(a).offset - weights.get(b).offset);
  throw new UsageError(
    `06_float8: ${all.join(", ")} have one scale, and only ${names.join(", ")} is stored anew`,
    {
      hint: 'store them together, or use the granularity "row"',
    },
  );
}

/** Stores rows that lie behind one another, and their scales. */
function quantizeInto(
  weights: Weights,
  names: readonly string[],
  quantize: (names: readonly string[]) => Float8Matrix,
): void {
  const places = [names, names.map(scaleName)].map((all) => all.map((name) => weights.get(name)));
  const [{ device }] = places[0];
  device.scope(() => {
    const { values, scales } = quantize(names);
    copyInto(joinedView(places[0])!, values);
    copyInto(scales.size === 1 ? places[1][0].reshape([1]) : joinedView(places[1])!, scales);
  });
  for (const memory of new Set(places.flat().map(({ memory }) => memory))) device.changed(memory);
}

/** A copy in a memory of its own. */
function weightOf(tensor: Tensor): Tensor {
  const copy = Tensor.empty(tensor.device, tensor.shape, tensor.dtype, "weights");
  copyInto(copy, tensor);
  return copy;
}

/** The float8 matrices of quantized weights, by what the model knows of them: the values. @param chosen which: all. */
export function matricesOf(
  transformer: Weights,
  rowwise: boolean,
  chosen = (_name: string) => true,
): WeakMap<Tensor, Float8Matrix> {
  const quantized = transformer.names.filter((name) => transformer.has(scaleName(name)) && chosen(name));
  return new WeakMap(quantized.map((name) => {
    const values = transformer.get(name);
    return [values, { values, scales: transformer.get(scaleName(name)), rowwise }];
  }));
}

function quantizePlan(plan: Plan, rowwise: boolean, chosen: (name: string, weight: Tensor) => boolean): Plan {
  const { device, ops } = plan;
  const transformer = quantizeWeights(device, plan.weights.transformer, rowwise, chosen);
  const isModulation = (name: string) => MODULATION.test(moduleOf(name));
  const matrices = matricesOf(transformer, rowwise, (name) => !isModulation(name));
  const wide = {
    ...ops,
    ...float8Products(ops, matricesOf(transformer, rowwise, isModulation), WIDE_PRODUCTS),
  };
  const products = float8Products(wide, matrices);
  return {
    ...plan,
    weights: { ...plan.weights, transformer },
    ops: { ...ops, ...products, ...(rowwise && float8Producers(ops, matrices)) },
  };
}

/** The module of a weight. */
function moduleOf(weight: string): string {
  return weight.slice(0, -".weight".length);
}

/** How {@link float8Products} multiplies by quantized weights. */
interface Products {
  readonly linear: typeof linearFloat8;
  readonly linears: typeof linearsFloat8;
}

/** Products in the dtype of the other factor, with weights alone in float8. */
export const WIDE_PRODUCTS: Products = { linear: linearFloat8Weight, linears: linearsFloat8Weight };

/** The operators that multiply, by quantized weights as `products` do; for all others those of `ops`. */
export function float8Products(
  ops: Ops,
  matrices: WeakMap<Tensor, Float8Matrix>,
  products: Products = { linear: linearFloat8, linears: linearsFloat8 },
) {
  const linear: Ops["linear"] = (x, weight, ...rest) => {
    const matrix = matrices.get(weight);
    return matrix === undefined ? ops.linear(x, weight, ...rest) : products.linear(x, matrix, ...rest);
  };
  return {
    linear,
    linearGelu(x, weight, bias, place) {
      const matrix = matrices.get(weight);
      return matrix === undefined
        ? ops.linearGelu(x, weight, bias, place)
        : products.linear(x, matrix, bias, "geluTanh", place);
    },
    linears(x, layers) {
      const quantized = layers.flatMap(({ weight, bias }) => {
        const matrix = matrices.get(weight);
        return matrix === undefined ? [] : [{ weight: matrix, bias }];
      });
      if (quantized.length === layers.length) return products.linears(x, quantized);
      if (quantized.length === 0) return ops.linears(x, layers);
      return layers.map(({ weight, bias }) => linear(x, weight, bias));
    },
  } satisfies Partial<Ops>;
}

/** Whether only quantized weights read what a producer gives. */
export function readersAreQuantized(matrices: WeakMap<Tensor, Float8Matrix>, readers: Readers = []): boolean {
  return readers.length > 0 && readers.every(({ weight }) => matrices.has(weight));
}

/** The operators before them, which give E4M3 with a scale for each row where only quantized weights read it. */
function float8Producers(ops: Ops, matrices: WeakMap<Tensor, Float8Matrix>) {
  const quantized = (readers?: Readers) => readersAreQuantized(matrices, readers);
  return {
    adaLayerNorm: (x, scale, shift, eps, readers) =>
      quantized(readers)
        ? adaLayerNormFloat8(x, scale, shift, eps)
        : ops.adaLayerNorm(x, scale, shift, eps, readers),
    gatedAdaLayerNorm: (residual, x, gate, scale, shift, eps, readers) =>
      quantized(readers)
        ? gatedAdaLayerNormFloat8(residual, x, gate, scale, shift, eps)
        : ops.gatedAdaLayerNorm(residual, x, gate, scale, shift, eps, readers),
    feedForward: (x, layers, table) =>
      quantized([layers.down]) ? feedForwardFloat8(x, layers, table) : ops.feedForward(x, layers, table),
    parallelBranches: (x, layers, cos, sin, eps, table) => {
      const body = quantized([layers.out]) ? parallelBranchesFloat8 : ops.parallelBranches;
      return body(x, layers, cos, sin, eps, table);
    },
  } satisfies Partial<Ops>;
}

/** Says whether a weight is a Linear layer's that gains from float8: those of some modules do not. */
function gainsFrom(kept: readonly RegExp[]): (name: string, weight: Tensor) => boolean {
  return (name, { shape }) => {
    if (!name.endsWith(".weight") || shape.length !== 2) return false;
    return shape.every((size) => size % MULTIPLE === 0) && !kept.some((one) => one.test(moduleOf(name)));
  };
}

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(float8().name));
