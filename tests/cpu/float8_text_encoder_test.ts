/** Recipe 11_float8_text_encoder on the CPU and on the emulated GPU; and the embedded model with it. */
import assert from "node:assert/strict";
import { openCpu } from "../../ffi/cpu/open.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { float8TextEncoder, TEXT_ENCODER_FLOAT8 } from "../../recipes/11_float8_text_encoder.ts";
import { EMBEDDED_MODEL } from "../../recipes/base/command_line.ts";
import { Model } from "../../recipes/base/model.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { psnr } from "../../recipes/base/psnr.ts";
import { draw } from "../support/drawing.ts";
import { float8TextEncoderSuite } from "../support/float8_text_encoder_suite.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { ownDevice, testOn } from "../support/test_device.ts";

const CPU = ownDevice("cpu", () => openCpu());
for (const target of [CPU, TEST_GPU]) {
  float8TextEncoderSuite(target);
  float8TextEncoderSuite(target, [compile, fuseQkv]);
  float8TextEncoderSuite(target, [compile, fuseQkv, float8()]);
}

testOn(CPU, "wo is in float8 by weights alone, since what it reads has the widest range", async (device) => {
  for (const mode of TEXT_ENCODER_FLOAT8) {
    using model = await Model.load(EMBEDDED_MODEL, device);
    const { text_encoder_2: t5 } = compose(
      eagerPlan(device, model.weights),
      bfloat16,
      float8TextEncoder(mode),
    ).weights;
    const quantized = (layer: string) =>
      t5.names.filter((name) => name.endsWith(`.${layer}.weight`) && t5.get(name).dtype === "f8e4m3").length;
    const { num_layers } = model.configs.text_encoder_2;
    for (const layer of ["q", "k", "v", "o", "wi_0", "wi_1"]) {
      assert.equal(quantized(layer), num_layers, layer);
    }
    assert.equal(quantized("wo"), mode === "weights" ? num_layers : 0);
  }
});

testOn(CPU, "models/tiny with T5 in float8 draws nearly the same picture", async (device) => {
  const options = { prompt: "a red apple", seed: 3 };
  const { result: expected } = await draw(device, EMBEDDED_MODEL, [bfloat16], options);
  const pictures = [];
  for (const mode of TEXT_ENCODER_FLOAT8) {
    const { result } = await draw(
      device,
      EMBEDDED_MODEL,
      [bfloat16, fuseQkv, float8TextEncoder(mode)],
      options,
    );
    const distance = psnr(result.images[0].rgb, expected.images[0].rgb);
    assert.ok(distance >= 30 && distance < 80, `${mode}: PSNR ${distance} dB`);
    pictures.push(String(result.images[0].rgb));
  }
  assert.notEqual(pictures[0], pictures[1]);
});
