import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { adaLayerNormFloat8 } from "./ada_layer_norm.ts";
import { type AttentionDType, TILE } from "./attention_tiles.ts";
import type { BlockStream, DoubleBlockOps, JointTurn } from "./double_block.ts";
import { flashAttention, hasFlashAttention } from "./flash_attention.ts";
import { Float8Tensor } from "./float8_tensor.ts";
import {
  fusedGelu,
  fusedGeluTakes,
  type FusedLayer,
  type FusedOperand,
  fusedQkv,
  fusedQkvTakes,
  fusedResidual,
  type Layers,
} from "./fused_linear.ts";
import type { Normed } from "./gated_ada_layer_norm.ts";
import { joinedView } from "./joined_linears.ts";
import type { LinearLayer, Readers } from "./linears.ts";
import { type LayerBound, outputScales } from "./output_scales.ts";
import type { ParallelLayers } from "./parallel_branches.ts";
import type { SingleBlockOps, SingleModulation } from "./single_block.ts";

/** What the fused blocks know of a plan's weights. */
export interface FusedWeights {
  /** What attention multiplies in. */
  readonly attention: AttentionDType;
  /** The scales of a float8 weight, f32 `[out]`; undefined for one that is not quantized. */
  scalesOf(weight: Tensor): Tensor | undefined;
  /** The {@link LayerBound} of a float8 layer whose results are stored in float8. */
  boundOf(weight: Tensor): LayerBound;
}

/** Whether {@link doubleBlockFused} takes these streams. */
export function doubleBlockFusedTakes(
  gpu: GpuDevice,
  weights: FusedWeights,
  streams: readonly BlockStream[],
  { heads, pairs }: JointTurn,
): boolean {
  const [{ x: { shape: [batch, , hidden] } }] = streams;
  // All but the last stream end with a tile.
  const whole = streams.slice(0, -1).every(({ x }) => x.shape[1] > 0 && x.shape[1] % TILE === 0);
  return hasFlashAttention(gpu) && pairs !== undefined && batch === 1 && streams.length <= 2 && whole &&
    hidden === heads * TILE &&
    streams.every(({ x, layers: { q, k, v, out, up, down } }) =>
      x.dtype === "bf16" && alike(weights, [q, k, v, out, up, down]) && fusedQkvTakes(hidden, hidden) &&
      fusedGeluTakes(up.weight.shape[0], hidden) && joinedLayer(weights, [q, k, v]) !== undefined
    );
}

/**
 * {@link doubleBlock} with the products of both streams in one kernel each, which do in their epilogues what comes behind
 * them: QK-norm, rotary embedding and the cast to tiles of attention; GELU; gates and residual connections.
 *
 * @param streams that {@link doubleBlockFusedTakes}, with weights in bfloat16, or all in float8 by rows.
 */
