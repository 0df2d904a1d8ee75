/** The fused kernels on the emulated GPU, on one with an attention library, and on the CPU. */
import assert from "node:assert/strict";
import type { Device, MatmulPlan } from "../../ffi/device.ts";
import { ShapeError } from "../../ffi/errors.ts";
import type { AttentionPlan } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { adaLayerNorm, adaLayerNormFloat8, adaLayerNormFused } from "../../kernels/ada_layer_norm.ts";
import { addRmsNorm, addRmsNormFused } from "../../kernels/add_rms_norm.ts";
import { attention } from "../../kernels/attention.ts";
import { concat } from "../../kernels/concat.ts";
import { readFloat32 } from "../../kernels/cpu.ts";
import type { Float8Tensor } from "../../kernels/float8_tensor.ts";
import {
  gatedAdaLayerNorm,
  gatedAdaLayerNormFloat8,
  gatedAdaLayerNormFused,
} from "../../kernels/gated_ada_layer_norm.ts";
import { geluTanhFloat8 } from "../../kernels/gelu_float8.ts";
import { geluTanh } from "../../kernels/gelu_tanh.ts";
import { jointAttention, jointAttentionFused } from "../../kernels/joint_attention.ts";
import { joinedLinears } from "../../kernels/joined_linears.ts";
import { linearGeluFused } from "../../kernels/linear_gelu.ts";
import { parallelBranches, parallelBranchesFused } from "../../kernels/parallel_branches.ts";
import { quantizeRows } from "../../kernels/quantize_float8.ts";
import { silu } from "../../kernels/silu.ts";
import { eagerOps } from "../../recipes/base/ops.ts";
import { assertClose } from "../support/compare.ts";
import { missingCompiler } from "../support/emulated_compiler.ts";
import { openEmulatedGpu } from "../support/emulated_gpu.ts";
import { valuesOf } from "../support/golden.ts";
import { fusedSuite } from "../support/kernel_suites/fused.ts";
import { parallelBranchesSuite } from "../support/kernel_suites/parallel_branches.ts";
import { forEachProvider, noise } from "../support/providers.ts";
import { openReference } from "../support/reference_provider.ts";
import { ownDevice, testOn } from "../support/test_device.ts";
import { watchLaunches } from "../support/watch_launches.ts";

fusedSuite();
parallelBranchesSuite();

function random(device: Device, shape: readonly number[], seed: number): Tensor {
  const values = new Float32Array(shape.reduce((a, b) => a * b)).map((_, i) => noise(seed)(i));
  return Tensor.fromFloat32(device, values, shape);
}

/** A single block's layers, joined, what they read and the rotary tables. */
function singleBlock(device: Device) {
  const [tokens, heads, headDim, mlpHidden] = [5, 2, 8, 24];
  const hidden = heads * headDim;
  const weight = random(device, [3 * hidden + mlpHidden, hidden], 1);
  const [q, k, v, mlp] = [hidden, hidden, hidden, mlpHidden].map((rows, i) => ({
    weight: weight.narrow(0, i * hidden, rows),
  }));
  const out = { weight: random(device, [hidden, hidden + mlpHidden], 6), bias: random(device, [hidden], 7) };
  const [normQ, normK] = [2, 3].map((seed) => random(device, [headDim], seed));
  const [cos, sin] = [4, 5].map((seed) => random(device, [tokens, headDim], seed));
  const layers = { q, k, v, mlp, out, normQ, normK, heads };
  return { x: random(device, [2, tokens, hidden], 8), layers, cos, sin };
}

const fusedOps = {
  ...eagerOps,
  jointAttention: jointAttentionFused,
  linearGelu: linearGeluFused,
  linears: joinedLinears,
};

const withLibrary = ownDevice(
  "emulated GPU with library attention",
  () => openEmulatedGpu({ attention: true }),
  missingCompiler(),
);

