/**
 * What the programs share: flux-fast's flags with its spelling and defaults, checked values, and an end in one line
 * and an exit code instead of a stack trace.
 */
import { Command, CommanderError, InvalidArgumentError, Option } from "@commander-js/extra-typings";
import { SingleBar } from "cli-progress";
import process from "node:process";
import { existsSync } from "node:fs";
import { isAbsolute, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { writeFileAtomic } from "../../ffi/files.ts";
import { FileError, FluxError, messageOf, UsageError } from "./errors.ts";
import { isHubId } from "./hub_id.ts";
import type { LoraChoice } from "./lora.ts";
import { NotebookPlace, progressContent } from "./notebook.ts";
import { type GenerateOptions, MAX_SEQUENCE_LENGTH, MAX_SIDE, MAX_STEPS } from "./pipeline.ts";

/** The repository's folder. */
const ROOT = fileURLToPath(new URL("../..", import.meta.url)).replace(/\/$/, "");

/** The model that the repository carries. */
export const EMBEDDED_MODEL = join(ROOT, "models/tiny");

/** A parser of option values for commander: whole numbers from `least` to `most`. */
export function wholeNumber(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^[+-]?\d+$/.test(text) || value < least || value > most) {
      throw new InvalidArgumentError(`Give a whole number from ${least} to ${most}.`);
    }
    return value;
  };
}

function finiteNumber(text: string): number {
  const value = Number(text);
  if (text.trim() === "" || !Number.isFinite(value)) throw new InvalidArgumentError("Give a number.");
  return value;
}

/** A seed as torch takes it: -2^63 to 2^64 - 1. */
function seedNumber(text: string): bigint {
  if (!/^[+-]?\d+$/.test(text)) throw new InvalidArgumentError("Give a whole number.");
  const value = BigInt(text.replace(/^\+/, ""));
  if (value < -(2n ** 63n) || value >= 2n ** 64n) {
    throw new InvalidArgumentError("Give one from -2^63 to 2^64 - 1.");
  }
  return value;
}

/**
 * A path as the user means it: from the folder where the command was typed. `deno task` changes to the folder of
 * deno.json first and keeps the user's in INIT_CWD.
 */
export function userPath(text: string): string {
  if (text === "") throw new InvalidArgumentError("Give a path.");
  const atRoot = Deno.cwd() === ROOT;
  return resolve(atRoot ? Deno.env.get("INIT_CWD") ?? ROOT : Deno.cwd(), text);
}

/** A model: the path of a folder or file, or else what can be an id on the hub, as it is. */
function modelPath(text: string): string {
  const path = userPath(text);
  return isHubId(text) && !existsSync(path) ? text : path;
}

/** A LoRA file, with a scale behind a colon or without; added to those that were given before. */
export function loraChoice(text: string, others: readonly LoraChoice[] = []): LoraChoice[] {
  const [, path, scale] = existsSync(userPath(text)) ? [text, text] : text.match(/^(.*?)(?::([^:/]*))?$/)!;
  if (!path.endsWith(".safetensors")) {
    throw new InvalidArgumentError(
      "Give a .safetensors file, and a scale behind a colon: style.safetensors:0.8.",
    );
  }
  return [...others, { path: userPath(path), scale: scale === undefined ? 1 : finiteNumber(scale) }];
}

/** A path of a PNG to write. */
export function pngPath(text: string): string {
  if (!/\.png$/i.test(text)) {
    throw new InvalidArgumentError("Pictures are written as PNG: name it something.png.");
  }
  return userPath(text);
}

/** A path of an SVG to write. */
export function svgPath(text: string): string {
  if (!/\.svg$/i.test(text)) {
    throw new InvalidArgumentError("Charts are written as SVG: name it something.svg.");
  }
  return userPath(text);
}

function deviceName(text: string): string {
  if (!/^(cpu|(cuda|hip)(:\d+)?)$/.test(text)) {
    throw new InvalidArgumentError("Known devices are cpu, cuda, cuda:N, hip and hip:N.");
  }
  return text;
}

/**
 * Default of `--cache-dir`: `$XDG_CACHE_HOME/flux-recipes` or `~/.cache/flux-recipes` (XDG Base Directory
 * Specification: an empty or relative variable counts as unset), or none where there is no home folder.
 */
export function defaultCacheDir(): string | undefined {
  const absolute = (name: string) => {
    const folder = Deno.env.get(name) ?? "";
    return isAbsolute(folder) ? folder : undefined;
  };
  const home = absolute("HOME");
  const cache = absolute("XDG_CACHE_HOME") ?? (home === undefined ? undefined : join(home, ".cache"));
  return cache === undefined ? undefined : join(cache, "flux-recipes");
}

