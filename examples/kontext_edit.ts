/**
 * Edits a picture with FLUX.1-Kontext, one instruction after another: each one edits what the one before has made.
 *
 *     deno run -A examples/kontext_edit.ts ~/models/FLUX.1-Kontext-dev photo.jpg "make it winter" "add a red balloon"
 *
 * It writes edit-1.png, edit-2.png, ... into the current folder. `FLUX_DEVICE=cpu` computes without a GPU, which makes sense
 * for small models only.
 */
import {
  compose,
  eagerPlan,
  encodePng,
  FluxPipeline,
  Model,
  openDevice,
  type Picture,
  preferredSize,
  readPicture,
  recipesFor,
  UsageError,
} from "../mod.ts";
import { runProgram } from "../recipes/base/command_line.ts";

const HELP = `Usage: kontext_edit <model folder> <picture> <instruction>...

Edits a picture with FLUX.1-Kontext, one instruction after another, into edit-1.png, edit-2.png, ...

Examples:
  deno run -A examples/kontext_edit.ts ~/models/FLUX.1-Kontext-dev photo.jpg "make it winter"
  deno run -A examples/kontext_edit.ts ~/models/FLUX.1-Kontext-dev photo.jpg "make it winter" "add a red balloon"
  FLUX_DEVICE=cuda:1 deno run -A examples/kontext_edit.ts ~/models/FLUX.1-Kontext-dev photo.png "a pencil drawing"`;

async function edit([folder, file, ...instructions]: string[]): Promise<void> {
  if (instructions.length === 0) {
    throw new UsageError("give a model folder, a picture, and at least one instruction", {
      hint: "--help has examples",
    });
  }

  using device = await openDevice(Deno.env.get("FLUX_DEVICE") ?? "cuda");
  using model = await Model.load(folder, device);
  // All recipes that this device runs; leave some out to compare.
  const recipes = recipesFor({}, device.kind);
  const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), ...recipes));

  let picture: Picture = await readPicture(file);
  for (const [i, prompt] of instructions.entries()) {
    const { images: [edited], settings, milliseconds } = await pipeline.generate({
      prompt,
      image: picture,
      seed: 42,
      ...preferredSize(picture), // what it is encoded in, so that it keeps its shape
      onProgress: ({ step, steps }) => console.error(`${prompt}: step ${step} of ${steps}`),
    });
    const path = `edit-${i + 1}.png`;
    await Deno.writeFile(path, await encodePng(edited.rgb, edited.width, edited.height, { prompt }));
    const seconds = milliseconds.steps.reduce((sum, ms) => sum + ms, 0) / 1000;
    console.log(
      `${path}: ${settings.width} x ${settings.height}, guidance ${settings.guidanceScale}, ${
        seconds.toFixed(1)
      } s`,
    );
    picture = edited;
  }
}

const help = Deno.args.includes("--help") || Deno.args.includes("-h");
if (help) console.log(HELP);
else Deno.exit(await runProgram("kontext_edit", () => edit(Deno.args)));