testOn(
  withLibrary,
  "a single block's products reach the library and its output without a copy, with GELU in an epilogue or apart",
  async (device) => {
    const { x, layers, cos, sin } = singleBlock(device);
    const plans: AttentionPlan[] = [];
    const library = device.attention.bind(device);
    device.attention = (plan) => (plans.push(plan), library(plan));
    let launches = 0;
    using _ = watchLaunches(device, () => launches++);
    const products: MatmulPlan[] = [];
    const matmul = device.matmul.bind(device);
    device.matmul = (plan) => (products.push(plan), matmul(plan));
    const expected = await valuesOf(parallelBranches(x, layers, cos, sin, 1e-6, eagerOps));
    for (const [way, columns] of [[24, 48, 16], [72, 16]].entries()) {
      device.fastest = () => way;
      [plans.length, launches, products.length] = [0, 0, 0];
      const out = parallelBranchesFused(x, layers, cos, sin, 1e-6, fusedOps);
      assert.deepEqual(products.map(({ b }) => b.shape[0]), columns);
      assert.equal(launches, way === 0 ? 1 : 2); // norm and rotation, GELU
      assert.equal(plans[0].v.memory, products[way === 0 ? 1 : 0].out.memory);
      assert.equal(plans[0].out.memory, products.at(-1)!.a.memory);
      assertClose(await valuesOf(out), expected, 1e-6, "parallel branches");
    }
  },
);

Deno.test("fused operators on the CPU are the composite ones", () => {
  using device = openReference();
  const [residual, x] = [1, 2].map((seed) => random(device, [2, 3, 8], seed));
  const [gate, scale, shift] = [3, 4, 5].map((seed) => random(device, [2, 8], seed));
  const weight = random(device, [8], 6);
  const { x: tokens, layers, cos, sin } = singleBlock(device);
  const { normQ, normK } = layers;
  const [q, k, v] = [9, 10, 11].map((seed) => random(device, [2, 5, 2, 8], seed));
  const stream = { q, k, v, normQ, normK };
  const both = ({ values, scales }: Float8Tensor) => [values, scales];
  const gated = gatedAdaLayerNorm(residual, x, gate, scale, shift, 1e-6);
  const gated8 = gatedAdaLayerNormFloat8(residual, x, gate, scale, shift, 1e-6);
  const pairs: [fused: Tensor[], composite: Tensor[]][] = [
    [[adaLayerNormFused(x, scale, shift, 1e-6)], [adaLayerNorm(x, scale, shift, 1e-6)]],
    [
      Object.values(gatedAdaLayerNormFused(residual, x, gate, scale, shift, 1e-6)),
      Object.values(gatedAdaLayerNorm(residual, x, gate, scale, shift, 1e-6)),
    ],
    [
      Object.values(addRmsNormFused(residual, x, weight, 1e-6)),
      Object.values(addRmsNorm(residual, x, weight, 1e-6)),
    ],
    [
      both(adaLayerNormFloat8(x, scale, shift, 1e-6)),
      both(quantizeRows(adaLayerNorm(x, scale, shift, 1e-6))),
    ],
    [both(gated8.normed), both(quantizeRows(gated.normed))],
    [[gated8.sum], [gated.sum]],
    [both(geluTanhFloat8(x, residual)), both(quantizeRows(concat([residual, geluTanh(x)], 2)))],
    [both(geluTanhFloat8(x)), both(quantizeRows(geluTanh(x)))],
    [[jointAttentionFused([stream], cos, sin, 1e-6)], [jointAttention([stream], cos, sin, 1e-6)]],
    [
      [parallelBranchesFused(tokens, layers, cos, sin, 1e-6, fusedOps)],
      [parallelBranches(tokens, layers, cos, sin, 1e-6, eagerOps)],
    ],
  ];
  for (const [fused, composite] of pairs) {
    assert.deepEqual(fused.map(readFloat32), composite.map(readFloat32));
  }
});

forEachProvider("attention", (test) => {
  test("stores into columns of a wider tensor", (device) => {
    const [q, k, v] = [1, 2, 3].map((seed) => random(device, [2, 9, 3, 8], seed));
    const whole = random(device, [2, 9, 40], 4);
    const before = readFloat32(whole).slice();
    const out = whole.narrow(2, 8, 24).reshape(q.shape);
    assert.equal(attention(q, k, v, { out }), out);
    assert.deepEqual(readFloat32(out), readFloat32(attention(q, k, v)));
    const beside = (values: Float32Array) => values.filter((_, i) => i % 40 < 8 || i % 40 >= 32);
    assert.deepEqual(beside(readFloat32(whole)), beside(before));
  });
});

Deno.test("an activation on the CPU refuses to store into a strided tensor", () => {
  using device = openReference();
  const x = random(device, [3, 4], 1);
  assert.throws(() => silu(x, random(device, [3, 8], 2).narrow(1, 4, 4)), ShapeError);
});
