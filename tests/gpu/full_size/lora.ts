/**
 * How long it takes to exchange one LoRA for another at full size, with random weights and random LoRAs for all Linear
 * layers of the blocks.
 *
 *     deno run -A tests/gpu/full_size/lora.ts --configs .gpu/FLUX.1-schnell --device cuda --json lora.json
 *
 * For bfloat16 and for float8: a picture is drawn, which records the graphs; then LoRAs of each rank are merged one after
 * another, each in the place of the one before. Prints a table, and ends with exit code 1 when a swap takes longer than the
 * bar, when something was compiled or recorded meanwhile, or when the first picture does not come back in the end.
 *
 * Floor, for 11.6 G weights at 3.0 TB/s: the changes are written and read in float32, originals read, sums written and copied
 * to their places, 184 GB and 61 ms in bfloat16; quantized in between, 197 GB and 66 ms in float8. The products take 2 ms for
 * each 50 of rank. Beside that the file is read: 0.17 GB at rank 16, 1.4 GB at rank 128, at 10 to 13 GB/s.
 */
import { Command } from "@commander-js/extra-typings";
import { join } from "node:path";
import { float32ToBfloat16 } from "../../../ffi/bfloat16.ts";
import { isGpu } from "../../../ffi/gpu.ts";
import { openDevice } from "../../../ffi/open.ts";
import { gigabytes, wholeNumber } from "../../../recipes/base/command_line.ts";
import { Loras } from "../../../recipes/base/lora.ts";
import { Model } from "../../../recipes/base/model.ts";
import { FluxPipeline } from "../../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../../recipes/base/plan.ts";
import { type TensorToWrite, writeSafetensors } from "../../../recipes/base/safetensors.ts";
import { markdownLines } from "../../../recipes/base/table.ts";
import { transformerWeightShapes } from "../../../recipes/base/transformer.ts";
import { kindOf, recipesFor, type Switches } from "../../../recipes/switches.ts";

/** Milliseconds of a swap, on an H100. */
const BAR = 300;

const flags = new Command("lora")
  .requiredOption("--configs <folder>", "configs and tokenizers in diffusers' layout")
  .option("--device <name>", "as for generate", "cuda")
  .option("--ranks <list>", "ranks, by commas", "4,16,64,128")
  .option("--repeats <n>", "swaps to each rank", wholeNumber(1, 100), 3)
  .option("--side <pixels>", "height and width of the pictures", wholeNumber(16, 8192), 1024)
  .option("--folder <folder>", "where the LoRAs are written: 1.4 GB for rank 128", "/dev/shm/flux-lora")
  .option("--untimed", "leave out the bar: for a machine or a size that it is not for")
  .option("--json <file>", "where the lines go as JSON too")
  .parse(Deno.args, { from: "user" })
  .opts();

interface Line {
  readonly dtype: string;
  readonly what: string;
  readonly rank: number;
  /** Each, in milliseconds. */
  readonly times: readonly number[];
  readonly barred: boolean;
}

const ranks = flags.ranks.split(",").map(Number);
const problems: string[] = [];
const lines: Line[] = [];
Deno.mkdirSync(flags.folder, { recursive: true });
try {
  for (
    const [dtype, switches] of [["bf16", { disable_quant: true }], ["f8e4m3", {}]] as [string, Switches][]
  ) {
    await measure(dtype, switches);
  }
} finally {
  Deno.removeSync(flags.folder, { recursive: true });
}

const median = (values: readonly number[]) => [...values].sort((a, b) => a - b)[values.length >> 1];
const rows = lines.map(({ dtype, what, rank, times }) => [
  `${dtype}, ${what}`,
  rank === 0 ? "-" : `${rank}`,
  median(times).toFixed(1),
  Math.max(...times).toFixed(1),
]);
console.log(markdownLines(["weights", "rank", "median, ms", "longest, ms"], rows).join("\n"));
for (const { dtype, what, rank, times, barred } of lines) {
  if (!barred || flags.untimed || Math.max(...times) <= BAR) continue;
  problems.push(`${dtype}: ${what} (rank ${rank}) took ${Math.max(...times).toFixed(0)} ms, allowed ${BAR}`);
}
if (flags.json !== undefined) {
  Deno.writeTextFileSync(flags.json, JSON.stringify({ lines, problems }, null, 1));
}
for (const problem of problems) console.error(problem);
Deno.exit(problems.length === 0 ? 0 : 1);

