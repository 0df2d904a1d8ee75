/** Times, counted operations, PSNR and tables: the numbers that benchmarks print. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { openDevice } from "../../ffi/open.ts";
import type { Tensor } from "../../ffi/tensor.ts";
import type { QkvStream } from "../../kernels/joint_qk_norm_rope.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { EMBEDDED_MODEL } from "../../recipes/base/command_line.ts";
import { stepFlops, stepSize } from "../../recipes/base/flops.ts";
import { measure, partStatistics, statistics } from "../../recipes/base/measure.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Plan } from "../../recipes/base/plan.ts";
import { psnr } from "../../recipes/base/psnr.ts";
import { markdownLines, numberLines, tableLines } from "../../recipes/base/table.ts";
import { transformerConfigSchema } from "../../recipes/base/transformer.ts";
import { openEmulatedGpu } from "../support/emulated_gpu.ts";
import { goldenPath } from "../support/golden.ts";

/** Runs `body` with a pipeline on the CPU; `change` may replace what it counts. */
async function withPipeline(
  folder: string,
  change: (plan: Plan) => Plan,
  body: (pipeline: FluxPipeline) => Promise<void>,
): Promise<void> {
  using device = await openDevice("cpu");
  using model = await Model.load(folder, device);
  await body(new FluxPipeline(model, change(compose(eagerPlan(device, model.weights), bfloat16))));
}

Deno.test("statistics of hand-counted values, and of one", () => {
  assert.deepEqual(statistics([4, 1, 3, 2]), { mean: 2.5, variance: 5 / 3, median: 2.5, min: 1, max: 4 });
  assert.equal(statistics([5, 1, 9]).median, 5);
  assert.deepEqual(statistics([7]), { mean: 7, variance: 0, median: 7, min: 7, max: 7 });
  assert.throws(() => statistics([]), { name: "UsageError" });
});

Deno.test("statistics keep their order, and do not change what they are given", () => {
  fc.assert(
    fc.property(fc.array(fc.double({ min: 0, max: 1e6, noNaN: true }), { minLength: 1 }), (values) => {
      const before = [...values];
      const { mean, variance, median, min, max } = statistics(values);
      assert.deepEqual(values, before);
      const slack = 1e-9 * (1 + max);
      assert.ok(min <= median && median <= max && min - slack <= mean && mean <= max + slack);
      assert.ok(variance >= 0 && variance <= (max - min) ** 2 + slack);
    }),
  );
});

Deno.test("measure draws the warm-ups and the runs, and its parts add up to no more than the whole", () =>
  withPipeline(goldenPath("schnell-like"), (plan) => plan, async (pipeline) => {
    const done: number[] = [];
    const { times, picture, settings } = await measure(
      pipeline,
      { prompt: "a", seed: 3, height: 32, width: 48, numInferenceSteps: 2 },
      { warmups: 2, runs: 3, onPicture: (count) => done.push(count) },
    );
    assert.deepEqual(done, [0, 1, 2, 3, 4, 5]);
    assert.equal(times.length, 3);
    assert.deepEqual([picture.width, picture.height, settings.numInferenceSteps], [48, 32, 2]);
    for (const { whole, text, steps, decode, postprocess } of times) {
      assert.equal(steps.length, 2);
      for (const part of [text, ...steps, decode, postprocess]) {
        assert.ok(part > 0 && part < whole, `${part}`);
      }
      assert.ok(text + steps[0] + steps[1] + decode + postprocess <= whole);
    }
    const parts = partStatistics(times);
    assert.equal(parts.steps.length, 2);
    const all = times.flatMap(({ steps }) => steps);
    assert.equal(parts.step.max, Math.max(...all));
    assert.equal(parts.steps[1].min, Math.min(...times.map(({ steps }) => steps[1])));
    const { images: [same] } = await pipeline.generate({
      prompt: "a",
      seed: 3,
      height: 32,
      width: 48,
      numInferenceSteps: 2,
    });
    assert.deepEqual(picture.rgb, same.rgb);
    await assert.rejects(measure(pipeline, { prompt: "a", height: 32, width: 32 }, { warmups: 1, runs: 0 }), {
      name: "UsageError",
    });
  }));

Deno.test("measure reads a GPU's clock and power while timed pictures are drawn, and lets go of the meter", async () => {
  await withPipeline(goldenPath("schnell-like"), (plan) => plan, async (pipeline) => {
    const drawing = { prompt: "a", height: 32, width: 32, numInferenceSteps: 2 };
    assert.equal((await measure(pipeline, drawing, { warmups: 0, runs: 1 })).power, undefined); // the CPU
  });
  using device = openEmulatedGpu();
  let open = 0;
  device.powerMeter = () => {
    open++;
    return {
      joules: () => 0.3 * performance.now(),
      megahertz: () => 1500,
      [Symbol.dispose]: () => void open--,
    };
  };
  const milliseconds = { text: 1, image: 0, steps: [1], decode: 1, pixels: 1 };
  // Only what is measured matters here: a picture that takes as long as it is told to.
  const drawing = (length: number) => {
    const generate = async () => {
      await new Promise((resolve) => setTimeout(resolve, length));
      return { milliseconds, images: [{}], settings: {} };
    };
    return { plan: { device }, generate } as unknown as FluxPipeline;
  };
  const { power } = await measure(drawing(300), { prompt: "a" }, { warmups: 1, runs: 4 });
  assert.ok(Math.abs(power!.watts! - 300) < 1, `${power?.watts} W`);
  assert.deepEqual([power!.megahertz!.min, power!.megahertz!.max], [1500, 1500]);
  assert.equal(open, 0);
  const short = await measure(drawing(1), { prompt: "a" }, { warmups: 0, runs: 1 });
  assert.equal(short.power!.watts, undefined);
  const failing = { ...drawing(1), generate: () => Promise.reject(new Error("lost")) };
  await assert.rejects(
    measure(failing as unknown as FluxPipeline, { prompt: "a" }, { warmups: 0, runs: 1 }),
    /lost/,
  );
  assert.equal(open, 0);
});

