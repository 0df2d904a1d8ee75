/**
 * How close the memory-bound kernels come to the machine's copy rate, at the shapes that FLUX.1 has at 1024 x 1024.
 *
 *     deno run -A tests/gpu/full_size/bandwidth.ts --device cuda --json bandwidth.json
 *
 * Each kernel is recorded a few times in one graph, over inputs that together are larger than the second-level cache,
 * so that neither the host nor the cache counts. Two shares are printed: of a plain copy of as many bytes, which has the
 * same launch to wait for, and of a copy of gigabytes. The bar is for the first. It is not for kernels that move so
 * little that a launch takes longer, nor for those that arithmetic holds up. Ends with exit code 1 when a kernel is
 * below its bar.
 */
import { Command } from "@commander-js/extra-typings";
import type { DType } from "../../../ffi/dtype.ts";
import { FfiError } from "../../../ffi/errors.ts";
import { type GpuDevice, isGpu } from "../../../ffi/gpu.ts";
import { openDevice } from "../../../ffi/open.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { groupNormSiluFused } from "../../../kernels/group_norm_silu.ts";
import { NCHW } from "../../../kernels/layout.ts";
import { adaLayerNormFloat8, adaLayerNormFused } from "../../../kernels/ada_layer_norm.ts";
import { addRmsNormFused } from "../../../kernels/add_rms_norm.ts";
import { gatedAdaLayerNormFloat8, gatedAdaLayerNormFused } from "../../../kernels/gated_ada_layer_norm.ts";
import type { Float8Tensor } from "../../../kernels/float8_tensor.ts";
import { geluTanhFloat8 } from "../../../kernels/gelu_float8.ts";
import { jointQkNormRopeFused, jointQkNormRopeTiles } from "../../../kernels/joint_qk_norm_rope.ts";
import { linearFewRows } from "../../../kernels/linear_few_rows.ts";
import { qkNormRope } from "../../../kernels/qk_norm_rope.ts";
import { quantizeRows, quantizeTensor } from "../../../kernels/quantize_float8.ts";
import { fillRandom } from "../../../kernels/random_fill.ts";
import { softmaxOnGpu } from "../../../kernels/softmax.ts";
import { packLatents, unpackLatents } from "../../../recipes/base/latents.ts";
import { eagerOps as ops } from "../../../recipes/base/ops.ts";

/** Of the rate of a copy of as many bytes. */
const BAR = 0.8;
/** Bytes below which a kernel has no bar: a copy of them reaches two thirds of the rate of a large one. */
const SMALL_BYTES = 8e6;
/** More than the caches of the GPUs that this is for: 50 MB on an H100, 256 MB on an MI300X. */
const FLUSHED_BYTES = 600e6;
const ROUNDS = 20;
/** What a block of 256 threads copies. */
const COPY_BLOCK_BYTES = 256 * 16;

const flags = new Command("bandwidth")
  .option("--device <name>", "as for generate", "cuda")
  .option("--json <file>", "where the rates go as JSON too")
  .parse(Deno.args, { from: "user" })
  .opts();

using opened = await openDevice(flags.device, { onWarning: console.error });
if (!isGpu(opened)) throw new FfiError(`${opened.name} is no GPU`);
const device: GpuDevice = opened;

/** A kernel under test: its inputs, what it computes, and the bytes that it cannot avoid to move. */
interface Case {
  readonly name: string;
  /** Makes one set of inputs. */
  readonly inputs: () => Tensor[];
  readonly run: (...inputs: Tensor[]) => Tensor | readonly Tensor[];
  /** Bytes read and written, from the inputs and the (first) output; those of all of them when left out. */
  readonly bytes?: (inputs: readonly Tensor[], out: Tensor) => number;
  /** Whether arithmetic takes longer than the bytes. */
  readonly arithmetic?: true;
}

const [TOKENS, TEXT, HIDDEN, HEADS, HEAD_DIM, MLP] = [4352, 256, 3072, 24, 128, 12288];
const [T5_HIDDEN, T5_MLP, T5_HEADS] = [4096, 10240, 64];
const bf16 = (...shape: number[]) => random(shape, "bf16");
const f32 = (...shape: number[]) => random(shape, "f32");

