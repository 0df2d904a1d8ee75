/**
 * Times pictures: `deno task benchmark`. The flags are flux-fast's, and what they switch; ours beside them are `--warmups`,
 * `--runs` and those of gen_image.
 */
import { checkWritable } from "../ffi/files.ts";
import { isGpu } from "../ffi/gpu.ts";
import { attendsInFloat8 } from "./05_flash_attention.ts";
import { exportedModel } from "./08_export.ts";
import {
  definedOnly,
  drawingOptions,
  gigabytes,
  htmlPath,
  onlyOnce,
  printLine,
  Progress,
  runProgram,
  userPath,
  wholeNumber,
  writeInterruptibly,
} from "./base/command_line.ts";
import { environmentOf } from "./base/environment.ts";
import { type Floor, measureFloor } from "./base/floor.ts";
import { type Flops, stepFlops, stepSize } from "./base/flops.ts";
import {
  checkModel,
  loadModel,
  mergeLoras,
  openChosen,
  pictureToEdit,
  withLocalModel,
} from "./base/loading.ts";
import {
  measure,
  type PartStatistics,
  partStatistics,
  type Power,
  RUNS,
  type Statistics,
  WARMUPS,
} from "./base/measure.ts";
import { encodePicture } from "./base/picture_file.ts";
import { FluxPipeline, type GenerateResult } from "./base/pipeline.ts";
import { compose, eagerPlan, type Plan, type Recipe } from "./base/plan.ts";
import { numberLines } from "./base/table.ts";
import { encodeTrace, tracePicture } from "./base/trace.ts";
import { climb, type Measured, type Setting } from "./ladder.ts";
import { rungsTo, writeLadderReport } from "./ladder_report.ts";
import { createPictureParser, kindOf, recipesFor } from "./switches.ts";

const NAME = "run_benchmark";

const EXAMPLES = `
Examples:
  deno task benchmark
  deno task benchmark --runs 20 --warmups 5 --json > result.json
  deno task benchmark --device cuda --ckpt ~/models/FLUX.1-schnell --output-file fast.png
  deno task benchmark --device cuda --ckpt ~/models/FLUX.1-schnell-configs --random-weights
  deno task benchmark --height 512 --width 512 --trace-file trace.json.gz
  deno task benchmark --report report.html
  deno task benchmark --disable_bf16

Open a trace in ui.perfetto.dev or chrome://tracing; kernels are in it where CUPTI is installed. "deno task ladder" measures all rungs, one after another.
`;

function parseFlags(args: string[]) {
  return createPictureParser(
    NAME,
    "Times pictures: the same one several times, with the model loaded.",
  )
    .option("--warmups <n>", "pictures that are drawn first and not timed", wholeNumber(0, 1000), WARMUPS)
    .option("--runs <n>", "pictures that are timed", wholeNumber(1, 10_000), RUNS)
    .option(
      "--trace-file <file>",
      "afterwards, a trace of one more picture: its parts, operators, and a GPU's kernels (.json or .json.gz)",
      userPath,
    )
    .option(
      "--report <file>",
      "afterwards, a page with these numbers, the ladder up to these recipes (each rung is measured, too), pictures, " +
        "environment and commands, in one HTML file",
      htmlPath,
    )
    .addHelpText("after", EXAMPLES)
    .allowExcessArguments(false)
    .parse(args, { from: "user" })
    .opts();
}

async function runBenchmark(args: string[]): Promise<void> {
  const given = parseFlags(args);
  const recipes = recipesFor(given, kindOf(given.device));
  const { outputFile, traceFile, report } = given;
  for (const path of [outputFile, traceFile, report]) {
    if (path !== undefined) await checkWritable(path); // before minutes of work, not after
  }
  const note = onlyOnce((message) => console.error(`${NAME}: ${message}`));
  const flags = await withLocalModel(given, note);
  checkModel(flags, recipes);

  const { rung, setting, printed } = await benchmark(flags, recipes, note);
  if (report === undefined) return;
  // The device is closed again: each rung opens one of its own.
  const { rungs } = await climb(rungsTo(recipes).slice(0, -1), flags, note, setting);
  await writeLadderReport(report, [...rungs, rung], setting, {
    task: "benchmark",
    args,
    flags: given,
    printed,
  });
  if (!flags.json) printLine(report);
}

