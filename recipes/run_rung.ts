/** Running a recipe's file by itself: a picture with the ladder up to this rung. */
import { runProgram } from "./base/command_line.ts";
import { generateImage } from "./gen_image.ts";
import { LADDER, ladderTo, writtenRecipes } from "./switches.ts";

/** Draws one picture with the flags of gen_image and the recipes up to the one of this name; ends the process. */
export async function runRung(name: string): Promise<never> {
  // The baseline is in float32, and so are the weights that are made up for it.
  const args = name === LADDER[0].name ? ["--disable_bf16", ...Deno.args] : Deno.args;
  Deno.exit(await runProgram(name, () => generateImage(args, ladderTo(name), examplesOf(name))));
}

/** The end of the help of a recipe's file. */
function examplesOf(name: string): string {
  const onCpu = writtenRecipes().find((recipe) => recipe.name === name)!.devices.includes("cpu");
  const run = `  deno run -A recipes/${name}.ts`;
  return [
    "",
    `Examples, all with the recipes up to ${name}:`,
    ...(onCpu ? [`${run} --prompt "three red apples" --output-file apples.png`] : []),
    `${run} --device cuda --ckpt ~/models/FLUX.1-schnell --prompt "a lighthouse at night"`,
    `${run} --device cuda --ckpt ~/models/FLUX.1-schnell-configs --random-weights --verbose`,
    "",
  ].join("\n").replaceAll("schnell", name.startsWith("09") ? "dev" : "schnell"); // 09 is refused for schnell
}
