/**
 * The ladder as one table, and the flags that switch its rungs: flux-fast's, with its spelling and its defaults, which
 * are that every optimization is on. A recipe is registered by giving its row a `recipe`.
 *
 * Nothing that was asked for is dropped silently: rungs that a device does not run, or that build on one that a flag
 * switches off, are left out when no flag asks for them, and flags that cannot go together end in an error that names
 * both.
 */
import { Option } from "@commander-js/extra-typings";
import type { DeviceKind } from "../ffi/device.ts";
import { baselineFp32 } from "./00_baseline_fp32.ts";
import { bfloat16 } from "./01_bfloat16.ts";
import { compile } from "./02_compile.ts";
import { fuseQkv } from "./03_fuse_qkv.ts";
import { channelsLast } from "./04_channels_last.ts";
import { ATTENTION_PROVIDERS, type AttentionProvider, flashAttention } from "./05_flash_attention.ts";
import { float8 } from "./06_float8.ts";
import { tuning } from "./07_tuning.ts";
import { exporting } from "./08_export.ts";
import { firstBlockCache, type FirstBlockCacheOptions } from "./09_first_block_cache.ts";
import { float8TextEncoder, TEXT_ENCODER_FLOAT8, type TextEncoderFloat8 } from "./11_float8_text_encoder.ts";
import { offload } from "./12_offload.ts";
import { fusedBlocks } from "./13_fused_blocks.ts";
import { createParser, loraChoice, pngPath, userPath } from "./base/command_line.ts";
import { UsageError } from "./base/errors.ts";
import type { Recipe } from "./base/plan.ts";
import { cacheDitConfig } from "./cache_dit_config.ts";

/** The switches as commander parses them; undefined where the user said nothing. */
export interface Switches {
  /** `--disable_bf16`: float32 instead of bfloat16. */
  readonly disable_bf16?: true | undefined;
  /** `--compile_export_mode`. */
  readonly compile_export_mode?: CompileExportMode | undefined;
  /** `--disable_fused_projections`: without 03_fuse_qkv. */
  readonly disable_fused_projections?: true | undefined;
  /** `--disable_channels_last`: without 04_channels_last. */
  readonly disable_channels_last?: true | undefined;
  /** `--disable_fa3`: attention in bfloat16. */
  readonly disable_fa3?: true | undefined;
  /** `--disable_quant`: without 06_float8, and without 11_float8_text_encoder unless that is asked for. */
  readonly disable_quant?: true | undefined;
  /** `--disable_fused_blocks`: without 13_fused_blocks. */
  readonly disable_fused_blocks?: true | undefined;
  /** `--disable_inductor_tuning_flags`: without 07_tuning. */
  readonly disable_inductor_tuning_flags?: true | undefined;
  /** `--use-cached-model`: start from an exported model. */
  readonly useCachedModel?: true | undefined;
  /** `--cache_dit_config`: with 09_first_block_cache. */
  readonly cache_dit_config?: FirstBlockCacheOptions | undefined;
  /** `--offload`: with 12_offload. */
  readonly offload?: true | undefined;
  /** `--t5_float8`: how 11_float8_text_encoder quantizes, or that it does not. */
  readonly t5_float8?: TextEncoderFloat8 | "off" | undefined;
  /** `--attention`: who attends. */
  readonly attention?: AttentionProvider | undefined;
}

const COMPILE_EXPORT_MODES: readonly CompileExportMode[] = ["compile", "export_aoti", "disabled"];
/** `compile`: fused kernels and graphs; `export_aoti`: and the finished model is written; `disabled`: neither. */
export type CompileExportMode = "compile" | "export_aoti" | "disabled";

/** What a flag wants of a rung. */
export interface Wish {
  /** Whether it asks for the rung, or to be without it. */
  readonly on: boolean;
  /** The flag as it was typed. */
  readonly flag: string;
}

/** One rung of the ladder. */
export interface Rung {
  /** The recipe's file name without extension. */
  readonly name: string;
  /** Gives the recipe for the flags; undefined while it is not written, and its flags are refused. */
  readonly recipe: ((switches: Switches) => Recipe) | undefined;
  /** Where it is on without being asked for; empty for what has to be asked for. */
  readonly devices: readonly DeviceKind[];
  /** Names of earlier rungs that it builds on. */
  readonly needs?: readonly string[];
  /** The flag that belongs to it. */
  readonly flag: string;
  /** What to type to be without it. */
  readonly off: string;
  /** What the flags want of it. */
  readonly wishes: (switches: Switches) => readonly Wish[];
  /** It changes nothing in the drawing of a picture, so that there is nothing to measure. */
  readonly drawsTheSame?: true;
}

