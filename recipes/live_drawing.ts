/**
 * A picture that is drawn again whenever a kernel file changes, with the model kept loaded. `deno task watch` runs this
 * program, and starts it again where TypeScript has changed.
 */
import { basename, dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { CompileError } from "../ffi/errors.ts";
import { checkWritable } from "../ffi/files.ts";
import { isGpu } from "../ffi/gpu.ts";
import { replaceKernelText } from "../kernels/gpu.ts";
import { drawingOptions, onlyOnce, printLine, runProgram, writeInterruptibly } from "./base/command_line.ts";
import { FluxError, UsageError } from "./base/errors.ts";
import { fileChanges } from "./base/file_changes.ts";
import {
  checkModel,
  loadModel,
  mergeLoras,
  openChosen,
  pictureToEdit,
  withLocalModel,
} from "./base/loading.ts";
import { encodePicture } from "./base/picture_file.ts";
import { FluxPipeline, type GenerateOptions, type GenerateResult, type Picture } from "./base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "./base/plan.ts";
import { psnr } from "./base/psnr.ts";
import { createPictureParser, kindOf, LADDER, ladderTo, recipesFor, type Switches } from "./switches.ts";

const NAME = "watch";
const RECIPES = fileURLToPath(new URL(".", import.meta.url));
const KERNELS = fileURLToPath(new URL("../kernels/", import.meta.url));

/** One drawing, again and again. */
export class LiveDrawing {
  #last: Picture | undefined;
  /** Of the kernel files, by name: writing the same again is no change. */
  readonly #texts: Map<string, string>;

  /** @param folder of the kernel files as they are loaded. */
  constructor(readonly pipeline: FluxPipeline, private readonly drawing: GenerateOptions, folder = KERNELS) {
    const names = [...Deno.readDirSync(folder)].map(({ name }) => name).filter(isKernelFile);
    this.#texts = new Map(names.map((name) => [name, Deno.readTextFileSync(join(folder, name))]));
  }

  /** Takes a kernel file in for the next drawing. False where it has the text that it had. */
  reload(path: string): boolean {
    const { plan } = this.pipeline;
    if (!isGpu(plan.device)) return false;
    let text: string;
    try {
      text = Deno.readTextFileSync(path);
    } catch (error) {
      if (error instanceof Deno.errors.NotFound) return false; // an editor renames; there will be another event
      throw error;
    }
    const name = basename(path);
    if (this.#texts.get(name) === text) return false;
    this.#texts.set(name, text);
    replaceKernelText(plan.device, name, text);
    plan.forget?.(plan); // recorded graphs have the old kernel
    return true;
  }

  /** @returns also how close the picture is to the one before, in dB: infinite for an equal one; undefined for the first. */
  async draw(): Promise<GenerateResult & { readonly closeness: number | undefined }> {
    const result = await this.pipeline.generate(this.drawing);
    const [picture] = result.images;
    const closeness = this.#last === undefined ? undefined : psnr(picture.rgb, this.#last.rgb);
    this.#last = picture;
    return { ...result, closeness };
  }
}

/** Whether a file has device code. */
function isKernelFile(path: string): boolean {
  return /\.cuh?$/.test(path);
}

/** A rung with all up to it; any other file's recipe on top of all that the flags leave on. */
async function recipesOf(path: string, flags: Switches & { readonly device: string }): Promise<Recipe[]> {
  const kind = kindOf(flags.device);
  const stem = basename(path, ".ts");
  if (`${dirname(path)}/` === RECIPES && LADDER.some(({ name }) => name === stem)) {
    return recipesFor(flags, kind, ladderTo(stem));
  }
  const exported: unknown[] = Object.values(await import(pathToFileURL(path).href));
  const own = exported.filter(isRecipe);
  if (own.length > 0) return [...recipesFor(flags, kind), ...own];
  throw new UsageError(`${path} exports no recipe`, {
    hint: "export const mine: Recipe = { name, exact, devices, apply }",
  });
}

function isRecipe(value: unknown): value is Recipe {
  return typeof value === "object" && value !== null && "name" in value && "apply" in value &&
    "devices" in value;
}

/** @param args the recipe's path, then gen_image's flags. */
async function runLiveDrawing([path, ...args]: string[]): Promise<void> {
  const baseline = basename(path, ".ts") === LADDER[0].name ? ["--disable_bf16"] : [];
  const given = createPictureParser(NAME, "Draws again when a kernel file changes.")
    .allowExcessArguments(false)
    .parse([...baseline, ...args], { from: "user" })
    .opts();
  const note = onlyOnce((message) => console.error(`${NAME}: ${message}`));
  const { outputFile: output, prompt } = given;
  const recipes = await recipesOf(path, given);
  await checkWritable(output);
  const flags = await withLocalModel(given, note);
  checkModel(flags, recipes);
  const edited = await pictureToEdit(flags);
  using device = await openChosen(flags, note);
  const drawing = { ...drawingOptions(flags), ...edited, onWarning: note };
  const dtype = flags.disable_bf16 ? "f32" : "bf16";
  using model = await loadModel(flags, device, dtype, note, recipes, drawing);
  const plan = compose(eagerPlan(device, model.weights), ...recipes);
  await mergeLoras(flags.lora, model, plan, note);
  const changes = fileChanges([KERNELS]); // before the texts are read, so that no change is missed
  const live = new LiveDrawing(new FluxPipeline(model, plan), drawing);
  const draw = async (why: string) => {
    const start = performance.now();
    try {
      const { images: [picture], settings, closeness } = await live.draw();
      const seconds = ((performance.now() - start) / 1000).toFixed(2);
      await writeInterruptibly(
        output,
        await encodePicture(picture, { prompt, settings, model, plan, loras: flags.lora }),
      );
      printLine(`${why}${output}  ${seconds} s${describe(closeness)}`);
    } catch (error) {
      if (!(error instanceof FluxError)) throw error;
      console.error(failureText(error));
      printLine(`${why}not drawn; change it again`);
    }
  };
  await draw(`${plan.recipes.join(", ")}: `);
  for await (const paths of changes) {
    const kernels = paths.filter(isKernelFile);
    if (kernels.length > 0 && !isGpu(device)) {
      note(
        `${kernels.map((path) => basename(path)).join(", ")} changed: .cu files run on a GPU: --device cuda`,
      );
    }
    const names = kernels.filter((path) => live.reload(path)).map((path) => basename(path));
    if (names.length > 0) await draw(`${names.join(", ")} changed: `);
  }
}

/** What to print: of device code that does not compile all of the compiler's log, which has lines and carets below places. */
export function failureText(error: FluxError): string {
  const text = error instanceof CompileError ? error.log : `${NAME}: ${error.message}`;
  return error.hint === undefined ? text : `${text}\n  ${error.hint}`;
}

function describe(closeness: number | undefined): string {
  if (closeness === undefined) return "";
  return closeness === Infinity ? "  the same picture" : `  ${closeness.toFixed(1)} dB to the one before`;
}

/** Ends with the program that started this one, however that ends. */
async function endWithParent(): Promise<void> {
  for await (const _ of Deno.stdin.readable);
  Deno.exit(0);
}

if (import.meta.main) {
  void endWithParent();
  Deno.exit(await runProgram(NAME, () => runLiveDrawing(Deno.args)));
}
