/**
 * Draws one picture: `deno task generate --prompt "..."`. The flags are flux-fast's.
 */
import { checkWritable, writeFileAtomic } from "../ffi/files.ts";
import { openDevice } from "../ffi/open.ts";
import { baselineFp32 } from "./00_baseline_fp32.ts";
import { bfloat16 } from "./01_bfloat16.ts";
import {
  createParser,
  EMBEDDED_MODEL,
  gigabytes,
  printLine,
  Progress,
  refuseLaterFlags,
  runProgram,
} from "./base/command_line.ts";
import { UsageError } from "./base/errors.ts";
import { encodePng, parametersText } from "./base/image.ts";
import { Model } from "./base/model.ts";
import { FluxPipeline } from "./base/pipeline.ts";
import { compose, eagerPlan } from "./base/plan.ts";

const EXAMPLES = `
Examples:
  deno task generate --prompt "A cat playing with a ball of yarn"
  deno task generate --prompt "three red apples on a blue background" --seed 7 --output-file apples.png
  deno task generate --ckpt ~/models/FLUX.1-schnell --height 512 --width 768 --prompt "a lighthouse at night"
  deno task generate --disable_bf16 --json --verbose
  deno task generate --ckpt ~/models/FLUX.1-schnell-configs --random-weights --device cuda --verbose
`;

const NAME = "gen_image";

async function generateImage(args: string[]): Promise<void> {
  refuseLaterFlags(args);
  const flags = createParser(NAME, "Draws a picture from a prompt with FLUX.1.")
    .addHelpText("after", EXAMPLES)
    .allowExcessArguments(false)
    .parse(args, { from: "user" })
    .opts();
  if (flags.image !== undefined) {
    throw new UsageError(
      "--image is for FLUX.1-Kontext checkpoints, which this version does not edit with yet",
    );
  }
  const output = flags.outputFile;
  await checkWritable(output); // before minutes of work, not after
  const started = performance.now();
  const note = (message: string) => console.error(`${NAME}: ${message}`);

  using device = await openDevice(flags.device, {
    ...definedOnly({ cacheDir: flags.cacheDir }),
    onWarning: note,
  });
  const loadStart = performance.now();
  const folder = flags.ckpt ?? EMBEDDED_MODEL;
  let loading: Progress | undefined;
  using model = flags.randomWeights
    ? await Model.random(folder, device, flags.disable_bf16 ? "f32" : "bf16")
    : await Model.load(folder, device, {
      onProgress: ({ loadedBytes, totalBytes }) => {
        loading ??= new Progress("loading", totalBytes, "bytes");
        loading.update(loadedBytes);
      },
      onWarning: note,
    }).finally(() => loading?.stop());
  const load = performance.now() - loadStart;
  const plan = compose(eagerPlan(device, model.weights), flags.disable_bf16 ? baselineFp32 : bfloat16);
  if (flags.verbose) {
    const { description, providers } = device.properties();
    note(`${model.name} on ${device.name} (${description}), ${plan.recipes.join(", ")}`);
    for (const [what, provider] of Object.entries(providers)) note(`${what}: ${provider}`);
  }

  let bar: Progress | undefined;
  const { images: [picture], settings, milliseconds } = await new FluxPipeline(model, plan).generate({
    prompt: flags.prompt,
    seed: flags.seed,
    ...definedOnly({
      height: flags.height,
      width: flags.width,
      numInferenceSteps: flags.num_inference_steps,
      guidanceScale: flags.guidance_scale,
      maxSequenceLength: flags.max_sequence_length,
    }),
    onWarning: note,
    onProgress: ({ step, steps }) => {
      bar ??= new Progress("denoising", steps, "steps");
      bar.update(step);
    },
  }).finally(() => bar?.stop());

  const parameters = parametersText({
    prompt: flags.prompt,
    steps: settings.numInferenceSteps,
    seed: settings.seed,
    width: settings.width,
    height: settings.height,
    model: model.name,
    ...(model.configs.transformer.guidance_embeds ? { guidance: settings.guidanceScale } : {}),
    extra: { Recipes: plan.recipes.join(" "), Software: "flux-recipes" },
  });
  const png = await encodePng(picture.rgb, picture.width, picture.height, { parameters });
  await writeInterruptibly(output, png);

  const seconds = (performance.now() - started) / 1000;
  const memory = device.memoryUse();
  if (flags.verbose) {
    const { text, steps, decode } = milliseconds;
    note(
      `load ${load.toFixed(0)} ms, text ${text.toFixed(0)} ms, steps ${
        steps.map((ms) => ms.toFixed(0)).join(" ")
      } ms, decode ${decode.toFixed(0)} ms`,
    );
    note(`memory: weights ${gigabytes(memory.weights)} GB, activations ${gigabytes(memory.peak)} GB at most`);
  }
  if (flags.json) {
    printLine(JSON.stringify({
      path: output,
      prompt: flags.prompt,
      model: model.name,
      device: device.name,
      recipes: plan.recipes,
      ...settings,
      seed: settings.seed.toString(), // beyond 2^53 a JSON number would change it
      seconds: Number(seconds.toFixed(3)),
      milliseconds: { load, ...milliseconds },
      memory: { weights: memory.weights, peak: memory.peak, reserved: memory.reserved }, // in bytes
    }));
  } else {
    printLine(`${output}  seed ${settings.seed}  ${seconds.toFixed(1)} s`);
  }
}

/** Ctrl-C while the file is written leaves no part of it behind; before that it ends the program at once. */
async function writeInterruptibly(path: string, bytes: Uint8Array): Promise<void> {
  const controller = new AbortController();
  const stop = () => controller.abort(new UsageError("stopped; no file was written"));
  Deno.addSignalListener("SIGINT", stop);
  try {
    await writeFileAtomic(path, bytes, { signal: controller.signal });
  } finally {
    Deno.removeSignalListener("SIGINT", stop);
  }
}

/** Without the keys that are undefined, so that defaults apply. */
function definedOnly<T extends object>(values: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as {
    [K in keyof T]?: Exclude<T[K], undefined>;
  };
}

if (import.meta.main) Deno.exit(await runProgram(NAME, () => generateImage(Deno.args)));
