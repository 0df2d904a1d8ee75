/** The ladder as a page to attach to an issue or a paper: what `--report` of the benchmark and the ladder writes. */
import { baselineFp32 } from "./00_baseline_fp32.ts";
import { definedOnly, writeInterruptibly } from "./base/command_line.ts";
import { encodePng } from "./base/image.ts";
import type { Recipe } from "./base/plan.ts";
import { reportPage, type ReportPicture, shellLine } from "./base/report_page.ts";
import {
  chartOf,
  compare,
  type LadderFlags,
  type Measured,
  type RungResult,
  type Setting,
  tableOf,
  titleOf,
} from "./ladder.ts";
import { LADDER } from "./switches.ts";

/** How a page came about. */
export interface ReportOrigin {
  /** The task and its arguments, as they were typed. */
  readonly task: string;
  readonly args: readonly string[];
  readonly flags: LadderFlags;
  /** What the program has printed beside the table. */
  readonly printed?: string | undefined;
}

/** The rungs that lead to these recipes: the baseline, then one more at a time; those that draw the same are left out. */
export function rungsTo(recipes: readonly Recipe[]): Recipe[][] {
  const drawsTheSame = new Set(LADDER.filter((rung) => rung.drawsTheSame).map(({ name }) => name));
  const measured = recipes.filter(({ name }) => !drawsTheSame.has(name));
  const rungs = measured.map((_, i) => measured.slice(0, i + 1));
  return measured[0] === baselineFp32 ? rungs : [[baselineFp32], ...rungs];
}

/**
 * Writes the page, in one file.
 *
 * @throws FileError where it cannot be written
 */
export async function writeLadderReport(
  path: string,
  rungs: readonly RungResult[],
  setting: Setting,
  { task, args, flags, printed }: ReportOrigin,
): Promise<void> {
  const { settings } = setting;
  const drawing = {
    prompt: flags.prompt,
    seed: settings.seed,
    width: settings.width,
    height: settings.height,
    num_inference_steps: settings.numInferenceSteps,
    ...definedOnly({
      ckpt: flags.ckpt,
      revision: flags.revision,
      transformer: flags.transformer,
      vae: flags.vae,
      image: flags.image,
      device: flags.device,
    }),
  };
  const words = [
    ...Object.entries(drawing).flatMap(([name, value]) => [`--${name}`, String(value)]),
    ...(flags.lora ?? []).flatMap(({ path, scale }) => ["--lora", `${path}:${scale}`]),
  ];
  const page = reportPage({
    title: `flux-recipes: ${setting.model} on ${setting.description}`,
    subtitle: `${titleOf(setting, flags.runs)}. Prompt: ${flags.prompt}`,
    charts: [chartOf(rungs, titleOf(setting, flags.runs))],
    table: tableOf(rungs),
    pictures: await picturesOf(rungs),
    printed,
    environment: { date: new Date().toISOString(), ...setting.environment },
    commands: [
      { what: "This page:", line: shellLine(["npx", "-y", "deno", "task", task, ...args]) },
      ...(flags.randomWeights ? [] : [{
        what: "One picture, with all that the device runs:",
        line: shellLine(["npx", "-y", "deno", "task", "generate", ...words]),
      }]),
    ],
  });
  await writeInterruptibly(path, new TextEncoder().encode(page));
}

/** Each picture once, with all rungs that drew it. */
async function picturesOf(rungs: readonly RungResult[]): Promise<ReportPicture[]> {
  const comparisons = compare(rungs);
  const different: {
    readonly rung: Measured;
    readonly names: string[];
    readonly psnr: number | undefined;
  }[] = [];
  rungs.forEach((rung, i) => {
    if (!("picture" in rung)) return;
    const name = `${rung.recipes.length > 1 ? "+ " : ""}${rung.recipes.at(-1)}`;
    const equal = different.find((known) => sameBytes(known.rung.picture.rgb, rung.picture.rgb));
    if (equal === undefined) different.push({ rung, names: [name], psnr: comparisons[i].psnr });
    else equal.names.push(name);
  });
  return await Promise.all(
    different.map(async ({ rung: { picture: { rgb, width, height } }, names, psnr }) => {
      const distance = psnr === undefined || psnr === Infinity
        ? ""
        : `: ${psnr.toFixed(1)} dB against 01_bfloat16`;
      return {
        png: await encodePng(rgb, width, height),
        width,
        height,
        caption: `${names.join(", ")}${distance}`,
      };
    }),
  );
}

function sameBytes(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((value, i) => value === b[i]);
}
