/** Weights by the memories that they lie in: as a package stores them, and back. */
import type { Memory } from "../../ffi/device.ts";
import { type DType, dtypeBytes } from "../../ffi/dtype.ts";
import { elementCount, Tensor } from "../../ffi/tensor.ts";
import { joinedView } from "../../kernels/joined_linears.ts";
import { type Component, COMPONENTS } from "./plan.ts";
import { type Weights, weightsFrom } from "./weights.ts";

/** A memory with weights, as a dense tensor. */
export interface Block {
  /** `"<part>/<weight>"`: of the first weight in it. */
  readonly name: string;
  readonly memory: Memory;
  readonly dtype: DType;
  /** In the order in which the elements lie. */
  readonly shape: readonly number[];
}

/** Where a weight lies in a block; strides and offset in elements. */
export interface View {
  readonly block: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly strides: readonly number[];
  readonly offset: number;
}

/** The views of each part's weights, by their names. */
export type Views = Readonly<Record<Component, Readonly<Record<string, View>>>>;

/** All memories of the weights, each once, and where each weight is. */
export function blocksOf(
  weights: Readonly<Record<Component, Weights>>,
): { readonly blocks: readonly Block[]; readonly views: Views } {
  const all = COMPONENTS.flatMap((component) =>
    weights[component].names.map((name) => ({ component, name, tensor: weights[component].get(name) }))
  );
  const views: Record<Component, Record<string, View>> = {
    text_encoder: {},
    text_encoder_2: {},
    transformer: {},
    vae: {},
  };
  const blocks = Array.from(Map.groupBy(all, ({ tensor }) => tensor.memory), ([memory, group]) => {
    const block = `${group[0].component}/${group[0].name}`;
    for (const { component, name, tensor: { dtype, shape, strides, offset } } of group) {
      views[component][name] = { block, dtype, shape, strides, offset };
    }
    return { name: block, memory, ...denseForm(memory, [...new Set(group.map(({ tensor }) => tensor))]) };
  });
  return { blocks, views };
}

/**
 * The first weight that does not lie in its block, or undefined: views come from a file, and an address outside would be
 * read all the same.
 *
 * @param byteLength of a block by its name; undefined for one that is not there.
 */
export function outside(views: Views, byteLength: (block: string) => number | undefined): string | undefined {
  for (const component of COMPONENTS) {
    for (const [name, { block, dtype, shape, strides, offset }] of Object.entries(views[component])) {
      const elements = (byteLength(block) ?? 0) / dtypeBytes(dtype);
      const last = shape.reduce((at, size, dim) => at + (size - 1) * strides[dim], offset);
      const fits = strides.length === shape.length && strides.every((stride) => stride >= 0) &&
        (shape.includes(0) || last < elements);
      if (!fits) return `${component}/${name}`;
    }
  }
  return undefined;
}

/** All weights out of memories, by the blocks' names. Equal views are one tensor. */
export function weightsOf(
  views: Views,
  memories: ReadonlyMap<string, Memory>,
): Record<Component, Weights> {
  const known = new Map<string, Tensor>();
  const tensorOf = (view: View) => {
    const key = JSON.stringify(view);
    const { block, dtype, shape, strides, offset } = view;
    const tensor = known.get(key) ?? new Tensor(memories.get(block)!, dtype, shape, strides, offset);
    known.set(key, tensor);
    return tensor;
  };
  const parts = COMPONENTS.map((component) => {
    const tensors = Object.entries(views[component]).map(([name, view]) => [name, tensorOf(view)] as const);
    return [component, weightsFrom(new Map(tensors))];
  });
  return Object.fromEntries(parts);
}

/** Dtype and shape that say the most of a memory: of its only tensor, of what its tensors are the rows of, or bytes. */
function denseForm(memory: Memory, tensors: readonly Tensor[]): { dtype: DType; shape: readonly number[] } {
  const whole = tensors.length === 1
    ? inMemoryOrder(tensors[0])
    : joinedView(tensors.toSorted((a, b) => a.offset - b.offset));
  const bytes = { dtype: "u8", shape: [memory.byteLength] } as const;
  if (whole === undefined || !whole.isContiguous) return bytes;
  const { dtype, shape } = whole;
  return elementCount(shape) * dtypeBytes(dtype) === memory.byteLength ? { dtype, shape } : bytes;
}

/** The tensor with its dimensions in the order of their strides, the longest first. */
function inMemoryOrder(tensor: Tensor): Tensor {
  const { shape, strides } = tensor;
  // A dimension of one element stays before the others: its stride says nothing.
  const rank = (dim: number) => shape[dim] === 1 ? Infinity : strides[dim];
  return tensor.permute(
    shape.map((_, dim) => dim).sort((a, b) => rank(b) === rank(a) ? a - b : rank(b) - rank(a)),
  );
}
