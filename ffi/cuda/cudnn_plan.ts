/**
 * From tensors to something that cuDNN can execute: operation graphs for convolution and attention, and the choice of
 * an engine for them. With a described GPU as target nothing here needs a real one, so tests plan for GPUs that are
 * not there.
 */
import type { DType } from "../dtype.ts";
import {
  type Attributes,
  boolean,
  type CudnnBackend,
  CudnnError,
  dataType,
  type Descriptor,
  descriptors,
  type DescriptorType,
  enumerator,
  float,
  handleValue,
  HEADER,
  int64,
  int64s,
  pointers,
  text,
} from "./cudnn_backend.ts";

/** What plans are made for: a handle's GPU, or one that is described in cuDNN's JSON of device properties. */
export type Target = { readonly handle: bigint } | { readonly deviceProperties: string };

/** How a tensor of a graph lies in memory. */
export interface Layout {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly strides: readonly number[];
  /** Bytes that divide its address. */
  readonly alignment: number;
}

/** A convolution: `[n, c, h, w]`, `[o, c, kh, kw]`, `[n, o, oh, ow]`, `[o]`, `[n, o, oh, ow]`, as in a ConvAddPlan. */
export interface ConvLayouts {
  readonly x: Layout;
  readonly weight: Layout;
  readonly residual: Layout | undefined;
  readonly bias: Layout | undefined;
  readonly out: Layout;
  readonly stride: number;
  readonly padding: readonly [top: number, left: number, bottom: number, right: number];
}

/** Attention: `[batch, tokens, heads, headDim]` each, as in an AttentionPlan. */
export interface AttentionLayouts {
  readonly q: Layout;
  readonly k: Layout;
  readonly v: Layout;
  readonly out: Layout;
}

/** The tensors of graphs; executions give their addresses under these numbers, of those that are in memory. */
export const ID = {
  x: 1,
  weight: 2,
  bias: 3,
  out: 4,
  q: 5,
  k: 6,
  v: 7,
  scale: 8,
  product: 9,
  residual: 10,
  sum: 11,
} as const;

/** Something ready to be executed with addresses and scratch. */
export interface Executable extends Disposable {
  readonly handle: bigint;
  readonly workspaceBytes: number;
  /**
   * The plan in cuDNN's own JSON, with the kernels that it has compiled, for {@link CudnnPlanner.restore}.
   *
   * @throws {CudnnError} where cuDNN cannot write it down
   */
  json(): Uint8Array<ArrayBuffer>;
}

/** An engine with its configuration. */
export interface ExecutionPlan extends Executable {
  /** cuDNN's number of the engine, e.g. for messages. */
  readonly engine: number;
  /** What cuDNN says of its arithmetic: values of cudnnBackendNumericalNote_t. */
  readonly numericalNotes: readonly number[];
}

/** Scratch above which another engine is preferred; NCHW in bf16 takes as much as a copy of input and result. */
const MAX_WORKSPACE_BYTES = 2 * 2 ** 30;

/** Notes of engines that add parts of sums in less than f32. */
const NARROW_SUMS: readonly number[] = [HEADER.CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION];
/** Notes of engines that, in addition, would round f32 inputs to TF32 or less. */
const NARROW_INPUTS: readonly number[] = [
  ...NARROW_SUMS,
  HEADER.CUDNN_NUMERICAL_NOTE_TENSOR_CORE,
  HEADER.CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS,
];

/** Takes one of the plans, and disposes of the others that it asked for; undefined where there are none. */
export type Choose = (plans: Iterator<ExecutionPlan>) => ExecutionPlan | undefined;

const first: Choose = (plans) => {
  const { value } = plans.next();
  return value ?? undefined;
};

/** What a search for plans has met on its way. */
interface Tried {
  /** Why there may be none. */
  problem: CudnnError;
  /** The one that wants the least scratch of those that want too much. */
  smallest: ExecutionPlan | undefined;
}

/** Makes a finalized descriptor, which lives as long as the plan that it is made for. */
type Make = (type: DescriptorType, attributes: Attributes) => Descriptor;

/** Makes execution plans for one target. */
export class CudnnPlanner implements Disposable {
  readonly #deviceProperties: Descriptor | undefined;

