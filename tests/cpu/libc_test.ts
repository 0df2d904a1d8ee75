import assert from "node:assert/strict";
import { join } from "node:path";
import { mapFile, readAhead } from "../../ffi/cpu/libc.ts";
import { librariesToRead } from "../../ffi/cuda/read_ahead.ts";
import { FfiError } from "../../ffi/errors.ts";
import { LIBC_SONAMES, openLibrary } from "../../ffi/library.ts";

/** Runs `body` with a fresh folder that is removed afterwards. */
function inFolder(body: (folder: string) => void): void {
  const folder = Deno.makeTempDirSync({ prefix: "flux-libc-" });
  try {
    body(folder);
  } finally {
    Deno.removeSync(folder, { recursive: true });
  }
}

Deno.test("mapFile shows the bytes of the file, at a page-aligned address", () =>
  inFolder((folder) => {
    const path = join(folder, "data");
    const content = Uint8Array.from({ length: 70_000 }, (_, i) => (i * 31) & 255);
    Deno.writeFileSync(path, content);
    using file = mapFile(path);
    assert.equal(file.mapped, true);
    assert.equal(file.byteLength, 70_000);
    assert.deepEqual(file.bytes, content);
    assert.equal(file.pointer % 4096n, 0n);
    const view = new Deno.UnsafePointerView(Deno.UnsafePointer.create(file.pointer)!);
    assert.equal(view.getUint8(69_999), content[69_999]);
  }));

Deno.test("a mapping outlives the file's name, as a rename over it needs", () =>
  inFolder((folder) => {
    const path = join(folder, "data");
    Deno.writeFileSync(path, new Uint8Array([1, 2, 3]));
    using file = mapFile(path);
    Deno.removeSync(path);
    assert.deepEqual([...file.bytes], [1, 2, 3]);
  }));

Deno.test("mapping keeps no file descriptor", () =>
  inFolder((folder) => {
    const path = join(folder, "data");
    Deno.writeFileSync(path, new Uint8Array(10));
    const symbols = {
      open: { parameters: ["buffer", "i32"], result: "i32" },
      close: { parameters: ["i32"], result: "i32" },
    } as const;
    using libc = openLibrary("libc", symbols, { sonames: LIBC_SONAMES, search: "system" });
    const lowestFree = () => {
      const fd = libc.symbols.open(new TextEncoder().encode(`${path}\0`), 0);
      libc.symbols.close(fd);
      return fd;
    };
    const before = lowestFree();
    const files = Array.from({ length: 100 }, () => mapFile(path));
    const { statSync } = Deno;
    Deno.statSync = (target) => ({ ...statSync(target), size: 11 }); // as if the file had changed since
    try {
      for (let i = 0; i < 100; i++) assert.throws(() => mapFile(path), /should have 11 bytes but has 10/);
    } finally {
      Deno.statSync = statSync;
    }
    // The runtime may open a file of its own meanwhile, but not a hundred.
    assert(lowestFree() - before < 50);
    for (const file of files) file[Symbol.dispose]();
  }));

Deno.test("after disposal: a typed error, and views that are empty instead of dangling", () =>
  inFolder((folder) => {
    const path = join(folder, "data");
    Deno.writeFileSync(path, new Uint8Array(8192).fill(7));
    const file = mapFile(path);
    const view = file.bytes.subarray(100, 200);
    const floats = new Float32Array(file.bytes.buffer, 0, 16);
    assert.equal(view[0], 7);
    file[Symbol.dispose]();
    assert.throws(() => file.bytes, FfiError);
    assert.throws(() => file.pointer, FfiError);
    assert.equal(view.length, 0);
    assert.equal(view[0], undefined);
    assert.equal(floats.length, 0);
    file[Symbol.dispose](); // a second time does nothing
  }));

