/**
 * Our FLUX.1 beside diffusers' at full size: errors, times, memory. Reads what make_reference.py has written.
 *
 *     deno run -A tests/gpu/full_size/compare.ts --reference /dev/shm/flux --device cuda --json compare.json
 *
 * Prints a table, and ends with exit code 1 when a bar is missed. The bars of the times hold for NVIDIA GPUs, beside
 * diffusers' times on the same machine.
 */
import { Command } from "@commander-js/extra-typings";
import { join } from "node:path";
import type { Device } from "../../../ffi/device.ts";
import { isGpu } from "../../../ffi/gpu.ts";
import { openDevice } from "../../../ffi/open.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { baselineFp32 } from "../../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../../recipes/01_bfloat16.ts";
import { channelsLast } from "../../../recipes/04_channels_last.ts";
import { wholeNumber } from "../../../recipes/base/command_line.ts";
import { packLatents, positionIds } from "../../../recipes/base/latents.ts";
import { Model } from "../../../recipes/base/model.ts";
import { fluxModulations } from "../../../recipes/base/modulations.ts";
import { FluxPipeline } from "../../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../../recipes/base/plan.ts";
import { psnr } from "../../../recipes/base/psnr.ts";
import { rotaryEmbedding } from "../../../recipes/base/rotary.ts";
import { SafetensorsFile } from "../../../recipes/base/safetensors.ts";
import { fluxTransformer } from "../../../recipes/base/transformer.ts";
import { relativeError } from "../../support/compare.ts";
import { valuesOf } from "../../support/golden.ts";

/** reference.json, as make_reference.py writes it. */
interface Settings {
  readonly prompt: string;
  readonly seed: number;
  readonly height: number;
  readonly width: number;
  readonly steps: number;
  readonly tokens: number;
  readonly guidance: number;
  readonly milliseconds: Readonly<Record<TimedPart, number>>;
}

type TimedPart = "text" | "step" | "decode";

const COMPONENTS = ["clip", "t5", "step", "decode"] as const;
const DTYPES = { f32: baselineFp32, bf16: bfloat16 } as const;

/** Relative error of a component in float32. */
const F32_LIMIT = 1e-4;
/** Our bfloat16 error may be this much of diffusers' own, both against diffusers' float32. */
const BF16_FACTOR = 1.1;
/** Our picture in bfloat16 may be so much farther from the float32 picture than diffusers' own, in dB. */
const PSNR_SLACK = 0.5;
/** Seconds. */
const LOAD_LIMIT = 5;
const FILL_LIMIT = 2;
/** Milliseconds for T5 and CLIP; steps and decoding take no longer than diffusers'. */
const TEXT_LIMIT = 15;

/** Milliseconds of warm-up before a part is timed. */
const WARM_UP = 300;

/** One line of the result: a number beside its bar, and whether it holds. A NaN does not hold. */
interface Line {
  readonly what: string;
  readonly value: number;
  readonly unit: string;
  readonly bar: string;
  readonly holds: boolean;
}

const flags = new Command("compare")
  .requiredOption("--reference <folder>", "what make_reference.py has written")
  .option("--device <name>", "as for generate", "cuda")
  .option("--runs <n>", "timed runs of each part", wholeNumber(1, 1000), 10)
  .option("--json <file>", "where the lines go as JSON too")
  .option("--untimed", "leave out the bars of times: for a machine or a size that they are not for")
  .parse(Deno.args, { from: "user" })
  .opts();

const settings: Settings = JSON.parse(Deno.readTextFileSync(join(flags.reference, "reference.json")));
using reference = SafetensorsFile.open(join(flags.reference, "reference.safetensors"));
const folder = join(flags.reference, "model");
using device = await openDevice(flags.device, { onWarning: console.error });
const { description, providers } = device.properties();
console.log(`${device.name}: ${description}`);
for (const [what, provider] of Object.entries(providers)) console.log(`  ${what}: ${provider}`);

const lines: Line[] = [];
const numbers: Record<string, number> = {};
for (const dtype of ["bf16", "f32"] as const) await compareIn(dtype);
await timeRandomWeights();

for (const [what, value] of Object.entries(numbers)) {
  console.log(`     ${what.padEnd(34)} ${value.toPrecision(4)}`);
}
if (flags.json !== undefined) {
  const report = { device: description, providers, settings, lines, numbers };
  Deno.writeTextFileSync(flags.json, `${JSON.stringify(report, null, 1)}\n`);
}
Deno.exitCode = lines.every(({ holds }) => holds) ? 0 : 1;

