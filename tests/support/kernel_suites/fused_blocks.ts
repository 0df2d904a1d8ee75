/** Fused transformer blocks on a GPU against those of operators. */
import assert from "node:assert/strict";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import type { Tensor } from "../../../ffi/tensor.ts";
import { adaLayerNormFloat8 } from "../../../kernels/ada_layer_norm.ts";
import type { AttentionDType } from "../../../kernels/attention_tiles.ts";
import {
  type BlockStream,
  doubleBlock,
  type DoubleModulation,
  type JointTurn,
} from "../../../kernels/double_block.ts";
import { hasFlashAttention } from "../../../kernels/flash_attention.ts";
import type { Float8Matrix } from "../../../kernels/float8_tensor.ts";
import {
  doubleBlockFused,
  doubleBlockFusedTakes,
  type FusedWeights,
  singleBlockFused,
  singleBlockFusedTakes,
} from "../../../kernels/fused_blocks.ts";
import { linearFloat8 } from "../../../kernels/linear_float8.ts";
import type { LinearLayer } from "../../../kernels/linears.ts";
import { type LayerBound, layerBound } from "../../../kernels/output_scales.ts";
import type { ParallelLayers } from "../../../kernels/parallel_branches.ts";
import { quantizeRows } from "../../../kernels/quantize_float8.ts";
import { rotaryPairs } from "../../../kernels/rotary_pairs.ts";
import { singleBlock } from "../../../kernels/single_block.ts";
import { eagerOps } from "../../../recipes/base/ops.ts";
import { valuesOf } from "../golden.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import { EPS, sample } from "./samples.ts";

const HEADS = 2;
const HIDDEN = 128 * HEADS;
const MLP = 512;

export function fusedBlocksSuite(): void {
  forEachGpu("fused blocks", (test) => {
    for (const float8 of [false, true]) {
      for (const attention of ["bf16", "f8e4m3"] as const) {
        const what = `${float8 ? "float8" : "bfloat16"} with attention in ${attention}`;
        test(`are near those of operators: ${what}`, async (device) => {
          if (!hasFlashAttention(device)) return;
          for (const [text, image] of [[128, 1], [128, 200], [256, 384]]) {
            const errors = await blockErrors(device, float8, attention, text, image);
            // Each operator of the eager blocks rounds to bfloat16; in float8 a value has four bits.
            const allowed = float8 || attention === "f8e4m3" ? 0.06 : 0.012;
            for (const [name, error] of Object.entries(errors)) {
              assert.ok(
                error <= allowed,
                `${name} in ${what} of ${text} + ${image} tokens: relative error ${error}`,
              );
            }
          }
        });
      }
    }
  });
}

/** Layers with weights that 03_fuse_qkv has laid together, quantized or not, and what the fused blocks know of them. */
class Block {
  readonly #matrices = new Map<Tensor, Float8Matrix>();
  readonly #bounds = new Map<Tensor, LayerBound>();
  #seed = 0;

  constructor(readonly device: GpuDevice, readonly float8: boolean, readonly attention: AttentionDType) {}

  draw(shape: readonly number[], scale: number, shift = 0): Tensor {
    const seed = this.#seed++;
    return sample(this.device, shape, "bf16", (i) => shift + scale * noise(seed)(i)).tensor;
  }

  /** Layers of `k` inputs side by side, with their weights as the eager blocks take them beside. */
  joined(rows: readonly number[], k: number): LinearLayer[] {
    const count = rows.reduce((a, b) => a + b, 0);
    const weight = this.draw([count, k], 2 / Math.sqrt(k));
    const bias = this.draw([count], 0.2);
    const quantized = this.float8 ? quantizeRows(weight) : undefined;
    let start = 0;
    return rows.map((own) => {
      start += own;
      const part = (whole: Tensor) => whole.narrow(0, start - own, own);
      const layer = { weight: part(quantized?.values ?? weight), bias: part(bias) };
      if (quantized !== undefined) {
        const matrix = { values: layer.weight, scales: part(quantized.scales), rowwise: true };
        this.#matrices.set(layer.weight, matrix);
        this.#bounds.set(layer.weight, layerBound(this.device, matrix, layer.bias));
      }
      return layer;
    });
  }

  get weights(): FusedWeights {
    return {
      attention: this.attention,
      scalesOf: (weight) => this.#matrices.get(weight)?.scales,
      boundOf: (weight) => this.#bounds.get(weight)!,
    };
  }

