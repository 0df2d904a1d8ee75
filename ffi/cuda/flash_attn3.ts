/**
 * FlashAttention-3 (Shah et al. 2024) as users have it installed: the operator `fwd` of the Python package `flash_attn_3`
 * or `fa3_fwd`, whose library registers it with PyTorch. No Python runs: torch.ts calls it.
 *
 * What to know of it: the operator allocates the logarithms of the softmax's sums with PyTorch's own allocator, which keeps
 * what it had from the GPU. Where a CUDA call inside of it fails, the library prints why and ends the process.
 */
import { dtypeBytes } from "../dtype.ts";
import { readSharedLibrary } from "../elf.ts";
import { FfiError } from "../errors.ts";
import type { AttentionPlan } from "../gpu.ts";
import { findInPackages, openLibraryAt, packageVersion, pinLibrary, type Place } from "../library.ts";
import { Tensor } from "../tensor.ts";
import type { CudaContext } from "./context.ts";
import { Torch, TORCH_FOR_CUDA, TorchOperator } from "./torch.ts";
import { doubleBits, parseSchema } from "./torch_schema.ts";

const NAME = "FlashAttention-3";
/** Python packages that have it, which are the operators' namespaces, too. */
const PACKAGES = ["flash_attn_3", "fa3_fwd"] as const;
export const INSTALL_FLASH_ATTENTION3 = "pip install fa3-fwd";
const HINT = `${INSTALL_FLASH_ATTENTION3} installs it, with PyTorch`;

/** The arguments of `fwd` that we give, and the types that we know them with. */
const GIVEN = {
  q: "Tensor",
  k: "Tensor",
  v: "Tensor",
  out: "Tensor",
  softmax_scale: "float",
  num_splits: "int",
} as const;
/** Which result has the logarithms of the sums; the others are `out` and what splits would need. */
const LSE = 1;

/** Hopper's compute capability: the instructions that it is made of are on no other GPU. */
const HOPPER = 9;
const HEAD_DIM = 128;
/** TMA moves rows that start at multiples of this many bytes. */
const ROW_ALIGNMENT = 16n;

/** Where it is. */
export interface FlashAttention3Files {
  readonly package: string;
  /** Its library. */
  readonly path: string;
  /** The folder of PyTorch's. */
  readonly torch: string;
  /** E.g. `"fa3_fwd 0.0.3, PyTorch 2.11.0"`. */
  readonly version: string;
}

/**
 * Looks for it and for PyTorch; opens nothing, since PyTorch's libraries are over a gigabyte.
 *
 * @throws {LibraryNotFoundError} for what is not installed
 */
export function findFlashAttention3(): FlashAttention3Files {
  const having = findInPackages(NAME, PACKAGES.map((name) => `${name}/_C.abi3.so`), HINT);
  const torches = findInPackages("PyTorch for CUDA, which FlashAttention-3 needs,", [TORCH_FOR_CUDA], HINT);
  // Where there are several Pythons, those of one belong together.
  const place = having.find(({ folder }) => torches.some((torch) => torch.folder === folder)) ?? having[0];
  const torch = torches.find(({ folder }) => folder === place.folder) ?? torches[0];
  const [path] = place.paths;
  const name = path.split("/").at(-2)!;
  return {
    package: name,
    path,
    torch: torch.paths[0].replace(/\/[^/]+$/, ""),
    version: `${name} ${versionIn(place, name)}, PyTorch ${versionIn(torch, "torch")}`,
  };
}

function versionIn({ folder }: Place, name: string): string {
  return packageVersion(folder!, name) ?? "of unknown version";
}

/** The libraries, opened. */
interface Session {
  readonly version: string;
  readonly torch: Torch;
  readonly operator: TorchOperator;
  readonly close: () => void;
}

/** FlashAttention-3 on one device. */
export class FlashAttention3 implements Disposable {
  #opened: Session | undefined;
  /** Results that recorded work writes. */
  readonly #recorded: bigint[] = [];

  /** Nothing is opened before the first call. */
  constructor(private readonly context: CudaContext) {}

