/**
 * cuDNN on one device: convolution and attention through its graph API. cudnn_backend.ts has the C functions and
 * descriptors, cudnn_plan.ts the graphs and the choice of engines.
 */
import type { ConvPlan } from "../device.ts";
import type { AttentionPlan, ConvAddPlan } from "../gpu.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext } from "./context.ts";
import { CudnnBackend, CudnnError } from "./cudnn_backend.ts";
import {
  type AttentionLayouts,
  type ConvLayouts,
  CudnnPlanner,
  type Executable,
  type ExecutionPlan,
  ID,
  type Layout,
  variantPack,
} from "./cudnn_plan.ts";

/** The first version with attention as one operation that NVIDIA's own frontend uses. */
const ATTENTION_VERSION = 91301;
/** Alignments above this make no difference to engines. */
const MAX_ALIGNMENT = 16;

/** Plans that are measured, at most: some engines compile for a second. */
const MEASURED = 5;

/** Where the tensors of a graph are. */
type Addresses = readonly (readonly [id: number, pointer: bigint])[];

/** 16-bit elements in 16 bytes. */
const ROW_ELEMENTS = 8;

/** Whether dtypes, sizes and places are such that cuDNN is asked for attention. */
export function cudnnTakesAttention({ q, k, v, out }: AttentionPlan): boolean {
  const headDim = q.shape[3];
  if (headDim % 8 !== 0 || headDim > 256) return false;
  if ((q.dtype !== "bf16" && q.dtype !== "f16") || [k, v, out].some(({ dtype }) => dtype !== q.dtype)) {
    return false;
  }
  // Engines move 16 bytes at a time, and take it for granted that rows start at multiples of that.
  return [q, k, v, out].every(({ strides, shape }) =>
    strides.every((stride, dim) => dim === 3 || shape[dim] <= 1 || stride % ROW_ELEMENTS === 0)
  );
}

/** A cuDNN handle and what plans for its GPU. */
interface Session {
  readonly handle: bigint;
  readonly planner: CudnnPlanner;
}

/** Convolutions and attention, planned once for each layout of their tensors. */
export class Cudnn implements Disposable {
  /** E.g. `"9.14.0"`. */
  readonly version: string;
  readonly #backend: CudnnBackend;
  #opened: Session | undefined;
  readonly #plans = new Map<string, Executable>();
  /** Work that may be done elsewhere, and that no engine takes. */
  readonly #refused = new Set<string>();
  // An array on the heap of V8 could move; this one keeps its address.
  readonly #scale = new Float32Array(new ArrayBuffer(4));
  readonly #scalePointer = Deno.UnsafePointer.value(Deno.UnsafePointer.of(this.#scale));

  /**
   * Finds and opens libcudnn; the handle is made at the first use.
   *
   * @throws {FfiError} where it, or a library that it needs, is not installed
   */
  constructor(private readonly context: CudaContext) {
    this.#backend = new CudnnBackend();
    this.version = this.#backend.version;
  }

  /**
   * Issues a convolution to the device's stream. `x`, `weight` and `out` are all f32, all bf16 or all f16, `bias` of
   * their dtype or f32; all of them NCHW with `[o, c, kh, kw]` weights, or all NHWC with weights `[o, kh, kw, c]` in
   * memory. Sums are in f32, and f32 inputs are multiplied as they are (no TF32).
   *
   * @throws {CudnnError} with the tensors, where no engine takes them, and for every other status
   */
  conv(plan: ConvPlan): void {
    if (plan.out.size === 0) return;
    const { key, layouts, addresses } = convolution(plan);
    this.context.driver.enter();
    const prepared = this.#planned(
      key,
      (planner) => planner.conv(layouts, (plans) => this.#fastest(key, plans, addresses)),
    );
    this.#execute(key, prepared, addresses);
  }

  /**
   * Issues a convolution with something added to it, as {@link conv} otherwise, and returns true, or returns false where no
   * engine takes that, and in f32, of which cuDNN's fast engines round the inputs.
   *
   * @throws {CudnnError} with the tensors, where something goes wrong
   */
  convAdd(plan: ConvAddPlan): boolean {
    if (plan.x.dtype === "f32") return false;
    if (plan.out.size === 0) return true;
    const { key, layouts, addresses } = convolution(plan, plan.residual);
    const prepared = this.#plannedUnlessRefused(
      key,
      (planner) => planner.conv(layouts, (plans) => this.#fastest(key, plans, addresses)),
    );
    if (prepared === undefined) return false;
    this.#execute(key, prepared, addresses);
    return true;
  }