/** The flags that all programs which draw have. */
export function createParser(name: string, description: string) {
  return new Command(name)
    .description(description)
    .option(
      "--ckpt <model>",
      "model folder in diffusers' layout, or a model of the Hugging Face hub such as black-forest-labs/FLUX.1-dev, which " +
        "is downloaded unless the cache has it; without it the small model of this repository",
      modelPath,
    )
    .option("--revision <name>", "branch, tag or commit of a --ckpt from the hub; default main")
    .option(
      "--transformer <file>",
      "a transformer in one safetensors file, in the place of --ckpt's: flux1-*.safetensors of Black Forest Labs, or as " +
        "ComfyUI has them, in float8 too",
      userPath,
    )
    .option("--vae <file>", "an autoencoder in one file (ae.safetensors), in the place of --ckpt's", userPath)
    .option("--prompt <text>", "what to draw", "A cat playing with a ball of yarn")
    .option("--image <file>", "PNG or JPEG to edit, for FLUX.1-Kontext checkpoints", userPath)
    .option(
      "--cache-dir <folder>",
      "where compiled kernels, measurements and exported models are kept",
      userPath,
      defaultCacheDir(),
    )
    .option("--device <name>", "cpu, cuda or cuda:N, hip or hip:N", deviceName, "cpu")
    .option(
      "--num_inference_steps <n>",
      "denoising steps; default 4, and 28 for models with guidance (dev)",
      wholeNumber(1, MAX_STEPS),
    )
    .addOption(
      new Option("--seed <n>", "random seed; the one that diffusers was given draws the same picture")
        .argParser(seedNumber)
        .default(42n, "42"), // a bigint has no JSON for the help to show
    )
    .option(
      "--height <pixels>",
      "default: what the model was made for (1024 for FLUX.1)",
      wholeNumber(1, MAX_SIDE),
    )
    .option(
      "--width <pixels>",
      "default: what the model was made for (1024 for FLUX.1)",
      wholeNumber(1, MAX_SIDE),
    )
    .option(
      "--guidance_scale <x>",
      "for models with guidance; default 3.5 for dev, 2.5 for Kontext",
      finiteNumber,
    )
    .option(
      "--max_sequence_length <n>",
      "T5 tokens; default 256, and 512 for models with guidance",
      wholeNumber(1, MAX_SEQUENCE_LENGTH),
    )
    .option(
      "--random-weights",
      "make weights up instead of loading them: for benchmarks, with nothing but --ckpt's configs and tokenizers",
    )
    .option("--json", "print one JSON object instead of text, on a line for each picture")
    .option("--verbose", "say what runs where, and how long each part took")
    .configureOutput({ outputError: (text, write) => write(text) })
    .showHelpAfterError("(--help lists all flags with examples)")
    .exitOverride();
}

/** What {@link createParser} parses. */
export type CommonFlags = ReturnType<ReturnType<typeof createParser>["opts"]>;

/** What to draw, from the flags; what was not given is left to the pipeline's defaults. */
export function drawingOptions(flags: CommonFlags): GenerateOptions {
  return {
    prompt: flags.prompt,
    seed: flags.seed,
    ...definedOnly({
      height: flags.height,
      width: flags.width,
      numInferenceSteps: flags.num_inference_steps,
      guidanceScale: flags.guidance_scale,
      maxSequenceLength: flags.max_sequence_length,
    }),
  };
}

/** Without the keys that are undefined, so that defaults apply. */
export function definedOnly<T extends object>(values: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as {
    [K in keyof T]?: Exclude<T[K], undefined>;
  };
}

/** Tells `note` each message once: several pictures give the same warnings. */
export function onlyOnce(note: (message: string) => void): (message: string) => void {
  const told = new Set<string>();
  return (message) => {
    if (told.has(message)) return;
    told.add(message);
    note(message);
  };
}

/** Ctrl-C while the file is written leaves no part of it behind; before that it ends the program at once. */
export async function writeInterruptibly(path: string, bytes: Uint8Array): Promise<void> {
  await interruptibly((signal) => writeFileAtomic(path, bytes, { signal }));
}

/**
 * Runs `write` with a signal that Ctrl-C aborts, so that it can leave nothing behind, or leave what is worth keeping.
 *
 * @param stopped what the user is told then.
 */
export async function interruptibly<T>(
  write: (signal: AbortSignal) => Promise<T>,
  stopped: () => string = () => "stopped; no file was written",
): Promise<T> {
  const controller = new AbortController();
  const stop = () => controller.abort(new UsageError(stopped()));
  Deno.addSignalListener("SIGINT", stop);
  try {
    return await write(controller.signal);
  } finally {
    Deno.removeSignalListener("SIGINT", stop);
  }
}