/** Group norm reads the picture twice: for the statistics, and to change it. */
const twiceRead = ([x]: readonly Tensor[], out: Tensor) => 2 * x.byteLength + out.byteLength;

const CASES: readonly Case[] = [
  { name: "layerNorm", inputs: () => [bf16(1, TOKENS, HIDDEN)], run: (x) => ops.layerNorm(x, 1e-6) },
  {
    name: "modulate and layer norm (adaLayerNorm)",
    inputs: () => [bf16(1, TOKENS, HIDDEN), bf16(1, HIDDEN), bf16(1, HIDDEN)],
    run: (x, scale, shift) => ops.adaLayerNorm(x, scale, shift, 1e-6),
    bytes: ([x], out) => 2 * (x.byteLength + out.byteLength), // two kernels
  },
  {
    name: "adaLayerNormFused",
    inputs: () => [bf16(1, TOKENS, HIDDEN), bf16(1, HIDDEN), bf16(1, HIDDEN)],
    run: (x, scale, shift) => adaLayerNormFused(x, scale, shift, 1e-6),
  },
  {
    name: "gatedAdaLayerNormFused",
    inputs: () => [
      ...[0, 1].map(() => bf16(1, TOKENS, HIDDEN)),
      ...[0, 1, 2].map(() => bf16(1, HIDDEN)),
    ],
    run: (residual, x, gate, scale, shift) =>
      Object.values(gatedAdaLayerNormFused(residual, x, gate, scale, shift, 1e-6)),
  },
  {
    name: "addRmsNormFused (T5)",
    inputs: () => [bf16(1, TEXT, T5_HIDDEN), bf16(1, TEXT, T5_HIDDEN), bf16(T5_HIDDEN)],
    run: (residual, x, weight) => Object.values(addRmsNormFused(residual, x, weight, 1e-6)),
  },
  {
    name: "jointQkNormRopeFused, single block",
    inputs: () => [...qkvOf(TOKENS, MLP), f32(TOKENS, HEAD_DIM), f32(TOKENS, HEAD_DIM)],
    run: (q, k, v, normQ, normK, cos, sin) => {
      const joint = jointQkNormRopeFused([{ q, k, v, normQ, normK }], cos, sin, 1e-6);
      return [joint.q, joint.k];
    },
    bytes: ([q, , , , , cos], out) => 2 * (q.byteLength + out.byteLength + cos.byteLength),
  },
  {
    name: "jointQkNormRopeFused, double block",
    inputs: () => [
      ...qkvOf(TEXT, 0),
      ...qkvOf(TOKENS - TEXT, 0),
      f32(TOKENS, HEAD_DIM),
      f32(TOKENS, HEAD_DIM),
    ],
    run: (...inputs) => {
      const streams = [0, 5].map((first) => {
        const [q, k, v, normQ, normK] = inputs.slice(first);
        return { q, k, v, normQ, normK };
      });
      return Object.values(jointQkNormRopeFused(streams, inputs[10], inputs[11], 1e-6));
    },
  },
  ...(["f8e4m3", "bf16"] as const).map((dtype): Case => ({
    name: `jointQkNormRopeTiles, ${dtype}`,
    inputs: () => [...qkvOf(TOKENS, MLP), f32(TOKENS, HEAD_DIM), f32(TOKENS, HEAD_DIM)],
    run: (q, k, v, normQ, normK, cos, sin) => {
      const tiles = jointQkNormRopeTiles(device, [{ q, k, v, normQ, normK }], cos, sin, 1e-6, dtype);
      return [tiles.q, tiles.k, tiles.v];
    },
    // Norm and rotation take as long in float8 as with twice the bytes written.
    ...(dtype === "f8e4m3" && { arithmetic: true as const }),
  })),
  {
    name: "geluTanh between wider tensors",
    inputs: () => [
      bf16(1, TOKENS, 3 * HIDDEN + MLP).narrow(2, 3 * HIDDEN, MLP),
      bf16(1, TOKENS, HIDDEN + MLP).narrow(2, HIDDEN, MLP),
    ],
    run: (x, out) => ops.geluTanh(x, out),
    bytes: ([x], out) => x.byteLength + out.byteLength,
  },
  {
    name: "rmsNorm of heads",
    inputs: () => [bf16(1, TOKENS, HEADS, HEAD_DIM), bf16(HEAD_DIM)],
    run: (x, weight) => ops.rmsNorm(x, weight, 1e-6),
  },
  {
    name: "rms norm and rope (qkNormRope)",
    inputs: () => [
      bf16(1, TOKENS, HEADS, HEAD_DIM),
      bf16(HEAD_DIM),
      f32(TOKENS, HEAD_DIM),
      f32(TOKENS, HEAD_DIM),
    ],
    run: (x, weight, cos, sin) => qkNormRope(x, weight, cos, sin, 1e-6),
    bytes: ([x, , cos, sin], out) => 2 * (x.byteLength + out.byteLength) + cos.byteLength + sin.byteLength,
  },
  { name: "geluTanh", inputs: () => [bf16(1, TOKENS, MLP)], run: (x) => ops.geluTanh(x) },
  { name: "silu of a picture", inputs: () => [bf16(1, 128, 1024, 1024)], run: (x) => ops.silu(x) },
  {
    name: "add",
    inputs: () => [bf16(1, 128, 1024, 1024), bf16(1, 128, 1024, 1024)],
    run: (a, b) => ops.add(a, b),
  },
  {
    name: "multiply (T5)",
    inputs: () => [bf16(1, TEXT, T5_MLP), bf16(1, TEXT, T5_MLP)],
    run: (a, b) => ops.multiply(a, b),
  },
  {
    name: "rmsNorm (T5)",
    inputs: () => [bf16(1, TEXT, T5_HIDDEN), bf16(T5_HIDDEN)],
    run: (x, weight) => ops.rmsNorm(x, weight, 1e-6),
  },
  {
    name: "softmax with bias (T5)",
    inputs: () => [f32(T5_HEADS, TEXT, TEXT), bf16(T5_HEADS, TEXT, TEXT)],
    run: (logits, bias) => softmaxOnGpu(device, logits, "bf16", bias),
  },
  {
    name: "softmax in f32",
    inputs: () => [f32(HEADS, 1024, TOKENS)],
    run: (logits) => softmaxOnGpu(device, logits, "f32"),
  },
  {
    name: "gatedResidual",
    inputs: () => [bf16(1, TOKENS, HIDDEN), bf16(1, TOKENS, HIDDEN), bf16(1, HIDDEN)],
    run: (residual, x, gate) => ops.gatedResidual(residual, x, gate),
  },
  {
    name: "concat of text and image",
    inputs: () => [bf16(1, TEXT, HEADS, HEAD_DIM), bf16(1, TOKENS - TEXT, HEADS, HEAD_DIM)],
    run: (text, image) => ops.concat([text, image], 1),
  },
  {
    name: "concat of attention and MLP",
    inputs: () => [bf16(1, TOKENS, HIDDEN), bf16(1, TOKENS, MLP)],
    run: (attended, mlp) => ops.concat([attended, mlp], 2),
  },
  {
    name: "contiguous, NCHW to tokens",
    inputs: () => [bf16(1, 512, 128 * 128)],
    run: (x) => ops.contiguous(x.permute([0, 2, 1])),
  },
  {
    name: "contiguous, NCHW to NHWC",
    inputs: () => [bf16(1, 128, 1024, 1024)],
    run: (x) => ops.contiguous(x.permute([0, 2, 3, 1])),
  },
  { name: "packing latents", inputs: () => [bf16(1, 16, 128, 128)], run: (x) => packLatents(ops, x) },
  {
    name: "unpacking latents",
    inputs: () => [bf16(1, 64 * 64, 64)],
    run: (x) => unpackLatents(ops, x, 128, 128),
  },
  { name: "cast to f32", inputs: () => [bf16(1, TOKENS, MLP)], run: (x) => ops.cast(x, "f32") },
  { name: "cast to bf16", inputs: () => [f32(1, TOKENS, MLP)], run: (x) => ops.cast(x, "bf16") },
  {
    name: "groupNorm, NCHW",
    inputs: () => [bf16(1, 128, 1024, 1024), bf16(128), bf16(128)],
    run: (x, weight, bias) => ops.groupNorm(x, 32, weight, bias, 1e-6),
    bytes: twiceRead,
  },
  {
    name: "groupNorm, NHWC",
    inputs: () => [bf16(1, 1024, 1024, 128).permute([0, 3, 1, 2]), bf16(128), bf16(128)],
    run: (x, weight, bias) => ops.groupNorm(x, 32, weight, bias, 1e-6),
    bytes: twiceRead,
  },
  {
    name: "groupNorm and silu in one, NCHW",
    inputs: () => [bf16(1, 128, 1024, 1024), bf16(128), bf16(128)],
    run: (x, weight, bias) => groupNormSiluFused(x, 32, weight, bias, 1e-6),
    bytes: twiceRead,
  },
  {
    name: "groupNorm and silu in one, NHWC",
    inputs: () => [bf16(1, 1024, 1024, 128).permute(NCHW), bf16(128), bf16(128)],
    run: (x, weight, bias) => groupNormSiluFused(x, 32, weight, bias, 1e-6),
    bytes: twiceRead,
  },
  ...[HIDDEN, MLP, HIDDEN + MLP].map((k): Case => ({
    name: `quantizeRows of ${k}`,
    inputs: () => [bf16(TOKENS, k)],
    run: (x) => quantizeRows(x).values,
  })),
  {
    name: "adaLayerNormFloat8",
    inputs: () => [bf16(1, TOKENS, HIDDEN), bf16(1, HIDDEN), bf16(1, HIDDEN)],
    run: (x, scale, shift) => adaLayerNormFloat8(x, scale, shift, 1e-6),
  },
  {
    name: "gatedAdaLayerNormFloat8",
    inputs: () => [
      ...[0, 1].map(() => bf16(1, TOKENS, HIDDEN)),
      ...[0, 1, 2].map(() => bf16(1, HIDDEN)),
    ],
    run: (residual, x, gate, scale, shift) =>
      Object.values(gatedAdaLayerNormFloat8(residual, x, gate, scale, shift, 1e-6)),
  },
  {
    name: "geluTanhFloat8 beside attention",
    inputs: () => [
      bf16(1, TOKENS, 3 * HIDDEN + MLP).narrow(2, 3 * HIDDEN, MLP),
      bf16(1, TOKENS, HIDDEN),
    ],
    run: (x, before) => geluTanhFloat8(x, before),
  },
  {
    name: "geluTanhFloat8",
    inputs: () => [bf16(1, TOKENS - TEXT, MLP)],
    run: (x) => geluTanhFloat8(x),
  },
  {
    name: "quantizeTensor",
    inputs: () => [bf16(TOKENS, HIDDEN)],
    run: (x) => quantizeTensor(x).values,
    bytes: twiceRead,
  },
  // The modulations of a double and of a single block, of schnell's four steps and of dev's.
  ...[[4, 6], [4, 3], [28, 6]].map(([rows, parts]): Case => ({
    name: `linearFewRows, ${rows} of ${parts * HIDDEN}`,
    inputs: () => [bf16(rows, HIDDEN), quantizeRows(bf16(parts * HIDDEN, HIDDEN)), bf16(parts * HIDDEN)],
    run: (x, weight, bias) => linearFewRows(x, weight as Float8Tensor, bias),
    ...(rows > 4 && { arithmetic: true as const }),
  })),
  { name: "upsampleNearest", inputs: () => [bf16(1, 256, 512, 512)], run: (x) => ops.upsampleNearest(x) },
  {
    name: "upsampleNearest, NHWC",
    inputs: () => [bf16(1, 512, 512, 256).permute(NCHW)],
    run: (x) => ops.upsampleNearest(x),
  },
  { name: "toPixels", inputs: () => [f32(8, 3, 1024, 1024)], run: (x) => ops.toPixels(x) },
  {
    name: "fillRandom",
    inputs: () => [Tensor.empty(device, [2 ** 28], "bf16")],
    run: (x) => {
      fillRandom(x, { seed: 1, stream: 0, kind: "normal", scale: 1, shift: 0 });
      return x;
    },
    bytes: (_, out) => out.byteLength,
    arithmetic: true,
  },
];

