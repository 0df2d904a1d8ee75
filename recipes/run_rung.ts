/** Running a recipe's file by itself: a picture with the ladder up to this rung. */
import { runProgram } from "./base/command_line.ts";
import { generateImage } from "./gen_image.ts";
import { LADDER, ladderTo } from "./switches.ts";

/** Draws one picture with the flags of gen_image and the recipes up to the one of this name; ends the process. */
export async function runRung(name: string): Promise<never> {
  // The baseline is in float32, and so are the weights that are made up for it.
  const args = name === LADDER[0].name ? ["--disable_bf16", ...Deno.args] : Deno.args;
  Deno.exit(await runProgram(name, () => generateImage(args, ladderTo(name))));
}