Deno.test("a sparse file of 24 GiB: bytes beyond 4 GiB are the right ones", () =>
  inFolder((folder) => {
    const path = join(folder, "sparse");
    const size = 24 * 2 ** 30 + 5;
    using handle = Deno.openSync(path, { write: true, createNew: true });
    try {
      handle.truncateSync(size);
    } catch {
      return; // a file system without such files: nothing to test here
    }
    for (const [at, value] of [[2 ** 32 - 1, 11], [2 ** 32, 12], [2 ** 34 + 3, 13], [size - 1, 14]]) {
      handle.seekSync(at, Deno.SeekMode.Start);
      handle.writeSync(new Uint8Array([value]));
    }
    using file = mapFile(path);
    assert.equal(file.mapped, true);
    assert.equal(file.bytes.length, size);
    assert.equal(file.bytes[2 ** 32 - 1], 11);
    assert.equal(file.bytes[2 ** 32], 12);
    assert.equal(file.bytes[2 ** 34 + 3], 13);
    assert.equal(file.bytes[0], 0);
    const tail = file.bytes.subarray(size - 2);
    assert.deepEqual([...tail], [0, 14]);
    assert.equal(Deno.UnsafePointer.value(Deno.UnsafePointer.of(tail)), file.pointer + BigInt(size - 2));
  }));

Deno.test("a file that grows or shrinks between stat and mmap is refused", () =>
  inFolder((folder) => {
    const path = join(folder, "data");
    const { statSync } = Deno;
    for (const change of [-1, 1]) {
      Deno.writeFileSync(path, new Uint8Array(10));
      // The race, made certain: the file changes as soon as its size has been looked at.
      Deno.statSync = (target) => {
        const stat = statSync(target);
        Deno.writeFileSync(path, new Uint8Array(10 + change));
        return stat;
      };
      try {
        assert.throws(() => mapFile(path), /should have 10 bytes but has (9|11)/);
      } finally {
        Deno.statSync = statSync;
      }
    }
  }));

Deno.test("an empty file has no bytes and no address", () =>
  inFolder((folder) => {
    const path = join(folder, "empty");
    Deno.writeFileSync(path, new Uint8Array());
    using file = mapFile(path);
    assert.equal(file.byteLength, 0);
    assert.equal(file.pointer, 0n);
    assert.equal(file.mapped, false);
  }));

Deno.test("folders and missing files are errors", () =>
  inFolder((folder) => {
    assert.throws(() => mapFile(folder), /not a file but a folder/);
    assert.throws(() => mapFile(join(folder, "none")), Deno.errors.NotFound);
  }));

Deno.test({
  name: "without --allow-ffi the file is read into memory",
  permissions: { ffi: false, read: "inherit", write: "inherit", env: "inherit" },
  fn: () =>
    inFolder((folder) => {
      const path = join(folder, "data");
      Deno.writeFileSync(path, new Uint8Array([5, 6, 7]));
      const file = mapFile(path);
      assert.equal(file.mapped, false);
      assert.deepEqual([...file.bytes], [5, 6, 7]);
      assert.throws(() => file.pointer, FfiError);
      const view = file.bytes.subarray(1);
      file[Symbol.dispose]();
      assert.equal(view.length, 0);
      assert.throws(() => file.bytes, FfiError);
    }),
});

Deno.test({
  name: "mapping does not go around --allow-read",
  permissions: { ffi: true, read: false },
  fn: () => assert.throws(() => mapFile("/etc/passwd"), Deno.errors.NotCapable),
});

