/** fake_torch.cpp and fake_flash_attn3.cpp, compiled and laid out like Python packages. */
import { fileURLToPath } from "node:url";
import { compile } from "./fake_cuda.ts";

const source = (name: string) => fileURLToPath(new URL(name, import.meta.url));
const LIBRARY_PATH = "FLUX_LIB_PATH";

const SYMBOLS = {
  // void fake_torch_reset(void)
  fake_torch_reset: { parameters: [], result: "void" },
  // void fake_torch_fail(const char *name, int after)
  fake_torch_fail: { parameters: ["buffer", "i32"], result: "void" },
  // int fake_torch_alive(void)
  fake_torch_alive: { parameters: [], result: "i32" },
  // const char *fake_torch_report(void)
  fake_torch_report: { parameters: [], result: "pointer" },
} as const satisfies Deno.ForeignLibraryInterface;

/** How a PyTorch and a FlashAttention-3 are built. */
export interface FakePackages {
  /** The Python package, which is the operator's namespace. */
  readonly package: "fa3_fwd" | "flash_attn_3";
  /** Macros of fake_torch.cpp: SINCE_2_13, LACKS_IMPL. */
  readonly torch?: readonly string[];
  /** Macros of fake_flash_attn3.cpp: SCHEMA_START=..., OPTIONS_SHIFT=... */
  readonly attention?: readonly string[];
}

/** What a test sees of the fake PyTorch, and can make it do. */
export interface FakeTorch {
  /** The folder with the packages. */
  readonly folder: string;
  /** The next call of this function but `after` fails. */
  fail(call: string, after?: number): void;
  /** Tensors and guards that are alive. */
  readonly alive: number;
  /** What the operator was called with so far, a line each for q, k, v, out and numbers. */
  readonly report: string;
}

const built = new Map<string, string>();

/** Builds the packages once, in a folder that is removed when the process ends. */
export function buildPackages(options: FakePackages): string {
  const key = JSON.stringify(options);
  const known = built.get(key);
  if (known !== undefined) return known;
  const { package: name, torch = [], attention = [] } = options;
  const folder = Deno.makeTempDirSync();
  addEventListener("unload", () => Deno.removeSync(folder, { recursive: true }));
  const libraries = `${folder}/torch/lib`;
  for (const made of [libraries, `${folder}/${name}`]) Deno.mkdirSync(made, { recursive: true });
  for (const info of ["torch-2.11.1", `${name}-0.0.3`]) Deno.mkdirSync(`${folder}/${info}.dist-info`);
  Deno.writeTextFileSync(`${libraries}/libtorch_cuda.so`, "only looked for");
  const build = (to: string, from: string, macros: readonly string[], ...others: string[]) => {
    const options = ["-std=c++17", "-O1", "-shared", "-fPIC", ...macros.map((macro) => `-D${macro}`)];
    const { success, text } = compile([...options, "-o", to, source(from), ...others], "c++");
    if (!success) throw new Error(text);
  };
  // The loader knows libraries by their sonames, and several fakes may be in one process.
  const soname = `-Wl,--no-as-needed,-soname,libtorch_fake_${built.size}.so`;
  build(`${libraries}/libtorch.so`, "fake_torch.cpp", torch, soname);
  build(
    `${folder}/${name}/_C.abi3.so`,
    "fake_flash_attn3.cpp",
    [`NAMESPACE="${name}"`, ...attention],
    `-L${libraries}`,
    "-ltorch",
  );
  built.set(key, folder);
  return folder;
}

/** Runs `body` where the packages are found, beside what `FLUX_LIB_PATH` has already; afterwards nothing may be alive. */
export async function withFakeTorch(
  options: FakePackages,
  body: (fake: FakeTorch) => void | Promise<void>,
): Promise<void> {
  const folder = buildPackages(options);
  const library = Deno.dlopen(`${folder}/torch/lib/libtorch.so`, SYMBOLS);
  const { symbols } = library;
  const before = Deno.env.get(LIBRARY_PATH);
  Deno.env.set(LIBRARY_PATH, before === undefined ? folder : `${before}:${folder}`);
  try {
    symbols.fake_torch_reset();
    await body({
      folder,
      fail: (call, after = 0) => symbols.fake_torch_fail(new TextEncoder().encode(`${call}\0`), after),
      get alive() {
        return symbols.fake_torch_alive();
      },
      get report() {
        return new Deno.UnsafePointerView(symbols.fake_torch_report()!).getCString();
      },
    });
  } finally {
    if (before === undefined) Deno.env.delete(LIBRARY_PATH);
    else Deno.env.set(LIBRARY_PATH, before);
    library.close();
  }
}