export function doubleBlockFused(
  gpu: GpuDevice,
  weights: FusedWeights,
  streams: readonly BlockStream[],
  turn: JointTurn,
  ops: DoubleBlockOps,
): Tensor[] {
  const [{ x: { shape: [, , hidden] }, layers: { q } }] = streams;
  const float8 = weights.scalesOf(q.weight) !== undefined;
  const tokens = streams.reduce((sum, { x }) => sum + x.shape[1], 0);
  const empty = (shape: readonly number[]) =>
    float8 ? Float8Tensor.alloc(gpu, shape, "bf16") : Tensor.empty(gpu, shape, "bf16");
  return gpu.scope(() => {
    const attended = empty([1, tokens, hidden]);
    const operand = operandOf(attended);
    gpu.scope(() => {
      const normed = streams.map(({ x, modulation: { scaleMsa, shiftMsa } }) =>
        norm(ops, float8, x, scaleMsa, shiftMsa, turn.eps)
      );
      if (attended instanceof Float8Tensor) {
        const mixed = streams.map(({ layers }, i) => measuredBy(normed[i], weights.boundOf(layers.v.weight)));
        outputScales(gpu, attended.scales, undefined, mixed);
      }
      const layers = streams.map(({ layers: { q, k, v, normQ, normK } }, i) => ({
        x: operandOf(normed[i]),
        ...joinedLayer(weights, [q, k, v])!,
        normQ,
        normK,
      }));
      const tiles = fusedQkv(gpu, pair(layers), { ...turn, pairs: turn.pairs!, dtype: weights.attention });
      flashAttention(
        gpu,
        tiles,
        TILE ** -0.5,
        operand.values.reshape([1, tokens, turn.heads, TILE]),
        operand.scales,
      );
    });
    const sums = streams.map(({ x }) => Tensor.empty(gpu, x.shape, "bf16"));
    let start = 0;
    const after = streams.map(({ x, layers, modulation }, i) => {
      const count = x.shape[1];
      start += count;
      const own = rowsOf(operand, start - count, count);
      return {
        ...layerOf(weights, own, layers.out),
        residual: flat(x),
        gate: modulation.gateMsa,
        out: flat(sums[i]),
      };
    });
    fusedResidual(gpu, pair(after));
    const results = streams.map(({ x }) => Tensor.empty(gpu, x.shape, "bf16"));
    gpu.scope(() => {
      const hiddenLayers = streams.map(({ x, layers }) => empty([1, x.shape[1], layers.up.weight.shape[0]]));
      const ups = streams.map(({ layers: { up }, modulation: { scaleMlp, shiftMlp } }, i) => {
        const normed = norm(ops, float8, sums[i], scaleMlp, shiftMlp, turn.eps);
        const { values, scales } = operandOf(hiddenLayers[i]);
        if (scales !== undefined) {
          outputScales(gpu, scales, measuredBy(normed, weights.boundOf(up.weight)));
        }
        return { ...layerOf(weights, normed, up), out: values, outScales: scales };
      });
      fusedGelu(gpu, pair(ups));
      const downs = streams.map(({ layers: { down }, modulation: { gateMlp } }, i) => ({
        ...layerOf(weights, hiddenLayers[i], down),
        residual: flat(sums[i]),
        gate: gateMlp,
        out: flat(results[i]),
      }));
      fusedResidual(gpu, pair(downs));
    });
    return results;
  });
}

/** Whether {@link singleBlockFused} takes this block. */
export function singleBlockFusedTakes(
  gpu: GpuDevice,
  weights: FusedWeights,
  { sum, normed }: Normed,
  { q, k, v, mlp, out, heads }: ParallelLayers,
  { pairs }: JointTurn,
): boolean {
  const [batch, , hidden] = sum.shape;
  const ready = weights.scalesOf(q.weight) === undefined
    ? normed.dtype === "bf16"
    : normed instanceof Float8Tensor && normed.lengths !== undefined;
  return hasFlashAttention(gpu) && pairs !== undefined && batch === 1 && hidden === heads * TILE && ready &&
    alike(weights, [q, k, v, mlp, out]) && fusedQkvTakes(hidden, hidden) &&
    fusedGeluTakes(mlp.weight.shape[0], hidden) &&
    joinedLayer(weights, [q, k, v, mlp]) !== undefined;
}

/**
 * {@link singleBlock} with one product for q, k, v and the MLP, which gives the tiles of attention and, beside the place of
 * attention's output, GELU: so that the output projection reads both as they are. It adds its results to the tokens.
 *
 * @param x that {@link singleBlockFusedTakes}. @param ops whose `adaLayerNorm` gives what `readers` read.
 */