/** Throws a file out of the page cache where its file system lets it go, and says which of its pages are there. */
const CACHED = {
  // int open(const char *path, int flags)
  open: { parameters: ["buffer", "i32"], result: "i32" },
  // int close(int fd)
  close: { parameters: ["i32"], result: "i32" },
  // ssize_t read(int fd, void *buf, size_t count)
  read: { parameters: ["i32", "buffer", "usize"], result: "isize" },
  // int posix_fadvise(int fd, off_t offset, off_t len, int advice)
  posix_fadvise: { parameters: ["i32", "i64", "i64", "i32"], result: "i32" },
  // int mincore(void *addr, size_t length, unsigned char *vec)
  mincore: { parameters: ["pointer", "usize", "buffer"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

Deno.test({
  name: "readAhead brings all pages of a file into the cache, and keeps nothing open",
  ignore: Deno.build.os !== "linux",
  fn: async () => {
    const folder = Deno.makeTempDirSync({ prefix: "flux-libc-" });
    try {
      const path = join(folder, "data");
      using file = Deno.openSync(path, { write: true, createNew: true });
      const pages = 4096; // 16 MB: more than a hint would read
      for (let i = 0; i < 16; i++) file.writeSync(new Uint8Array(2 ** 20).fill(i));
      file.syncSync();
      using libc = openLibrary("libc", CACHED, { sonames: LIBC_SONAMES, search: "system" });
      const { open, close, read, posix_fadvise: advise, mincore } = libc.symbols;
      const opened = (path: string) => open(new TextEncoder().encode(`${path}\0`), 0);
      const fd = opened(path);
      assert.equal(advise(fd, 0n, 0n, 4), 0); // POSIX_FADV_DONTNEED
      close(fd);
      // Deno itself shows a process's mappings to those only that may do all.
      const mappings = () => {
        const maps = opened("/proc/self/maps");
        const piece = new Uint8Array(1 << 16);
        let text = "";
        for (let count = 1; count > 0; text += new TextDecoder().decode(piece.subarray(0, count))) {
          count = Number(read(maps, piece, BigInt(piece.length)));
        }
        close(maps);
        assert.match(text, /libc/);
        return text.split(path).length - 1;
      };

      assert.equal(await readAhead(path), true);
      assert.equal(mappings(), 0);
      using mapped = mapFile(path);
      const there = new Uint8Array(pages);
      assert.equal(mincore(Deno.UnsafePointer.create(mapped.pointer), BigInt(pages * 4096), there), 0);
      assert.equal(there.filter((page) => page & 1).length, pages);
    } finally {
      Deno.removeSync(folder, { recursive: true });
    }
  },
});

Deno.test("readAhead says nothing of what cannot be read", async () => {
  const folder = Deno.makeTempDirSync({ prefix: "flux-libc-" });
  try {
    Deno.writeFileSync(join(folder, "empty"), new Uint8Array(0));
    for (const path of [folder, join(folder, "missing"), join(folder, "empty")]) {
      assert.equal(await readAhead(path), false);
    }
  } finally {
    Deno.removeSync(folder, { recursive: true });
  }
});

Deno.test("NVIDIA's libraries to read ahead are those that would be opened, with what cuDNN opens", () => {
  const folders: Record<string, string[]> = {
    "/venv/lib": ["python3.12"],
    "/venv/lib/python3.12/site-packages": ["nvidia"],
    "/venv/lib/python3.12/site-packages/nvidia": ["cu13", "cudnn"],
    "/venv/lib/python3.12/site-packages/nvidia/cu13/lib": [
      "libcublasLt.so.13",
      "libnvrtc.so.13",
      "libcublas.so.13",
    ],
    "/venv/lib/python3.12/site-packages/nvidia/cudnn/lib": [
      "libcudnn_ops.so.9",
      "libcudnn_adv.so.9",
      "libcudnn_engines_precompiled.so.9",
      "libcudnn.so.9",
    ],
    "/mine": ["libnvrtc.so.12", "libcublasLt.so.12"],
  };
  const read = (newest: number, env: Record<string, string>) =>
    librariesToRead(newest, (name) => env[name], (folder) => folders[folder]);
  const packages = "/venv/lib/python3.12/site-packages/nvidia";
  const cudnn = ["libcudnn.so.9", "libcudnn_engines_precompiled.so.9", "libcudnn_ops.so.9"]
    .map((name) => `${packages}/cudnn/lib/${name}`);
  const toolkit = ["libnvrtc.so.13", "libcublasLt.so.13"].map((name) => `${packages}/cu13/lib/${name}`);
  assert.deepEqual(read(13, { VIRTUAL_ENV: "/venv" }), [...toolkit, ...cudnn]);
  assert.deepEqual(read(13, { VIRTUAL_ENV: "/venv", FLUX_LIB_PATH: "/mine" }), [
    "/mine/libnvrtc.so.12",
    "/mine/libcublasLt.so.12",
    ...cudnn,
  ]);
  assert.deepEqual(read(12, { VIRTUAL_ENV: "/venv" }), cudnn);
  assert.deepEqual(read(13, {}), []);
});
