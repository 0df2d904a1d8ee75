/**
 * Draws pictures: `deno task generate --prompt "..."`. The flags are flux-fast's.
 */
import { Option } from "@commander-js/extra-typings";
import { checkWritable } from "../ffi/files.ts";
import { exportedModel } from "./08_export.ts";
import {
  drawingOptions,
  gigabytes,
  onlyOnce,
  printLine,
  Progress,
  runProgram,
  userPath,
  wholeNumber,
  writeInterruptibly,
} from "./base/command_line.ts";
import { UsageError } from "./base/errors.ts";
import {
  checkModel,
  loadModel,
  mergeLoras,
  openChosen,
  pictureToEdit,
  withLocalModel,
} from "./base/loading.ts";
import { encodePicture } from "./base/picture_file.ts";
import { FluxPipeline, type GenerateResult } from "./base/pipeline.ts";
import { compose, eagerPlan } from "./base/plan.ts";
import { PngEncoder } from "./base/png_encoder.ts";
import { numberedPaths, readPrompts } from "./base/prompts.ts";
import { createPictureParser, kindOf, LADDER, recipesFor, type Rung } from "./switches.ts";

const EXAMPLES = `
Examples:
  deno task generate --prompt "A cat playing with a ball of yarn"
  deno task generate --prompt "three red apples on a blue background" --seed 7 --output-file apples.png
  deno task generate --ckpt ~/models/FLUX.1-schnell --height 512 --width 768 --prompt "a lighthouse at night"
  deno task generate --ckpt black-forest-labs/FLUX.1-dev --lora style.safetensors:0.8 --prompt "a lighthouse"
  deno task generate --ckpt black-forest-labs/FLUX.1-dev --transformer flux1-dev-fp8.safetensors --vae ae.safetensors
  deno task generate --prompt-file prompts.txt --num_images_per_prompt 4 --output-file drawn.png
  deno task generate --ckpt ~/models/FLUX.1-Kontext-dev --image photo.jpg --prompt "make it winter"
  deno task generate --disable_bf16 --json --verbose
  deno task generate --ckpt ~/models/FLUX.1-schnell-configs --random-weights --device cuda --verbose
`;

const NAME = "gen_image";
/** What memory takes of pictures of a million pixels is far fewer. */
const MOST_IMAGES = 64;

