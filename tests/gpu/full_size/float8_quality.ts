/**
 * What float8 costs in quality: the distance of pictures from bfloat16's, by what is in float8, over many prompts of models/tiny's
 * words, since single pictures vary by some 10 dB.
 *
 *     deno run -A tests/gpu/full_size/float8_quality.ts                       # models/tiny on the cpu, where float8 is emulated
 *     deno run -A tests/gpu/full_size/float8_quality.ts --device cuda         # with all rungs of the GPU
 */
import {
  createParser,
  drawingOptions,
  printLine,
  runProgram,
  wholeNumber,
} from "../../../recipes/base/command_line.ts";
import { loadModel, openChosen } from "../../../recipes/base/loading.ts";
import { statistics } from "../../../recipes/base/measure.ts";
import { FluxPipeline } from "../../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "../../../recipes/base/plan.ts";
import { psnr } from "../../../recipes/base/psnr.ts";
import { markdownLines } from "../../../recipes/base/table.ts";
import { float8 } from "../../../recipes/06_float8.ts";
import { kindOf, recipesFor, type Switches } from "../../../recipes/switches.ts";
import nouns from "../../../models/tiny/nouns.json" with { type: "json" };

const SCENES = [
  ({ one }: { one: string }) => `a ${one}`,
  ({ many }: { many: string }) => `three ${many} on a blue background`,
  ({ one }: { one: string }) => `a ${one} at night`,
];

/** `count` prompts, of words from all over the list. */
function prompts(count: number): string[] {
  return Array.from({ length: count }, (_, i) => {
    const { names: [name] } = nouns[Math.floor(i * nouns.length / count)];
    return SCENES[i % SCENES.length](name);
  });
}

async function main(args: string[]): Promise<void> {
  const flags = createParser("float8_quality", "Compares pictures in float8 with those in bfloat16.")
    .option("--pictures <n>", "how many, each of a prompt and a seed of its own", wholeNumber(2, 368), 123)
    .allowExcessArguments(false)
    .parse(args, { from: "user" })
    .opts();
  const kind = kindOf(flags.device);
  const draw = async (recipes: readonly Recipe[]) => {
    using device = await openChosen(flags, console.error);
    using model = await loadModel(flags, device, "bf16", console.error);
    const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), ...recipes));
    const pictures: Uint8Array[] = [];
    for (const [seed, prompt] of prompts(flags.pictures).entries()) {
      const { images } = await pipeline.generate({ ...drawingOptions(flags), prompt, seed });
      pictures.push(images[0].rgb);
    }
    return pictures;
  };
  const choose = (switches: Switches, own: readonly Recipe[] = []) => {
    const recipes = recipesFor({ compile_export_mode: "compile", disable_fa3: true, ...switches }, kind);
    return kind === "cpu" ? [...recipes, ...own] : recipes; // which has no float8 unless asked for
  };
  const expected = await draw(choose({ disable_quant: true }));
  const rows: string[][] = [];
  let before: number[] | undefined;
  for (const disable_quant of [undefined, true] as const) {
    for (const t5_float8 of ["off", "weights", "dynamic"] as const) {
      if (disable_quant && t5_float8 === "off") continue;
      const recipes = choose({ disable_quant, t5_float8 }, disable_quant ? [] : [float8()]);
      const pictures = await draw(recipes);
      const distances = pictures.map((picture, i) => psnr(picture, expected[i]));
      before ??= distances;
      const { mean, variance } = statistics(distances.map((distance, i) => distance - before![i]));
      rows.push([
        disable_quant ? "no" : "yes",
        t5_float8,
        statistics(distances).mean.toFixed(2),
        `${mean.toFixed(2)} ± ${Math.sqrt(variance / distances.length).toFixed(2)}`, // the mean's standard error
      ]);
    }
  }
  printLine(
    markdownLines(["06_float8", "--t5_float8", "PSNR, dB", "against the first row"], rows).join("\n"),
  );
}

if (import.meta.main) Deno.exit(await runProgram("float8_quality", () => main(Deno.args)));
