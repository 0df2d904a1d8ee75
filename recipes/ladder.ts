/**
 * Climbs the ladder: `deno task ladder`. Measures the baseline, then one more recipe at a time, each with a device and a
 * model of its own, so that a rung's memory is its own and no plan finds its weights consumed by another.
 */
import { Option } from "@commander-js/extra-typings";
import { OutOfMemoryError } from "../ffi/errors.ts";
import { checkWritable } from "../ffi/files.ts";
import { barChart } from "./base/bar_chart.ts";
import {
  type CommonFlags,
  createParser,
  definedOnly,
  drawingOptions,
  gigabytes,
  htmlPath,
  onlyOnce,
  printLine,
  Progress,
  runProgram,
  svgPath,
  wholeNumber,
  writeInterruptibly,
} from "./base/command_line.ts";
import { environmentOf } from "./base/environment.ts";
import { FluxError, UsageError } from "./base/errors.ts";
import { loadModel, mergeLoras, openChosen, pictureToEdit, withLocalModel } from "./base/loading.ts";
import type { LoraChoice } from "./base/lora.ts";
import { measure, type PartStatistics, partStatistics, RUNS, WARMUPS } from "./base/measure.ts";
import { FluxPipeline, type GenerateResult, type Picture } from "./base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "./base/plan.ts";
import { largestError, psnr } from "./base/psnr.ts";
import { markdownLines, numberLines } from "./base/table.ts";
import { writeLadderReport } from "./ladder_report.ts";
import { cumulativeRungs, kindOf } from "./switches.ts";

const NAME = "ladder";

const EXAMPLES = `
Examples:
  deno task ladder
  deno task ladder --markdown --chart ladder.svg
  deno task ladder --report ladder.html
  deno task ladder --device cuda --ckpt ~/models/FLUX.1-schnell --warmups 2 --runs 5
  deno task ladder --device cuda --ckpt ~/models/FLUX.1-Kontext-dev --image photo.jpg --prompt "make it winter"
  deno task ladder --device cuda --ckpt ~/models/FLUX.1-schnell-configs --random-weights --json > ladder.json

Times are medians. Speed-up, PSNR and the largest error of a pixel are against 01_bfloat16. "deno task benchmark" measures one choice of recipes.
`;

/** What everything is compared with: the rung that changes nothing but the dtype that checkpoints have anyway. */
const REFERENCE = "01_bfloat16";

/** What one rung gave. */
export type RungResult = Measured | Failed;

interface Climbed {
  /** In order; the last one is what this rung adds. */
  readonly recipes: readonly string[];
  /** All of them compute the same function, up to rounding. */
  readonly exact: boolean;
}

export interface Measured extends Climbed {
  readonly milliseconds: PartStatistics;
  /** In bytes. */
  readonly memory: { readonly weights: number; readonly peak: number; readonly reserved: number };
  readonly picture: Picture;
}

export interface Failed extends Climbed {
  readonly error: string;
}

/** A rung beside {@link REFERENCE}; undefined where one of the two was not measured. */
export interface Comparison {
  /** How many times as fast a whole picture is. */
  readonly speedup: number | undefined;
  /** Of the picture, in dB; infinite for an equal one. */
  readonly psnr: number | undefined;
  /** Largest difference of a pixel's 8 bits, 0 to 255. */
  readonly largestError: number | undefined;
}

const NOT_COMPARED: Comparison = { speedup: undefined, psnr: undefined, largestError: undefined };

/** Compares each rung with {@link REFERENCE}, by medians and by pictures. */
export function compare(rungs: readonly RungResult[]): Comparison[] {
  const reference = rungs.find((rung): rung is Measured =>
    isMeasured(rung) && rung.recipes.at(-1) === REFERENCE
  );
  return rungs.map((rung) => {
    if (reference === undefined || !isMeasured(rung)) return NOT_COMPARED;
    return {
      speedup: reference.milliseconds.whole.median / rung.milliseconds.whole.median,
      psnr: psnr(rung.picture.rgb, reference.picture.rgb),
      largestError: largestError(rung.picture.rgb, reference.picture.rgb),
    };
  });
}

function isMeasured(rung: RungResult): rung is Measured {
  return "milliseconds" in rung;
}

const HEADING = [
  "rung",
  "text, ms",
  "step, ms",
  "decoder, ms",
  "pixels, ms",
  "picture, ms",
  "speed-up",
  "weights, GB",
  "peak, GB",
  "PSNR, dB",
  "max error",
  "quality",
];

