import assert from "node:assert/strict";
import { join } from "node:path";
import { FfiError } from "../../ffi/errors.ts";
import {
  candidatePaths,
  findFileInPackages,
  findInPackages,
  LibraryNotFoundError,
  openLibrary,
  openLibraryAt,
  packagePlaces,
  packageVersion,
  pinLibrary,
} from "../../ffi/library.ts";
import { inFolder } from "../support/folders.ts";

/** A made-up file system: folder -> names in it. */
function lister(folders: Record<string, string[]>): (folder: string) => string[] | undefined {
  return (folder) => folders[folder];
}

function env(values: Record<string, string>): (name: string) => string | undefined {
  return (name) => values[name];
}

const LIBC = Deno.build.os === "darwin" ? "libSystem.B.dylib" : "libc.so.6";
const GETPID = { getpid: { parameters: [], result: "i32" } } as const;

/** The first advice in every error of a missing library. */
const DOCTOR = "deno task doctor shows what is found and how to install the rest";

Deno.test("candidatePaths: overrides first, then the loader, toolkits, wheels, system", () => {
  const places = candidatePaths(
    ["libx.so.2", "libx.so.1"],
    env({
      FLUX_LIB_PATH: "/override/:/missing",
      LD_LIBRARY_PATH: "/ld::relative:/override:/ld/",
      VIRTUAL_ENV: "/venv",
      CONDA_PREFIX: "/conda",
      PATH: "/usr/bin:/opt/py/bin:/root/.pyenv/shims",
      HOME: "/home/me",
    }),
    lister({
      "/override": ["libx.so.1", "libx.so.2", "other"],
      "/ld": ["libx.so.1"],
      "/usr/local": ["cuda", "cuda-13.0", "bin", "lib"],
      "/usr/local/cuda/lib64": ["libx.so.2"],
      "/usr/local/cuda-13.0/lib64": [],
      "/usr/local/cuda-13.0/extras/CUPTI/lib64": ["libx.so.2"],
      "/conda/lib": ["libx.so.1", "python3.12"],
      "/venv/lib": ["python3.11"],
      "/venv/lib/python3.11/site-packages/nvidia": ["cu13", "cudnn"],
      "/venv/lib/python3.11/site-packages/nvidia/cu13/lib": ["libx.so.2"],
      "/venv/lib/python3.11/site-packages/nvidia/cudnn/lib": [],
      "/opt/py/bin": ["python3"],
      "/opt/py/lib": ["python3.12", "libpython3.so"],
      "/opt/py/lib/python3.12/site-packages/nvidia": ["nccl"],
      "/opt/py/lib/python3.12/site-packages/nvidia/nccl/lib": ["libx.so.1"],
      "/root/.pyenv/shims": ["python", "python3"],
      "/root/.pyenv/versions": ["3.11.7", "2.7.18"],
      "/root/.pyenv/versions/3.11.7/lib": ["python3.11"],
      "/root/.pyenv/versions/3.11.7/lib/python3.11/site-packages/nvidia": ["cublas"],
      "/root/.pyenv/versions/3.11.7/lib/python3.11/site-packages/nvidia/cublas/lib": ["libx.so.2"],
      "/home/me/.local/lib": ["python3.10"],
      "/home/me/.local/lib/python3.10/site-packages/nvidia": ["x"],
      "/home/me/.local/lib/python3.10/site-packages/nvidia/x/lib": [],
      "/usr/lib64": ["libx.so.1"],
    }),
  );
  const wheel = (path: string) => `${path}/site-packages/nvidia`;
  assert.deepEqual(places.map((place) => [place.from, place.folder]), [
    ["FLUX_LIB_PATH", "/override"],
    ["FLUX_LIB_PATH", "/missing"],
    ["LD_LIBRARY_PATH", "/ld"],
    ["the loader's default path", undefined],
    ["CUDA toolkit", "/usr/local/cuda/lib64"],
    ["CUDA toolkit", "/usr/local/cuda-13.0/lib64"],
    ["CUDA toolkit", "/usr/local/cuda-13.0/extras/CUPTI/lib64"],
    ["CONDA_PREFIX", "/conda/lib"],
    ["python package", `${wheel("/venv/lib/python3.11")}/cu13/lib`],
    ["python package", `${wheel("/venv/lib/python3.11")}/cudnn/lib`],
    ["python package", `${wheel("/opt/py/lib/python3.12")}/nccl/lib`],
    ["python package", `${wheel("/root/.pyenv/versions/3.11.7/lib/python3.11")}/cublas/lib`],
    ["python package", `${wheel("/home/me/.local/lib/python3.10")}/x/lib`],
    ["system", "/usr/lib64"],
  ]);
  // Within a folder the preferred soname comes first, whatever order the folder lists them in.
  assert.deepEqual(places[0].paths, ["/override/libx.so.2", "/override/libx.so.1"]);
  // A named folder that cannot be listed may have them all; the loader is asked.
  assert.deepEqual(places[1].paths, ["/missing/libx.so.2", "/missing/libx.so.1"]);
  assert.deepEqual(places[2].paths, ["/ld/libx.so.1"]);
  assert.deepEqual(places[3].paths, ["libx.so.2", "libx.so.1"]);
  assert.deepEqual(places[5].paths, []);
});