/** Loads the model, computes every part in one dtype, and notes errors, times and memory. */
async function compareIn(dtype: keyof typeof DTYPES): Promise<void> {
  const { prompt, tokens, height, width, seed, steps, guidance } = settings;
  const [rows, columns] = [height / 16, width / 16];
  const started = performance.now();
  let bytes = 0;
  using model = await Model.load(folder, device, {
    onProgress: ({ totalBytes }) => bytes = totalBytes,
    onWarning: console.error,
  });
  const seconds = (performance.now() - started) / 1000;
  console.log(`loaded ${(bytes / 1e9).toFixed(2)} GB in ${seconds.toFixed(2)} s`);
  numbers[`${dtype}: loading, GB/s`] = bytes / 1e9 / seconds;
  if (dtype === "bf16") timeLine("loading", seconds, "s", LOAD_LIMIT);

  const plan = compose(eagerPlan(device, model.weights), DTYPES[dtype]);
  const pipeline = new FluxPipeline(model, plan);
  const { configs } = model;
  using inputs = new DisposableStack();
  const input = (name: string) => {
    const { shape } = reference.info(name);
    const tensor = Tensor.fromBytes(device, reference.bytes(name), shape, "f32");
    inputs.defer(() => tensor.dispose());
    return tensor;
  };
  const rotary = rotaryEmbedding(
    device,
    positionIds(tokens, [{ rows, columns }]),
    configs.transformer.axes_dims_rope,
  );
  const given = {
    hiddenStates: input("step.hidden_states"),
    encoderHiddenStates: input("step.encoder_hidden_states"),
    rotary,
  };
  const conditioning = {
    pooledProjections: input("step.pooled_projections"),
    timestep: Tensor.fromFloat32(device, [1], [1]),
    guidance: configs.transformer.guidance_embeds ? Tensor.fromFloat32(device, [guidance], [1]) : undefined,
  };
  const unpacked = input("decode.latents");
  const latents = device.scope(() => packLatents(plan.ops, unpacked));
  inputs.defer(() => latents.dispose());

  const run: Record<(typeof COMPONENTS)[number], () => Tensor> = {
    clip: () => pipeline.encodeClip([prompt], 1),
    t5: () => pipeline.encodeT5([prompt], 1, tokens),
    // With its modulations, which diffusers computes in each step, and we for several steps at once.
    step: () =>
      plan.execute(plan, "step", [], () => {
        const { configs: { transformer: config } } = model;
        const { ops, weights: { transformer: weights } } = plan;
        const modulations = fluxModulations(config, weights, ops, conditioning);
        return fluxTransformer(config, weights, ops, { ...given, modulations });
      }),
    decode: () => pipeline.decodeLatents(latents, height / 8, width / 8),
  };
  const errorOf = async (component: (typeof COMPONENTS)[number], out: Tensor) => {
    const error = relativeError(await valuesOf(out), values(`${component}.f32`));
    out.dispose();
    return error;
  };
  const compareInBf16 = async (what: string, component: (typeof COMPONENTS)[number], out: Tensor) => {
    const error = await errorOf(component, out);
    const theirs = relativeError(values(`${component}.bf16`), values(`${component}.f32`));
    numbers[`bf16: error of ${what}`] = error;
    numbers[`bf16: diffusers' error of ${component}`] = theirs;
    const ratio = error / theirs;
    const bar = `at most ${BF16_FACTOR} of diffusers'`;
    line(`bf16: error of ${what}`, ratio, "x", bar, ratio <= BF16_FACTOR);
  };
  for (const component of COMPONENTS) {
    const out = run[component]();
    if (dtype === "bf16") await compareInBf16(component, component, out);
    else {
      const error = await errorOf(component, out);
      line(`f32: error of ${component}`, error, "", `at most ${F32_LIMIT}`, error <= F32_LIMIT);
    }
  }

  const text = await median(() => {
    run.clip().dispose();
    run.t5().dispose();
  });
  const step = await median(() => run.step().dispose());
  const decode = await median(() => run.decode().dispose());
  if (dtype === "bf16") {
    timeLine("bf16: text encoders", text, "ms", TEXT_LIMIT, settings.milliseconds.text);
    timeLine("bf16: a step", step, "ms", settings.milliseconds.step, settings.milliseconds.step);
    timeLine("bf16: decoding", decode, "ms", settings.milliseconds.decode, settings.milliseconds.decode);
  } else {
    Object.assign(numbers, {
      "f32: text encoders, ms": text,
      "f32: a step, ms": step,
      "f32: decoding, ms": decode,
    });
  }

  const { images: [picture], milliseconds } = await pipeline.generate({
    prompt,
    seed,
    height,
    width,
    numInferenceSteps: steps,
    guidanceScale: guidance,
    maxSequenceLength: tokens,
  });
  numbers[`${dtype}: whole picture, ms`] = milliseconds.text + milliseconds.decode +
    milliseconds.steps.reduce((sum, ms) => sum + ms, 0);
  const wide = pixels("image.f32");
  const ours = psnr(picture.rgb, wide);
  if (dtype === "bf16") {
    const theirs = psnr(pixels("image.bf16"), wide);
    const bar = `at least ${theirs.toFixed(2)} - ${PSNR_SLACK}, diffusers'`;
    line("bf16: picture against f32's", ours, "dB", bar, ours >= theirs - PSNR_SLACK);
  } else {
    numbers["f32: picture against diffusers', dB"] = ours;
  }
  const use = device.memoryUse();
  numbers[`${dtype}: weights, GB`] = use.weights / 1e9;
  numbers[`${dtype}: peak of activations, GB`] = use.peak / 1e9;
  numbers[`${dtype}: reserved, GB`] = use.reserved / 1e9;

  if (dtype === "bf16" && isGpu(device)) {
    // Behind all else, since the recipe takes the autoencoder's weights over.
    const changed = new FluxPipeline(model, compose(plan, channelsLast));
    const out = changed.decodeLatents(latents, height / 8, width / 8);
    await compareInBf16(`decode, ${channelsLast.name}`, "decode", out);
  }

  for (const tensor of [conditioning.timestep, conditioning.guidance, rotary.cos, rotary.sin]) {
    tensor?.dispose();
  }
  // Those in the checkpoint's dtype are the model's. Others would stay until they are collected, and there is no room.
  if (dtype !== "bf16") {
    for (const weights of Object.values(plan.weights)) weights.names.forEach((name) => weights.free(name));
  }
}