const ALL: readonly DeviceKind[] = ["cpu", "cuda", "hip"];
const GPUS: readonly DeviceKind[] = ["cuda", "hip"];

/** The ladder, in the order in which recipes are applied. */
export const LADDER: readonly Rung[] = [
  { name: "00_baseline_fp32", recipe: () => baselineFp32, devices: [], ...askedBy("disable_bf16") },
  { name: "01_bfloat16", recipe: () => bfloat16, devices: ALL, ...unless("disable_bf16") },
  { name: "02_compile", recipe: () => compile, devices: ALL, ...compileMode() },
  { name: "03_fuse_qkv", recipe: () => fuseQkv, devices: ALL, ...unless("disable_fused_projections") },
  { name: "04_channels_last", recipe: () => channelsLast, devices: GPUS, ...unless("disable_channels_last") },
  {
    name: "05_flash_attention",
    recipe: ({ attention, disable_fa3 }) => flashAttention(attention, disable_fa3 ? "bf16" : "f8e4m3"),
    devices: GPUS,
    needs: ["01_bfloat16"],
    ...attentionProvider(),
  },
  {
    name: "06_float8",
    recipe: () => float8(),
    devices: GPUS,
    needs: ["01_bfloat16"],
    ...unless("disable_quant"),
  },
  {
    name: "07_tuning",
    recipe: () => tuning,
    devices: ALL,
    needs: ["02_compile"],
    ...unless("disable_inductor_tuning_flags"),
  },
  {
    name: "08_export",
    recipe: () => exporting,
    devices: GPUS,
    needs: ["02_compile"],
    drawsTheSame: true,
    ...exportMode(),
  },
  {
    name: "09_first_block_cache",
    recipe: ({ cache_dit_config }) => firstBlockCache(cache_dit_config),
    devices: [],
    ...askedBy("cache_dit_config"),
  },
  {
    name: "11_float8_text_encoder",
    recipe: ({ t5_float8 }) => float8TextEncoder(t5_float8 === "off" ? undefined : t5_float8),
    devices: GPUS,
    needs: ["01_bfloat16"],
    ...textEncoderMode(),
  },
  { name: "12_offload", recipe: () => offload, devices: [], ...askedBy("offload") },
  {
    name: "13_fused_blocks",
    recipe: () => fusedBlocks,
    devices: ["cuda"],
    needs: ["01_bfloat16", "02_compile", "03_fuse_qkv"],
    ...unless("disable_fused_blocks"),
  },
];

type Behaviour = Pick<Rung, "flag" | "off" | "wishes">;

/** On unless `--name` is given. */
function unless(name: keyof Switches): Behaviour {
  const flag = `--${name}`;
  return { flag, off: flag, wishes: (given) => given[name] === undefined ? [] : [{ on: false, flag }] };
}

/** On only where `--name` is given. */
function askedBy(name: keyof Switches): Behaviour {
  const flag = `--${name}`;
  return {
    flag,
    off: `no ${flag}`,
    wishes: (given) => given[name] === undefined ? [] : [{ on: true, flag }],
  };
}

/** 05_flash_attention: asked for by naming a provider, in bfloat16 where float8 is disabled; else on unless that is so. */
function attentionProvider(): Behaviour {
  const { flag, off, wishes } = unless("disable_fa3");
  return {
    flag,
    off,
    wishes: (given) =>
      given.attention === undefined || given.attention === "auto"
        ? wishes(given)
        : [{ on: true, flag: `--attention ${given.attention}` }],
  };
}

/** 02_compile: an exported model is a compiled one, too. */
function compileMode(): Behaviour {
  return {
    flag: "--compile_export_mode",
    off: "--compile_export_mode disabled",
    wishes: ({ compile_export_mode: mode }) =>
      mode === undefined ? [] : [{ on: mode !== "disabled", flag: `--compile_export_mode ${mode}` }],
  };
}

/** 11_float8_text_encoder: as its flag says, else on and off with 06_float8. */
function textEncoderMode(): Behaviour {
  return {
    flag: "--t5_float8",
    off: "--t5_float8 off",
    wishes: ({ t5_float8: mode, disable_quant }) => {
      if (mode !== undefined) return [{ on: mode !== "off", flag: `--t5_float8 ${mode}` }];
      return disable_quant === undefined ? [] : [{ on: false, flag: "--disable_quant" }];
    },
  };
}

function exportMode(): Behaviour {
  return {
    flag: "--use-cached-model",
    off: "--compile_export_mode compile",
    wishes: ({ compile_export_mode: mode, useCachedModel }) => [
      ...(mode === undefined ? [] : [{ on: mode === "export_aoti", flag: `--compile_export_mode ${mode}` }]),
      ...(useCachedModel === undefined ? [] : [{ on: true, flag: "--use-cached-model" }]),
    ],
  };
}

