import assert from "node:assert/strict";
import { join } from "node:path";
import { DiskCache } from "../../ffi/cache.ts";

/** A cache in a new folder, with what it warned of and how often something was built. */
async function open() {
  const folder = join(await Deno.makeTempDir(), "made", "at first use");
  const warnings: string[] = [];
  let builds = 0;
  const cache = new DiskCache(folder, (message) => warnings.push(message));
  const get = (parts: string[], content = Uint8Array.of(1, 2, 3)) =>
    cache.get(parts, () => {
      builds++;
      return content;
    });
  return { folder, warnings, get, builds: () => builds };
}

Deno.test("DiskCache builds once and reads afterwards", async () => {
  const cache = await open();
  assert.deepEqual([...cache.get(["a"])], [1, 2, 3]);
  assert.deepEqual([...cache.get(["a"], Uint8Array.of(9))], [1, 2, 3]);
  assert.equal(cache.builds(), 1);
  assert.deepEqual(cache.warnings, []);
});

Deno.test("DiskCache tells all parts of a key apart", async () => {
  const cache = await open();
  const keys = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["", "abc"], ["1:a"], ["a"]];
  for (const [i, key] of keys.entries()) cache.get(key, Uint8Array.of(i));
  for (const [i, key] of keys.entries()) {
    assert.deepEqual([...cache.get(key)], [i], JSON.stringify(key));
  }
  assert.equal(cache.builds(), keys.length);
});

Deno.test("DiskCache rebuilds a damaged entry with one line, whatever the damage", async () => {
  const damages: ((bytes: Uint8Array) => Uint8Array)[] = [
    (bytes) => bytes.with(0, bytes[0] ^ 1),
    (bytes) => bytes.with(bytes.length - 1, bytes.at(-1)! ^ 1),
    (bytes) => bytes.subarray(0, bytes.length - 1),
    (bytes) => bytes.subarray(0, 10),
    () => new Uint8Array(0),
  ];
  for (const damage of damages) {
    const cache = await open();
    cache.get(["a"]);
    const [entry] = [...Deno.readDirSync(cache.folder)];
    const path = join(cache.folder, entry.name);
    await Deno.writeFile(path, damage(await Deno.readFile(path)));
    assert.deepEqual([...cache.get(["a"])], [1, 2, 3]);
    assert.equal(cache.warnings.length, 1);
    assert.match(cache.warnings[0], /damaged/);
    assert.deepEqual([...cache.get(["a"])], [1, 2, 3]);
    assert.equal(cache.builds(), 2, "the rebuilt entry was not kept");
  }
});

Deno.test("DiskCache works without a folder that it can write", async () => {
  const file = await Deno.makeTempFile();
  const warnings: string[] = [];
  const cache = new DiskCache(join(file, "below a file"), (message) => warnings.push(message));
  assert.deepEqual([...cache.get(["a"], () => Uint8Array.of(7))], [7]);
  assert.deepEqual([...cache.get(["b"], () => Uint8Array.of(8))], [8]);
  assert.equal(warnings.length, 1, "one line is enough");
  assert.match(warnings[0], /going on without it/);
});
