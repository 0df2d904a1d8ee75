/**
 * Where the time goes: each operator's share of the text encoders, of a step and of decoding, with random weights.
 *
 *     deno run -A tests/gpu/full_size/profile.ts --configs FLUX.1-schnell --device cuda --rungs 2 --json profile.json
 *
 * An event stands before and after each operator, which then run eagerly. "alone" is the part's time without them and as
 * the recipes run it, "issued" what the host needs to issue it: where the two are close, the GPU waits for the host.
 */
import { Command } from "@commander-js/extra-typings";
import { FfiError } from "../../../ffi/errors.ts";
import { type GpuDevice, type GpuEvent, isGpu } from "../../../ffi/gpu.ts";
import { openDevice } from "../../../ffi/open.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { fillRandom } from "../../../kernels/random_fill.ts";
import { defaultCacheDir, wholeNumber } from "../../../recipes/base/command_line.ts";
import { positionIds } from "../../../recipes/base/latents.ts";
import { Model } from "../../../recipes/base/model.ts";
import { type Conditioning, fluxModulations } from "../../../recipes/base/modulations.ts";
import type { Ops } from "../../../recipes/base/ops.ts";
import { FluxPipeline } from "../../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../../recipes/base/plan.ts";
import { rotaryEmbedding } from "../../../recipes/base/rotary.ts";
import { fluxTransformer } from "../../../recipes/base/transformer.ts";
import { cumulativeRungs } from "../../../recipes/switches.ts";

const PROMPT = "A cat playing with a ball of yarn";
/** Lines of each part's table: all but the shortest of the decoder's. */
const MOST_LINES = 32;

const flags = new Command("profile")
  .requiredOption("--configs <folder>", "configs and tokenizers in diffusers' layout")
  .option("--device <name>", "as for generate", "cuda")
  .option("--side <pixels>", "height and width", wholeNumber(64, 2048), 1024)
  .option("--tokens <n>", "T5 tokens", wholeNumber(1, 512), 256)
  .option("--steps <n>", "of a picture, whose modulations are computed together", wholeNumber(1, 32), 4)
  .option(
    "--rungs <n>",
    "how many of the ladder's recipes follow 01_bfloat16",
    wholeNumber(0, 100),
    0,
  )
  .option("--runs <n>", "timed runs of each part", wholeNumber(1, 1000), 10)
  .option("--json <file>", "where all lines go as JSON")
  .parse(Deno.args, { from: "user" })
  .opts();

/** An operator at one shape: how often it was called, and its milliseconds. */
interface Line {
  readonly what: string;
  calls: number;
  milliseconds: number;
}

/** What is called while an operator is timed. */
interface Timed {
  readonly what: string;
  readonly start: GpuEvent;
  readonly end: GpuEvent;
  /** The operators that it called. */
  readonly inner: readonly Timed[];
}

const cacheDir = defaultCacheDir();
using opened = await openDevice(flags.device, {
  onWarning: console.error,
  ...(cacheDir === undefined ? {} : { cacheDir }),
});
if (!isGpu(opened)) throw new FfiError(`${opened.name} is no GPU`);
const device: GpuDevice = opened;
using model = await Model.random(flags.configs, device, "bf16");
const eager = eagerPlan(device, model.weights);
// The ladder starts with the baseline, then 01_bfloat16.
const rungs = cumulativeRungs(device.kind).slice(1);
const plain = compose(eager, ...rungs[Math.min(flags.rungs, rungs.length - 1)]);
console.log(plain.recipes.join(", "));
const timed: Timed[] = [];
/** What the operator that runs has called so far. */
let inner: Timed[] = [];
const watched = { ...plain, ops: watch(plain.ops), execute: eager.execute };

const [rows, columns] = [flags.side / 16, flags.side / 16];
const { transformer: config } = model.configs;
const hiddenStates = random(1, rows * columns, config.in_channels);
const steps = conditioning(flags.steps);
const given = {
  hiddenStates,
  encoderHiddenStates: random(1, flags.tokens, config.joint_attention_dim),
  modulations: fluxModulations(config, plain.weights.transformer, plain.ops, conditioning(1)),
  rotary: rotaryEmbedding(device, positionIds(flags.tokens, [{ rows, columns }]), config.axes_dims_rope),
};

