/** writeFileAtomic: all or nothing, and nothing left over. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { writeFileAtomic } from "../../ffi/files.ts";
import { symlink } from "../support/symlink.ts";
import { FileError } from "../../recipes/base/errors.ts";

async function inFolder(body: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir();
  try {
    await body(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}
const names = (folder: string) => [...Deno.readDirSync(folder)].map(({ name }) => name).sort();

async function fileError(promise: Promise<void>, message: RegExp): Promise<void> {
  await assert.rejects(promise, (error) => {
    assert.ok(error instanceof FileError, String(error));
    assert.match(error.message, message);
    assert.ok(!error.message.includes("\n"));
    return true;
  });
}

Deno.test("writeFileAtomic: writes, replaces and leaves only the file", () =>
  inFolder(async (folder) => {
    const path = join(folder, "out.png");
    const big = Uint8Array.from({ length: 3 * (1 << 20) + 17 }, (_, i) => i & 255); // several chunks
    for (const bytes of [big, new Uint8Array([1, 2, 3]), new Uint8Array(0)]) {
      await writeFileAtomic(path, bytes);
      assert.deepEqual(await Deno.readFile(path), bytes);
      assert.deepEqual(names(folder), ["out.png"]);
    }
  }));

Deno.test("writeFileAtomic: aborted before or during the write, the old file stays and nothing is left", () =>
  inFolder(async (folder) => {
    const path = join(folder, "out.png");
    await writeFileAtomic(path, new Uint8Array([7]));
    const big = new Uint8Array(64 << 20);
    const reason = new Error("Ctrl-C");

    await assert.rejects(writeFileAtomic(path, big, { signal: AbortSignal.abort(reason) }), reason);
    assert.deepEqual(names(folder), ["out.png"]);

    const controller = new AbortController();
    const writing = writeFileAtomic(path, big, { signal: controller.signal });
    const settled = assert.rejects(writing, reason);
    // Abort only once the temporary file is there, so that there is something to clean up.
    const deadline = Date.now() + 10_000;
    while (names(folder).length < 2 && Date.now() < deadline) await new Promise((done) => setTimeout(done));
    assert.equal(names(folder).length, 2);
    controller.abort(reason);
    await settled;
    assert.deepEqual(names(folder), ["out.png"]);
    assert.deepEqual(await Deno.readFile(path), new Uint8Array([7]));
  }));

Deno.test("writeFileAtomic: missing folder, a file as folder, a folder as file, a name too long", () =>
  inFolder(async (folder) => {
    const bytes = new Uint8Array([1]);
    await Deno.mkdir(join(folder, "sub"));
    await Deno.writeFile(join(folder, "plain"), bytes);
    await fileError(writeFileAtomic(join(folder, "no", "out.png"), bytes), /no\/out\.png: .*does not exist/);
    await fileError(writeFileAtomic(join(folder, "plain", "out.png"), bytes), /is not a folder/);
    await fileError(writeFileAtomic(join(folder, "sub"), bytes), /it is a folder/);
    await fileError(writeFileAtomic(join(folder, "x".repeat(300)), bytes), /too long/);
    assert.deepEqual(names(folder), ["plain", "sub"]);
    assert.deepEqual(names(join(folder, "sub")), []);
  }));

Deno.test("writeFileAtomic: a device is refused, not replaced", async () => {
  await fileError(writeFileAtomic("/dev/zero", new Uint8Array([1])), /not a regular file/);
});

Deno.test("writeFileAtomic: a folder without permission", async () => {
  // Outside what the test run may write, or, where everything may be written, a file system that refuses.
  await fileError(
    writeFileAtomic("/proc/flux-recipes.png", new Uint8Array([1])),
    /permission|does not exist/,
  );
});

Deno.test("writeFileAtomic: an existing file keeps its mode, a symbolic link stays a link", async () => {
  const folder = await Deno.makeTempDir();
  const [file, link] = [join(folder, "file"), join(folder, "link")];
  await Deno.writeTextFile(file, "old", { mode: 0o600 });
  assert.equal(Deno.lstatSync(file).mode! & 0o777, 0o600);
  symlink(file, link);
  await writeFileAtomic(link, new TextEncoder().encode("new"));
  assert.ok(Deno.lstatSync(link).isSymlink);
  assert.equal(Deno.readTextFileSync(file), "new");
  assert.equal(Deno.lstatSync(file).mode! & 0o777, 0o600);
});
