/**
 * The products of a step, by cuBLASLt and by our kernel with and without what it does in its epilogues, and attention from
 * the tiles that it gives. Each is issued for some tenths of a second, so that the GPU has the clocks of steady work.
 *
 *     deno run -A tests/gpu/full_size/products.ts [--bf16]
 */
import { isGpu } from "../../../ffi/gpu.ts";
import { openDevice } from "../../../ffi/open.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { flashAttention } from "../../../kernels/flash_attention.ts";
import {
  fusedGelu,
  type FusedLayer,
  fusedLinear,
  fusedQkv,
  fusedResidual,
} from "../../../kernels/fused_linear.ts";
import { linearFloat8 } from "../../../kernels/linear_float8.ts";
import { quantizeRows } from "../../../kernels/quantize_float8.ts";
import { fillRandom } from "../../../kernels/random_fill.ts";
import { rotaryPairs } from "../../../kernels/rotary_pairs.ts";

const TOKENS = 4352;
const HEADS = 24;
const HIDDEN = 128 * HEADS;
const MLP = 4 * HIDDEN;
const RUNS = 10;
const MILLISECONDS = 400;

const dtype = Deno.args.includes("--bf16") ? "bf16" : "f8e4m3";
using device = await openDevice("cuda", { onWarning: console.error });
if (!isGpu(device)) throw new TypeError(`${device.name} is no GPU`);
const gpu = device;
console.log(gpu.properties().description);

const pairs = rotaryPairs(gpu, random([TOKENS, 128], 1, "f32"), random([TOKENS, 128], 1, "f32"));
const [normQ, normK] = [random([128], 1), random([128], 1)];
const outScales = dtype === "bf16"
  ? undefined
  : Tensor.fromFloat32(gpu, new Float32Array(TOKENS).fill(0.02), [TOKENS]);
const residual = random([TOKENS, HIDDEN], 1);
const gate = random([HIDDEN], 1);

for (
  const [columns, k] of [[3 * HIDDEN + MLP, HIDDEN], [3 * HIDDEN, HIDDEN], [MLP, HIDDEN], [
    HIDDEN,
    HIDDEN + MLP,
  ], [
    HIDDEN,
    MLP,
  ], [HIDDEN, HIDDEN]]
) {
  const [x, w, bias] = [random([TOKENS, k], 1), random([columns, k], 0.02), random([columns], 0.1)];
  const [qx, qw] = [x, w].map((wide) => quantizeRows(wide));
  const layer: FusedLayer = dtype === "bf16"
    ? { x: { values: x }, weight: { values: w }, bias }
    : { x: qx, weight: qw, bias };
  const out = Tensor.empty(gpu, [TOKENS, columns], "bf16");
  const mlp = { out: Tensor.empty(gpu, [TOKENS, MLP], dtype), outScales };
  const turn = { heads: HEADS, pairs, eps: 1e-6, dtype } as const;
  const rows: [string, () => void][] = [
    [
      "cuBLASLt",
      () =>
        dtype === "bf16"
          ? gpu.matmul({ a: x, b: w, bias, out, constant: true })
          : void linearFloat8(qx, qw, bias, undefined, out),
    ],
    ["ours", () => fusedLinear(gpu, [{ ...layer, out }])],
  ];
  if (columns === HIDDEN) {
    rows.push(["with residual", () => fusedResidual(gpu, [{ ...layer, residual, gate, out }])]);
  } else if (columns === MLP) rows.push(["with GELU", () => fusedGelu(gpu, [{ ...layer, ...mlp }])]);
  else {
    const beside = columns > 3 * HIDDEN ? mlp : undefined;
    rows.push([
      `to tiles${beside === undefined ? "" : " and GELU"}`,
      () => void fusedQkv(gpu, [{ ...layer, normQ, normK }], { ...turn, mlp: beside }),
    ]);
  }
  console.log(`${TOKENS} x ${columns} x ${k}`);
  for (const [what, run] of rows) print(what, await time(run), 2 * TOKENS * columns * k);
  if (columns === 3 * HIDDEN) {
    const tiles = fusedQkv(gpu, [{ ...layer, normQ, normK }], turn);
    const attended = Tensor.empty(gpu, [1, TOKENS, HEADS, 128], "bf16");
    print(
      "attention",
      await time(() => flashAttention(gpu, tiles, 128 ** -0.5, attended)),
      4 * TOKENS ** 2 * HIDDEN,
    );
    for (const tensor of [tiles.q, tiles.k, tiles.v, attended]) tensor.dispose();
  }
  for (const tensor of [x, w, bias, qx, qw, out, mlp.out]) tensor.dispose();
}

function print(what: string, milliseconds: number, flops: number): void {
  const rate = (flops / milliseconds / 1e9).toFixed(0);
  console.log(
    `  ${what.padEnd(20)} ${(1000 * milliseconds).toFixed(0).padStart(5)} us ${rate.padStart(6)} TFLOP/s`,
  );
}

function random(shape: readonly number[], scale: number, of: "bf16" | "f32" = "bf16"): Tensor {
  const tensor = Tensor.empty(gpu, shape, of);
  fillRandom(tensor, { seed: 1, stream: shape[0], kind: "normal", scale, shift: 0 });
  return tensor;
}

/** The median, in milliseconds. */
async function time(run: () => void): Promise<number> {
  gpu.measuring(() => gpu.scope(run));
  await gpu.synchronize();
  using graph = gpu.record(() => {
    for (let i = 0; i < RUNS; i++) gpu.scope(run);
  });
  const times: number[] = [];
  for (const start = performance.now(); performance.now() - start < MILLISECONDS;) {
    using from = gpu.event();
    graph.replay();
    using to = gpu.event();
    times.push(to.since(from) / RUNS);
  }
  return times.sort((a, b) => a - b)[times.length >> 1];
}