  /**
   * Issues attention to the device's stream and returns true, or returns false where cuDNN does not do it: tensors that
   * are not all bf16 or all f16, head sizes that are no multiple of 8 or above 256, rows that do not start at multiples of
   * 16 bytes, versions before 9.13.1, GPUs that no engine is made for. Softmax and sums are in f32.
   *
   * @throws {CudnnError} with the tensors, where something goes wrong
   */
  attention(plan: AttentionPlan): boolean {
    if (this.#backend.versionNumber < ATTENTION_VERSION || !cudnnTakesAttention(plan)) return false;
    const { q, k, v, out, scale } = plan;
    if (out.size === 0) return true;
    const layouts: AttentionLayouts = { q: layoutOf(q), k: layoutOf(k), v: layoutOf(v), out: layoutOf(out) };
    const key = `attention ${text(layouts.q)} ${text(layouts.k)} ${text(layouts.v)} ${text(layouts.out)}`;
    const prepared = this.#plannedUnlessRefused(key, (planner) => planner.attention(layouts));
    if (prepared === undefined) return false;
    this.#scale[0] = scale;
    this.#execute(key, prepared, [
      [ID.q, q.pointer],
      [ID.k, k.pointer],
      [ID.v, v.pointer],
      [ID.out, out.pointer],
      [ID.scale, this.#scalePointer],
    ]);
    return true;
  }

  /** The plans so far in cuDNN's JSON, none for what it refuses: for {@link CudaContext.prepared} of a later process. */
  *serialized(): Generator<[key: string, json: Uint8Array<ArrayBuffer>]> {
    this.context.driver.enter();
    for (const key of this.#refused) yield [this.#keyOfPlan(key), new Uint8Array(0)];
    for (const [key, plan] of this.#plans) {
      try {
        yield [this.#keyOfPlan(key), plan.json()];
      } catch (error) {
        if (!(error instanceof CudnnError)) throw error; // an engine that cannot be written down is planned anew
      }
    }
  }

  [Symbol.dispose](): void {
    if (this.#opened !== undefined) {
      const { handle, planner } = this.#opened;
      this.context.driver.enter();
      for (const plan of this.#plans.values()) plan[Symbol.dispose]();
      planner[Symbol.dispose]();
      this.#backend.check(this.#backend.symbols.cudnnDestroy(handle), "cudnnDestroy");
    }
    this.#backend[Symbol.dispose]();
  }

  get #session(): Session {
    if (this.#opened === undefined) {
      const { cudnnCreate, cudnnSetStream } = this.#backend.symbols;
      const out = new BigUint64Array(1);
      this.#backend.check(cudnnCreate(out), "cudnnCreate");
      const [handle] = out;
      this.#backend.check(cudnnSetStream(handle, this.context.stream), "cudnnSetStream");
      this.#opened = { handle, planner: new CudnnPlanner(this.#backend, { handle }) };
    }
    return this.#opened;
  }

  #keyOfPlan(key: string): string {
    return `cuDNN ${this.version} plan of ${key}`;
  }

  /** What an earlier process has left for this work. */
  #prepared(key: string): Uint8Array<ArrayBuffer> | undefined {
    return this.context.prepared(this.#keyOfPlan(key));
  }

  /** The plan for some work: of this process, of an earlier one, or made now. */
  #planned(key: string, make: (planner: CudnnPlanner) => Executable): Executable {
    let prepared = this.#plans.get(key);
    if (prepared === undefined) {
      const { planner } = this.#session;
      prepared = this.#restored(key) ?? named(key, () => make(planner));
      this.#plans.set(key, prepared);
    }
    return prepared;
  }

