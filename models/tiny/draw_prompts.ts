/**
 * Draws the prompts of `evaluate.py --write-prompts FILE` with this project's own pipeline, for `evaluate.py --images`:
 *
 *     deno run --allow-read --allow-write --allow-ffi --allow-env --allow-sys=cpus models/tiny/draw_prompts.ts FILE FOLDER
 */
import { bfloat16, compose, eagerPlan, FluxPipeline, Model, openDevice } from "../../mod.ts";
import { encodePng } from "../../recipes/base/image.ts";

interface Row {
  readonly file: string;
  readonly prompt: string;
  readonly seed: number;
}

const [list, folder] = Deno.args;
if (list === undefined || folder === undefined) {
  console.error("usage: draw_prompts.ts FILE FOLDER");
  Deno.exit(2);
}
const rows: Row[] = JSON.parse(Deno.readTextFileSync(list));
Deno.mkdirSync(folder, { recursive: true });
using device = await openDevice("cpu");
using model = await Model.load(import.meta.dirname!, device);
const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), bfloat16));
for (const { file, prompt, seed } of rows) {
  const { images: [picture] } = await pipeline.generate({ prompt, seed });
  Deno.writeFileSync(`${folder}/${file}`, await encodePng(picture.rgb, picture.width, picture.height));
}