async function timeRandomWeights(): Promise<void> {
  const started = performance.now();
  using model = await Model.random(folder, device, "bf16");
  model.checkOpen();
  timeLine("random weights", (performance.now() - started) / 1000, "s", FILL_LIMIT);
}

/**
 * Median milliseconds of `body` after warm-up: between events of the GPU, else on the clock. Three runs warm up, or more
 * where they are so short that V8 has not compiled the code of the host by then.
 */
async function median(body: () => void): Promise<number> {
  const until = performance.now() + WARM_UP;
  for (let i = 0; i < 3 || performance.now() < until; i++) {
    body();
    await device.synchronize();
  }
  const times: number[] = [];
  for (let i = 0; i < flags.runs; i++) times.push(await timeOf(device, body));
  return times.sort((a, b) => a - b)[times.length >> 1];
}

async function timeOf(device: Device, body: () => void): Promise<number> {
  if (isGpu(device)) {
    using start = device.event();
    body();
    using end = device.event();
    return end.since(start);
  }
  const start = performance.now();
  body();
  await device.synchronize();
  return performance.now() - start;
}

function line(what: string, value: number, unit: string, bar: string, holds: boolean): void {
  lines.push({ what, value, unit, bar, holds });
  const number = Math.abs(value) < 0.1 ? value.toExponential(2) : value.toFixed(2);
  console.log(`${holds ? "ok  " : "MISS"} ${what.padEnd(34)} ${`${number} ${unit}`.padEnd(14)} ${bar}`);
}

function timeLine(what: string, value: number, unit: string, limit: number, diffusers?: number): void {
  const theirs = diffusers === undefined ? "" : `; diffusers took ${diffusers.toFixed(1)}`;
  const bar = flags.untimed ? `no bar here${theirs}` : `at most ${limit.toFixed(1)}${theirs}`;
  line(what, value, unit, bar, flags.untimed === true || value <= limit);
}

function values(name: string): Float32Array {
  return new Float32Array(reference.bytes(name).slice().buffer);
}

/** A picture `[1, 3, height, width]` of about -1..1 as 8-bit RGB, as diffusers' image processor rounds it. */
function pixels(name: string): Uint8Array {
  const planes = values(name);
  const count = planes.length / 3;
  return Uint8Array.from(
    planes,
    (_, i) => Math.round(255 * Math.min(1, Math.max(0, planes[i % 3 * count + Math.floor(i / 3)] / 2 + 0.5))),
  );
}