const parts = {
  clip: (plan: typeof plain) => new FluxPipeline(model, plan).encodeClip([PROMPT], 1),
  t5: (plan: typeof plain) => new FluxPipeline(model, plan).encodeT5([PROMPT], 1, flags.tokens),
  modulations: (plan: typeof plain) =>
    plan.execute(
      plan,
      "modulations",
      [],
      () => fluxModulations(config, plan.weights.transformer, plan.ops, steps),
    ),
  // Nothing of this changes from run to run, so that none of it has to be an input.
  step: (plan: typeof plain) =>
    plan.execute(plan, "step", [], () => fluxTransformer(config, plan.weights.transformer, plan.ops, given)),
  decode: (plan: typeof plain) =>
    new FluxPipeline(model, plan).decodeLatents(hiddenStates, flags.side / 8, flags.side / 8),
};
const report: Record<string, unknown> = { device: device.properties().description };
for (const [part, run] of Object.entries(parts)) {
  for (let i = 0; i < 3; i++) run(plain).dispose();
  await device.synchronize();
  const alone: number[] = [];
  const issued: number[] = [];
  for (let i = 0; i < flags.runs; i++) {
    await device.synchronize();
    using start = device.event();
    const from = performance.now();
    run(plain).dispose();
    issued.push(performance.now() - from);
    using end = device.event();
    alone.push(end.since(start));
  }
  run(watched).dispose();
  const lines = collect().sort((a, b) => b.milliseconds - a.milliseconds);
  const sum = lines.reduce((total, { milliseconds }) => total + milliseconds, 0);
  console.log(
    `${part}: ${median(alone).toFixed(2)} ms alone, issued in ${median(issued).toFixed(2)} ms; ${
      lines.reduce((total, { calls }) => total + calls, 0)
    } operators, ${sum.toFixed(2)} ms one by one`,
  );
  for (const { what, calls, milliseconds } of lines.slice(0, MOST_LINES)) {
    const each = (1000 * milliseconds / calls).toFixed(1);
    console.log(
      `  ${milliseconds.toFixed(2).padStart(7)} ms ${String(calls).padStart(4)} x ${each} us  ${what}`,
    );
  }
  report[part] = { alone: median(alone), issued: median(issued), lines };
}
if (flags.json !== undefined) Deno.writeTextFileSync(flags.json, `${JSON.stringify(report, null, 1)}\n`);

/** The table with an event before and after each call. */
function watch(ops: Ops): Ops {
  return Object.fromEntries(
    Object.entries(ops).map(([name, run]) => [name, (...args: unknown[]) => {
      const shapes = args.flat().filter((arg) => arg instanceof Tensor).map(({ shape }) => `[${shape}]`);
      const around = inner;
      const own: Timed[] = inner = [];
      const start = device.event();
      const result = (run as (...args: unknown[]) => unknown)(...args);
      const one = { what: `${name} ${shapes.join(" ")}`, start, end: device.event(), inner: own };
      inner = around;
      for (const list of [inner, timed]) list.push(one);
      return result;
    }]),
  ) as unknown as Ops;
}

/** The timed operators by name and shape, without what they called of the table; their events go. */
function collect(): Line[] {
  const lines = new Map<string, Line>();
  const all = timed.splice(0);
  inner = [];
  for (const { what, start, end, inner } of all) {
    let line = lines.get(what);
    if (line === undefined) lines.set(what, line = { what, calls: 0, milliseconds: 0 });
    line.calls++;
    line.milliseconds += end.since(start) - inner.reduce((sum, one) => sum + one.end.since(one.start), 0);
  }
  for (const { start, end } of all) for (const event of [start, end]) event[Symbol.dispose]();
  return [...lines.values()];
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1];
}

/** What modulates as many steps. */
function conditioning(rows: number): Conditioning {
  const filled = (value: number) => Tensor.fromFloat32(device, new Float32Array(rows).fill(value), [rows]);
  return {
    pooledProjections: random(rows, config.pooled_projection_dim),
    timestep: filled(1),
    guidance: config.guidance_embeds ? filled(3.5) : undefined,
  };
}

function random(...shape: number[]): Tensor {
  const tensor = Tensor.empty(device, shape, "bf16");
  fillRandom(tensor, { seed: 1, stream: 0, kind: "normal", scale: 1, shift: 0 });
  return tensor;
}