Deno.test("candidatePaths: ROCm's folders, and those of its wheels", () => {
  const places = candidatePaths(
    ["libx.so.7"],
    env({ VIRTUAL_ENV: "/venv" }),
    lister({
      "/opt": ["rocm", "rocm-6.2.0", "other"],
      "/opt/rocm/lib": ["libx.so.7"],
      "/opt/rocm-6.2.0/lib": [],
      "/venv/lib": ["python3.12"],
      "/venv/lib/python3.12/site-packages": ["_rocm_sdk_core", "_rocm_sdk_libraries_gfx94X_dcgpu", "torch"],
      "/venv/lib/python3.12/site-packages/_rocm_sdk_core/lib": ["libx.so.7"],
    }),
  );
  assert.deepEqual(
    places.filter(({ folder }) => folder !== undefined).map((
      { from, folder, paths },
    ) => [from, folder, paths.length]),
    [
      ["ROCm", "/opt/rocm/lib", 1],
      ["ROCm", "/opt/rocm-6.2.0/lib", 0],
      ["python package", "/venv/lib/python3.12/site-packages/_rocm_sdk_core/lib", 1],
    ],
  );
});

Deno.test("findFileInPackages: a path that the user has named, else Python's packages, else an error with all places", () =>
  inFolder((folder) => {
    const before = Deno.env.get("FLUX_LIB_PATH");
    Deno.env.set("FLUX_LIB_PATH", folder);
    try {
      const find = (...named: string[]) =>
        findFileInPackages(
          "a table",
          "made/up/table.csv",
          "get it",
          named.map((path) => ({ from: "NAMED", path })),
        );
      const own = join(folder, "own.csv");
      assert.throws(() => find(own), (error) => {
        assert.ok(error instanceof LibraryNotFoundError);
        assert.match(error.message, /^a table was not found \(looked for made\/up\/table\.csv\)/);
        assert.ok(
          error.message.includes(`${folder} (NAMED)`) && error.message.includes(`${folder} (FLUX_LIB_PATH)`),
        );
        return error.hint === `${DOCTOR}; get it`;
      });
      Deno.mkdirSync(join(folder, "made/up"), { recursive: true });
      Deno.writeTextFileSync(join(folder, "made/up/table.csv"), "");
      assert.deepEqual(find(own), { path: join(folder, "made/up/table.csv"), folder });
      Deno.writeTextFileSync(own, "");
      assert.deepEqual(find(own), { path: own, folder: undefined });
    } finally {
      if (before === undefined) Deno.env.delete("FLUX_LIB_PATH");
      else Deno.env.set("FLUX_LIB_PATH", before);
    }
  }));

Deno.test("candidatePaths: nothing set and nothing readable leaves the loader", () => {
  const places = candidatePaths(["libx.so"], () => undefined, () => undefined);
  assert.deepEqual(places, [{ from: "the loader's default path", folder: undefined, paths: ["libx.so"] }]);
});

