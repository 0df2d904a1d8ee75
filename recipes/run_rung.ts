/** Running a recipe's file by itself: a picture with the ladder up to this rung. */
import { runProgram } from "./base/command_line.ts";
import { generateImage } from "./gen_image.ts";
import { LADDER } from "./switches.ts";

/** Draws one picture with the flags of gen_image and the recipes up to the one of this name; ends the process. */
export async function runRung(name: string): Promise<never> {
  const ladder = LADDER.slice(0, LADDER.findIndex((rung) => rung.name === name) + 1);
  // The baseline is on when it is asked for only.
  const args = ladder.length === 1 ? ["--disable_bf16", ...Deno.args] : Deno.args;
  Deno.exit(await runProgram(name, () => generateImage(args, ladder)));
}
