/** Recipe 12_offload, and models that are loaded in pieces. */
import assert from "node:assert/strict";
import { OutOfMemoryError } from "../../ffi/errors.ts";
import type { GpuDevice } from "../../ffi/gpu.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { channelsLast } from "../../recipes/04_channels_last.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { tuning } from "../../recipes/07_tuning.ts";
import { float8TextEncoder } from "../../recipes/11_float8_text_encoder.ts";
import { offload, OFFLOADED } from "../../recipes/12_offload.ts";
import { depositOf } from "../../recipes/base/deposits.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { type Pieces, piecesFor } from "../../recipes/base/pieces.ts";
import { COMPONENTS, compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { draw } from "./drawing.ts";
import { bytesOf, goldenPath } from "./golden.ts";
import { smallestPiecesFor } from "./smallest_pieces.ts";
import { type TestDevice, testOn } from "./test_device.ts";

const RECIPES: readonly (readonly Recipe[])[] = [
  [bfloat16],
  [bfloat16, compile, fuseQkv, channelsLast, tuning],
  [bfloat16, compile, fuseQkv, channelsLast, float8(), tuning, float8TextEncoder("weights")],
  [bfloat16, compile, fuseQkv, channelsLast, float8(), tuning, float8TextEncoder("dynamic")],
];
const OPTIONS = {
  prompt: "a red apple",
  seed: 5,
  height: 32,
  width: 32,
  numInferenceSteps: 2,
  maxSequenceLength: 32,
};

export function offloadSuite(target: TestDevice<GpuDevice>): void {
  const test = (name: string, body: (device: GpuDevice) => Promise<void>) =>
    testOn(target, `12_offload: ${name}`, body);

  for (const recipes of RECIPES) {
    for (const folder of ["dev-like", "schnell-like"].map(goldenPath)) {
      const what = `${folder.split("/").at(-1)}, ${recipes.map(({ name }) => name.slice(0, 2)).join("+")}`;
      test(`the same picture, prompt after prompt, with the text encoders away in between (${what})`, async (device) => {
        const { current } = device.memoryUse();
        const prompts = ["a red apple", "three boats", "a red apple"];
        const expected: Uint8Array[] = [];
        for (const prompt of prompts) {
          const { result } = await draw(device, folder, recipes, { ...OPTIONS, prompt });
          expected.push(result.images[0].rgb);
        }
        const all = [...recipes, offload];
        using model = await Model.load(folder, device, { pieces: smallestPiecesFor(all) });
        const plan = compose(eagerPlan(device, model.weights), ...all);
        for (const component of COMPONENTS) {
          const deposited = depositOf(plan.weights[component]) !== undefined;
          assert.equal(deposited, OFFLOADED.includes(component), component);
          assert.deepEqual(
            plan.weights[component].names,
            model.weights[component].names,
            "nothing is left to do",
          );
        }
        const away = device.memoryUse().weights;
        let most = 0;
        const pipeline = new FluxPipeline(model, {
          ...plan,
          ops: {
            ...plan.ops,
            embedding: (...args) => {
              most = Math.max(most, device.memoryUse().weights);
              return plan.ops.embedding(...args);
            },
          },
        });
        for (const [i, prompt] of prompts.entries()) {
          const { images } = await pipeline.generate({ ...OPTIONS, prompt });
          assert.deepEqual(images[0].rgb, expected[i], prompt);
        }
        assert.ok(most > away, `${most} bytes of weights while encoding, ${away} before`);
        assert.equal(device.memoryUse().current, current);
      });
    }
  }

  test("what is quantized is loaded in pieces: the same bytes, without memory for the checkpoint", async (device) => {
    assert.equal(piecesFor([compile, tuning]), undefined);
    const recipes = [bfloat16, fuseQkv, float8(), float8TextEncoder()];
    const folder = goldenPath("schnell-like");
    const before = device.memoryUse().weights;
    const load = async (pieces: Pieces | undefined) => {
      const { alloc } = device;
      let most = 0;
      device.alloc = (...args) => {
        const memory = alloc.apply(device, args);
        most = Math.max(most, device.memoryUse().weights - before);
        return memory;
      };
      try {
        using model = await Model.load(folder, device, { pieces });
        const { weights } = compose(eagerPlan(device, model.weights), ...recipes);
        const bytes = [];
        for (const component of COMPONENTS) bytes.push(await bytesOf(weights[component]));
        return { bytes, most };
      } finally {
        device.alloc = alloc;
      }
    };
    const atOnce = await load(undefined);
    const inPieces = await load(smallestPiecesFor(recipes));
    assert.deepEqual(inPieces.bytes, atOnce.bytes);
    assert.ok(inPieces.most < atOnce.most, `${inPieces.most} bytes at most, at once ${atOnce.most}`);
  });

  test("weights of text encoders that are away cannot be read, and are freed with the model", async (device) => {
    const before = device.memoryUse().weights;
    {
      const all = [bfloat16, fuseQkv, offload];
      using model = await Model.load(goldenPath("dev-like"), device, { pieces: piecesFor(all) });
      const { weights, execute } = compose(eagerPlan(device, model.weights), ...all);
      assert.ok(weights.text_encoder_2.names.length > 0 && execute !== undefined);
      const deposit = depositOf(weights.text_encoder_2)!;
      const away = device.memoryUse().weights;
      deposit.bring();
      deposit.bring();
      assert.ok(device.memoryUse().weights > away);
      const [name] = weights.text_encoder_2.names;
      const tensor = weights.text_encoder_2.get(name);
      const { pointer } = tensor;
      const bytes = await device.download(tensor);
      deposit.leave();
      deposit.leave();
      assert.equal(device.memoryUse().weights, away);
      deposit.bring();
      assert.equal(tensor.pointer, pointer);
      assert.deepEqual(await device.download(tensor), bytes);
      deposit.leave();
    }
    assert.ok(device.memoryUse().weights <= before);
  });

  test("where there is no room for the text encoders, recordings make room", async (device) => {
    const all = [bfloat16, compile, fuseQkv, offload];
    using model = await Model.load(goldenPath("dev-like"), device, { pieces: piecesFor(all) });
    const plan = compose(eagerPlan(device, model.weights), ...all);
    const pipeline = new FluxPipeline(model, plan);
    const expected = (await pipeline.generate(OPTIONS)).images[0].rgb;
    const deposit = depositOf(plan.weights.text_encoder_2)!;
    const { bring } = deposit;
    let refusals = 0;
    deposit.bring = () => {
      if (refusals++ === 0) throw new OutOfMemoryError("full");
      bring.call(deposit);
    };
    const { record } = device;
    let recorded = 0;
    device.record = (body) => (recorded++, record.call(device, body));
    const held = device.memoryUse().weights;
    assert.deepEqual((await pipeline.generate(OPTIONS)).images[0].rgb, expected);
    assert.equal(refusals, 2);
    // All but CLIP, which ran before.
    assert.ok(recorded >= 3, `${recorded} parts were recorded again`);
    const again = recorded;
    assert.deepEqual((await pipeline.generate(OPTIONS)).images[0].rgb, expected);
    assert.ok(recorded <= again + 1, "they stay recorded where there is room");
    assert.ok(device.memoryUse().weights <= held, "nothing more is kept");
    deposit.bring = () => {
      throw new OutOfMemoryError("full");
    };
    await assert.rejects(pipeline.generate(OPTIONS), OutOfMemoryError);
    deposit.bring = bring;
    assert.deepEqual((await pipeline.generate(OPTIONS)).images[0].rgb, expected);
    device.record = record;
  });

  test("a model that was loaded at once is refused, with what to do", async (device) => {
    using model = await Model.load(goldenPath("dev-like"), device);
    assert.throws(
      () => compose(eagerPlan(device, model.weights), bfloat16, offload),
      (error) => error instanceof UsageError && /text_encoder was not loaded for it/.test(error.message),
    );
  });

  test("random weights are the same in pieces", async (device) => {
    const pictures: Uint8Array[] = [];
    for (const recipes of [[bfloat16, fuseQkv], [bfloat16, fuseQkv, offload]]) {
      using model = await Model.random(goldenPath("dev-like"), device, "bf16", 0, smallestPiecesFor(recipes));
      const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), ...recipes));
      pictures.push((await pipeline.generate(OPTIONS)).images[0].rgb);
    }
    assert.deepEqual(pictures[1], pictures[0]);
  });
}

/** On a device of so little memory that the model does not fit as it is: at once it fails, in pieces it draws. */
export function littleMemorySuite(target: TestDevice<GpuDevice>): void {
  const recipes = [bfloat16, fuseQkv, float8(), float8TextEncoder("weights"), offload];
  testOn(target, "12_offload: draws where the checkpoint does not fit", async (device) => {
    const folder = goldenPath("schnell-like");
    await assert.rejects(async () => {
      using model = await Model.load(folder, device);
      compose(eagerPlan(device, model.weights), bfloat16);
    }, OutOfMemoryError);
    using model = await Model.load(folder, device, { pieces: smallestPiecesFor(recipes) });
    const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), ...recipes));
    const { images } = await pipeline.generate({ ...OPTIONS, height: 16, width: 16, maxSequenceLength: 8 });
    assert.equal(images.length, 1);
  });
}