/**
 * The recipes to compose for the given flags, in order.
 *
 * @throws UsageError for a flag whose recipe is not written yet, for one that asks for what the device does not run,
 * and for flags that clash, with all that clashes and what to type instead.
 */
export function recipesFor(
  switches: Switches,
  kind: DeviceKind,
  ladder: readonly Rung[] = LADDER,
): Recipe[] {
  refuseUnwritten(switches, ladder);
  const chosen = new Map<string, Recipe>();
  const clashes: Clash[] = [];
  for (const rung of ladder) {
    const wishes = rung.wishes(switches);
    const asked = wishes.find(({ on }) => on);
    const refused = wishes.find(({ on }) => !on);
    if (asked !== undefined && refused !== undefined) {
      clashes.push({ between: [refused.flag, asked.flag], instead: [`leave ${asked.flag} out`] });
    }
    if (rung.recipe === undefined || refused !== undefined) continue;
    if (asked === undefined && !rung.devices.includes(kind)) continue;
    const recipe = rung.recipe(switches);
    if (!recipe.devices.includes(kind)) {
      if (asked === undefined) continue;
      throw new UsageError(
        `${asked.flag} asks for recipe ${recipe.name}, which runs on ${
          recipe.devices.join(" and ")
        }, not on ${kind}`,
        {
          hint: `use --device ${recipe.devices[0]}${
            asked.flag.startsWith("--") ? `, or leave ${asked.flag} out` : ""
          }`,
        },
      );
    }
    const missing = (rung.needs ?? []).filter((name) => !chosen.has(name));
    if (missing.length === 0) {
      chosen.set(rung.name, recipe);
      continue;
    }
    // What nobody asked for is left out with what it builds on.
    if (asked === undefined) continue;
    const culprit = ladder.filter(({ name }) => missing.includes(name))
      .flatMap((needed) => needed.wishes(switches)).find(({ on }) => !on);
    if (culprit === undefined) {
      throw new UsageError(
        `${asked.flag} needs recipe ${missing.join(", ")}, which does not run on ${kind}`,
      );
    }
    clashes.push({ between: [culprit.flag, asked.flag], instead: ["leave one of them out"] });
  }
  if (clashes.length > 0) throw clashError(clashes);
  return [...chosen.values()];
}

/**
 * The ladder as a recipe's file runs it: up to its rung, which is asked for by running the file. What a flag asks for beyond
 * it is refused.
 */
export function ladderTo(name: string, ladder: readonly Rung[] = LADDER): Rung[] {
  const last = ladder.findIndex((rung) => rung.name === name);
  const flag = `recipes/${name}.ts`;
  return ladder.map((rung, i) => {
    if (i < last) return rung;
    if (i === last) return { ...rung, wishes: (given) => [...rung.wishes(given), { on: true, flag }] };
    const wishes = (given: Switches) => {
      const all = rung.wishes(given);
      return all.some(({ on }) => on) ? [...all, { on: false, flag }] : all;
    };
    return { ...rung, devices: [], wishes };
  });
}

interface Clash {
  readonly between: readonly [string, string];
  readonly instead: readonly string[];
}

function clashError(clashes: readonly Clash[]): UsageError {
  const message = clashes.map(({ between: [first, second] }) => `${first} clashes with ${second}`).join("; ");
  return new UsageError(message, {
    hint: [...new Set(clashes.map(({ instead }) => instead.join(", or ")))].join("; "),
  });
}

function refuseUnwritten(switches: Switches, ladder: readonly Rung[]): void {
  for (const { name, recipe, flag: own, wishes } of ladder) {
    if (recipe !== undefined) continue;
    // "compile" is a wish for no export, and can be had without the recipe that exports.
    const wish = wishes(switches).find(({ on, flag }) => on || flag.split(" ")[0] === own);
    if (wish === undefined) continue;
    throw new UsageError(`${wish.flag} is not available yet: it comes with recipe ${name}`);
  }
}

/**
 * The recipes of these names, in the ladder's order.
 *
 * @throws UsageError for a name that no written recipe has, for one that the device does not run, and where one is missing
 * that another builds on.
 */
export function recipesNamed(names: readonly string[], kind: DeviceKind): Recipe[] {
  for (const name of names) {
    const rung = LADDER.find((rung) => rung.name === name);
    const recipe = rung?.recipe?.({});
    if (rung === undefined || recipe === undefined) throw new UsageError(`there is no recipe ${name}`);
    if (!recipe.devices.includes(kind)) throw new UsageError(`recipe ${name} does not run on ${kind}`);
    const missing = (rung.needs ?? []).filter((needed) => !names.includes(needed));
    if (missing.length > 0) throw new UsageError(`recipe ${name} needs ${missing.join(" and ")}`);
  }
  return writtenRecipes().filter(({ name }) => names.includes(name));
}