Deno.test("candidatePaths: a system search ignores overrides, toolkits and wheels", () => {
  const places = candidatePaths(
    ["libc.so.6"],
    env({ FLUX_LIB_PATH: "/override", LD_LIBRARY_PATH: "/ld", CONDA_PREFIX: "/conda" }),
    lister({ "/override": ["libc.so.6"], "/conda/lib": ["libc.so.6"], "/usr/lib": ["libc.so.6"] }),
    "system",
  );
  assert.deepEqual(places.map((place) => place.folder), [undefined, "/usr/lib"]);
});

Deno.test("packagePlaces: FLUX_LIB_PATH's folders, then every Python's packages, with the files that are there", () => {
  const places = packagePlaces(
    ["torch/lib/libtorch.so", "other/_C.abi3.so"],
    env({ FLUX_LIB_PATH: "/override:/missing", VIRTUAL_ENV: "/venv", PATH: "/opt/py/bin" }),
    lister({
      "/override": ["torch"],
      "/override/torch/lib": ["libtorch.so", "libc10.so"],
      "/venv/lib": ["python3.12"],
      "/venv/lib/python3.12/site-packages": ["other", "torch"],
      "/venv/lib/python3.12/site-packages/other": ["_C.abi3.so"],
      "/venv/lib/python3.12/site-packages/torch/lib": ["libtorch.so"],
      "/opt/py/bin": ["python3"],
      "/opt/py/lib": ["python3.11"],
      "/opt/py/lib/python3.11/site-packages": ["torch"], // which has no lib
    }),
  );
  const venv = "/venv/lib/python3.12/site-packages";
  assert.deepEqual(places, [
    { from: "FLUX_LIB_PATH", folder: "/override", paths: ["/override/torch/lib/libtorch.so"] },
    { from: "FLUX_LIB_PATH", folder: "/missing", paths: [] },
    {
      from: "python package",
      folder: venv,
      paths: [`${venv}/torch/lib/libtorch.so`, `${venv}/other/_C.abi3.so`],
    },
    { from: "python package", folder: "/opt/py/lib/python3.11/site-packages", paths: [] },
  ]);
});

Deno.test("findInPackages and packageVersion: what is there, and an error with all places", () =>
  inFolder((folder) => {
    const before = Deno.env.get("FLUX_LIB_PATH");
    try {
      Deno.env.set("FLUX_LIB_PATH", folder);
      assert.throws(
        () => findInPackages("Something", ["something_rare/lib.so"], "pip install something"),
        (error: unknown) =>
          error instanceof LibraryNotFoundError && error.hint === `${DOCTOR}; pip install something` &&
          error.message.startsWith(
            "Something was not found (looked for something_rare/lib.so). Searched: ",
          ) &&
          error.message.includes(`${folder} (FLUX_LIB_PATH)`),
      );
      Deno.mkdirSync(join(folder, "something_rare"));
      Deno.writeTextFileSync(join(folder, "something_rare/lib.so"), "");
      const [place] = findInPackages("Something", ["something_rare/lib.so"], "");
      assert.deepEqual(place.paths, [join(folder, "something_rare/lib.so")]);
      assert.equal(packageVersion(folder, "something_rare"), undefined);
      for (const info of ["something_rare_too-9.9", "something_rare-1.2.3+cu130"]) {
        Deno.mkdirSync(join(folder, `${info}.dist-info`));
      }
      assert.equal(packageVersion(folder, "something_rare"), "1.2.3+cu130");
    } finally {
      if (before === undefined) Deno.env.delete("FLUX_LIB_PATH");
      else Deno.env.set("FLUX_LIB_PATH", before);
    }
  }));

Deno.test("openLibraryAt opens one path, or says why it does not", () => {
  using first = openLibrary("libc", GETPID, { sonames: [LIBC] });
  using libc = openLibraryAt("libc", first.path, GETPID, "");
  assert.equal(libc.symbols.getpid(), Deno.pid);
  assert.throws(
    () => openLibraryAt("Nothing", "/no/such/lib.so", GETPID, "install it"),
    (error: unknown) =>
      error instanceof FfiError && error.hint === `${DOCTOR}; install it` &&
      /^Nothing could not be opened: \/no\/such\/lib\.so: cannot open/.test(error.message),
  );
});

