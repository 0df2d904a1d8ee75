/**
 * 06 float8: the transformer's large Linear layers multiply 8-bit floats (E4M3).
 *
 * Idea: matrix units multiply float8 at twice bfloat16's rate, and the weights take half the memory. A weight is
 * quantized once, with a scale for each of its rows or one for all; what it is multiplied with is quantized anew in each
 * step, with a scale for each token or one for all. The scales are applied to the sums.
 * Changes: most weights of the transformer, and `linear`, `linears` and `linearGelu` for those; all else computes as before.
 * Exact: no. A value keeps 4 of bfloat16's 8 bits, and the picture's details change. Needs bfloat16 before it.
 * Measured on an H100: a step 114.6 to 81.8 ms, weights 33.7 to 25.9 GB.
 *
 *     deno run -A recipes/06_float8.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import type { Device } from "../ffi/device.ts";
import type { Tensor } from "../ffi/tensor.ts";
import { isGpu } from "../ffi/gpu.ts";
import { type Float8Matrix, linearFloat8 } from "../kernels/linear_float8.ts";
import { joinedView } from "../kernels/joined_linears.ts";
import { linearsFloat8 } from "../kernels/linears_float8.ts";
import { quantizeRows, quantizeTensor } from "../kernels/quantize_float8.ts";
import { UsageError } from "./base/errors.ts";
import type { Plan, Recipe } from "./base/plan.ts";
import type { Ops } from "./base/ops.ts";
import { replaced, scaleName, type Weights } from "./base/weights.ts";

export interface Float8Options {
  /**
   * A scale for each row, of weights and of activations, or one for each tensor. With rows a large value costs the
   * others of its own row their precision, and no more than those.
   */
  readonly granularity?: "row" | "tensor";
}

/** The Linear layers of the transformer that stay as they are. */
const KEPT: readonly RegExp[] = [
  /^x_embedder$/, // 64 numbers in: to quantize the latents would cost more than it saves
  /^context_embedder$/, // once a step, for the text only: next to nothing to gain
  /^time_text_embed\./, // one row, and all modulations follow from it
  // One row, bound by reading weights, whose shifts, scales and gates act on every token.
  /\.norm(1|1_context)?\.linear$/,
  /^norm_out\.linear$/,
  /^proj_out$/, // 64 numbers out, and they are the result
  // A long sum for a few hundred text tokens: cuBLASLt (13.1) has no kernel for it with scales for rows.
  /\.ff_context\.net\.2$/,
];

/** What float8 matrix units read at a time: sizes are multiples of it. */
const MULTIPLE = 16;

/** The recipe, for a granularity: a scale for each row when left out. */
export function float8({ granularity = "row" }: Float8Options = {}): Recipe {
  return {
    name: "06_float8",
    exact: false,
    devices: ["cpu", "cuda", "hip"],
    options: { granularity },
    apply: (plan) => quantizePlan(plan, granularity === "row"),
  };
}

/**
 * The weights with those quantized that gain from it, and their scales beside them; quantized ones stay as they are. On a
 * GPU the bfloat16 weights are consumed, as by castPlan.
 *
 * @throws UsageError where they are of another dtype.
 */
function quantizeWeights(device: Device, transformer: Weights, rowwise: boolean): Weights {
  const names = transformer.names.filter((name) =>
    isQuantized(name, transformer.get(name)) && !transformer.has(scaleName(name))
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
  const quantize = rowwise ? quantizeRows : quantizeTensor;
  // Weights that 03_fuse_qkv has joined stay joined: they are quantized as one.
  for (const group of Map.groupBy(names, (name) => transformer.get(name).memory).values()) {
    const parts = group.map((name) => transformer.get(name));
    const { values, scales } = quantize(joinedView(parts)!, "weights");
    let start = 0;
    parts.forEach(({ shape: [rows] }, i) => {
      own.set(group[i], values.narrow(0, start, rows));
      own.set(scaleName(group[i]), rowwise ? scales.narrow(0, start, rows) : scales);
      start += rows;
      // One group at a time, since both do not fit. Nothing overwrites a weight before it was read: see castWeights.
      if (isGpu(device)) transformer.free(group[i]);
    });
  }
  return replaced(transformer, own);
}

/** The float8 matrices of quantized weights, by what the model knows of them: the values. */
function matricesOf(transformer: Weights, rowwise: boolean): WeakMap<Tensor, Float8Matrix> {
  const quantized = transformer.names.filter((name) => transformer.has(scaleName(name)));
  return new WeakMap(quantized.map((name) => {
    const values = transformer.get(name);
    return [values, { values, scales: transformer.get(scaleName(name)), rowwise }];
  }));
}

function quantizePlan(plan: Plan, rowwise: boolean): Plan {
  const { device, ops } = plan;
  const transformer = quantizeWeights(device, plan.weights.transformer, rowwise);
  const matrices = matricesOf(transformer, rowwise);
  const linear: Ops["linear"] = (x, weight, bias) => {
    const matrix = matrices.get(weight);
    return matrix === undefined ? ops.linear(x, weight, bias) : linearFloat8(x, matrix, bias);
  };
  return {
    ...plan,
    weights: { ...plan.weights, transformer },
    ops: {
      ...ops,
      linear,
      linearGelu(x, weight, bias) {
        const matrix = matrices.get(weight);
        return matrix === undefined
          ? ops.linearGelu(x, weight, bias)
          : linearFloat8(x, matrix, bias, "geluTanh");
      },
      linears(x, layers) {
        const quantized = layers.flatMap(({ weight, bias }) => {
          const matrix = matrices.get(weight);
          return matrix === undefined ? [] : [{ weight: matrix, bias }];
        });
        if (quantized.length === layers.length) return linearsFloat8(x, quantized);
        if (quantized.length === 0) return ops.linears(x, layers);
        return layers.map(({ weight, bias }) => linear(x, weight, bias));
      },
    },
  };
}

/** Whether a weight is a Linear layer's that gains from float8. */
function isQuantized(name: string, { shape }: Tensor): boolean {
  if (!name.endsWith(".weight") || shape.length !== 2) return false;
  const module = name.slice(0, -".weight".length);
  return shape.every((size) => size % MULTIPLE === 0) && !KEPT.some((kept) => kept.test(module));
}

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(float8().name));