  /**
   * Issues attention to the device's stream and returns true, or returns false for what it is not made for: GPUs other than
   * Hopper's, dtypes other than all bf16 or f8e4m3 with a bf16 `out`, heads that are not of 128, rows that do not start at
   * multiples of 16 bytes, no keys. Softmax and sums are in f32; in float8 the softmax's weights are rounded to E4M3.
   *
   * @throws {FfiError} where it, or PyTorch, is not installed or does not fit, and with PyTorch's reason where it fails
   */
  attention(plan: AttentionPlan): boolean {
    if (this.context.capability[0] !== HOPPER || !flashAttention3TakesPlan(plan)) return false;
    const { q, k, v, out, scale } = plan;
    if (out.size === 0) return true;
    this.context.driver.enter();
    const { torch, operator } = this.#session;
    torch.onStream(this.context.stream, () => {
      const tensors = torch.tensors([q, k, v, out].map(withDenseUnits));
      const results = operator.call([...tensors, doubleBits(scale), 1n]);
      if (this.context.isRecording()) this.#recorded.push(...results.splice(LSE, 1));
      for (const tensor of results) torch.delete(tensor);
    });
    return true;
  }

  /** Of the libraries, as in {@link FlashAttention3Files}; undefined before the first call. */
  get version(): string | undefined {
    return this.#opened?.version;
  }

  /** Gives back what recorded work used; no graph may be replayed any more. */
  freeRecorded(): void {
    for (const tensor of this.#recorded.splice(0)) this.#session.torch.delete(tensor);
  }

  [Symbol.dispose](): void {
    if (this.#opened === undefined) return;
    this.context.driver.enter();
    this.freeRecorded();
    this.#opened.close();
    this.#opened = undefined;
  }

  get #session(): Session {
    return this.#opened ??= open(this.context.index);
  }
}

function open(index: number): Session {
  const { package: namespace, path, torch: folder, version } = findFlashAttention3();
  const { imports, constants } = readSharedLibrary(path);
  const schema = parseSchema(schemaIn(constants, path));
  const torch = new Torch(folder, index);
  try {
    // A function that PyTorch lacks would end the process at the loader, which looks for it at the first call.
    const lacking = torch.lacks(imports.filter((name) => !OF_PYTHON.test(name)));
    if (lacking.length > 0) {
      throw new FfiError(
        `${NAME}: ${path} was built for another PyTorch than ${torch.version} at ${torch.path}, which lacks ` +
          `${lacking.slice(0, 3).join(", ")}${lacking.length > 3 ? " and more" : ""}`,
        { hint: "pip install --upgrade torch fa3-fwd brings two that belong together" },
      );
    }
    const operator = new TorchOperator(torch, namespace, schema, GIVEN);
    const library = openLibraryAt(NAME, path, {}, HINT); // which registers the operator
    pinLibrary(path, { onlyIfLoaded: true });
    const close = () => {
      library.close();
      torch[Symbol.dispose]();
    };
    return { version, torch, operator, close };
  } catch (error) {
    torch[Symbol.dispose]();
    throw error;
  }
}

/** Symbols that only Python itself would use: the library is a module of it, too. */
const OF_PYTHON = /^_?Py/;

/** The text that the library registers `fwd` with, from among its constants. */
function schemaIn(constants: Uint8Array, path: string): string {
  const [text] = /fwd\(Tensor q,[^\0]*/.exec(new TextDecoder("latin1").decode(constants)) ?? [];
  if (text !== undefined) return text;
  throw new FfiError(`${NAME}: ${path} does not say what its operator fwd takes`, { hint: HINT });
}

/** Whether dtypes, sizes and places are such that FlashAttention-3 takes them. */
export function flashAttention3TakesPlan({ q, k, v, out }: AttentionPlan): boolean {
  const { dtype } = q;
  const dtypes = (dtype === "bf16" || dtype === "f8e4m3") && k.dtype === dtype && v.dtype === dtype &&
    out.dtype === "bf16";
  return dtypes && k.shape[1] > 0 && [q, k, v, out].every((x) => x.shape[3] === HEAD_DIM && isAligned(x));
}

/**
 * The same tensor, of which dimensions of size 1 have the strides of a dense one: TMA looks at strides that nothing is read
 * with, too.
 */
function withDenseUnits({ memory, dtype, shape, strides, offset }: Tensor): Tensor {
  const dense = [...strides];
  for (let dim = 2; dim >= 0; dim--) {
    if (shape[dim] === 1) dense[dim] = shape[dim + 1] * dense[dim + 1];
  }
  return new Tensor(memory, dtype, shape, dense, offset);
}

function isAligned({ pointer, shape, strides, dtype }: Tensor): boolean {
  const places = strides.slice(0, 3).filter((_, dim) => shape[dim] > 1).map((stride) =>
    BigInt(stride * dtypeBytes(dtype))
  );
  return strides[3] === 1 && [pointer, ...places].every((place) => place % ROW_ALIGNMENT === 0n);
}