  /** As {@link #planned}, or undefined where no engine takes the work, which is remembered. */
  #plannedUnlessRefused(
    key: string,
    make: (planner: CudnnPlanner) => Executable,
  ): Executable | undefined {
    if (this.#refused.has(key) || this.#prepared(key)?.length === 0) return undefined;
    this.context.driver.enter();
    try {
      return this.#planned(key, make);
    } catch (error) {
      if (!(error instanceof CudnnError && error.unsupported)) throw error;
      this.#refused.add(key);
      return undefined;
    }
  }

  /** The plan of an earlier process, or undefined: there is none, or cuDNN does not take it any more. */
  #restored(key: string): Executable | undefined {
    const json = this.#prepared(key);
    if (json === undefined) return undefined;
    const { planner } = this.#session;
    const attempt = () => {
      try {
        return planner.restore(json);
      } catch (error) {
        if (!(error instanceof CudnnError)) throw error;
        return undefined;
      }
    };
    const restored = attempt();
    if (restored !== undefined) return restored;
    this.#backend.openCompiler(); // engines that have compiled a kernel take it only where they could compile it
    return attempt();
  }

  /** The plan that the device chooses; only the first is built where it does not measure. */
  #fastest(
    key: string,
    plans: Iterator<ExecutionPlan>,
    addresses: Addresses,
  ): ExecutionPlan | undefined {
    const built: ExecutionPlan[] = [];
    const build = (count: number) => {
      while (built.length < count) {
        const { value, done } = plans.next();
        if (done) return;
        built.push(value);
      }
    };
    const runs = (plan: ExecutionPlan) => () => {
      try {
        this.#execute(key, plan, addresses);
        return true;
      } catch (error) {
        if (!(error instanceof CudnnError && error.unsupported)) throw error;
        return false;
      }
    };
    const index = this.context.choose(`cuDNN ${this.version} ${key}`, () => {
      build(MEASURED);
      return built.map(runs);
    });
    build(index + 1);
    const chosen = built[index] ?? built[0];
    for (const plan of built) if (plan !== chosen) plan[Symbol.dispose]();
    return chosen;
  }

  #execute(
    key: string,
    plan: Executable,
    addresses: Addresses,
  ): void {
    const workspace = plan.workspaceBytes === 0 ? 0n : this.context.workspace(plan.workspaceBytes);
    using pack = variantPack(this.#backend, addresses, workspace);
    const { cudnnBackendExecute } = this.#backend.symbols;
    const status = cudnnBackendExecute(this.#session.handle, plan.handle, pack.handle);
    named(key, () => this.#backend.check(status, "cudnnBackendExecute"));
  }
}

/** A convolution as cuDNN plans it, and where its tensors are; `residual` is added to it. */
function convolution(
  { x, weight, bias, out, stride, padding }: ConvPlan,
  residual?: Tensor,
): { readonly key: string; readonly layouts: ConvLayouts; readonly addresses: Addresses } {
  const layouts: ConvLayouts = {
    x: layoutOf(x),
    weight: layoutOf(weight),
    residual: residual && layoutOf(residual),
    bias: bias && layoutOf(bias),
    out: layoutOf(out),
    stride,
    padding,
  };
  const { x: input, weight: filter, residual: added, bias: shift, out: result } = layouts;
  const key = `conv ${text(input)} ${text(filter)} ${shift && text(shift)} ${
    text(result)
  } ${stride} ${padding}${added === undefined ? "" : ` plus ${text(added)}`}`;
  const tensors = [[ID.x, x], [ID.weight, weight], [ID.out, out], [ID.bias, bias], [
    ID.residual,
    residual,
  ]] as const;
  const addresses = tensors.flatMap(([id, tensor]) =>
    tensor === undefined ? [] : [[id, tensor.pointer] as const]
  );
  return { key, layouts, addresses };
}

function layoutOf({ dtype, shape, strides, pointer }: Tensor): Layout {
  const low = Number(BigInt.asUintN(4, pointer));
  return { dtype, shape, strides, alignment: low === 0 ? MAX_ALIGNMENT : low & -low };
}

/** A layout in words: part of a plan's key and of messages. */
function text({ dtype, shape, strides, alignment }: Layout): string {
  return `${dtype} [${shape}] strides [${strides}]${
    alignment === MAX_ALIGNMENT ? "" : ` aligned to ${alignment}`
  }`;
}

/** Runs `body`; cuDNN's errors tell what it was about. */
function named<T>(what: string, body: () => T): T {
  try {
    return body();
  } catch (error) {
    if (!(error instanceof CudnnError)) throw error;
    throw new CudnnError(`${error.message}, for ${what}`, error.status);
  }
}