async function measure(dtype: string, switches: Switches): Promise<void> {
  using device = await openDevice(flags.device);
  using model = await Model.random(flags.configs, device, "bf16");
  const recipes = recipesFor(switches, kindOf(flags.device)).filter(({ name }) => name !== "08_export");
  const plan = compose(eagerPlan(device, model.weights), ...recipes);
  const pipeline = new FluxPipeline(model, plan);
  const draw = async () => {
    const options = { prompt: "a lighthouse", seed: 1, height: flags.side, width: flags.side };
    const { images: [{ rgb }], milliseconds } = await pipeline.generate({ ...options, numInferenceSteps: 2 });
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", rgb.slice()));
    return { digest: digest.toHex(), step: Math.min(...milliseconds.steps) };
  };
  await draw();
  const plain = await draw();

  const layers = [...transformerWeightShapes(model.configs.transformer)].filter(([name, shape]) =>
    name.includes("transformer_blocks.") && shape.length === 2
  );
  for (const rank of ranks) await writeRandom(pathOf(rank), layers, rank);

  const loras = new Loras(model, plan, console.error);
  const time = async (path: string | undefined) => {
    const start = performance.now();
    await loras.merge(path === undefined ? [] : [{ path, scale: 0.8 }]);
    return performance.now() - start;
  };
  const add = (what: string, rank: number, times: readonly number[], barred: boolean) =>
    void lines.push({ dtype, what, rank, times, barred });
  const before = device.memoryUse().weights;
  add("first, with the originals", ranks[0], [await time(pathOf(ranks[0]))], false);
  console.log(`${dtype}: originals take ${gigabytes(device.memoryUse().weights - before)} GB`);

  let [compiled, recorded] = [0, 0];
  if (isGpu(device)) {
    const { kernel, record } = device;
    device.kernel = (...args) => {
      compiled++;
      return kernel.apply(device, args);
    };
    device.record = (body) => {
      recorded++;
      return record.call(device, body);
    };
  }
  const swaps = ranks.map((rank) => ({ rank, times: [] as number[] }));
  for (let i = 0; i < flags.repeats; i++) {
    for (const { rank, times } of swaps) times.push(await time(pathOf(rank)));
  }
  for (const { rank, times } of swaps) add("swapped to", rank, times, true);
  const changed = await draw();
  add("removed", 0, [await time(undefined)], true);
  const again = await draw();
  add("a step without, with and after", 0, [plain.step, changed.step, again.step], false);

  if (changed.digest === plain.digest) problems.push(`${dtype}: a merged LoRA does not show`);
  if (again.digest !== plain.digest) problems.push(`${dtype}: the first picture does not come back`);
  if (compiled > 0 || recorded > 0) {
    problems.push(
      `${dtype}: ${compiled} kernels were compiled and ${recorded} graphs recorded while swapping`,
    );
  }
  loras.release();
}

function pathOf(rank: number): string {
  return join(flags.folder, `${rank}.safetensors`);
}

/** A LoRA of repeated random numbers: to draw all of them anew would take minutes. */
async function writeRandom(
  path: string,
  layers: readonly (readonly [string, readonly number[]])[],
  rank: number,
): Promise<void> {
  const block = new Uint16Array(65_521); // a prime, so that rows differ
  float32ToBfloat16(Float32Array.from(block, () => (Math.random() - 0.5) * 0.05), block);
  const source = new Uint8Array(block.buffer);
  const bytes = (length: number) => () => {
    const all = new Uint8Array(length);
    for (let at = 0; at < length; at += source.length) all.set(source.subarray(0, length - at), at);
    return all;
  };
  const tensors = layers.flatMap(([name, [outFeatures, inFeatures]]): TensorToWrite[] => {
    const module = `transformer.${name.replace(/\.weight$/, "")}`;
    return [
      {
        name: `${module}.lora_A.weight`,
        dtype: "bf16",
        shape: [rank, inFeatures],
        bytes: bytes(2 * rank * inFeatures),
      },
      {
        name: `${module}.lora_B.weight`,
        dtype: "bf16",
        shape: [outFeatures, rank],
        bytes: bytes(2 * rank * outFeatures),
      },
    ];
  });
  await writeSafetensors(path, tensors);
}
