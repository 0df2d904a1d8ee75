/**
 * Says what this machine has of what the recipes need: `deno task doctor`. Looks only, and works without a GPU.
 */
import { Command } from "@commander-js/extra-typings";
import {
  type FoundGpu,
  type FoundLibrary,
  type Inventory,
  type LibraryName,
  takeInventory,
} from "../ffi/inventory.ts";
import { printLine, runProgram } from "./base/command_line.ts";
import type { Recipe } from "./base/plan.ts";
import { tableLines } from "./base/table.ts";
import { writtenRecipes } from "./switches.ts";

const NAME = "doctor";

const EXAMPLES = `
Examples:
  deno task doctor
  deno task doctor --json > machine.json
  FLUX_LIB_PATH=~/cuda/lib deno task doctor

FLUX_LIB_PATH names folders, with colons between them, that are searched before all others.
`;

/** What a kind of device needs, and what makes it faster. */
const NEEDS = {
  cpu: { required: [], faster: ["oneDNN"] },
  cuda: { required: ["NVIDIA driver", "NVRTC", "cuBLASLt", "cuDNN"], faster: [] },
  hip: { required: ["HIP", "hipRTC", "hipBLASLt", "MIOpen"], faster: ["AITER"] },
} as const satisfies Record<string, Record<"required" | "faster", readonly LibraryName[]>>;

/** What no recipe needs, but flags that are for NVIDIA GPUs: kernels in the traces of `--trace-file`, `--attention fa3`. */
const FOR_GPUS = ["CUPTI", "FlashAttention-3"] as const satisfies readonly LibraryName[];

type Kind = keyof typeof NEEDS;
const OTHER = { cuda: "hip", hip: "cuda" } as const;
const KINDS = Object.keys(NEEDS) as Kind[];

/** Whether a recipe runs on a kind of device here. */
export interface Readiness {
  readonly recipe: string;
  readonly device: Kind;
  /** All that it needs is there. */
  readonly ready: boolean;
  readonly missing: readonly LibraryName[];
  /** What it runs without, but slower. */
  readonly fasterWith: readonly LibraryName[];
}

/** What each recipe lacks here, on each kind of device that it is for. */
export function readiness(inventory: Inventory, recipes: readonly Recipe[] = writtenRecipes()): Readiness[] {
  const absent = (name: LibraryName) => isAbsent(inventory, name);
  return recipes.flatMap(({ name, devices }) =>
    KINDS.filter((kind) => devices.includes(kind)).map((device) => {
      const missing = NEEDS[device].required.filter(absent);
      const fasterWith = NEEDS[device].faster.filter(absent);
      return { recipe: name, device, ready: missing.length === 0, missing, fasterWith };
    })
  );
}

function isAbsent({ libraries }: Inventory, name: LibraryName): boolean {
  return libraries.find((library) => library.name === name)?.problem !== undefined;
}

/** The report as text, a table for each question. */
export function describe(inventory: Inventory, recipes: readonly Readiness[]): string {
  const { libraries, gpus, driverVersion, cudaVersion, hipVersion } = inventory;
  const has = (kind: Kind) => gpus.some(({ device }) => device.startsWith(kind));
  const drivers = [
    ...(has("cuda") ? [`  driver ${driverVersion ?? "unknown"}, takes CUDA up to ${cudaVersion}`] : []),
    ...(has("hip") ? [`  HIP ${hipVersion}`] : []),
  ];
  // Nobody has GPUs of both vendors: what the other one's need is no gap.
  const wanted = recipes.filter(({ device }) => device === "cpu" || has(device) || !has(OTHER[device]));
  const gaps = [
    ...new Set<LibraryName>(wanted.flatMap(({ missing, fasterWith }) => [...missing, ...fasterWith])),
    ...FOR_GPUS.filter((name) => has("cuda") && isAbsent(inventory, name)),
  ];
  return [
    "Libraries",
    ...tableLines(libraries.map(libraryRow)),
    "",
    "GPUs",
    ...(gpus.length === 0 ? ["  none: --device cpu works without one"] : tableLines(gpus.map(gpuRow))),
    ...drivers,
    "",
    "Recipes",
    ...tableLines(recipes.map(recipeRow)),
    ...(gaps.length === 0 ? [] : ["", "To install"]),
    ...tableLines(gaps.map((name) => [name, libraries.find((library) => library.name === name)!.install])),
  ].join("\n");
}

function libraryRow({ name, version, path, purpose, problem }: FoundLibrary): string[] {
  if (path === undefined) return [name, "-", purpose, problem ?? ""];
  const where = path.includes("/") ? path : `${path} (on the loader's own path)`;
  return [name, version ?? "version unknown", purpose, where];
}

function gpuRow({ device, description, memoryBytes, architecture }: FoundGpu): string[] {
  return [device, description, `${(memoryBytes / 2 ** 30).toFixed(1)} GiB`, architecture];
}

function recipeRow({ recipe, device, ready, missing, fasterWith }: Readiness): string[] {
  const faster = fasterWith.length === 0 ? "" : ` (faster with ${fasterWith.join(", ")})`;
  return [recipe, device, ready ? `ready${faster}` : `needs ${missing.join(", ")}`];
}

function runDoctor(args: string[]): Promise<void> {
  const { json } = new Command(NAME)
    .description("Says which libraries and GPUs are found, and which recipes can run.")
    .option("--json", "print one JSON object instead of tables")
    .addHelpText("after", EXAMPLES)
    .showHelpAfterError("(--help lists all flags with examples)")
    .allowExcessArguments(false)
    .configureOutput({ outputError: (text, write) => write(text) })
    .exitOverride()
    .parse(args, { from: "user" })
    .opts();
  const inventory = takeInventory();
  const recipes = readiness(inventory);
  printLine(json ? JSON.stringify({ ...inventory, recipes }) : describe(inventory, recipes));
  return Promise.resolve();
}

if (import.meta.main) Deno.exit(await runProgram(NAME, () => runDoctor(Deno.args)));