Deno.test("FLUX.1's step has 56.2 TFLOP in Linear layers and 13.3 in attention", () => {
  const config = transformerConfigSchema.parse({});
  const size = { batch: 1, imageTokens: 4096, textTokens: 256 };
  const { linear, attention } = stepFlops(config, size);
  assert.equal((linear / 1e12).toFixed(1), "56.2");
  assert.equal((attention / 1e12).toFixed(1), "13.3");
  // By hand: 57 blocks of 12 hidden^2 multiplications a token; projections in and out; and for the picture as a whole
  // modulations (19 of 12, 38 of 3 and one of 2 hidden^2), timestep and pooled text.
  const hidden = 3072;
  const blocks = 57 * 12 * hidden ** 2 * 4352;
  const edges = 4096 * (64 + 64) * hidden + 256 * 4096 * hidden;
  const whole = (19 * 12 + 38 * 3 + 2) * hidden ** 2 + (256 + 768) * hidden + 2 * hidden ** 2;
  assert.equal(linear, 2 * (blocks + edges + whole));
  assert.equal(attention, 2 * 57 * 24 * 2 * 4352 ** 2 * 128);
  const twice = stepFlops(config, { ...size, batch: 2 });
  assert.deepEqual(twice, { linear: 2 * linear, attention: 2 * attention });
});

for (const [name, folder] of [["tiny", EMBEDDED_MODEL], ["dev-like", goldenPath("dev-like")]]) {
  Deno.test(`the counted operations are those that a step of ${name} does`, async () => {
    let [linear, attention, inStep] = [0, 0, false];
    const counting = (plan: Plan): Plan => {
      const count = (x: Tensor, weight: Tensor) => {
        if (inStep) linear += 2 * x.size * weight.shape[0];
      };
      const attend = (streams: readonly QkvStream[]) => {
        const [{ q: { shape: [batch, , heads, headDim] } }] = streams;
        const tokens = streams.reduce((sum, { q }) => sum + q.shape[1], 0);
        if (inStep) attention += 4 * batch * heads * headDim * tokens ** 2;
      };
      return {
        ...plan,
        execute: (running, part, inputs, body) => {
          inStep = part === "transformer" || part === "modulations"; // which this one step has for itself
          return plan.execute(running, part, inputs, body);
        },
        ops: {
          ...plan.ops,
          linear: (x, weight, bias) => (count(x, weight), plan.ops.linear(x, weight, bias)),
          linearGelu: (x, weight, bias) => (count(x, weight), plan.ops.linearGelu(x, weight, bias)),
          linears: (x, layers) => {
            for (const { weight } of layers) count(x, weight);
            return plan.ops.linears(x, layers);
          },
          jointAttention: (streams, ...rest) => (attend(streams), plan.ops.jointAttention(streams, ...rest)),
        },
      };
    };
    await withPipeline(folder, counting, async (pipeline) => {
      const { settings } = await pipeline.generate({
        prompt: "a",
        height: 64,
        width: 32,
        numInferenceSteps: 1,
        maxSequenceLength: 24,
      });
      const { configs } = pipeline.model;
      const size = stepSize(configs, settings);
      assert.equal(size.textTokens, 24);
      assert.deepEqual(stepFlops(configs.transformer, size), { linear, attention });
      assert.ok(linear > 0 && attention > 0);
    });
  });
}

Deno.test("PSNR of hand-counted pictures; equal ones are infinitely close; others need one size", () => {
  const black = new Uint8Array(12);
  assert.equal(psnr(black, black), Infinity);
  assert.equal(psnr(black.map(() => 255), black), 0);
  const one = black.with(3, 255);
  assert.ok(Math.abs(psnr(one, black) - 10 * Math.log10(12)) < 1e-12);
  assert.equal(psnr(one, black), psnr(black, one));
  assert.throws(() => psnr(black, new Uint8Array(9)), { name: "ShapeError" });
  assert.throws(() => psnr(new Uint8Array(), new Uint8Array()), { name: "ShapeError" });
});

Deno.test("tables are aligned, and Markdown's cells cannot break out", () => {
  assert.deepEqual(tableLines([["a", "bb", "c"], ["aaa", "b", ""]]), ["  a    bb  c", "  aaa  b"]);
  assert.deepEqual(tableLines([]), []);
  assert.deepEqual(numberLines(["", "ms"], [["step", "1.5"], ["x", "100"]]), [
    "         ms",
    "  step  1.5",
    "  x     100",
  ]);
  assert.deepEqual(markdownLines(["rung", "ms"], [["a|b", "1\n2"]]), [
    "| rung | ms |",
    "|---|--:|",
    "| a\\|b | 1 2 |",
  ]);
});
