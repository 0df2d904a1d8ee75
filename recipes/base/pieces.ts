/**
 * Weights that are brought to a device piece by piece, each as the recipes want it before the next one comes: a GPU then needs
 * memory for what they become and for one piece, not for the checkpoint, and what is freed on the way is used again.
 */
import type { Device } from "../../ffi/device.ts";
import { isGpu } from "../../ffi/gpu.ts";
import type { Tensor } from "../../ffi/tensor.ts";
import { depositWeights } from "./deposits.ts";
import { type Component, COMPONENTS, compose, eagerPlan, type Recipe } from "./plan.ts";
import { freeAll, type Weights, weightsFrom } from "./weights.ts";

/** How weights are loaded in pieces. */
export interface Pieces {
  /** Of them those that change weights are applied to each piece; a plan of the model is to be composed of all of them. */
  readonly recipes: readonly Recipe[];
  /** Parts that go on to a deposit each, on the host, where the device is a GPU. They are loaded last. */
  readonly deposited: readonly Component[];
  /**
   * A piece has at least so many bytes, as far as there are so many. When left out: {@link PIECE_BYTES} where pieces become less or
   * go on to a deposit, else each part of the model is one.
   */
  readonly pieceBytes?: number;
}

/** Each piece sets up buffers of its own, so that larger ones are loaded faster. */
const PIECE_BYTES = 2 ** 30;

/**
 * How a model is loaded for these recipes: in pieces where one of them takes parts from a deposit, or makes other weights of those of
 * the checkpoint, so that there need not be memory for both; undefined, all at once, otherwise.
 */
export function piecesFor(recipes: readonly Recipe[]): Pieces | undefined {
  const deposited = recipes.flatMap(({ deposits = [] }) => deposits);
  const preparing = recipes.some(({ preparesWeights }) => preparesWeights);
  return deposited.length > 0 || preparing ? { recipes, deposited } : undefined;
}

/** A part's weights that are not loaded so far. */
export interface Unloaded {
  readonly component: Component;
  /** In the order of the checkpoint. */
  readonly names: readonly string[];
  readonly bytesOf: (name: string) => number;
  /** Brings some of them to the device. */
  readonly place: (names: readonly string[]) => Promise<Weights>;
}

/** Loads all parts. */
export async function loadInPieces(
  device: Device,
  parts: readonly Unloaded[],
  { recipes, deposited, ...pieces }: Pieces,
): Promise<Record<Component, Weights>> {
  const preparing = recipes.filter(({ preparesWeights }) => preparesWeights);
  const shrinking = deposited.length > 0 || preparing.some(({ exact }) => !exact);
  const pieceBytes = pieces.pieceBytes ?? (shrinking ? PIECE_BYTES : Infinity);
  const joined = (component: Component) => recipes.flatMap(({ joins }) => joins?.[component] ?? []);
  const loaded: [Component, Weights][] = [];
  const kept = new Map<string, Tensor>(); // of the part that is being loaded
  const last = ({ component }: Unloaded) => Number(deposited.includes(component));
  try {
    for (const part of parts.toSorted((a, b) => last(a) - last(b))) {
      const deposit = last(part) === 1 && isGpu(device) ? device.deposit() : undefined;
      for (const names of piecesOf(part, joined(part.component), pieceBytes)) {
        let piece = prepared(device, part.component, await part.place(names), preparing);
        if (deposit !== undefined) piece = depositWeights(piece, deposit);
        for (const name of piece.names) kept.set(name, piece.get(name));
      }
      loaded.push([part.component, weightsFrom(new Map(kept))]);
      kept.clear();
    }
    await device.synchronize();
    return Object.fromEntries(loaded) as Record<Component, Weights>;
  } catch (error) {
    for (const weights of [weightsFrom(kept), ...loaded.map(([, weights]) => weights)]) freeAll(weights);
    throw error;
  }
}

function prepared(
  device: Device,
  component: Component,
  weights: Weights,
  recipes: readonly Recipe[],
): Weights {
  const none = weightsFrom(new Map());
  const alone = Object.fromEntries(COMPONENTS.map((one) => [one, one === component ? weights : none]));
  const plan = eagerPlan(device, alone as Record<Component, Weights>);
  return compose(plan, ...recipes).weights[component];
}

/**
 * The part's weights in groups of whole blocks: recipes join what stands side by side in one. Of each block first those that are
 * `joined`: when they have been, there is room for what the next ones become.
 */
function piecesOf(
  { names, bytesOf }: Unloaded,
  joined: readonly (readonly string[])[],
  pieceBytes: number,
): string[][] {
  const ends = joined.flat().map((layer) => `.${layer}.weight`);
  const rank = (name: string) => Number(!ends.some((end) => name.endsWith(end)));
  const blocks = [...Map.groupBy(names, (name) => name.match(/^.*?\.\d+(?=\.)/)?.[0] ?? "").values()]
    .map((block) => block.toSorted((a, b) => rank(a) - rank(b)));
  const pieces: string[][] = [];
  let room = 0;
  for (const block of blocks) {
    if (room <= 0) {
      pieces.push([]);
      room = pieceBytes;
    }
    pieces.at(-1)!.push(...block);
    room -= block.reduce((sum, name) => sum + bytesOf(name), 0);
  }
  return pieces;
}