export function singleBlockFused(
  gpu: GpuDevice,
  weights: FusedWeights,
  x: Normed,
  layers: ParallelLayers,
  { gate, scale, shift }: SingleModulation,
  turn: JointTurn,
  readers: Readers,
  ops: SingleBlockOps,
): Normed {
  const { q, k, v, mlp, out, normQ, normK } = layers;
  const [, tokens, hidden] = x.sum.shape;
  const mlpHidden = mlp.weight.shape[0];
  const shape = [1, tokens, hidden + mlpHidden];
  return gpu.scope(() => {
    const sum = Tensor.empty(gpu, x.sum.shape, "bf16");
    gpu.scope(() => {
      const both = weights.scalesOf(q.weight) === undefined
        ? Tensor.empty(gpu, shape, "bf16")
        : Float8Tensor.alloc(gpu, shape, "bf16");
      const { values, scales } = operandOf(both);
      if (scales !== undefined) {
        const mixed = measuredBy(x.normed, weights.boundOf(v.weight));
        outputScales(gpu, scales, measuredBy(x.normed, weights.boundOf(mlp.weight)), [mixed]);
      }
      const joined = joinedLayer(weights, [q, k, v, mlp])!;
      const tiles = fusedQkv(gpu, [{ x: operandOf(x.normed), ...joined, normQ, normK }], {
        ...turn,
        pairs: turn.pairs!,
        dtype: weights.attention,
        mlp: { out: values.narrow(1, hidden, mlpHidden), outScales: scales },
      });
      const attended = values.narrow(1, 0, hidden).reshape([1, tokens, turn.heads, TILE]);
      flashAttention(gpu, tiles, TILE ** -0.5, attended, scales);
      const layer = layerOf(weights, both, out);
      fusedResidual(gpu, [{ ...layer, residual: flat(x.sum), gate, out: flat(sum) }]);
    });
    return { sum, normed: ops.adaLayerNorm(sum, scale, shift, turn.eps, readers) };
  });
}

/** The norm that a product reads: in float8 with the lengths of its rows. */
function norm(
  ops: DoubleBlockOps,
  float8: boolean,
  x: Tensor,
  scale: Tensor,
  shift: Tensor,
  eps: number,
): Tensor {
  return float8 ? adaLayerNormFloat8(x, scale, shift, eps, true) : ops.adaLayerNorm(x, scale, shift, eps);
}

/** A tensor `[1, rows, k]` as a matrix. */
function operandOf(x: Tensor): FusedOperand {
  return x instanceof Float8Tensor ? { values: flat(x.values), scales: x.scales } : { values: flat(x) };
}

function flat(x: Tensor): Tensor {
  return x.reshape([x.shape[1], x.shape[2]]);
}

function rowsOf({ values, scales }: FusedOperand, start: number, count: number): FusedOperand {
  return { values: values.narrow(0, start, count), scales: scales?.narrow(0, start, count) };
}

function layerOf(weights: FusedWeights, x: Tensor | FusedOperand, { weight, bias }: LinearLayer): FusedLayer {
  return {
    x: x instanceof Tensor ? operandOf(x) : x,
    weight: { values: weight, scales: weights.scalesOf(weight) },
    bias,
  };
}

/** Layers of one input as one, where 03_fuse_qkv has laid them together, quantized or not. */
function joinedLayer(
  weights: FusedWeights,
  layers: readonly LinearLayer[],
): Pick<FusedLayer, "weight" | "bias"> | undefined {
  const values = joinedView(layers.map((layer) => layer.weight));
  const scales = layers.flatMap(({ weight }) => weights.scalesOf(weight) ?? []);
  const joinedScales = scales.length === layers.length ? joinedView(scales) : undefined;
  const biases = layers.flatMap(({ bias }) => bias ?? []);
  const bias = biases.length === layers.length ? joinedView(biases) : undefined;
  const whole = values !== undefined && bias !== undefined &&
    (scales.length === 0 || joinedScales !== undefined);
  return whole ? { weight: { values, scales: joinedScales }, bias } : undefined;
}

function measuredBy(normed: Tensor, bound: LayerBound) {
  return { lengths: (normed as Float8Tensor).lengths!, bound };
}

/** Whether all weights are bfloat16, or all are in float8 with scales for their rows. */
function alike(weights: FusedWeights, layers: readonly LinearLayer[]): boolean {
  const [first] = layers;
  const scaled = weights.scalesOf(first.weight) !== undefined;
  return layers.every(({ weight, bias }) =>
    weight.dtype === (scaled ? "f8e4m3" : "bf16") && (weights.scalesOf(weight) !== undefined) === scaled &&
    bias?.dtype === "bf16"
  );
}

function pair<L>(layers: readonly L[]): Layers<L> {
  return layers as unknown as Layers<L>;
}