/** q, k and v as columns of one product with `more` behind them, and the weights of their norms. */
function qkvOf(tokens: number, more: number): Tensor[] {
  const product = bf16(1, tokens, 3 * HIDDEN + more);
  const qkv = [0, 1, 2].map((part) =>
    product.narrow(2, part * HIDDEN, HIDDEN).reshape([1, tokens, HEADS, HEAD_DIM])
  );
  return [...qkv, bf16(HEAD_DIM), bf16(HEAD_DIM)];
}

const largeCopy = copyRate(2 ** 31);
console.log(`${device.properties().description}: copies at ${terabytes(largeCopy)}, read and written`);
const rates = CASES.map((one) => {
  const { name, arithmetic = false } = one;
  const { rate, moved } = measure(one);
  const ofSame = rate / copyRate(moved);
  const ofLarge = rate / largeCopy;
  const small = moved < SMALL_BYTES;
  const holds = arithmetic || small || ofSame >= BAR;
  const why = arithmetic ? "no bar: arithmetic" : small ? "no bar: small" : holds ? "ok" : "MISS";
  console.log(
    `${name.padEnd(38)} ${terabytes(rate)} ${percent(ofSame)} of a copy of ${
      (moved / 1e6).toFixed(1).padStart(6)
    } MB, ${percent(ofLarge)} of a large one  ${why}`,
  );
  return { name, bytes: moved, bytesPerSecond: rate, ofSame, ofLarge, holds };
});
if (flags.json !== undefined) {
  const report = { device: device.properties().description, largeCopy, bar: BAR, rates };
  Deno.writeTextFileSync(flags.json, `${JSON.stringify(report, null, 1)}\n`);
}
Deno.exitCode = rates.every(({ holds }) => holds) ? 0 : 1;