/** Heading and rows of the cumulative table. */
export function tableOf(rungs: readonly RungResult[]): [heading: string[], rows: string[][]] {
  const comparisons = compare(rungs);
  const rows = rungs.map((rung, i) => {
    const quality = rung.exact ? "exact" : "lossy";
    if (!isMeasured(rung)) return [labelOf(rung), ...HEADING.slice(2).map(() => "-"), "failed"];
    const { milliseconds: { text, step, decode, postprocess, whole }, memory } = rung;
    const { speedup, psnr, largestError } = comparisons[i];
    return [
      labelOf(rung),
      ...[text, step, decode, postprocess, whole].map(({ median }) => significant(median)),
      speedup === undefined ? "-" : speedup.toFixed(2),
      gigabytes(memory.weights),
      gigabytes(memory.peak),
      psnr === undefined ? "-" : psnr === Infinity ? "equal" : psnr.toFixed(1),
      largestError === undefined ? "-" : `${largestError}/255`,
      quality,
    ];
  });
  return [HEADING, rows];
}

/** `"01_bfloat16"`, then `"+ 02_compile"`: every rung has all recipes since 01. */
function labelOf({ recipes }: Climbed): string {
  return `${recipes.length > 1 ? "+ " : ""}${recipes.at(-1)}`;
}

function significant(milliseconds: number): string {
  return milliseconds.toFixed(milliseconds < 10 ? 2 : milliseconds < 1000 ? 1 : 0);
}

/** The chart of whole pictures. */
export function chartOf(rungs: readonly RungResult[], subtitle: string): string {
  const comparisons = compare(rungs);
  return barChart({
    title: "Milliseconds of a picture",
    subtitle,
    bars: rungs.map((rung, i) => {
      const { speedup } = comparisons[i];
      const median = isMeasured(rung) ? rung.milliseconds.whole.median : undefined;
      const times = speedup === undefined ? "" : `, ${speedup.toFixed(2)} x`;
      const note = median === undefined ? "failed" : `${significant(median)} ms${times}`;
      return {
        label: labelOf(rung),
        value: median,
        note: `${note}${rung.exact ? "" : ", lossy"}`,
        accent: !rung.exact,
      };
    }),
  });
}

async function runLadder(args: string[]): Promise<number> {
  const flags = createParser(
    NAME,
    "Measures the ladder of recipes, one more at a time, and compares the pictures.",
  )
    .option("--warmups <n>", "pictures of each rung that are not timed", wholeNumber(0, 1000), WARMUPS)
    .option("--runs <n>", "pictures of each rung that are timed", wholeNumber(1, 10_000), RUNS)
    .addOption(new Option("--markdown", "print the table in Markdown").conflicts("json"))
    .option("--chart <file>", "an SVG bar chart to write", svgPath)
    .option(
      "--report <file>",
      "a page to write, with chart, table, pictures, environment and commands",
      htmlPath,
    )
    .addHelpText("after", EXAMPLES)
    .allowExcessArguments(false)
    .parse(args, { from: "user" })
    .opts();
  const { chart, report, warmups, runs } = flags;
  for (const path of [chart, report]) {
    if (path !== undefined) await checkWritable(path); // before minutes of work, not after
  }
  const note = onlyOnce((message) => console.error(`${NAME}: ${message}`));
  const { rungs, setting } = await climb(
    cumulativeRungs(kindOf(flags.device)),
    await withLocalModel(flags, note),
    note,
  );
  const { settings, model, device, description } = setting;
  const title = titleOf(setting, runs);
  if (chart !== undefined) {
    await writeInterruptibly(chart, new TextEncoder().encode(chartOf(rungs, title)));
  }
  if (report !== undefined) await writeLadderReport(report, rungs, setting, { task: NAME, args, flags });
  const written = [chart, report].filter((path) => path !== undefined);
  const [heading, rows] = tableOf(rungs);
  if (flags.json) {
    const comparisons = compare(rungs);
    printLine(JSON.stringify({
      prompt: flags.prompt,
      model,
      device,
      description,
      ...settings,
      seed: settings.seed.toString(), // beyond 2^53 a JSON number would change it
      warmups,
      runs,
      ...definedOnly({ chart, report }),
      rungs: rungs.map((rung, i) => ({ ...withoutPicture(rung), ...comparedInJson(comparisons[i]) })),
    }));
  } else if (flags.markdown) {
    printLine([title, "", ...markdownLines(heading, rows)].join("\n"));
  } else {
    printLine(
      [title, "", ...numberLines(heading, rows), ...(written.length > 0 ? ["", ...written] : [])].join("\n"),
    );
  }
  return rungs.every(isMeasured) ? 0 : 1;
}

