/**
 * What 09_first_block_cache gains and costs, by threshold: steps that were reused, milliseconds of all steps, and the
 * distance of the picture from the one without it.
 *
 *     deno run -A tests/gpu/full_size/first_block_cache.ts                       # models/tiny with a guidance of zero, cpu
 *     deno run -A tests/gpu/full_size/first_block_cache.ts --device cuda --ckpt FLUX.1-dev
 *     deno run -A tests/gpu/full_size/first_block_cache.ts --device cuda --ckpt FLUX.1-dev-configs --random-weights
 *
 * With random weights the times of both kinds of steps are right, but which steps are reused means nothing: there a
 * threshold of a thousand reuses all behind the first eight.
 */
import {
  createParser,
  drawingOptions,
  printLine,
  runProgram,
  wholeNumber,
} from "../../../recipes/base/command_line.ts";
import { loadModel, openChosen, pictureToEdit } from "../../../recipes/base/loading.ts";
import { FluxPipeline, type GenerateResult } from "../../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../../recipes/base/plan.ts";
import { psnr } from "../../../recipes/base/psnr.ts";
import { markdownLines } from "../../../recipes/base/table.ts";
import { firstBlockCache } from "../../../recipes/09_first_block_cache.ts";
import { kindOf, recipesFor } from "../../../recipes/switches.ts";
import { withGuidedTiny } from "../../support/guided_tiny.ts";

const THRESHOLDS = [0, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 1000];

async function main(args: string[]): Promise<void> {
  const flags = createParser("first_block_cache", "Measures 09_first_block_cache by threshold.")
    .option("--runs <n>", "timed pictures of each threshold", wholeNumber(1, 100), 3)
    .allowExcessArguments(false)
    .parse(args, { from: "user" })
    .opts();
  const edited = await pictureToEdit(flags);
  const measure = async (ckpt: string) => {
    using device = await openChosen(flags, console.error);
    using model = await loadModel({ ...flags, ckpt }, device, "bf16", console.error);
    const plan = compose(eagerPlan(device, model.weights), ...recipesFor({}, kindOf(flags.device)));
    let expected: GenerateResult | undefined;
    const rows: string[][] = [];
    for (const threshold of [undefined, ...THRESHOLDS]) {
      const cached = threshold === undefined ? plan : compose(plan, firstBlockCache({ threshold }));
      const pipeline = new FluxPipeline(model, cached);
      const drawing = { ...drawingOptions(flags), ...edited };
      await pipeline.generate(drawing); // compiles, records
      const times: number[] = [];
      let last: GenerateResult | undefined;
      for (let run = 0; run < flags.runs; run++) {
        last = await pipeline.generate(drawing);
        times.push(last.milliseconds.steps.reduce((sum, ms) => sum + ms, 0));
      }
      expected ??= last!;
      const median = times.toSorted((a, b) => a - b)[times.length >> 1];
      rows.push([
        threshold === undefined ? "none" : String(threshold),
        `${last!.reusedSteps?.length ?? 0} of ${last!.settings.numInferenceSteps}`,
        median.toFixed(0),
        threshold === undefined
          ? ""
          : psnr(last!.images[0].rgb, expected.images[0].rgb).toFixed(1).replace("Infinity", "equal"),
      ]);
    }
    const base = Number(rows[0][2]);
    printLine(`${model.name} on ${device.name}, ${plan.recipes.join(", ")}`);
    printLine(
      markdownLines(
        ["threshold", "reused", "all steps, ms", "PSNR, dB", "speed-up"],
        rows.map((row) => [...row, (base / Number(row[2])).toFixed(2)]),
      ).join("\n"),
    );
  };
  if (flags.ckpt === undefined) {
    flags.num_inference_steps ??= 28;
    await withGuidedTiny(measure);
  } else await measure(flags.ckpt);
}

if (import.meta.main) Deno.exit(await runProgram("first_block_cache", () => main(Deno.args)));