/**
 * Runs a program and returns its exit code: the one that it returns or 0, 2 for a wrong call, 1 for any other failure
 * that has a {@link FluxError}. Anything else is a bug and keeps its stack trace.
 */
export async function runProgram(name: string, program: () => Promise<number | void>): Promise<number> {
  try {
    return await program() ?? 0;
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2; // commander has printed already
    if (!(error instanceof FluxError)) throw error;
    console.error(`${name}: ${error.message}`);
    if (error.hint !== undefined) console.error(`  ${error.hint}`);
    return error.exitCode;
  }
}

/** Prints a result. Throws {@link FileError} when stdout takes no more (a full disk behind `> file`). */
export function printLine(text: string): void {
  try {
    const bytes = new TextEncoder().encode(`${text}\n`);
    for (let written = 0; written < bytes.length;) written += Deno.stdout.writeSync(bytes.subarray(written));
  } catch (cause) {
    if (cause instanceof Deno.errors.BrokenPipe) return; // the reader has left; the work is done
    throw new FileError(`the result cannot be printed: ${messageOf(cause)}`, {
      cause,
    });
  }
}

/** How bars look. A killed program must leave the terminal as it was: the cursor shown, long lines wrapped. */
const BAR_STYLE = {
  stream: process.stderr,
  barCompleteChar: "█",
  barIncompleteChar: "░",
  hideCursor: false,
  linewrap: true,
  barsize: 30,
};

/**
 * A progress bar in a notebook, below the cell that runs, or on stderr, or nothing where stderr is no terminal. `unit` stands
 * behind the numbers; those of "bytes" show as GB, with GB/s since the bar was made. There is one at a time.
 */
export class Progress {
  static #current: Progress | undefined;
  /** Counts what is measured while there is no bar. */
  static #tuning: SingleBar | undefined;
  readonly #bar: SingleBar | undefined;
  readonly #place = NotebookPlace.open();
  readonly #label: string;
  readonly #unit: string;
  #total: number;
  readonly #started = performance.now();
  #done = 0;
  #note = "";

  /** Shows an empty bar. @param total what {@link update} counts to. */
  constructor(label: string, total: number, unit: string) {
    [this.#label, this.#total, this.#unit] = [label, total, unit];
    if (this.#place !== undefined) {
      Progress.#current = this;
      this.update(0);
      return;
    }
    if (!Deno.stderr.isTerminal()) return;
    Progress.#tuning?.stop();
    Progress.#tuning = undefined;
    Progress.#current = this;
    const bytes = unit === "bytes";
    this.#bar = new SingleBar({
      ...BAR_STYLE,
      format: `${label} {bar} {value}/{total} ${bytes ? "GB  {rate} GB/s" : unit} {duration_formatted}{note}`,
      formatValue: (value: number, _options: unknown, type: string) =>
        bytes && (type === "value" || type === "total") ? gigabytes(value) : String(value),
    });
    this.#bar.start(total, 0, { rate: gigabytes(0), note: "" });
  }

  /** Tells that algorithms are being measured, and how many were: behind the bar, or on a line where there is none. */
  static tuning(count: number): void {
    const current = Progress.#current;
    if (current !== undefined) {
      current.#note = `  tuning: ${count} measured`;
      current.update(current.#done);
      return;
    }
    if (!Deno.stderr.isTerminal()) return;
    if (Progress.#tuning === undefined) {
      const format = "tuning: {value} products, convolutions and kernels measured {duration_formatted}";
      Progress.#tuning = new SingleBar({ ...BAR_STYLE, format });
      Progress.#tuning.start(0, 0);
    }
    Progress.#tuning.update(count);
  }

  /**
   * Shows how much is done.
   *
   * @param total where it was not known from the start. @param kept what was done before: the rate is without it.
   */
  update(done: number, total = this.#total, kept = 0): void {
    this.#done = done;
    if (total !== this.#total) this.#bar?.setTotal(total);
    this.#total = total;
    const seconds = (performance.now() - this.#started) / 1000;
    const rate = gigabytes((done - kept) / seconds);
    this.#bar?.update(done, { rate, note: this.#note });
    const count = this.#unit === "bytes"
      ? `${gigabytes(done)}/${gigabytes(total)} GB  ${rate} GB/s`
      : `${done}/${total} ${this.#unit}`;
    const note = `${count}  ${seconds.toFixed(1)} s${this.#note}`;
    this.#place?.show(progressContent(this.#label, done / total, note));
  }

  /** Ends the bar; it stays where it is. */
  stop(): void {
    this.#bar?.stop();
    if (Progress.#current === this) Progress.#current = undefined;
  }
}

/** Bytes as GB for messages. */
export function gigabytes(bytes: number): string {
  return (bytes / 1e9).toFixed(bytes < 1e9 ? 3 : 1);
}