/** Bytes that a case moves, and how many in a second: the median of {@link ROUNDS} replays. */
function measure({ inputs, run, bytes }: Case): { rate: number; moved: number } {
  return device.scope(() => {
    const first = inputs();
    // Compiles the kernel, which must not happen while a graph is recorded.
    const moved = device.scope(() => {
      const outs = [run(...first)].flat();
      return bytes?.(first, outs[0]) ??
        [...first, ...outs].reduce((sum, { byteLength }) => sum + byteLength, 0);
    });
    const sets = [first];
    while (sets.length * moved < FLUSHED_BYTES) sets.push(inputs());
    // Outputs are kept apart, since each must be a place that is in no cache.
    using graph = device.record(() => sets.forEach((set) => void run(...set)));
    graph.replay();
    const times = Array.from({ length: ROUNDS }, () => {
      using start = device.event();
      graph.replay();
      using end = device.event();
      return end.since(start);
    });
    const milliseconds = times.sort((a, b) => a - b)[ROUNDS >> 1];
    return { rate: moved * sets.length / milliseconds * 1000, moved };
  });
}

/** Bytes per second, read and written, of a copy that moves about `bytes`. */
function copyRate(bytes: number): number {
  const half = Math.ceil(bytes / 2 / COPY_BLOCK_BYTES) * COPY_BLOCK_BYTES;
  return measure({
    name: "copy",
    inputs: () => [Tensor.empty(device, [half], "u8"), Tensor.empty(device, [half], "u8")],
    run: copy,
    bytes: () => 2 * half,
  }).rate;
}

/** What the bars are measured against: 16 bytes a thread, read and written. */
function copy(from: Tensor, to: Tensor): Tensor {
  const text = `extern "C" __global__ void copy(uint4* to, const uint4* from) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    to[i] = from[i];
  }`;
  const kernel = device.kernel({ name: "copy.cu", text }, "copy");
  device.launch(kernel, { grid: to.byteLength / COPY_BLOCK_BYTES, block: 256 }, [to, from]);
  return to;
}

function terabytes(rate: number): string {
  return `${(rate / 1e12).toFixed(2)} TB/s`;
}

function percent(share: number): string {
  return `${(100 * share).toFixed(0).padStart(3)} %`;
}

function random(shape: readonly number[], dtype: DType): Tensor {
  const tensor = Tensor.empty(device, shape, dtype);
  fillRandom(tensor, { seed: 1, stream: 0, kind: "normal", scale: 1, shift: 0 });
  return tensor;
}
