/** FLUX.1-Kontext: the parts, and pictures against diffusers' on the CPU and the emulated GPU, with the recipes. */
import assert from "node:assert/strict";
import { openCpu } from "../../ffi/cpu/open.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { channelsLast } from "../../recipes/04_channels_last.ts";
import { flashAttention } from "../../recipes/05_flash_attention.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { tuning } from "../../recipes/07_tuning.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { fitReference, PREFERRED_SIZES, preferredSize } from "../../recipes/base/kontext.ts";
import { positionIds } from "../../recipes/base/latents.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { Golden, goldenPath } from "../support/golden.ts";
import { GPU_WITH_ATTENTION } from "../support/gpu_devices.ts";
import {
  kontextOptions,
  kontextRecipesSuite,
  kontextSuite,
  withKontext,
} from "../support/golden_suite_kontext.ts";
import { openReference } from "../support/reference_provider.ts";
import { ownDevice } from "../support/test_device.ts";

const CPU = ownDevice("cpu", () => openCpu());

kontextSuite(CPU);
kontextSuite(CPU, [compile, fuseQkv], false);
kontextSuite(GPU_WITH_ATTENTION, [compile, fuseQkv, tuning], false);
kontextRecipesSuite(CPU, [bfloat16, compile, fuseQkv, float8()], 40);
kontextRecipesSuite(
  GPU_WITH_ATTENTION,
  [bfloat16, compile, fuseQkv, channelsLast, flashAttention("fa3"), float8(), tuning],
  40,
);

Deno.test("Kontext: positions of the picture to edit equal diffusers'", () => {
  using device = openReference();
  using golden = new Golden("kontext/one.fp32.safetensors", device);
  const [noise, picture] = [{ rows: 3, columns: 4 }, { rows: 2, columns: 3 }];
  const ids = positionIds(5, [noise, picture]);
  assert.deepEqual(ids.subarray(3 * (5 + 12)), golden.values("image_ids"));
  assert.deepEqual(ids.subarray(0, 3 * (5 + 12)), positionIds(5, [noise]));
});

Deno.test("Kontext: the preferred size is the one of the nearest shape", () => {
  for (const [width, height] of PREFERRED_SIZES) {
    assert.deepEqual(preferredSize({ width, height }), { width, height });
    assert.deepEqual(preferredSize({ width: 3 * width, height: 3 * height }), { width, height });
    assert.equal(width % 16 + height % 16, 0);
  }
  const cases = [
    [[4032, 3024], [1184, 880]],
    [[3024, 4032], [880, 1184]],
    [[1920, 1080], [1392, 752]],
    [[500, 10], [1568, 672]],
    [[1, 1000], [672, 1568]],
    [[1000, 999], [1024, 1024]],
  ];
  for (const [[width, height], [w, h]] of cases) {
    assert.deepEqual(preferredSize({ width, height }), { width: w, height: h }, `${width} x ${height}`);
  }
});

Deno.test("Kontext: small pictures have the shape that is left when they are cut to multiples, as in diffusers", () => {
  const size = (width: number, height: number) => {
    const fitted = fitReference({ width, height, rgb: new Uint8Array(width * height * 3) }, 16, true);
    return [fitted.width, fitted.height];
  };
  assert.deepEqual(size(60, 44), [1248, 832]);
  assert.deepEqual(size(600, 440), [1184, 880]);
  assert.deepEqual(size(3, 5), [1024, 1024]);
});

Deno.test("Kontext: a picture that keeps its size is cut to multiples by resizing", () => {
  const picture = { width: 60, height: 44, rgb: new Uint8Array(60 * 44 * 3).fill(7) };
  const { width, height, rgb } = fitReference(picture, 16, false);
  assert.deepEqual([width, height, rgb.length], [48, 32, 48 * 32 * 3]);
  assert.ok(rgb.every((value) => value === 7), "one colour stays that colour");
});

Deno.test("Kontext: a picture is refused by other models, and one without sense by all", async () => {
  using device = openReference();
  const options = await kontextOptions("one");
  const refused = async (
    folder: string,
    image: typeof options.image,
    message: RegExp,
    autoResize = false,
  ) => {
    using model = await Model.load(folder, device);
    const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), bfloat16));
    await assert.rejects(pipeline.generate({ ...options, image: image!, autoResize }), (error: Error) => {
      assert.ok(error instanceof UsageError);
      assert.match(error.message, message);
      return true;
    });
  };
  for (const model of ["dev-like", "schnell-like"]) {
    await refused(goldenPath(model), options.image, /-like is no FLUX\.1-Kontext/);
  }
  await withKontext(async (folder) => {
    const pixels = new Uint8Array(300);
    await refused(folder, { width: 20, height: 20, rgb: pixels }, /300 bytes, not those of 20 x 20/);
    await refused(folder, { width: 20, height: 5, rgb: pixels }, /20 x 5 pixels: give 16 or more/);
    await refused(folder, { width: 0, height: 5, rgb: pixels }, /300 bytes/, true);
  });
});

Deno.test("Kontext: says how to keep the picture's shape where the default is another one", async () => {
  using device = openReference();
  await withKontext(async (folder) => {
    using model = await Model.load(folder, device);
    const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), bfloat16));
    const { height: _h, width: _w, ...options } = await kontextOptions("one");
    const warnings: string[] = [];
    const { settings } = await pipeline.generate({
      ...options,
      numInferenceSteps: 1,
      onWarning: (message) => warnings.push(message),
    });
    assert.deepEqual([settings.width, settings.height], [64, 64]);
    assert.deepEqual(settings.image, { width: 48, height: 32 });
    assert.equal(settings.guidanceScale, 2.5);
    assert.equal(warnings.length, 1);
    assert.match(warnings[0], /is 48 x 32, and 64 x 64 is drawn.*width 48 and height 32/);
  });
});