/** Draws, measures, writes the picture and prints the numbers; `printed` is their text. */
async function benchmark(
  flags: ReturnType<typeof parseFlags>,
  recipes: readonly Recipe[],
  note: (message: string) => void,
): Promise<{ rung: Measured; setting: Setting; printed: string }> {
  const { outputFile: output, traceFile, prompt, warmups, runs } = flags;
  const edited = await pictureToEdit(flags);
  using device = await openChosen(flags, note);
  const loadStart = performance.now();
  const exported = exportedModel(flags, recipes, device, note);
  const dtype = flags.disable_bf16 ? "f32" : "bf16";
  const drawing = { ...drawingOptions(flags), ...edited, onWarning: note };
  using model = await exported?.load() ?? await loadModel(flags, device, dtype, note, recipes, drawing);
  const load = performance.now() - loadStart;
  const plan = compose(eagerPlan(device, model.weights), ...recipes);
  const loras = await mergeLoras(flags.lora, model, plan, note);
  const { description, providers } = device.properties();
  if (flags.verbose) {
    for (const [what, provider] of Object.entries(providers)) note(`${what}: ${provider}`);
  }

  const pipeline = new FluxPipeline(model, plan);
  const bar = new Progress("drawing", warmups + runs, "pictures");
  const { times, first, picture, settings, power } = await measure(pipeline, drawing, {
    warmups,
    runs,
    onPicture: (done) => bar.update(done),
  }).finally(() => bar.stop());
  const memory = device.memoryUse();
  await writeInterruptibly(
    output,
    await encodePicture(picture, { prompt, settings, model, plan, loras: flags.lora }),
  );
  if (traceFile !== undefined) {
    const events = await tracePicture(pipeline, drawing); // afterwards, since it takes time itself
    await writeInterruptibly(traceFile, await encodeTrace(events, traceFile));
  }

  const parts = partStatistics(times);
  const flops = stepFlops(model.configs.transformer, stepSize(model.configs, settings));
  const floor = await measureFloor(device, flops, productDTypes(plan));
  const report: Report = {
    path: output,
    ...definedOnly({ trace: traceFile, report: flags.report }),
    prompt,
    model: model.name,
    device: device.name,
    description,
    recipes: plan.recipes,
    ...settings,
    seed: settings.seed.toString(), // beyond 2^53 a JSON number would change it
    warmups,
    runs,
    milliseconds: { load, first, pictures: times.map(({ whole }) => whole), ...parts },
    step: {
      ...flops,
      teraflopsPerSecond: rate(flops, parts.step.median),
      ...(floor && { floor: { ...floor, share: floor.milliseconds / parts.step.median } }),
    },
    memory: { weights: memory.weights, peak: memory.peak, reserved: memory.reserved },
    ...(power && { power }),
  };
  const printed = describe(report);
  printLine(flags.json ? JSON.stringify(report) : printed);
  await exported?.write(plan, loras);
  return {
    rung: {
      recipes: plan.recipes,
      exact: recipes.every(({ exact }) => exact),
      milliseconds: parts,
      memory: report.memory,
      picture,
    },
    setting: {
      settings,
      model: model.name,
      device: device.name,
      description,
      environment: environmentOf(device),
    },
    printed,
  };
}

/** What `--json` prints. */
interface Report extends Omit<GenerateResult["settings"], "seed"> {
  readonly path: string;
  readonly trace?: string;
  /** Written after this is printed. */
  readonly report?: string;
  readonly prompt: string;
  readonly model: string;
  readonly device: string;
  readonly description: string;
  readonly recipes: readonly string[];
  readonly seed: string;
  readonly warmups: number;
  readonly runs: number;
  /** `first` is the first picture's, a warm-up's or not; `pictures` has each timed one. */
  readonly milliseconds: PartStatistics & {
    readonly load: number;
    readonly first: number;
    readonly pictures: readonly number[];
  };
  /**
   * Operations of a step, how many 10^12 of them it did in a second, and what share of its time it would take at the rate
   * of large products.
   */
  readonly step: Flops & {
    readonly teraflopsPerSecond: number;
    readonly floor?: Floor & { readonly share: number };
  };
  /** In bytes. */
  readonly memory: { readonly weights: number; readonly peak: number; readonly reserved: number };
  /** Of the GPU while pictures were timed: watts on average, and the multiprocessors' clock. */
  readonly power?: Power;
}

