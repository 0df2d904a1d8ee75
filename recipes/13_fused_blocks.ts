/**
 * 13 fused blocks: the transformer's products do what comes behind them.
 *
 * Idea: between the products of a block stand passes that read and write all tokens, only to hand them on: QK-norm, rotary
 * embedding and the cast to attention's tiles, GELU, quantizing, gates and residual connections. A matrix product has each of
 * its results in registers once, so all of that can be done there: by warps of its own, while the units multiply the next
 * tile. And the double blocks' text, too short to fill a GPU, is multiplied in the same launch as the image.
 * In float8 a result's scale has to be known before it is there: a row a and a weight w give at most |a| |w|, and E4M3 has
 * exponents enough for a scale that is some 16 times too large (kernels/output_scales.cu).
 * Changes: `doubleBlock` and `singleBlock`, where our kernels take them: heads of 128, one sample, text tokens in whole tiles,
 * weights that 03_fuse_qkv has laid together, our own attention; with 07_tuning, where it finds them faster. Norms before
 * float8 weights give the lengths of their rows, too.
 * With 06_float8 the text's down projections are in float8 as well, which cuBLASLt has no kernel for, and products are summed in
 * f16, which takes less energy: rows are scaled so that no sum can pass its largest.
 * Exact: yes, up to roundings, in bfloat16; behind 06_float8 as lossy as that.
 * Measured on H200s: a step in float8 59 to 61 ms, in bfloat16 106 to 108; on H100s float8's was 73.1 ms without it, and 115 ms
 * in bfloat16 with and without, before the kernels became what they are.
 *
 *     deno run -A recipes/13_fused_blocks.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import { type GpuDevice, isGpu } from "../ffi/gpu.ts";
import type { Tensor } from "../ffi/tensor.ts";
import { adaLayerNormFloat8 } from "../kernels/ada_layer_norm.ts";
import {
  doubleBlockFused,
  doubleBlockFusedTakes,
  type FusedWeights,
  singleBlockFused,
  singleBlockFusedTakes,
} from "../kernels/fused_blocks.ts";
import type { Float8Matrix } from "../kernels/float8_tensor.ts";
import { gatedAdaLayerNormFloat8 } from "../kernels/gated_ada_layer_norm.ts";
import type { Readers } from "../kernels/linears.ts";
import { type LayerBound, layerBound, renewLayerBound } from "../kernels/output_scales.ts";
import { rotaryPairs } from "../kernels/rotary_pairs.ts";
import { runFastest } from "../kernels/run_fastest.ts";
import { ownAttention } from "./05_flash_attention.ts";
import { isQuantizedByRows, matricesOf, quantizeRest, readersAreQuantized } from "./06_float8.ts";
import type { Ops } from "./base/ops.ts";
import type { Plan, Recipe } from "./base/plan.ts";
import { scaleName, type Weights } from "./base/weights.ts";

/** 13: products of our own for Hopper GPUs, with what comes behind them in their epilogues. Exact up to rounding. */
export const fusedBlocks: Recipe = {
  name: "13_fused_blocks",
  exact: true,
  devices: ["cuda"],
  apply: (given: Plan) => {
    const { device } = given;
    const attention = ownAttention(given);
    if (!isGpu(device) || attention === undefined) return given;
    const quantized = isQuantizedByRows(given);
    const plan = quantized ? quantizeRest(given) : given;
    const { ops } = plan;
    const matrices = matricesOf(plan.weights.transformer, true);
    const bounds = boundsOf(
      plan.weights.transformer,
      (weight, bias) => layerBound(device, matrices.get(weight)!, bias),
    );
    const weights: FusedWeights = {
      attention,
      scalesOf: (weight) => matrices.get(weight)?.scales,
      boundOf: (weight) => bounds.get(weight)!,
    };
    const numbers = `${quantized ? "float8" : "bf16"} and attention in ${attention}`;
    const key = (block: string, tokens: readonly Tensor[]) => `${block} in ${numbers}: ${tokens}`;
    return {
      ...plan,
      weights: { ...plan.weights, transformer: renewing(device, plan.weights.transformer, matrices, bounds) },
      ops: {
        ...ops,
        ...(quantized && measuringNorms(ops, matrices)),
        rotaryPairs: (cos, sin) => rotaryPairs(device, cos, sin),
        doubleBlock: (streams, turn, table) => {
          const otherwise = () => ops.doubleBlock(streams, turn, table);
          if (!doubleBlockFusedTakes(device, weights, streams, turn)) return otherwise();
          const fused = () => doubleBlockFused(device, weights, streams, turn, table);
          return runFastest(device, key("doubleBlock", streams.map(({ x }) => x)), [fused, otherwise]);
        },
        singleBlock: (x, layers, modulation, turn, readers, table) => {
          const otherwise = () => ops.singleBlock(x, layers, modulation, turn, readers, table);
          if (!singleBlockFusedTakes(device, weights, x, layers, turn)) return otherwise();
          const fused = () => singleBlockFused(device, weights, x, layers, modulation, turn, readers, table);
          const last = quantized && !readersAreQuantized(matrices, readers); // whose norm is another kernel's
          const block = last ? "last singleBlock" : "singleBlock";
          return runFastest(device, key(block, [x.sum]), [fused, otherwise]);
        },
      },
    };
  },
};

