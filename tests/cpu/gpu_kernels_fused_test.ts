/** The fused kernels on the emulated GPU, on one with an attention library, and on the CPU. */
import assert from "node:assert/strict";
import type { Device } from "../../ffi/device.ts";
import { ShapeError } from "../../ffi/errors.ts";
import type { AttentionPlan } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { adaLayerNorm, adaLayerNormFused } from "../../kernels/ada_layer_norm.ts";
import { addRmsNorm, addRmsNormFused } from "../../kernels/add_rms_norm.ts";
import { attention } from "../../kernels/attention.ts";
import { attentionBesideMlp, attentionBesideMlpFused } from "../../kernels/attention_beside_mlp.ts";
import { readFloat32 } from "../../kernels/cpu.ts";
import { gatedAdaLayerNorm, gatedAdaLayerNormFused } from "../../kernels/gated_ada_layer_norm.ts";
import { jointAttention, jointAttentionFused } from "../../kernels/joint_attention.ts";
import { silu } from "../../kernels/silu.ts";
import { assertClose } from "../support/compare.ts";
import { missingCompiler, openEmulatedGpu } from "../support/emulated_gpu.ts";
import { valuesOf } from "../support/golden.ts";
import { fusedSuite } from "../support/kernel_suites/fused.ts";
import { forEachProvider, noise } from "../support/providers.ts";
import { openReference } from "../support/reference_provider.ts";
import { ownDevice, testOn } from "../support/test_device.ts";

fusedSuite();

function random(device: Device, shape: readonly number[], seed: number): Tensor {
  const values = new Float32Array(shape.reduce((a, b) => a * b)).map((_, i) => noise(seed)(i));
  return Tensor.fromFloat32(device, values, shape);
}

/** A single block's q, k, v and MLP as columns of one product, by heads, and its rotary tables. */
function singleStream(device: Device) {
  const [tokens, heads, headDim, mlpHidden] = [5, 2, 8, 24];
  const hidden = heads * headDim;
  const product = random(device, [2, tokens, 3 * hidden + mlpHidden], 1);
  const [q, k, v] = [0, 1, 2].map((part) =>
    product.narrow(2, part * hidden, hidden).reshape([2, tokens, heads, headDim])
  );
  const [normQ, normK] = [2, 3].map((seed) => random(device, [headDim], seed));
  const [cos, sin] = [4, 5].map((seed) => random(device, [tokens, headDim], seed));
  return { stream: { q, k, v, normQ, normK }, mlp: product.narrow(2, 3 * hidden, mlpHidden), cos, sin };
}

const withLibrary = ownDevice(
  "emulated GPU with library attention",
  () => openEmulatedGpu({ attention: true }),
  missingCompiler(),
);

testOn(
  withLibrary,
  "a single block's product reaches the library and its output without a copy",
  async (device) => {
    const { stream, mlp, cos, sin } = singleStream(device);
    const plans: AttentionPlan[] = [];
    const library = device.attention.bind(device);
    device.attention = (plan) => (plans.push(plan), library(plan));
    let launches = 0;
    const launch = device.launch.bind(device);
    device.launch = (...args) => (launches++, launch(...args));
    const out = attentionBesideMlpFused(stream, cos, sin, 1e-6, mlp);
    assert.equal(launches, 2); // norm and rotation, GELU
    assert.equal(plans[0].v, stream.v);
    assert.equal(plans[0].out.memory, out.memory);

    const expected = attentionBesideMlp(stream, cos, sin, 1e-6, mlp);
    assertClose(await valuesOf(out), await valuesOf(expected), 1e-6, "attention beside MLP");
  },
);

Deno.test("fused operators on the CPU are the composite ones", () => {
  using device = openReference();
  const [residual, x] = [1, 2].map((seed) => random(device, [2, 3, 8], seed));
  const [gate, scale, shift] = [3, 4, 5].map((seed) => random(device, [2, 8], seed));
  const weight = random(device, [8], 6);
  const { stream, mlp, cos, sin } = singleStream(device);
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
    [[jointAttentionFused([stream], cos, sin, 1e-6)], [jointAttention([stream], cos, sin, 1e-6)]],
    [
      [attentionBesideMlpFused(stream, cos, sin, 1e-6, mlp)],
      [attentionBesideMlp(stream, cos, sin, 1e-6, mlp)],
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