function describe(report: Report): string {
  const { milliseconds: { whole, text, image, step, steps, decode, postprocess, load, first }, memory } =
    report;
  const row = (what: string, { mean, variance, median, min, max }: Statistics) => [
    what,
    ...[mean, variance, median, min, max].map((value) => value.toFixed(2)),
  ];
  const tera = (flops: number) => (flops / 1e12).toPrecision(3);
  return [
    `${report.model} on ${report.device} (${report.description}), ${report.recipes.join(", ")}`,
    `${report.width} x ${report.height}, steps: ${report.numInferenceSteps}, seed ${report.seed}, ` +
    `warm-ups: ${report.warmups}, timed pictures: ${report.runs}`,
    "",
    ...numberLines(["milliseconds", "mean", "variance", "median", "min", "max"], [
      row("whole picture", whole),
      row("text encoders", text),
      ...(report.image ? [row("image encoder", image)] : []),
      row("one step", step),
      row("decoder", decode),
      row("post-processing", postprocess),
    ]),
    "",
    `time mean/var: ${(whole.mean / 1000).toPrecision(6)} s, ${(whole.variance / 1e6).toPrecision(3)} s^2`,
    `medians of the steps: ${steps.map(({ median }) => median.toFixed(2)).join(" ")} ms`,
    `a step: ${tera(report.step.linear)} TFLOP in Linear layers, ${
      tera(report.step.attention)
    } in attention: ` +
    `${report.step.teraflopsPerSecond.toPrecision(4)} TFLOP/s`,
    ...describeFloor(report.step.floor),
    ...describePower(report.power),
    `loading: ${load.toFixed(0)} ms; first picture: ${first.toFixed(0)} ms; memory: weights ${
      gigabytes(memory.weights)
    } GB, ` +
    `activations ${gigabytes(memory.peak)} GB at most`,
    ...[report.path, report.trace].filter((path) => path !== undefined),
  ].join("\n");
}

function describeFloor(floor: Report["step"]["floor"]): string[] {
  if (floor === undefined) return [];
  const rates = Object.entries(floor.rates).map(([dtype, rate]) => `${rate.toPrecision(3)} in ${dtype}`);
  return [
    `at the rate of large products here (TFLOP/s: ${rates.join(", ")}) it would take ` +
    `${floor.milliseconds.toPrecision(3)} ms, ${(100 * floor.share).toFixed(0)} % of its time`,
  ];
}

function describePower({ watts, megahertz }: Power = {}): string[] {
  const parts = [
    watts === undefined ? undefined : `${watts.toFixed(0)} W`,
    megahertz === undefined
      ? undefined
      : `${megahertz.median.toFixed(0)} MHz (${megahertz.min.toFixed(0)} to ${megahertz.max.toFixed(0)})`,
  ].filter((part) => part !== undefined);
  return parts.length === 0 ? [] : [`the GPU while pictures were timed: ${parts.join(", ")}`];
}

/** What a plan multiplies in: a GPU's float8 units only where recipes use them; elsewhere float8 is emulated. */
function productDTypes(plan: Plan): Parameters<typeof measureFloor>[2] {
  const { device, recipes, weights } = plan;
  const dtype = weights.transformer.get("x_embedder.weight").dtype === "bf16" ? "bf16" : "f32";
  const inFloat8 = isGpu(device) && recipes.includes("06_float8");
  return { linear: inFloat8 ? "f8e4m3" : dtype, attention: attendsInFloat8(plan) ? "f8e4m3" : dtype };
}

/** TFLOP/s. */
function rate({ linear, attention }: Flops, milliseconds: number): number {
  return (linear + attention) / 1e9 / milliseconds;
}

if (import.meta.main) Deno.exit(await runProgram(NAME, () => runBenchmark(Deno.args)));