Deno.test("openLibrary opens a library with typed symbols", () => {
  using libc = openLibrary("libc", GETPID, { sonames: ["libnothing.so.99", LIBC] });
  assert.equal(libc.symbols.getpid(), Deno.pid);
  assert.equal(libc.name, "libc");
});

Deno.test("a library that is nowhere: one error with every place, the loader's words and the hint", () => {
  assert.throws(
    () => openLibrary("Nothing", GETPID, { sonames: ["libnothing.so.99"], hint: "apt-get install nothing" }),
    (error: unknown) => {
      assert(error instanceof LibraryNotFoundError);
      assert(error instanceof FfiError);
      assert.equal(error.name, "LibraryNotFoundError");
      assert.match(error.message, /^Nothing was not found \(looked for libnothing\.so\.99\)/);
      assert.match(error.message, /the loader's default path/);
      for (const place of error.places) if (place.folder) assert(error.message.includes(place.folder));
      assert.equal(error.hint, `${DOCTOR}; apt-get install nothing`);
      assert(error.attempts.length > 0);
      return true;
    },
  );
});

Deno.test("a library that lacks a symbol is reported with the symbol", () => {
  const symbols = { no_such_function_: { parameters: [], result: "void" } } as const;
  assert.throws(
    () => openLibrary("libc", symbols, { sonames: [LIBC], search: "system" }),
    (error: unknown) => error instanceof LibraryNotFoundError && error.message.includes("no_such_function_"),
  );
});

Deno.test("a FLUX_LIB_PATH library that does not open ends the search; an absent one does not", () => {
  const folder = Deno.makeTempDirSync({ prefix: "flux-library-" });
  const before = Deno.env.get("FLUX_LIB_PATH");
  try {
    Deno.env.set("FLUX_LIB_PATH", `/no/such/folder:${folder}`);
    {
      using libc = openLibrary("libc", GETPID, { sonames: [LIBC] });
      assert.equal(libc.path.includes(folder), false);
    }
    Deno.writeTextFileSync(join(folder, LIBC), "this is no library");
    assert.throws(
      () => openLibrary("libc", GETPID, { sonames: [LIBC] }),
      (error: unknown) => {
        assert(error instanceof LibraryNotFoundError);
        assert.match(error.message, /was found but could not be opened/);
        assert(error.message.includes(join(folder, LIBC)));
        assert.match(error.hint ?? "", /FLUX_LIB_PATH/);
        return true;
      },
    );
  } finally {
    if (before === undefined) Deno.env.delete("FLUX_LIB_PATH");
    else Deno.env.set("FLUX_LIB_PATH", before);
    Deno.removeSync(folder, { recursive: true });
  }
});

Deno.test("pinLibrary says whether it pinned", () => {
  assert.equal(pinLibrary(LIBC), true);
  assert.equal(pinLibrary(LIBC, { onlyIfLoaded: true }), true);
  assert.equal(pinLibrary("libnothing.so.99"), false);
  assert.equal(pinLibrary("libnothing.so.99", { onlyIfLoaded: true }), false);
});

Deno.test({
  name: "without env and read permission the loader's default still works",
  permissions: { ffi: true, env: false, read: false },
  fn: () => {
    using libc = openLibrary("libc", GETPID, { sonames: [LIBC] });
    assert.equal(libc.symbols.getpid(), Deno.pid);
  },
});

Deno.test({
  name: "without --allow-ffi: a typed error that names the flag",
  permissions: { ffi: false, env: "inherit", read: "inherit" },
  fn: () => {
    const refused = (error: unknown) =>
      error instanceof FfiError && !(error instanceof LibraryNotFoundError) &&
      /allow-ffi/.test(error.hint ?? "");
    assert.throws(() => openLibrary("libc", GETPID, { sonames: [LIBC] }), refused);
    assert.throws(() => pinLibrary(LIBC), refused);
  },
});
