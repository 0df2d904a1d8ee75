/**
 * A page to draw and compare with: `deno task studio`. It listens on 127.0.0.1 only.
 */
import { FileError } from "../ffi/errors.ts";
import { createLoadingParser, onlyOnce, printLine, runProgram, wholeNumber } from "./base/command_line.ts";
import { messageOf } from "./base/errors.ts";
import { withLocalModel } from "./base/loading.ts";
import { Engine } from "./studio/engine.ts";
import { studioHandler } from "./studio/server.ts";

const NAME = "studio";
/** The one that the task may listen on. */
const PORT = 7860;

const EXAMPLES = `
Examples:
  deno task studio
  deno task studio --device cuda --ckpt ~/models/FLUX.1-schnell

Open the address that it prints. The page draws with the recipes that you tick, shows the picture as it emerges, and puts two choices of recipes side by side. History is kept by the browser. Ctrl-C ends the program.
`;

async function runStudio(args: string[]): Promise<void> {
  const flags = createLoadingParser(NAME, "Serves a page on 127.0.0.1 to draw, watch and compare recipes.")
    .option(
      "--port <n>",
      "where the page is served; the task may use the default only",
      wholeNumber(1, 65535),
      PORT,
    )
    .addHelpText("after", EXAMPLES)
    .allowExcessArguments(false)
    .parse(args, { from: "user" })
    .opts();
  const { port } = flags;
  const note = onlyOnce((message) => console.error(`${NAME}: ${message}`));
  using engine = new Engine(await withLocalModel(flags, note), note);
  engine.offer(); // a device or a model that is wrong shows now, not in the page
  const server = listen(port, studioHandler(engine, port, note));
  printLine(`http://127.0.0.1:${port}/`);
  await server.finished;
}

/** Throws {@link FileError} where the port cannot be had. */
function listen(port: number, handler: (request: Request) => Promise<Response>): Deno.HttpServer {
  try {
    return Deno.serve({ hostname: "127.0.0.1", port, onListen: () => {} }, handler);
  } catch (error) {
    const hint = error instanceof Deno.errors.AddrInUse
      ? "another program, or another studio, has it: end that one"
      : error instanceof Deno.errors.NotCapable
      ? `the task may use port ${PORT} only; for another one run recipes/studio.ts with --allow-net=127.0.0.1:${port}`
      : undefined;
    throw new FileError(`cannot listen on 127.0.0.1:${port}: ${messageOf(error)}`, {
      cause: error,
      ...(hint === undefined ? {} : { hint }),
    });
  }
}

if (import.meta.main) Deno.exit(await runProgram(NAME, () => runStudio(Deno.args)));
