/**
 * Takes a GPU's memory until its standard input ends, but for so many gigabytes: what runs beside it meets a smaller GPU.
 *
 *     deno run -A tests/gpu/full_size/ballast.ts --leave 24 --device cuda
 *
 * Prints "ready" when the memory is taken. What the driver needs for this process counts as taken.
 */
import { Command } from "@commander-js/extra-typings";
import { OutOfMemoryError } from "../../../ffi/errors.ts";
import { openDevice } from "../../../ffi/open.ts";

const { leave, device: name } = new Command("ballast")
  .requiredOption("--leave <gigabytes>", "what stays for others, in 10^9 bytes", Number)
  .option("--device <name>", "as for generate", "cuda")
  .parse(Deno.args, { from: "user" })
  .opts();

/** Free memory of the GPU, in bytes. */
async function free(): Promise<number> {
  const command = new Deno.Command("nvidia-smi", {
    args: ["--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", name.split(":")[1] ?? "0"],
  });
  return Number(new TextDecoder().decode((await command.output()).stdout)) * 2 ** 20;
}

using device = await openDevice(name);
const CHUNK = 256 * 2 ** 20; // what a device grows by
const held = [];
try {
  while (await free() - CHUNK >= leave * 1e9) held.push(device.alloc(CHUNK, "weights"));
} catch (error) {
  if (!(error instanceof OutOfMemoryError)) throw error;
}
console.log(`ready: ${held.length * CHUNK / 1e9} GB taken, ${await free() / 1e9} GB free`);
await Deno.stdin.readable.pipeTo(new WritableStream());
