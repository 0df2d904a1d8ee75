/**
 * Draws one picture: `deno task generate --prompt "..."`. The flags are flux-fast's.
 */
import { Option } from "@commander-js/extra-typings";
import { checkWritable } from "../ffi/files.ts";
import { exportedModel } from "./08_export.ts";
import {
  drawingOptions,
  gigabytes,
  printLine,
  Progress,
  runProgram,
  writeInterruptibly,
} from "./base/command_line.ts";
import { UsageError } from "./base/errors.ts";
import { loadModel, mergeLoras, openChosen, withLocalModel } from "./base/loading.ts";
import { encodePicture } from "./base/picture_file.ts";
import { FluxPipeline } from "./base/pipeline.ts";
import { compose, eagerPlan } from "./base/plan.ts";
import { createPictureParser, kindOf, LADDER, recipesFor, refuseImage, type Rung } from "./switches.ts";

const EXAMPLES = `
Examples:
  deno task generate --prompt "A cat playing with a ball of yarn"
  deno task generate --prompt "three red apples on a blue background" --seed 7 --output-file apples.png
  deno task generate --ckpt ~/models/FLUX.1-schnell --height 512 --width 768 --prompt "a lighthouse at night"
  deno task generate --ckpt black-forest-labs/FLUX.1-dev --lora style.safetensors:0.8 --prompt "a lighthouse"
  deno task generate --ckpt black-forest-labs/FLUX.1-dev --transformer flux1-dev-fp8.safetensors --vae ae.safetensors
  deno task generate --disable_bf16 --json --verbose
  deno task generate --ckpt ~/models/FLUX.1-schnell-configs --random-weights --device cuda --verbose
`;

const NAME = "gen_image";

/** @param ladder the rungs that the flags switch. */
export async function generateImage(args: string[], ladder: readonly Rung[] = LADDER): Promise<void> {
  const given = createPictureParser(NAME, "Draws a picture from a prompt with FLUX.1.")
    .addOption(new Option("--trace-file <file>").hideHelp())
    .addHelpText("after", EXAMPLES)
    .allowExcessArguments(false)
    .parse(args, { from: "user" })
    .opts();
  if (given.traceFile !== undefined) {
    throw new UsageError("--trace-file is for benchmarks", { hint: "deno task benchmark --trace-file ..." });
  }
  refuseImage(given);
  const recipes = recipesFor(given, kindOf(given.device), ladder);
  const output = given.outputFile;
  await checkWritable(output); // before minutes of work, not after
  const started = performance.now();
  const note = (message: string) => console.error(`${NAME}: ${message}`);
  const flags = await withLocalModel(given, note);

  using device = await openChosen(flags, note);
  const loadStart = performance.now();
  const exported = exportedModel(flags, recipes, device, note);
  using model = await exported?.load() ??
    await loadModel(flags, device, flags.disable_bf16 ? "f32" : "bf16", note);
  const load = performance.now() - loadStart;
  const plan = compose(eagerPlan(device, model.weights), ...recipes);
  const loras = await mergeLoras(flags.lora, model, plan, note);
  if (flags.verbose) {
    const { description, providers } = device.properties();
    note(`${model.name} on ${device.name} (${description}), ${plan.recipes.join(", ")}`);
    for (const [what, provider] of Object.entries(providers)) note(`${what}: ${provider}`);
  }

  let bar: Progress | undefined;
  const { images: [picture], settings, milliseconds } = await new FluxPipeline(model, plan).generate({
    ...drawingOptions(flags),
    onWarning: note,
    onProgress: ({ step, steps }) => {
      bar ??= new Progress("denoising", steps, "steps");
      bar.update(step);
    },
  }).finally(() => bar?.stop());

  const png = await encodePicture(picture, {
    prompt: flags.prompt,
    settings,
    model,
    plan,
    loras: flags.lora,
  });
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
      ...(flags.lora && { loras: flags.lora }),
      ...settings,
      seed: settings.seed.toString(), // beyond 2^53 a JSON number would change it
      seconds: Number(seconds.toFixed(3)),
      milliseconds: { load, ...milliseconds },
      memory: { weights: memory.weights, peak: memory.peak, reserved: memory.reserved }, // in bytes
    }));
  } else {
    printLine(`${output}  seed ${settings.seed}  ${seconds.toFixed(1)} s`);
  }
  if (exported !== undefined) await loras?.merge([]); // the package is the model's, whatever was merged for this picture
  await exported?.write(plan);
}

if (import.meta.main) Deno.exit(await runProgram(NAME, () => generateImage(Deno.args)));