  constructor(private readonly backend: CudnnBackend, private readonly target: Target) {
    if ("deviceProperties" in target) {
      this.#deviceProperties = backend.make("CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR", {
        CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION: text(target.deviceProperties),
      });
    }
  }

  /**
   * A convolution with sums in f32; residual and bias are added before the result is rounded. With f32 tensors no engine is
   * taken of which cuDNN notes that it uses tensor cores (TF32), narrower inputs or narrower reductions.
   *
   * The residual comes first: cuDNN's own kernels add in this order (`convolution + z + bias` of its older interface), and only
   * slower ones, which are compiled for the graph, in the other.
   *
   * @param choose which of the plans that cuDNN proposes is taken; the first when left out.
   * @throws {CudnnError} where no engine takes it
   */
  conv(layouts: ConvLayouts, choose: Choose = first): ExecutionPlan {
    const { x, weight, residual, bias, out } = withOrderedStrides(layouts);
    const { stride, padding: [top, left, bottom, right] } = layouts;
    return this.#plan(x.dtype === "f32" ? NARROW_INPUTS : NARROW_SUMS, choose, (make) => {
      const inMemory = (id: number, layout: Layout) =>
        make("CUDNN_BACKEND_TENSOR_DESCRIPTOR", tensor(id, layout));
      // What lies between two operations is never in memory, so it can stay f32.
      const between = (id: number) =>
        make("CUDNN_BACKEND_TENSOR_DESCRIPTOR", {
          ...tensor(id, { ...out, dtype: "f32", alignment: 16 }),
          CUDNN_ATTR_TENSOR_IS_VIRTUAL: boolean(true),
        });
      const addends = [
        ...(residual === undefined ? [] : [inMemory(ID.residual, residual)]),
        ...(bias === undefined ? [] : [inMemory(ID.bias, bias)]),
      ];
      const results = [
        ...[ID.product, ID.sum].slice(0, addends.length).map(between),
        inMemory(ID.out, out),
      ];
      const convolution = make("CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR", {
        CUDNN_ATTR_CONVOLUTION_COMP_TYPE: dataType("f32"),
        CUDNN_ATTR_CONVOLUTION_CONV_MODE: enumerator(
          "CUDNN_TYPE_CONVOLUTION_MODE",
          "CUDNN_CROSS_CORRELATION",
        ),
        CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS: int64(2),
        CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES: int64s([stride, stride]),
        CUDNN_ATTR_CONVOLUTION_DILATIONS: int64s([1, 1]),
        CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS: int64s([top, left]),
        CUDNN_ATTR_CONVOLUTION_POST_PADDINGS: int64s([bottom, right]),
      });
      const multiply = make("CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR", {
        CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC: descriptors(convolution),
        CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X: descriptors(inMemory(ID.x, x)),
        CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W: descriptors(inMemory(ID.weight, weight)),
        CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y: descriptors(results[0]),
        CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA: float(1),
        CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA: float(0),
      });
      const addition = make("CUDNN_BACKEND_POINTWISE_DESCRIPTOR", {
        CUDNN_ATTR_POINTWISE_MODE: enumerator("CUDNN_TYPE_POINTWISE_MODE", "CUDNN_POINTWISE_ADD"),
        CUDNN_ATTR_POINTWISE_MATH_PREC: dataType("f32"),
      });
      const additions = addends.map((addend, i) =>
        make("CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR", {
          CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR: descriptors(addition),
          CUDNN_ATTR_OPERATION_POINTWISE_XDESC: descriptors(results[i]),
          CUDNN_ATTR_OPERATION_POINTWISE_BDESC: descriptors(addend),
          CUDNN_ATTR_OPERATION_POINTWISE_YDESC: descriptors(results[i + 1]),
        })
      );
      return [multiply, ...additions];
    });
  }

  /**
   * Attention in one kernel, softmax and sums in f32. The scale is an f32 on the host, under {@link ID.scale}.
   *
   * @throws {CudnnError} where no engine takes it
   */
  attention({ q, k, v, out }: AttentionLayouts): ExecutionPlan {
    return this.#plan(NARROW_SUMS, first, (make) => {
      const heads = (id: number, layout: Layout) =>
        descriptors(make("CUDNN_BACKEND_TENSOR_DESCRIPTOR", tensor(id, headsFirst(layout))));
      const scale = make("CUDNN_BACKEND_TENSOR_DESCRIPTOR", {
        ...tensor(ID.scale, { dtype: "f32", shape: [1, 1, 1, 1], strides: [1, 1, 1, 1], alignment: 4 }),
        CUDNN_ATTR_TENSOR_IS_BY_VALUE: boolean(true),
      });
      return [make("CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR", {
        CUDNN_ATTR_OPERATION_SDPA_FWD_QDESC: heads(ID.q, q),
        CUDNN_ATTR_OPERATION_SDPA_FWD_KDESC: heads(ID.k, k),
        CUDNN_ATTR_OPERATION_SDPA_FWD_VDESC: heads(ID.v, v),
        CUDNN_ATTR_OPERATION_SDPA_FWD_ODESC: heads(ID.out, out),
        CUDNN_ATTR_OPERATION_SDPA_FWD_SCALEDESC: descriptors(scale),
      })];
    });
  }

  /**
   * A plan out of its JSON. Nothing is compiled; engines that compile want NVRTC to be open all the same.
   *
   * @throws {CudnnError} for JSON of another version of cuDNN or of another GPU, and where NVRTC is wanted
   */
  restore(json: Uint8Array<ArrayBuffer>): Executable {
    return executable(this.backend.make("CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR", {
      ...this.#targetOfPlan,
      CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION: {
        type: "CUDNN_TYPE_CHAR",
        count: json.length,
        bytes: json,
      },
    }));
  }

  [Symbol.dispose](): void {
    this.#deviceProperties?.[Symbol.dispose]();
  }

  get #targetOfPlan(): Attributes {
    return {
      ...("handle" in this.target && { CUDNN_ATTR_EXECUTION_PLAN_HANDLE: handleValue(this.target.handle) }),
      ...(this.#deviceProperties &&
        { CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP: descriptors(this.#deviceProperties) }),
    };
  }

  /**
   * A plan for the graph of the operations that `describe` makes: of the engine configurations that the heuristics
   * propose (the best first, then the fallbacks), that have none of the notes in `refused`, that can be built and do not
   * want a lot of scratch, the one that is chosen. Where all want a lot, it is the one that wants least.
   */
  #plan(
    refused: readonly number[],
    choose: Choose,
    describe: (make: Make) => readonly Descriptor[],
  ): ExecutionPlan {
    this.backend.openCompiler();
    // cuDNN keeps what a plan refers to, so all but the plan can go.
    using made = new DisposableStack();
    const make: Make = (type, attributes) => made.use(this.backend.make(type, attributes));
    const graph = make("CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR", {
      CUDNN_ATTR_OPERATIONGRAPH_OPS: descriptors(...describe(make)),
      ...("handle" in this.target && { CUDNN_ATTR_OPERATIONGRAPH_HANDLE: handleValue(this.target.handle) }),
    });
    const tried: Tried = {
      problem: new CudnnError("cuDNN: no engine takes this", HEADER.CUDNN_STATUS_NOT_SUPPORTED),
      smallest: undefined,
    };
    const plan = choose(this.#plans(graph, refused, made, tried));
    if (plan === undefined && tried.smallest === undefined) throw tried.problem;
    if (plan === undefined) return tried.smallest!;
    if (tried.smallest !== plan) tried.smallest?.[Symbol.dispose]();
    return plan;
  }

  /** The plans that need little scratch, in the order of the heuristics. What else was found goes into `tried`. */
  *#plans(
    graph: Descriptor,
    refused: readonly number[],
    made: DisposableStack,
    tried: Tried,
  ): Generator<ExecutionPlan> {
    for (const config of this.#configs(graph, made)) {
      const notes = numericalNotes(this.backend, config);
      if (notes.some((note) => refused.includes(note))) continue;
      let plan: ExecutionPlan;
      try {
        plan = this.#build(config, notes);
      } catch (error) {
        if (!(error instanceof CudnnError)) throw error;
        // What went wrong says more than what is not supported.
        if (tried.problem.unsupported) tried.problem = error;
        continue;
      }
      if (plan.workspaceBytes <= MAX_WORKSPACE_BYTES) yield plan;
      else if (tried.smallest === undefined || plan.workspaceBytes < tried.smallest.workspaceBytes) {
        tried.smallest?.[Symbol.dispose]();
        tried.smallest = plan;
      } else plan[Symbol.dispose]();
    }
  }

  #build(config: Descriptor, numericalNotes: readonly number[]): ExecutionPlan {
    const plan = this.backend.make("CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR", {
      ...this.#targetOfPlan,
      CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG: descriptors(config),
    });
    return { ...executable(plan), engine: engineNumber(this.backend, config), numericalNotes };
  }

  /** The configurations that cuDNN proposes, the best first; `made` gets them. */
  *#configs(graph: Descriptor, made: DisposableStack): Generator<Descriptor> {
    for (const mode of ["CUDNN_HEUR_MODE_A", "CUDNN_HEUR_MODE_FALLBACK"] as const) {
      let heuristics: Descriptor;
      try {
        heuristics = made.use(this.backend.make("CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR", {
          CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH: descriptors(graph),
          CUDNN_ATTR_ENGINEHEUR_MODE: enumerator("CUDNN_TYPE_HEUR_MODE", mode),
          ...(this.#deviceProperties &&
            { CUDNN_ATTR_ENGINEHEUR_DEVICEPROP: descriptors(this.#deviceProperties) }),
        }));
      } catch (error) {
        if (!(error instanceof CudnnError && error.unsupported)) throw error;
        continue; // this mode knows nothing for the graph
      }
      const [results, type] = ["CUDNN_ATTR_ENGINEHEUR_RESULTS", "CUDNN_TYPE_BACKEND_DESCRIPTOR"] as const;
      const count = heuristics.get(results, type, 0, new BigInt64Array(0));
      const configs = Array.from(
        { length: count },
        () => made.use(this.backend.create("CUDNN_BACKEND_ENGINECFG_DESCRIPTOR")),
      );
      const found = heuristics.get(results, type, count, BigInt64Array.from(configs, ({ handle }) => handle));
      yield* configs.slice(0, found);
    }
  }
}

/** Takes the plan's descriptor over. */
function executable(plan: Descriptor): Executable {
  return {
    handle: plan.handle,
    workspaceBytes: plan.getInt64("CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE"),
    json: () => plan.getText("CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION"),
    [Symbol.dispose]: () => plan[Symbol.dispose](),
  };
}

/** What an execution works on: the addresses of the graph's tensors, and of scratch. */
export function variantPack(
  backend: CudnnBackend,
  addresses: readonly (readonly [id: number, pointer: bigint])[],
  workspace: bigint,
): Descriptor {
  return backend.make("CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR", {
    CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS: int64s(addresses.map(([id]) => id)),
    CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS: pointers(addresses.map(([, pointer]) => pointer)),
    CUDNN_ATTR_VARIANT_PACK_WORKSPACE: pointers([workspace]),
  });
}

function tensor(id: number, { dtype, shape, strides, alignment }: Layout): Attributes {
  return {
    CUDNN_ATTR_TENSOR_UNIQUE_ID: int64(id),
    CUDNN_ATTR_TENSOR_DATA_TYPE: dataType(dtype),
    CUDNN_ATTR_TENSOR_DIMENSIONS: int64s(shape),
    CUDNN_ATTR_TENSOR_STRIDES: int64s(strides),
    CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT: int64(alignment),
  };
}

/** `[batch, tokens, heads, headDim]` as cuDNN names the dimensions: `[batch, heads, tokens, headDim]`. */
function headsFirst({ dtype, shape, strides, alignment }: Layout): Layout {
  const order = [0, 2, 1, 3];
  return {
    dtype,
    shape: order.map((dim) => shape[dim]),
    strides: order.map((dim) => strides[dim]),
    alignment,
  };
}

/** The engine of a configuration. */
function engineOf(backend: CudnnBackend, config: Descriptor): Descriptor {
  const engine = backend.create("CUDNN_BACKEND_ENGINE_DESCRIPTOR");
  config.get(
    "CUDNN_ATTR_ENGINECFG_ENGINE",
    "CUDNN_TYPE_BACKEND_DESCRIPTOR",
    1,
    BigInt64Array.of(engine.handle),
  );
  return engine;
}

function engineNumber(backend: CudnnBackend, config: Descriptor): number {
  using engine = engineOf(backend, config);
  return engine.getInt64("CUDNN_ATTR_ENGINE_GLOBAL_INDEX");
}

function numericalNotes(backend: CudnnBackend, config: Descriptor): number[] {
  using engine = engineOf(backend, config);
  const most = HEADER.CUDNN_NUMERICAL_NOTE_TYPE_COUNT;
  const notes = new Int32Array(most);
  const count = engine.get("CUDNN_ATTR_ENGINE_NUMERICAL_NOTE", "CUDNN_TYPE_NUMERICAL_NOTE", most, notes);
  return [...notes.subarray(0, count)];
}

/** Bias as cuDNN adds it, and for dimensions of one element, whose strides say nothing, strides in the order of x. */
function withOrderedStrides(
  { x, weight, residual, bias, out }: ConvLayouts,
): Pick<ConvLayouts, "x" | "weight" | "residual" | "bias" | "out"> {
  const channelsLast = x.strides[1] === 1 && x.shape[1] > 1;
  const order = channelsLast ? [1, 3, 2, 0] : [3, 2, 1, 0]; // from the innermost dimension on
  const inOrder = (layout: Layout): Layout => {
    const strides = [...layout.strides];
    let next = 1;
    for (const dim of order) {
      if (layout.shape[dim] === 1) strides[dim] = next;
      next = strides[dim] * layout.shape[dim];
    }
    return { ...layout, strides };
  };
  const [channels] = weight.shape;
  const spread = bias && { ...bias, shape: [1, channels, 1, 1], strides: [1, bias.strides[0], 1, 1] };
  return {
    x: inOrder(x),
    weight: inOrder(weight),
    residual: residual && inOrder(residual),
    bias: spread && inOrder(spread),
    out: inOrder(out),
  };
}