/** The layers whose results are stored in float8 with a scale that is known before: v, and what GELU reads. */
const BOUNDED =
  /^(.*\.(?:attn\.to_v|attn\.add_v_proj|proj_mlp|ff\.net\.0\.proj|ff_context\.net\.0\.proj))\.weight$/;

function boundsOf(
  transformer: Weights,
  bound: (weight: Tensor, bias: Tensor) => LayerBound,
): WeakMap<Tensor, LayerBound> {
  const names = transformer.names.filter((name) => BOUNDED.test(name) && transformer.has(scaleName(name)));
  return new WeakMap(names.map((name) => {
    const weight = transformer.get(name);
    return [weight, bound(weight, transformer.get(name.replace(/weight$/, "bias")))];
  }));
}

/** The same weights; with other values of a bounded layer its bound follows. */
function renewing(
  device: GpuDevice,
  transformer: Weights,
  matrices: WeakMap<Tensor, Float8Matrix>,
  bounds: WeakMap<Tensor, LayerBound>,
): Weights {
  return {
    ...transformer,
    assign(values) {
      transformer.assign(values);
      const modules = new Set(Array.from(values.keys(), (name) => name.replace(/\.(weight|bias)$/, "")));
      for (const module of modules) {
        if (!BOUNDED.test(`${module}.weight`)) continue;
        const weight = transformer.get(`${module}.weight`);
        const [bound, bias] = [bounds.get(weight), transformer.get(`${module}.bias`)];
        if (bound === undefined) continue;
        renewLayerBound(device, matrices.get(weight)!, bias, bound);
      }
    },
  };
}

/** The norms that quantized layers read, with the lengths of their rows. */
function measuringNorms(ops: Ops, matrices: WeakMap<Tensor, Float8Matrix>) {
  const quantized = (readers?: Readers) => readersAreQuantized(matrices, readers);
  return {
    adaLayerNorm: (x, scale, shift, eps, readers) =>
      quantized(readers)
        ? adaLayerNormFloat8(x, scale, shift, eps, true)
        : ops.adaLayerNorm(x, scale, shift, eps, readers),
    gatedAdaLayerNorm: (residual, x, gate, scale, shift, eps, readers) =>
      quantized(readers)
        ? gatedAdaLayerNormFloat8(residual, x, gate, scale, shift, eps, true)
        : ops.gatedAdaLayerNorm(residual, x, gate, scale, shift, eps, readers),
  } satisfies Partial<Ops>;
}

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(fusedBlocks.name));
