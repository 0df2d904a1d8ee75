/**
 * oneDNN 2.x by FFI: the C functions in use, and {@link OneDnn}, which checks every status and keeps primitives.
 *
 * Source: `oneapi/dnnl/dnnl.h` and `dnnl_types.h` of oneDNN 2.6.3 (Debian's libdnnl-dev). Version 3 has the same names
 * but no operation descriptors: it is refused. All calls are made on one thread, because each thread that calls gets
 * an OpenMP team of its own.
 */
import type { DType } from "../dtype.ts";
import { FfiError } from "../errors.ts";
import { type OpenedLibrary, openLibrary, pinLibrary } from "../library.ts";

const DNNL = {
  // const dnnl_version_t *dnnl_version(void)
  dnnl_version: { parameters: [], result: "pointer" },
  // dnnl_cpu_isa_t dnnl_get_effective_cpu_isa(void)
  dnnl_get_effective_cpu_isa: { parameters: [], result: "i32" },
  // dnnl_status_t dnnl_engine_create(dnnl_engine_t *engine, dnnl_engine_kind_t kind, size_t index)
  dnnl_engine_create: { parameters: ["buffer", "i32", "usize"], result: "i32" },
  // dnnl_status_t dnnl_engine_destroy(dnnl_engine_t engine)
  dnnl_engine_destroy: { parameters: ["pointer"], result: "i32" },
  // dnnl_status_t dnnl_stream_create(dnnl_stream_t *stream, dnnl_engine_t engine, unsigned flags)
  dnnl_stream_create: { parameters: ["buffer", "pointer", "u32"], result: "i32" },
  // dnnl_status_t dnnl_stream_wait(dnnl_stream_t stream)
  dnnl_stream_wait: { parameters: ["pointer"], result: "i32" },
  // dnnl_status_t dnnl_stream_destroy(dnnl_stream_t stream)
  dnnl_stream_destroy: { parameters: ["pointer"], result: "i32" },
  // dnnl_status_t dnnl_memory_desc_init_by_strides(dnnl_memory_desc_t *md, int ndims, const dnnl_dims_t dims,
  //     dnnl_data_type_t data_type, const dnnl_dims_t strides)
  dnnl_memory_desc_init_by_strides: {
    parameters: ["buffer", "i32", "buffer", "i32", "buffer"],
    result: "i32",
  },
  // dnnl_status_t dnnl_memory_desc_init_by_tag(dnnl_memory_desc_t *md, int ndims, const dnnl_dims_t dims,
  //     dnnl_data_type_t data_type, dnnl_format_tag_t tag)
  dnnl_memory_desc_init_by_tag: { parameters: ["buffer", "i32", "buffer", "i32", "i32"], result: "i32" },
  // int dnnl_memory_desc_equal(const dnnl_memory_desc_t *lhs, const dnnl_memory_desc_t *rhs)
  dnnl_memory_desc_equal: { parameters: ["buffer", "buffer"], result: "i32" },
  // size_t dnnl_memory_desc_get_size(const dnnl_memory_desc_t *md)
  dnnl_memory_desc_get_size: { parameters: ["buffer"], result: "usize" },
  // dnnl_status_t dnnl_memory_create(dnnl_memory_t *memory, const dnnl_memory_desc_t *md, dnnl_engine_t engine,
  //     void *handle)
  dnnl_memory_create: { parameters: ["buffer", "buffer", "pointer", "pointer"], result: "i32" },
  // dnnl_status_t dnnl_memory_set_data_handle(dnnl_memory_t memory, void *handle)
  dnnl_memory_set_data_handle: { parameters: ["pointer", "pointer"], result: "i32" },
  // dnnl_status_t dnnl_memory_destroy(dnnl_memory_t memory)
  dnnl_memory_destroy: { parameters: ["pointer"], result: "i32" },
  // dnnl_status_t dnnl_primitive_attr_create(dnnl_primitive_attr_t *attr)
  dnnl_primitive_attr_create: { parameters: ["buffer"], result: "i32" },
  // dnnl_status_t dnnl_primitive_attr_set_output_scales(dnnl_primitive_attr_t attr, dnnl_dim_t count, int mask,
  //     const float *scales)
  dnnl_primitive_attr_set_output_scales: { parameters: ["pointer", "i64", "i32", "buffer"], result: "i32" },
  // dnnl_status_t dnnl_primitive_attr_destroy(dnnl_primitive_attr_t attr)
  dnnl_primitive_attr_destroy: { parameters: ["pointer"], result: "i32" },
  // dnnl_status_t dnnl_matmul_desc_init(dnnl_matmul_desc_t *desc, const dnnl_memory_desc_t *src,
  //     const dnnl_memory_desc_t *weights, const dnnl_memory_desc_t *bias, const dnnl_memory_desc_t *dst)
  dnnl_matmul_desc_init: { parameters: ["buffer", "buffer", "buffer", "buffer", "buffer"], result: "i32" },
  // dnnl_status_t dnnl_convolution_forward_desc_init(dnnl_convolution_desc_t *desc, dnnl_prop_kind_t prop_kind,
  //     dnnl_alg_kind_t alg_kind, const dnnl_memory_desc_t *src, const dnnl_memory_desc_t *weights,
  //     const dnnl_memory_desc_t *bias, const dnnl_memory_desc_t *dst, const dnnl_dims_t strides,
  //     const dnnl_dims_t padding_l, const dnnl_dims_t padding_r)
  dnnl_convolution_forward_desc_init: {
    parameters: [
      "buffer",
      "i32",
      "i32",
      "buffer",
      "buffer",
      "buffer",
      "buffer",
      "buffer",
      "buffer",
      "buffer",
    ],
    result: "i32",
  },
  // dnnl_status_t dnnl_reorder_primitive_desc_create(dnnl_primitive_desc_t *pd, const dnnl_memory_desc_t *src,
  //     dnnl_engine_t src_engine, const dnnl_memory_desc_t *dst, dnnl_engine_t dst_engine,
  //     const_dnnl_primitive_attr_t attr)
  dnnl_reorder_primitive_desc_create: {
    parameters: ["buffer", "buffer", "pointer", "buffer", "pointer", "pointer"],
    result: "i32",
  },
  // dnnl_status_t dnnl_primitive_desc_create(dnnl_primitive_desc_t *pd, const_dnnl_op_desc_t op_desc,
  //     const_dnnl_primitive_attr_t attr, dnnl_engine_t engine, const_dnnl_primitive_desc_t hint_forward)
  dnnl_primitive_desc_create: {
    parameters: ["buffer", "buffer", "pointer", "pointer", "pointer"],
    result: "i32",
  },
  // const dnnl_memory_desc_t *dnnl_primitive_desc_query_md(const_dnnl_primitive_desc_t pd, dnnl_query_t what,
  //     int index)
  dnnl_primitive_desc_query_md: { parameters: ["pointer", "i32", "i32"], result: "pointer" },
  // dnnl_status_t dnnl_primitive_desc_query(const_dnnl_primitive_desc_t pd, dnnl_query_t what, int index,
  //     void *result)
  dnnl_primitive_desc_query: { parameters: ["pointer", "i32", "i32", "buffer"], result: "i32" },
  // dnnl_status_t dnnl_primitive_desc_destroy(dnnl_primitive_desc_t pd)
  dnnl_primitive_desc_destroy: { parameters: ["pointer"], result: "i32" },
  // dnnl_status_t dnnl_primitive_create(dnnl_primitive_t *primitive, const_dnnl_primitive_desc_t pd)
  dnnl_primitive_create: { parameters: ["buffer", "pointer"], result: "i32" },
  // dnnl_status_t dnnl_primitive_execute(const_dnnl_primitive_t primitive, dnnl_stream_t stream, int nargs,
  //     const dnnl_exec_arg_t *args)
  dnnl_primitive_execute: { parameters: ["pointer", "pointer", "i32", "buffer"], result: "i32" },
  // dnnl_status_t dnnl_primitive_destroy(dnnl_primitive_t primitive)
  dnnl_primitive_destroy: { parameters: ["pointer"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

// Constants of dnnl_types.h, under its own names without the prefix.
const STATUS = [
  "success",
  "out of memory",
  "invalid arguments",
  "unimplemented",
  "iterator ends",
  "runtime error",
];
const DATA_TYPE: Partial<Record<DType, number>> = { bf16: 2, f32: 3 };
const FORMAT_TAG_ANY = 1;
const ENGINE_CPU = 1;
const STREAM_DEFAULT_FLAGS = 1;
const FORWARD_INFERENCE = 96;
const CONVOLUTION_AUTO = 3;
const QUERY_IMPL_INFO_STR = 8;
const QUERY_SRC_MD = 129;
const QUERY_WEIGHTS_MD = 131; // index 1 is the bias
const QUERY_DST_MD = 133;
const ARG_SRC = 1; // also "from" of a reorder
const ARG_DST = 17; // also "to" of a reorder
const ARG_WEIGHTS = 33;
const ARG_BIAS = 41;
const CPU_ISA_NAMES: Readonly<Record<number, string>> = {
  0x1: "sse41",
  0x3: "avx",
  0x7: "avx2",
  0x27: "avx512_core",
  0x67: "avx512_core_vnni",
  0xe7: "avx512_core_bf16",
  0x3e7: "avx512_core_amx",
  0x407: "avx2_vnni",
};
/** All bits of avx512_core_bf16: with them bf16 products run natively. */
const CPU_ISA_BF16 = 0xe7;

// Sizes of the structs in bytes, from the 2.6.3 headers.
const MEMORY_DESC_BYTES = 696;
const MATMUL_DESC_BYTES = 2800;
const CONVOLUTION_DESC_BYTES = 5976;
const EXEC_ARG_BYTES = 16; // i32 arg, then at 8 the dnnl_memory_t

/** Primitives that are kept; beyond that the one goes that was not used for the longest time. */
const MAX_PRIMITIVES = 512;

const HINT = "apt-get install libdnnl2 (Debian, Ubuntu)";

/** How a tensor lies in memory. Without `strides` oneDNN chooses the layout (format tag "any"). */
export interface Layout {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly strides?: readonly number[] | undefined;
}

/** A dnnl_memory_desc_t. */
export type MemoryDesc = Uint8Array<ArrayBuffer>;

/** A compiled operation. Its data pointers are handed in with each execution. */
export interface Primitive {
  /** Implementation's own name, e.g. `"brgemm:avx512_core"`; the slow reference's start with "ref". */
  readonly implementation: string;
  /** Layouts as compiled: those that were left to oneDNN are known here. */
  readonly source: MemoryDesc;
  readonly weights: MemoryDesc | undefined;
  readonly target: MemoryDesc;
  readonly handle: Deno.PointerValue;
  readonly descriptor: Deno.PointerValue;
  /** Memory objects in the order source, weights, target, bias (a reorder: source, target). */
  readonly memories: readonly Deno.PointerValue[];
  readonly args: Uint8Array<ArrayBuffer>;
}

/** The operands of one product `[m, k] x [k, n] + [1, n]`. */
export interface MatmulLayouts {
  readonly source: Layout;
  readonly weights: Layout;
  readonly target: Layout;
  readonly bias: Layout | undefined;
  readonly alpha: number;
}

/** The operands of one convolution: `[n, c, h, w]`, `[o, c, kh, kw]`, `[o]`, `[n, o, oh, ow]`. */
export interface ConvLayouts {
  readonly source: Layout;
  readonly weights: Layout;
  readonly target: Layout;
  readonly bias: Layout | undefined;
  readonly stride: number;
  readonly padding: readonly [number, number, number, number];
}

/** An opened oneDNN with its engine, its stream and the primitives made so far. */
export class OneDnn implements Disposable {
  /** E.g. `"2.6.3"`. */
  readonly version: string;
  /** The instructions that it uses, e.g. `"avx512_core_bf16"`. */
  readonly isa: string;
  /** Whether bf16 products run natively. */
  readonly nativeBfloat16: boolean;
  readonly #lib: OpenedLibrary<typeof DNNL>;
  readonly #engine: Deno.PointerValue;
  readonly #stream: Deno.PointerValue;
  readonly #primitives = new Map<string, Primitive>();
  #closed = false;

  /**
   * Finds and opens libdnnl, with `threads` OpenMP threads.
   *
   * @throws {FfiError} with the reason: not found (a LibraryNotFoundError), another major version, no permission
   */
  constructor(threads: number) {
    shortenSpinning();
    const { version, soname } = findVersion2();
    this.version = version;
    this.#lib = openLibrary("oneDNN", DNNL, { sonames: [soname], hint: HINT });
    setThreads(threads);
    const isa = this.#lib.symbols.dnnl_get_effective_cpu_isa();
    this.isa = CPU_ISA_NAMES[isa] ?? `isa 0x${isa.toString(16)}`;
    this.nativeBfloat16 = (isa & CPU_ISA_BF16) === CPU_ISA_BF16;
    const { dnnl_engine_create, dnnl_stream_create } = this.#lib.symbols;
    this.#engine = created("dnnl_engine_create", (out) => dnnl_engine_create(out, ENGINE_CPU, 0n));
    this.#stream = created(
      "dnnl_stream_create",
      (out) => dnnl_stream_create(out, this.#engine, STREAM_DEFAULT_FLAGS),
    );
  }

  /** Names of the implementations in use, e.g. `["matmul brgemm:avx512_core"]`: the tests refuse slow ones. */
  implementations(): string[] {
    const names = [...this.#primitives].map(([key, { implementation }]) =>
      `${key.split(" ")[0]} ${implementation}`
    );
    return [...new Set(names)];
  }

  /** The primitive of a matrix product. Throws {@link FfiError} for what oneDNN does not do on this CPU. */
  matmul(layouts: MatmulLayouts): Primitive {
    const { source, weights, target, bias, alpha } = layouts;
    const key = `matmul ${text(source)} ${text(weights)} ${text(target)} ${bias ? text(bias) : "-"} ${alpha}`;
    return this.#primitive(key, () => {
      const desc = new Uint8Array(MATMUL_DESC_BYTES);
      check(
        "dnnl_matmul_desc_init",
        this.#lib.symbols.dnnl_matmul_desc_init(
          desc,
          this.describe(source),
          this.describe(weights),
          bias === undefined ? null : this.describe(bias),
          this.describe(target),
        ),
      );
      return this.#compile(desc, bias !== undefined, alpha);
    });
  }

  /** The primitive of a convolution. Throws {@link FfiError} for what oneDNN does not do on this CPU. */
  conv(layouts: ConvLayouts): Primitive {
    const { source, weights, target, bias, stride, padding } = layouts;
    const key = `conv ${text(source)} ${text(weights)} ${text(target)} ${
      bias ? text(bias) : "-"
    } ${stride} ${padding}`;
    return this.#primitive(key, () => {
      const desc = new Uint8Array(CONVOLUTION_DESC_BYTES);
      const [top, left, bottom, right] = padding;
      check(
        "dnnl_convolution_forward_desc_init",
        this.#lib.symbols.dnnl_convolution_forward_desc_init(
          desc,
          FORWARD_INFERENCE,
          CONVOLUTION_AUTO,
          this.describe(source),
          this.describe(weights),
          bias === undefined ? null : this.describe(bias),
          this.describe(target),
          dims([stride, stride]),
          dims([top, left]),
          dims([bottom, right]),
        ),
      );
      return this.#compile(desc, bias !== undefined, 1);
    });
  }

  /** The primitive that copies from one layout to another of the same sizes. */
  reorder(source: MemoryDesc, target: MemoryDesc): Primitive {
    return this.#primitive(`reorder ${fingerprint(source)} ${fingerprint(target)}`, () => {
      const { dnnl_reorder_primitive_desc_create } = this.#lib.symbols;
      const descriptor = created(
        "dnnl_reorder_primitive_desc_create",
        (out) => dnnl_reorder_primitive_desc_create(out, source, this.#engine, target, this.#engine, null),
      );
      return this.#instantiate(descriptor, { source, weights: undefined, target }, [
        [ARG_SRC, source],
        [ARG_DST, target],
      ]);
    });
  }

  /** Runs a primitive and waits for it. `pointers` are in the order of {@link Primitive.memories}. */
  execute(primitive: Primitive, pointers: readonly bigint[]): void {
    const { dnnl_memory_set_data_handle, dnnl_primitive_execute, dnnl_stream_wait } = this.#lib.symbols;
    for (const [i, memory] of primitive.memories.entries()) {
      check(
        "dnnl_memory_set_data_handle",
        dnnl_memory_set_data_handle(memory, Deno.UnsafePointer.create(pointers[i])),
      );
    }
    const count = primitive.memories.length;
    check(
      "dnnl_primitive_execute",
      dnnl_primitive_execute(primitive.handle, this.#stream, count, primitive.args),
    );
    check("dnnl_stream_wait", dnnl_stream_wait(this.#stream));
  }

  /** The memory descriptor of a layout. */
  describe(layout: Layout): MemoryDesc {
    const { dtype, shape, strides } = layout;
    const type = DATA_TYPE[dtype];
    if (type === undefined) throw new FfiError(`oneDNN: no ${dtype} here`);
    const desc = new Uint8Array(MEMORY_DESC_BYTES);
    const { dnnl_memory_desc_init_by_strides, dnnl_memory_desc_init_by_tag } = this.#lib.symbols;
    if (strides === undefined) {
      const status = dnnl_memory_desc_init_by_tag(desc, shape.length, dims(shape), type, FORMAT_TAG_ANY);
      check("dnnl_memory_desc_init_by_tag", status, text(layout));
    } else {
      const status = dnnl_memory_desc_init_by_strides(desc, shape.length, dims(shape), type, dims(strides));
      check("dnnl_memory_desc_init_by_strides", status, text(layout));
    }
    return desc;
  }

  /** Whether two descriptors say the same. */
  same(a: MemoryDesc, b: MemoryDesc): boolean {
    return this.#lib.symbols.dnnl_memory_desc_equal(a, b) !== 0;
  }

  /** Bytes that a tensor of this description takes, with the padding of blocked layouts. */
  byteLength(desc: MemoryDesc): number {
    return Number(this.#lib.symbols.dnnl_memory_desc_get_size(desc));
  }

  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const primitive of this.#primitives.values()) this.#destroy(primitive);
    this.#primitives.clear();
    check("dnnl_stream_destroy", this.#lib.symbols.dnnl_stream_destroy(this.#stream));
    check("dnnl_engine_destroy", this.#lib.symbols.dnnl_engine_destroy(this.#engine));
    this.#lib.close();
  }

  #primitive(key: string, make: () => Primitive): Primitive {
    if (this.#closed) throw new FfiError("cpu: the device was closed");
    let found = this.#primitives.get(key);
    if (found === undefined) {
      found = make();
      if (this.#primitives.size >= MAX_PRIMITIVES) {
        const [[oldest, primitive]] = this.#primitives;
        this.#primitives.delete(oldest);
        this.#destroy(primitive);
      }
    } else {
      this.#primitives.delete(key); // to the end of the map: the last one to go
    }
    this.#primitives.set(key, found);
    return found;
  }

  /** Compiles an operation descriptor; the result is multiplied by `alpha` before the bias is added. */
  #compile(operation: Uint8Array<ArrayBuffer>, bias: boolean, alpha: number): Primitive {
    const {
      dnnl_primitive_attr_create,
      dnnl_primitive_attr_set_output_scales,
      dnnl_primitive_attr_destroy,
      dnnl_primitive_desc_create,
    } = this.#lib.symbols;
    let attr: Deno.PointerValue = null;
    if (alpha !== 1) {
      attr = created("dnnl_primitive_attr_create", (out) => dnnl_primitive_attr_create(out));
      const scale = new Float32Array([alpha]);
      check(
        "dnnl_primitive_attr_set_output_scales",
        dnnl_primitive_attr_set_output_scales(attr, 1n, 0, scale),
      );
    }
    try {
      const descriptor = created(
        "dnnl_primitive_desc_create",
        (out) => dnnl_primitive_desc_create(out, operation, attr, this.#engine, null),
      );
      const source = this.#query(descriptor, QUERY_SRC_MD, 0);
      const weights = this.#query(descriptor, QUERY_WEIGHTS_MD, 0);
      const target = this.#query(descriptor, QUERY_DST_MD, 0);
      const args: [number, MemoryDesc][] = [[ARG_SRC, source], [ARG_WEIGHTS, weights], [ARG_DST, target]];
      if (bias) args.push([ARG_BIAS, this.#query(descriptor, QUERY_WEIGHTS_MD, 1)]);
      return this.#instantiate(descriptor, { source, weights, target }, args);
    } finally {
      if (attr !== null) check("dnnl_primitive_attr_destroy", dnnl_primitive_attr_destroy(attr));
    }
  }

  #instantiate(
    descriptor: Deno.PointerValue,
    layouts: Pick<Primitive, "source" | "weights" | "target">,
    operands: readonly (readonly [number, MemoryDesc])[],
  ): Primitive {
    const { dnnl_primitive_create, dnnl_memory_create, dnnl_primitive_desc_query } = this.#lib.symbols;
    const name = created(
      "dnnl_primitive_desc_query",
      (out) => dnnl_primitive_desc_query(descriptor, QUERY_IMPL_INFO_STR, 0, out),
    );
    const args = new Uint8Array(operands.length * EXEC_ARG_BYTES);
    const words = new DataView(args.buffer);
    const memories = operands.map(([arg, desc], i) => {
      const memory = created(
        "dnnl_memory_create",
        (out) => dnnl_memory_create(out, desc, this.#engine, null),
      );
      words.setInt32(i * EXEC_ARG_BYTES, arg, true);
      words.setBigUint64(i * EXEC_ARG_BYTES + 8, Deno.UnsafePointer.value(memory), true);
      return memory;
    });
    return {
      ...layouts,
      implementation: name === null ? "" : Deno.UnsafePointerView.getCString(name),
      handle: created("dnnl_primitive_create", (out) => dnnl_primitive_create(out, descriptor)),
      descriptor,
      memories,
      args,
    };
  }

  /** A copy of one of a primitive descriptor's memory descriptors. */
  #query(descriptor: Deno.PointerValue, what: number, index: number): MemoryDesc {
    const found = this.#lib.symbols.dnnl_primitive_desc_query_md(descriptor, what, index);
    if (found === null) {
      throw new FfiError(`oneDNN: dnnl_primitive_desc_query_md(${what}, ${index}) found nothing`);
    }
    return new Uint8Array(Deno.UnsafePointerView.getArrayBuffer(found, MEMORY_DESC_BYTES).slice(0));
  }

  #destroy(primitive: Primitive): void {
    const { dnnl_memory_destroy, dnnl_primitive_destroy, dnnl_primitive_desc_destroy } = this.#lib.symbols;
    for (const memory of primitive.memories) check("dnnl_memory_destroy", dnnl_memory_destroy(memory));
    check("dnnl_primitive_destroy", dnnl_primitive_destroy(primitive.handle));
    check("dnnl_primitive_desc_destroy", dnnl_primitive_desc_destroy(primitive.descriptor));
  }
}

/** Looks at the version before any function is called that other versions lack. */
function findVersion2(): { version: string; soname: string } {
  const symbols = { dnnl_version: DNNL.dnnl_version };
  using found = openLibrary("oneDNN", symbols, {
    sonames: ["libdnnl.so.2", "libdnnl.so", "libdnnl.so.3"],
    hint: HINT,
  });
  const pointer = found.symbols.dnnl_version();
  if (pointer === null) throw new FfiError("oneDNN: dnnl_version returned nothing");
  // struct { int major, minor, patch; ... }
  const [major, minor, patch] = new Int32Array(Deno.UnsafePointerView.getArrayBuffer(pointer, 12));
  const version = `${major}.${minor}.${patch}`;
  if (major !== 2) {
    throw new FfiError(
      `${found.path} is oneDNN ${version}; this program calls 2.x, whose interface differs`,
      {
        hint: HINT,
      },
    );
  }
  return { version, soname: found.path.replace(/^.*\//, "") };
}

/**
 * Lets idle OpenMP threads sleep after some microseconds instead of milliseconds (libgomp reads this when it is loaded).
 * When another program has one of the cores, a thread that spins takes the time that the one it waits for would need:
 * products of 1 ms then took 16. What the user has set stays; without the permission, libgomp's default does.
 */
function shortenSpinning(): void {
  const allowed = (variable: string) =>
    Deno.permissions.querySync({ name: "env", variable }).state === "granted";
  if (!allowed("GOMP_SPINCOUNT") || !allowed("OMP_WAIT_POLICY")) return;
  if (Deno.env.has("GOMP_SPINCOUNT") || Deno.env.has("OMP_WAIT_POLICY")) return;
  Deno.env.set("GOMP_SPINCOUNT", "1000");
}

const GOMP = {
  // void omp_set_num_threads(int num_threads)
  omp_set_num_threads: { parameters: ["i32"], result: "void" },
} as const satisfies Deno.ForeignLibraryInterface;

/** Sizes the OpenMP team, and keeps its library mapped: its threads outlive the unmapping at exit otherwise. */
function setThreads(threads: number): void {
  const soname = "libgomp.so.1";
  if (!pinLibrary(soname, { onlyIfLoaded: true })) return; // a build with another OpenMP: its own default holds
  using gomp = openLibrary("OpenMP", GOMP, { sonames: [soname], search: "system" });
  gomp.symbols.omp_set_num_threads(threads);
}

/** Calls a function that stores a handle through its first argument, and returns the handle. */
function created(name: string, call: (out: BigUint64Array<ArrayBuffer>) => number): Deno.PointerValue {
  const out = new BigUint64Array(1);
  check(name, call(out));
  return Deno.UnsafePointer.create(out[0]);
}

function check(name: string, status: number, detail = ""): void {
  if (status === 0) return;
  throw new FfiError(
    `oneDNN: ${name} failed: ${STATUS[status] ?? `status ${status}`}${detail === "" ? "" : ` (${detail})`}`,
  );
}

/** dnnl_dims_t. */
function dims(values: readonly number[]): BigInt64Array<ArrayBuffer> {
  const array = new BigInt64Array(12);
  for (const [i, value] of values.entries()) array[i] = BigInt(value);
  return array;
}

function text({ dtype, shape, strides }: Layout): string {
  return `${dtype}[${shape}]${strides === undefined ? "any" : `(${strides})`}`;
}

/** A short name of a descriptor's bytes, equal for equal bytes. */
function fingerprint(desc: MemoryDesc): string {
  const words = new Uint32Array(desc.buffer, desc.byteOffset, MEMORY_DESC_BYTES / 4);
  let name = "";
  for (const [i, word] of words.entries()) if (word !== 0) name += `${i.toString(36)}.${word.toString(36)},`;
  return name;
}
