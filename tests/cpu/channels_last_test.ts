/** The autoencoder with its channels last, on the emulated GPU, and what it issues at FLUX.1's sizes. */
import assert from "node:assert/strict";
import { Tensor } from "../../ffi/tensor.ts";
import { add } from "../../kernels/add.ts";
import { isChannelsLast } from "../../kernels/layout.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { channelsLast } from "../../recipes/04_channels_last.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Plan } from "../../recipes/base/plan.ts";
import { assertClose } from "../support/compare.ts";
import { issueAutoencoder } from "../support/flux_autoencoder.ts";
import { autoencoderSuite, OTHER_ORDER } from "../support/golden_suite_components.ts";
import { goldenPath, valuesOf } from "../support/golden.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import type { Launched } from "../support/null_gpu.ts";
import { noise } from "../support/providers.ts";
import { openReference } from "../support/reference_provider.ts";
import { testOn } from "../support/test_device.ts";

autoencoderSuite(TEST_GPU, [channelsLast], OTHER_ORDER);

testOn(
  TEST_GPU,
  "channels last: a pipeline's pictures are dense f32 as without, and no memory more than phases take",
  async (device) => {
    using model = await Model.load(goldenPath("schnell-like"), device);
    const plain = compose(eagerPlan(device, model.weights), bfloat16);
    const latents = device.scope(() =>
      Tensor.fromFloat32(device, new Float32Array(2 * 4 * 6 * 64).map((_, i) => noise(5)(i)), [2, 24, 64])
    );
    const decoded = async (plan: Plan) => {
      const pictures = new FluxPipeline(model, plan).decodeLatents(latents, 8, 12);
      assert.equal(pictures.dtype, "f32");
      const values = await valuesOf(pictures);
      pictures.dispose();
      return { shape: pictures.shape, values };
    };
    const without = await decoded(plain);
    const { current, weights } = device.memoryUse();
    const turned = compose(plain, channelsLast);
    // Of the upsamplers' phases four taps each, and four biases, of two bytes each.
    const phases = turned.weights.vae.names.filter((one) => one.includes(".phases."))
      .map((one) => turned.weights.vae.get(one));
    assert.ok(phases.length > 0 && phases.every(({ shape, rank }) => rank === 1 || shape[2] === 2));
    const more = phases.reduce((sum, { byteLength }) => sum + byteLength, 0);
    assert.deepEqual([device.memoryUse().current, device.memoryUse().weights], [current, weights + more]);
    const name = "decoder.conv_in.weight";
    assert.ok(isChannelsLast(turned.weights.vae.get(name)));
    assert.throws(() => plain.weights.vae.get(name), UsageError);
    const last = await decoded(turned);
    assert.deepEqual(last.shape, without.shape);
    assertClose(last.values, without.values, 0.03, "the picture in bf16");
    assert.equal(device.memoryUse().current, current);
    latents.dispose();
  },
);

testOn(
  TEST_GPU,
  "channels last: phases follow when other values of weights are stored",
  async (device) => {
    using model = await Model.load(goldenPath("schnell-like"), device);
    const plain = compose(eagerPlan(device, model.weights), bfloat16);
    const module = "decoder.up_blocks.0.upsamplers.0.conv";
    const given = [`${module}.weight`, `${module}.bias`, "decoder.conv_in.weight", "decoder.conv_in.bias"];
    const doubled = new Map(given.map((name) => {
      const weight = plain.weights.vae.get(name);
      return [name, add(weight, weight)] as const;
    }));
    const { vae } = compose(plain, channelsLast).weights;
    const names = [...given, `${module}.phases.weight`, `${module}.phases.bias`];
    const before = await Promise.all(names.map((name) => vae.get(name).toFloat32()));
    const { current, weights } = device.memoryUse();
    vae.assign(doubled);
    assert.deepEqual([device.memoryUse().current, device.memoryUse().weights], [current, weights]);
    for (const [i, name] of names.entries()) {
      assert.deepEqual(await vae.get(name).toFloat32(), before[i].map((value) => 2 * value), name);
    }
    for (const tensor of doubled.values()) tensor.dispose();
  },
);

Deno.test("channels last: refused on the CPU", () => {
  using device = openReference();
  assert.throws(() => compose(eagerPlan(device, {} as never), channelsLast), UsageError);
});

for (const dtype of ["bf16", "f32"] as const) {
  for (const direction of ["decode", "encode"] as const) {
    Deno.test(`channels last: FLUX.1's autoencoder turns no large picture around (${direction}, ${dtype})`, () => {
      const { launches, convs } = issueAutoencoder(direction, dtype, [channelsLast]);
      for (const { x, weight, out } of convs) {
        assert.ok([x, weight, out].every(isChannelsLast), `x ${x}, weight ${weight}, out ${out}`);
      }
      // Behind upsampling, in bfloat16, the small picture is convolved, and the phases are interleaved 16 bytes at a time.
      const phases = direction === "decode" && dtype === "bf16" ? [[128, 512], [256, 512], [512, 256]] : [];
      const small = convs.filter(({ weight }) => weight.shape[2] === 2);
      assert.deepEqual(
        small.map(({ x, out }) => [x.shape, out.shape]),
        phases.map(([side, channels]) => [
          [1, channels, side, side],
          [1, 4 * channels, side + 1, side + 1],
        ]),
      );
      const isInterleaving = ({ args: [to] }: Launched) => to instanceof Tensor && to.rank === 6;
      const interleavings = launches.filter(isInterleaving);
      assert.deepEqual(
        interleavings.map(({ entry, constants, args: [to] }) => [
          entry,
          constants.BYTES,
          (to as Tensor).shape,
        ]),
        phases.map(([side, channels]) => ["copyRows", 16, [1, side, 2, side, 2, channels]]),
      );
      const upsamplings = launches.filter(({ entry }) => entry.startsWith("upsample"));
      assert.equal(upsamplings.length, direction === "decode" ? 3 - phases.length : 0);
      // Residual blocks end in a convolution that adds the residual, in bfloat16.
      const blocks = convs.filter(({ residual }) => residual !== undefined);
      const all = direction === "decode" ? 2 + 4 * 3 : 2 + 4 * 2;
      assert.equal(blocks.length, dtype === "bf16" ? all : 0);
      assert.ok(blocks.every(({ residual }) => isChannelsLast(residual!)));
      assert.equal(
        launches.filter(({ entry }) => entry === "add").length,
        1 + all - blocks.length,
        "attention's, and those",
      );
      // The shortcuts are matrix products.
      assert.ok(convs.every((conv) => conv.weight.shape[2] === 3 || small.includes(conv)));
      const copies = launches.filter((launched) =>
        /^(copyRows|transposeTiles)$/.test(launched.entry) && !isInterleaving(launched)
      );
      for (const { args } of copies) {
        const [to] = args as Tensor[];
        assert.ok(to.size <= 3 * 1024 ** 2, `${to} is a copy`);
      }
      assert.equal(copies.length, 2, "one at either end");
      for (const { entry, constants, args } of launches) {
        const [to] = args as Tensor[];
        if (to.size < 2 ** 23 || constants.N === undefined) continue;
        assert.ok(
          constants.N * to.byteLength / to.size === 16,
          `${entry} moves ${constants.N} elements at a time`,
        );
      }
    });
  }
}
