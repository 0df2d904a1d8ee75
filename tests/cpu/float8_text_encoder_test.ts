/** Recipe 11_float8_text_encoder on the CPU and on the emulated GPU; and the embedded model with it. */
import assert from "node:assert/strict";
import { openCpu } from "../../ffi/cpu/open.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { float8TextEncoder, TEXT_ENCODER_FLOAT8 } from "../../recipes/11_float8_text_encoder.ts";
import { EMBEDDED_MODEL } from "../../recipes/base/command_line.ts";
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