  /** The eager table, that multiplies by quantized weights. */
  get ops() {
    const linear: typeof eagerOps.linear = (x, weight, bias, ...rest) => {
      const matrix = this.#matrices.get(weight);
      return matrix === undefined ? eagerOps.linear(x, weight, bias, ...rest) : linearFloat8(x, matrix, bias);
    };
    return {
      ...eagerOps,
      linear,
      linears: (x: Tensor, layers: readonly LinearLayer[]) =>
        layers.map(({ weight, bias }) => linear(x, weight, bias)),
      linearGelu: (x: Tensor, weight: Tensor, bias?: Tensor) => eagerOps.geluTanh(linear(x, weight, bias)),
    };
  }

  modulation(): DoubleModulation {
    const [scaleMsa, shiftMsa, gateMsa, scaleMlp, shiftMlp, gateMlp] = Array.from(
      { length: 6 },
      () => this.draw([1, HIDDEN], 0.7),
    );
    return { scaleMsa, shiftMsa, gateMsa, scaleMlp, shiftMlp, gateMlp };
  }

  stream(tokens: number): BlockStream {
    const [q, k, v] = this.joined([HIDDEN, HIDDEN, HIDDEN], HIDDEN);
    const [out] = this.joined([HIDDEN], HIDDEN);
    const [up] = this.joined([MLP], HIDDEN);
    const [down] = this.joined([HIDDEN], MLP);
    const [normQ, normK] = [1, 1].map((shift) => this.draw([128], 0.3, shift));
    return {
      x: this.draw([1, tokens, HIDDEN], 2),
      layers: { q, k, v, out, up, down, normQ, normK },
      modulation: this.modulation(),
    };
  }
}

async function blockErrors(
  device: GpuDevice,
  float8: boolean,
  attention: AttentionDType,
  text: number,
  image: number,
) {
  const block = new Block(device, float8, attention);
  const tokens = text + image;
  const [cos, sin] = [3, 4].map((seed) =>
    sample(device, [tokens, 128], "f32", (i) => noise(seed)(i >> 1)).tensor
  );
  const turn: JointTurn = { heads: HEADS, cos, sin, pairs: rotaryPairs(device, cos, sin), eps: EPS };
  const streams = [block.stream(text), block.stream(image)];
  assert.ok(doubleBlockFusedTakes(device, block.weights, streams, turn));
  const double = doubleBlockFused(device, block.weights, streams, turn, block.ops);
  const expectedDouble = doubleBlock(streams, turn, block.ops);

  const [q, k, v, mlp] = block.joined([HIDDEN, HIDDEN, HIDDEN, MLP], HIDDEN);
  const [out] = block.joined([HIDDEN], HIDDEN + MLP);
  const { normQ, normK } = streams[0].layers;
  const layers: ParallelLayers = { q, k, v, mlp, out, normQ, normK, heads: HEADS };
  const x = block.draw([1, tokens, HIDDEN], 2);
  const { scaleMsa: scale, shiftMsa: shift, gateMsa: gate } = streams[0].modulation;
  const normed = float8
    ? adaLayerNormFloat8(x, scale, shift, EPS, true)
    : eagerOps.adaLayerNorm(x, scale, shift, EPS);
  const modulation = { gate, scale, shift };
  assert.ok(singleBlockFusedTakes(device, block.weights, { sum: x, normed }, layers, turn));
  const single = singleBlockFused(
    device,
    block.weights,
    { sum: x, normed },
    layers,
    modulation,
    turn,
    [],
    block.ops,
  );
  const plain = eagerOps.adaLayerNorm(x, scale, shift, EPS);
  const expectedSingle = singleBlock({ sum: x, normed: plain }, layers, modulation, turn, [], block.ops);
  const errors = {
    text: await error(double[0], expectedDouble[0], streams[0].x),
    image: await error(double[1], expectedDouble[1], streams[1].x),
    single: await error(single.sum, expectedSingle.sum, x),
    norm: await error(single.normed, expectedSingle.normed),
  };
  return errors;
}

/** Relative error, of what was added to `base`. */
async function error(actual: Tensor, expected: Tensor, base?: Tensor): Promise<number> {
  const [a, b, c] = [await valuesOf(actual), await valuesOf(expected), base && await valuesOf(base)];
  let [difference, size] = [0, 0];
  for (let i = 0; i < b.length; i++) {
    difference += (a[i] - b[i]) ** 2;
    size += (b[i] - (c?.[i] ?? 0)) ** 2;
  }
  return Math.sqrt(difference / size);
}