/** What was measured where, in a line. */
export function titleOf({ settings, model, device, description }: Setting, runs: number): string {
  return `${model} on ${device} (${description}), ${settings.width} x ${settings.height}, ` +
    `steps: ${settings.numInferenceSteps}, medians of ${runs}`;
}

/** JSON has no infinity: an equal picture is `equal`, and has no PSNR. */
function comparedInJson({ speedup, psnr, largestError }: Comparison) {
  return { speedup, equal: psnr === Infinity, psnr: psnr === Infinity ? undefined : psnr, largestError };
}

function withoutPicture(rung: RungResult): Omit<Measured, "picture"> | Failed {
  if (!isMeasured(rung)) return rung;
  const { picture: _, ...rest } = rung;
  return rest;
}

/** What all rungs have in common. */
export interface Setting {
  readonly settings: GenerateResult["settings"];
  readonly model: string;
  readonly device: string;
  readonly description: string;
  /** For people to read, by name. */
  readonly environment: Readonly<Record<string, string>>;
}

export interface LadderFlags extends CommonFlags {
  /** Merged into every rung's model. */
  readonly lora?: readonly LoraChoice[] | undefined;
  readonly warmups: number;
  readonly runs: number;
}

/**
 * Measures each rung. One that fails is noted, and the others are measured all the same.
 *
 * @param known where a rung was measured already: it can be, so that none has to succeed here.
 */
export async function climb(
  ladder: readonly (readonly Recipe[])[],
  flags: LadderFlags,
  note: (message: string) => void,
  known?: Setting,
): Promise<{ rungs: RungResult[]; setting: Setting }> {
  const rungs: RungResult[] = [];
  let setting = known;
  let failure: FluxError | undefined;
  for (const recipes of ladder) {
    const climbed = { recipes: recipes.map(({ name }) => name), exact: recipes.every(({ exact }) => exact) };
    const label = labelOf(climbed);
    try {
      const { rung, ...found } = await measureRung(label, recipes, flags, note);
      rungs.push({ ...climbed, ...rung });
      setting ??= found;
      if (flags.verbose) note(`${label}: ${significant(rung.milliseconds.whole.median)} ms a picture`);
    } catch (error) {
      if (!(error instanceof FluxError)) throw error;
      // float32 may be too large where the other rungs fit; a wrong call or a damaged model stays what it is.
      if (setting === undefined && !(error instanceof OutOfMemoryError)) throw error;
      failure ??= error;
      rungs.push({ ...climbed, error: error.message });
      note(`${label} failed: ${error.message}`);
    }
  }
  if (setting === undefined) throw failure ?? new UsageError("there is nothing to measure");
  return { rungs, setting };
}

async function measureRung(
  label: string,
  recipes: readonly Recipe[],
  flags: LadderFlags,
  note: (message: string) => void,
): Promise<Setting & { rung: Omit<Measured, keyof Climbed> }> {
  const edited = await pictureToEdit(flags);
  using device = await openChosen(flags, note);
  const dtype = recipes.some(({ name }) => name === REFERENCE) ? "bf16" : "f32";
  const drawing = { ...drawingOptions(flags), ...edited, onWarning: note };
  using model = await loadModel(flags, device, dtype, note, recipes, drawing);
  const plan = compose(eagerPlan(device, model.weights), ...recipes);
  await mergeLoras(flags.lora, model, plan, note);
  const pipeline = new FluxPipeline(model, plan);
  const { warmups, runs } = flags;
  const bar = new Progress(label, warmups + runs, "pictures");
  const { times, picture, settings } = await measure(pipeline, drawing, {
    warmups,
    runs,
    onPicture: (done) => bar.update(done),
  }).finally(() => bar.stop());
  const { weights, peak, reserved } = device.memoryUse();
  return {
    rung: { milliseconds: partStatistics(times), memory: { weights, peak, reserved }, picture },
    settings,
    model: model.name,
    device: device.name,
    description: device.properties().description,
    environment: environmentOf(device),
  };
}

if (import.meta.main) Deno.exit(await runProgram(NAME, () => runLadder(Deno.args)));
