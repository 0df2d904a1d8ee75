import assert from "node:assert/strict";
import { decode, type Image } from "imagescript";
import type { Device } from "../../ffi/device.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { EMBEDDED_MODEL } from "../../recipes/base/command_line.ts";
import type { Recipe } from "../../recipes/base/plan.ts";
import { assertClose } from "./compare.ts";
import { draw, type Trace } from "./drawing.ts";
import { Golden, goldenPath } from "./golden.ts";
import { type TestDevice, testOn } from "./test_device.ts";

interface Run {
  readonly image: string;
  readonly tensors: string;
  readonly prompt: string;
  readonly seed: number;
  readonly num_inference_steps: number;
  readonly height: number;
  readonly width: number;
  readonly max_sequence_length: number;
}

/** The golden runs, and the digests of the weights that they were drawn with. */
export const TINY_GOLDEN: { sha256: Record<string, string>; runs: Run[] } = JSON.parse(
  Deno.readTextFileSync(goldenPath("tiny/runs.json")),
);

/** Draws a golden prompt; defaults of ours that equal the golden run's settings are left to us. */
function drawRun(device: Device, run: Run, recipes: readonly Recipe[]): Promise<Trace> {
  return draw(device, EMBEDDED_MODEL, recipes, { prompt: run.prompt, seed: run.seed });
}

/** Diffusers' picture as RGB. */
async function expectedPixels(run: Run): Promise<Uint8Array> {
  const { bitmap } = await decode(await Deno.readFile(goldenPath(`tiny/${run.image}`))) as Image;
  return Uint8Array.from(bitmap).filter((_, i) => i % 4 !== 3);
}

/**
 * The embedded model: what diffusers draws with it, we draw. Defines the tests on a device.
 *
 * @param rest exact recipes that follow the one of the dtype.
 */
export function tinySuite(target: TestDevice, rest: readonly Recipe[] = []): void {
  const test = (name: string, body: (device: Device) => Promise<void>) => testOn(target, name, body);
  const after = rest.length === 0 ? "" : `, with ${rest.map(({ name }) => name).join(", ")}`;
  for (const run of TINY_GOLDEN.runs) {
    test(`models/tiny draws ${JSON.stringify(run.prompt)} as diffusers does, by its own defaults${after}`, async (device) => {
      using golden = new Golden(`tiny/${run.tensors}`, device);
      const { result, latents } = await drawRun(device, run, [baselineFp32, ...rest]);
      const { height, width, numInferenceSteps, maxSequenceLength } = result.settings;
      assert.deepEqual(
        { height, width, numInferenceSteps, maxSequenceLength },
        {
          height: run.height,
          width: run.width,
          numInferenceSteps: run.num_inference_steps,
          maxSequenceLength: run.max_sequence_length,
        },
      );
      assert.deepEqual(latents[0], golden.values("initial"));
      assertClose(latents.at(-1)!, golden.values("final"), 1e-4, "final latents");
      const expected = await expectedPixels(run);
      const [{ rgb }] = result.images;
      assert.equal(rgb.length, expected.length);
      const worst = rgb.reduce((most, value, i) => Math.max(most, Math.abs(value - expected[i])), 0);
      assert.ok(worst <= 2, `a pixel differs by ${worst}/255`);
    });
  }

  test(`models/tiny in bfloat16 draws nearly the same picture${after}`, async (device) => {
    const [run] = TINY_GOLDEN.runs;
    const expected = await expectedPixels(run);
    const { result } = await drawRun(device, run, [bfloat16, ...rest]);
    const [{ rgb }] = result.images;
    const squares = rgb.reduce((sum, value, i) => sum + (value - expected[i]) ** 2, 0) / rgb.length;
    const psnr = 10 * Math.log10(255 ** 2 / squares);
    assert.ok(psnr >= 25, `PSNR ${psnr} dB`);
  });
}