/** @param ladder the rungs that the flags switch. @param examples the end of the help. */
export async function generateImage(
  args: string[],
  ladder: readonly Rung[] = LADDER,
  examples = EXAMPLES,
): Promise<void> {
  const given = createPictureParser(NAME, "Draws pictures from prompts with FLUX.1.")
    .addOption(
      new Option(
        "--prompt-file <file>",
        "what to draw, a prompt on each line; pictures are output-1.png, ...",
      )
        .argParser(userPath).conflicts("prompt"),
    )
    .option(
      "--num_images_per_prompt <n>",
      "pictures of each prompt, drawn together",
      wholeNumber(1, MOST_IMAGES),
      1,
    )
    .addOption(new Option("--trace-file <file>").hideHelp())
    .addHelpText("after", examples)
    .allowExcessArguments(false)
    .parse(args, { from: "user" })
    .opts();
  if (given.traceFile !== undefined) {
    throw new UsageError("--trace-file is for benchmarks", { hint: "deno task benchmark --trace-file ..." });
  }
  const recipes = recipesFor(given, kindOf(given.device), ladder);
  const { num_images_per_prompt: numImagesPerPrompt } = given;
  const prompts = given.promptFile === undefined ? [given.prompt] : await readPrompts(given.promptFile);
  const paths = numberedPaths(given.outputFile, prompts.length * numImagesPerPrompt);
  for (const path of paths) await checkWritable(path); // before minutes of work, not after
  let started = performance.now();
  const note = (message: string) => console.error(`${NAME}: ${message}`);
  const flags = await withLocalModel(given, note);
  checkModel(flags, recipes);
  const edited = await pictureToEdit(flags);

  using device = await openChosen(flags, note);
  const loadStart = performance.now();
  const exported = exportedModel(flags, recipes, device, note);
  const dtype = flags.disable_bf16 ? "f32" : "bf16";
  const drawing = { ...drawingOptions(flags), ...edited, numImagesPerPrompt };
  using model = await exported?.load() ?? await loadModel(flags, device, dtype, note, recipes, drawing);
  const load = performance.now() - loadStart;
  const plan = compose(eagerPlan(device, model.weights), ...recipes);
  const loras = await mergeLoras(flags.lora, model, plan, note);
  if (flags.verbose) {
    const { description, providers } = device.properties();
    note(`${model.name} on ${device.name} (${description}), ${plan.recipes.join(", ")}`);
    for (const [what, provider] of Object.entries(providers)) note(`${what}: ${provider}`);
  }

  const pipeline = new FluxPipeline(model, plan);
  const onWarning = onlyOnce(note);
  /** Writes a prompt's pictures and says so. */
  const finish = async (number: number, prompt: string, result: GenerateResult) => {
    const { images, settings, milliseconds, reusedSteps } = result;
    const memory = device.memoryUse();
    for (const [i, picture] of images.entries()) {
      const path = paths[number * numImagesPerPrompt + i];
      const place = images.length === 1 ? undefined : `${i + 1} of ${images.length}`;
      await writeInterruptibly(
        path,
        await encodePicture(
          picture,
          { prompt, settings, model, plan, place, loras: flags.lora },
          encoder?.encode,
        ),
      );
    }

    const seconds = (performance.now() - started) / 1000;
    started = performance.now();
    if (flags.verbose) {
      const { text, image, steps, decode } = milliseconds;
      note(
        `${number === 0 ? `load ${load.toFixed(0)} ms, ` : ""}text ${text.toFixed(0)} ms, ${
          settings.image ? `image ${image.toFixed(0)} ms, ` : ""
        }steps ${steps.map((ms) => ms.toFixed(0)).join(" ")} ms, decode ${decode.toFixed(0)} ms`,
      );
      if (reusedSteps) note(`steps that reused the blocks' result: ${reusedSteps.length} of ${steps.length}`);
      note(
        `memory: weights ${gigabytes(memory.weights)} GB, activations ${gigabytes(memory.peak)} GB at most`,
      );
    }
    images.forEach((_, i) => {
      const path = paths[number * numImagesPerPrompt + i];
      if (!flags.json) {
        return printLine(`${path}  seed ${settings.seed}  ${seconds.toFixed(1)} s`);
      }
      printLine(JSON.stringify({
        path,
        prompt,
        model: model.name,
        device: device.name,
        recipes: plan.recipes,
        ...(flags.lora && { loras: flags.lora }),
        ...settings,
        seed: settings.seed.toString(), // beyond 2^53 a JSON number would change it
        seconds: Number(seconds.toFixed(3)),
        milliseconds: { load, ...milliseconds },
        ...(reusedSteps && { reusedSteps }),
        memory: { weights: memory.weights, peak: memory.peak, reserved: memory.reserved }, // in bytes
      }));
    });
  };
  // A prompt's pictures are encoded and written while the next one's are drawn.
  using encoder = prompts.length > 1 ? new PngEncoder() : undefined;
  let finished = Promise.resolve();
  try {
    for (const [number, prompt] of prompts.entries()) {
      let bar: Progress | undefined;
      const result = await pipeline.generate({
        ...drawing,
        prompt,
        onWarning,
        onProgress: ({ step, steps }) => {
          const label = prompts.length === 1 ? "denoising" : `prompt ${number + 1}/${prompts.length}`;
          bar ??= new Progress(label, steps, "steps");
          bar.update(step);
        },
      }).finally(() => bar?.stop());
      await finished;
      finished = finish(number, prompt, result);
      finished.catch(() => {}); // it is waited for below, and its error thrown there
    }
  } finally {
    await finished; // whatever became of the next one
  }
  await exported?.write(plan, loras);
}

if (import.meta.main) Deno.exit(await runProgram(NAME, () => generateImage(Deno.args)));