/** The recipes that are written, in the ladder's order. */
export function writtenRecipes(ladder: readonly Rung[] = LADDER): Recipe[] {
  return ladder.flatMap(({ recipe }) => recipe === undefined ? [] : [recipe({})]);
}

/**
 * The recipes of each measured rung: the baseline, then one more recipe at a time, of those that are written and run on
 * the device. What has to be asked for is no part of it, nor what changes nothing in the drawing.
 */
export function cumulativeRungs(kind: DeviceKind, ladder: readonly Rung[] = LADDER): Recipe[][] {
  const [baseline, ...others] = ladder;
  const rungs = [[baseline.recipe!({})]];
  let current: readonly Recipe[] = [];
  for (const { recipe, devices, needs = [], drawsTheSame } of others) {
    if (recipe === undefined || devices.length === 0 || drawsTheSame) continue;
    const next = recipe({});
    const standing = needs.every((name) => current.some((below) => below.name === name));
    if (!next.devices.includes(kind) || !standing) continue;
    current = [...current, next];
    rungs.push([...current]);
  }
  return rungs;
}

/** The kind of a device by its name, before it is opened. */
export function kindOf(device: string): DeviceKind {
  return device.split(":")[0] as DeviceKind;
}

/** The flags of programs that draw one picture: the common ones, those of the picture, and the ladder's switches. */
export function createPictureParser(name: string, description: string) {
  const mode = new Option(
    "--compile_export_mode <mode>",
    "compile: fused kernels and graphs; export_aoti (default on GPUs): and the finished model is written into " +
      "--cache-dir after the picture, by default the first time only; disabled: neither",
  ).choices(COMPILE_EXPORT_MODES);
  return createParser(name, description)
    .option(
      "--lora <file[:scale]>",
      "a LoRA to merge into the weights, in diffusers', PEFT's, Kohya's or BFL's naming; again for several",
      loraChoice,
    )
    .option("--output-file <file>", "the PNG to write", pngPath, userPath("output.png"))
    .option("--disable_bf16", "compute in float32 instead of bfloat16")
    .addOption(mode.hideHelp(!written("--compile_export_mode")))
    .addOption(toggle("--disable_fused_projections", "one projection each for query, key and value"))
    .addOption(toggle("--disable_channels_last", "the autoencoder in NCHW instead of channels-last"))
    .addOption(toggle("--disable_fa3", "attention in bfloat16 instead of float8, whoever attends"))
    .addOption(
      new Option(
        "--attention <provider>",
        "who attends: own, our kernel for Hopper and for AMD; fa3, FlashAttention-3, or aiter, AMD's AITER, as installed; " +
          "cudnn, in bfloat16; auto, own on Hopper and aiter on AMD where they run",
      )
        .choices(ATTENTION_PROVIDERS),
    )
    .addOption(toggle("--disable_quant", "Linear layers in bfloat16 instead of float8, in T5 too"))
    .addOption(
      toggle("--disable_fused_blocks", "what comes behind the transformer's products in kernels of its own"),
    )
    .addOption(toggle("--disable_inductor_tuning_flags", "libraries' own choices instead of measured ones"))
    .addOption(
      toggle(
        "--use-cached-model",
        "start from what export_aoti has written with the same flags, without compiling, tuning or quantizing; " +
          "where nothing there fits, say why, build the model and write it",
      ),
    )
    .addOption(
      new Option(
        "--cache_dit_config <x>",
        "reuse the blocks' result in steps where the first block hardly changes (dev and Kontext): the threshold, " +
          "e.g. 0.08, or a file with it as cache-dit has them",
      ).argParser(cacheDitConfig),
    )
    .addOption(
      new Option(
        "--t5_float8 <what>",
        "T5 in float8: dynamic (default on GPUs), multiplied in float8; weights, multiplied in bfloat16: less memory, more " +
          "time; off, in bfloat16",
      ).choices([...TEXT_ENCODER_FLOAT8, "off"]),
    )
    .addOption(
      new Option(
        "--offload",
        "the text encoders are on the GPU only while they encode, and the model is loaded in pieces: for GPUs of 24 GB",
      ),
    );
}

/** An option that the help shows as soon as its recipe is written. */
function toggle<const Flags extends string>(flags: Flags, description: string): Option<Flags> {
  return new Option(flags, description).hideHelp(!written(flags.split(" ")[0]));
}

function written(flag: string): boolean {
  return LADDER.some((rung) => rung.flag === flag && rung.recipe !== undefined);
}
