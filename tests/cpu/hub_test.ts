/** Models by their hub ids, against a server on this machine that behaves like the hub. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { type DownloadProgress, hubModel, type HubOptions } from "../../recipes/base/hub.ts";
import { hubHosts } from "../../recipes/base/hub_hosts.ts";
import { isHubId } from "../../recipes/base/hub_id.ts";
import { type HubSettings, hubSettings } from "../../recipes/base/hub_settings.ts";
import { FluxError } from "../../recipes/base/errors.ts";
import { bflTransformer, writePart } from "../support/bfl_files.ts";
import { type FakeHub, gitHash, serveHub, sha256 } from "../support/fake_hub.ts";
import { inFolder } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";
import { ended, namesIn, taskCommand } from "../support/programs.ts";

const ID = "some-lab/FLUX.1-small";
const MODEL = goldenPath("schnell-like"); // its transformer is in three shards
/** What a hub's repository has beside what is needed. */
const EXTRA = {
  "README.md": "# a model",
  "flux1-schnell.safetensors": "the same weights in one file",
  "ae.safetensors": "and the autoencoder's",
  "text_encoder/model.fp16.safetensors": "a variant",
  "text_encoder_2/spiece.model": "for sentencepiece",
  "transformer/diffusion_pytorch_model-00001-of-00009.safetensors": "a shard of an older upload",
  "vae/diffusion_pytorch_model.bin": "a pickle",
};
const SHARD = "transformer/diffusion_pytorch_model-00001-of-00003.safetensors";

interface Bench {
  readonly hub: FakeHub;
  readonly settings: HubSettings;
  /** The model's folder in the cache. */
  readonly repository: string;
  readonly get: (options?: HubOptions) => Promise<string>;
  readonly notes: string[];
}

/** Defines a test with a hub of its own and an empty cache. */
function hubTest(name: string, body: (bench: Bench) => Promise<void>): void {
  Deno.test(`hub: ${name}`, () =>
    inFolder(async (root) => {
      await using hub = serveHub(ID, MODEL, EXTRA);
      const settings = { endpoint: hub.endpoint, cache: join(root, "hub"), token: undefined, offline: false };
      const notes: string[] = [];
      const get = (options: HubOptions = {}) =>
        hubModel(ID, { settings, patience: 1, onNote: (note) => notes.push(note), ...options });
      const repository = join(settings.cache, "models--some-lab--FLUX.1-small");
      await body({ hub, settings, repository, get, notes });
    }));
}

async function refused(promise: Promise<unknown>, message: RegExp, hint?: RegExp): Promise<FluxError> {
  try {
    await promise;
  } catch (error) {
    assert.ok(error instanceof FluxError, String(error));
    assert.match(error.message, message);
    assert.match(error.hint ?? "", hint ?? /./);
    return error;
  }
  assert.fail("it was not refused");
}

/** All files below a folder, links followed. */
function tree(folder: string, prefix = ""): string[] {
  return namesIn(folder).flatMap((name) =>
    Deno.statSync(join(folder, name)).isDirectory
      ? tree(join(folder, name), `${prefix}${name}/`)
      : [prefix + name]
  );
}

function checkSnapshot(folder: string): void {
  const expected = tree(MODEL);
  assert.deepEqual(tree(folder).sort(), expected.sort());
  for (const path of expected) {
    assert.deepEqual(Deno.readFileSync(join(folder, path)), Deno.readFileSync(join(MODEL, path)), path);
  }
}

hubTest("downloads what is needed and nothing else, into huggingface_hub's layout", async (bench) => {
  const { hub, repository, get } = bench;
  const events: DownloadProgress[] = [];
  const folder = await get({ onProgress: (event) => events.push(event) });
  assert.equal(folder, join(repository, "snapshots", hub.commit));
  checkSnapshot(folder);
  assert.equal(Deno.readTextFileSync(join(repository, "refs/main")), hub.commit);
  const weights = Deno.readFileSync(join(MODEL, SHARD));
  const config = Deno.readFileSync(join(MODEL, "vae/config.json"));
  // Relative links, so that a cache can be moved.
  assert.equal(Deno.readLinkSync(join(folder, SHARD)), `../../../blobs/${sha256(weights)}`);
  assert.equal(Deno.readLinkSync(join(folder, "vae/config.json")), `../../../blobs/${gitHash(config)}`);
  assert.equal(
    Deno.readLinkSync(join(folder, "model_index.json")).split("/").slice(0, -1).join("/"),
    "../../blobs",
  );
  assert.ok(namesIn(join(repository, "blobs")).every((name) => /^([0-9a-f]{40}|[0-9a-f]{64})$/.test(name)));
  assert.ok(hub.most > 1, "one file after another");
  const { doneBytes, totalBytes, keptBytes } = events.at(-1)!;
  assert.deepEqual([doneBytes, keptBytes], [totalBytes, 0]);
  assert.equal(totalBytes, tree(MODEL).reduce((sum, path) => sum + Deno.statSync(join(MODEL, path)).size, 0));
});

hubTest("takes what the cache has without asking the network", async ({ hub, get, settings }) => {
  const folder = await get();
  const asked = hub.asked.length;
  assert.equal(await get(), folder);
  assert.equal(await get({ revision: hub.commit }), folder);
  assert.equal(
    await get({ settings: { ...settings, offline: true, endpoint: "http://127.0.0.1:9" } }),
    folder,
  );
  assert.equal(hub.asked.length, asked);
});

hubTest("offline says what is missing", async ({ get, settings, repository }) => {
  const offline = { settings: { ...settings, offline: true } };
  await refused(get(offline), /FLUX.1-small is not in .*HF_HUB_OFFLINE/, /unset HF_HUB_OFFLINE/);
  const folder = await get();
  Deno.removeSync(join(folder, SHARD));
  await refused(get(offline), /is not complete in/);
  Deno.removeSync(join(repository, "blobs"), { recursive: true }); // links that lead nowhere
  await refused(get(offline), /is not complete in/);
});

hubTest("brings only what a cache lacks", async ({ hub, get }) => {
  const folder = await get();
  Deno.removeSync(join(folder, SHARD)); // the link; its blob is there
  const sent = hub.sent;
  await get();
  checkSnapshot(folder);
  assert.equal(hub.sent, sent);
  Deno.removeSync(Deno.realPathSync(join(folder, SHARD)));
  await get();
  checkSnapshot(folder);
  assert.equal(hub.sent - sent, Deno.statSync(join(MODEL, SHARD)).size);
});

hubTest("configs and tokenizers alone, where weights are not wanted", async ({ get }) => {
  const configs = ["text_encoder", "text_encoder_2", "transformer", "vae"] as const;
  const folder = await get({ wanted: { configs, weights: [] } });
  assert.deepEqual(tree(folder), tree(MODEL).filter((path) => !/\.safetensors(\.index\.json)?$/.test(path)));
  const all = await get();
  assert.equal(all, folder);
  checkSnapshot(folder);
});

hubTest("of a model whose transformer is a file of its own the other parts alone", async ({ get }) => {
  const configs = ["text_encoder", "text_encoder_2", "transformer", "vae"] as const;
  const folder = await get({ wanted: { configs, weights: ["text_encoder", "text_encoder_2", "vae"] } });
  const isWeights = (path: string) => /^transformer\/.*\.safetensors/.test(path);
  assert.deepEqual(tree(folder), tree(MODEL).filter((path) => !isWeights(path)));
});

hubTest("goes on where a connection was cut, in the same run", async ({ hub, get }) => {
  hub.cuts.push(20_000, 50_000, 0, 1);
  checkSnapshot(await get());
  assert.deepEqual(hub.cuts, []);
  const ranges = hub.asked.filter(({ server, range }) => server === "store" && range !== null);
  assert.ok(ranges.length >= 2, "the rest was asked for");
  assert.ok(ranges.every(({ range }) => !range!.startsWith("bytes=0-")));
});

hubTest("goes on where an earlier run was stopped", async ({ hub, get, repository }) => {
  const controller = new AbortController();
  // When a file that was cut is gone on with: then a part of it has arrived, however far the others are.
  hub.cuts.push(20_000);
  hub.trouble = ({ server, range }) => {
    if (server === "store" && range !== null) controller.abort(new FluxError("stopped by the user"));
    return undefined;
  };
  await assert.rejects(get({ signal: controller.signal }), /stopped by the user/);
  hub.trouble = undefined;
  const partials = namesIn(join(repository, "blobs")).filter((name) => name.endsWith(".incomplete")).map((
    name,
  ) => Deno.statSync(join(repository, "blobs", name)).size).filter((size) => size > 0);
  assert.ok(partials.length > 0, "nothing was kept");
  const before = hub.asked.length;
  let last: DownloadProgress | undefined;
  checkSnapshot(await get({ onProgress: (event) => last = event }));
  assert.equal(last?.doneBytes, last?.totalBytes);
  assert.ok(last!.keptBytes >= partials.reduce((a, b) => a + b));
  const starts = hub.asked.slice(before).map(({ range }) => range).filter((range) => range !== null).map((
    range,
  ) => Number(range.match(/bytes=(\d+)-/)![1]));
  // One that had arrived to its end is only looked through.
  const whole = new Set(tree(MODEL).map((path) => Deno.statSync(join(MODEL, path)).size));
  const cut = partials.filter((size) => !whole.has(size));
  assert.ok(starts.length >= cut.length, "not gone on from what had arrived");
  assert.ok(starts.every((start) => partials.includes(start)), `${starts}: not among ${partials}`);
  const sent = hub.asked.slice(before).filter(({ server, range }) =>
    server === "store" && range === null
  ).length;
  assert.ok(sent <= tree(MODEL).filter((path) => path.endsWith(".safetensors")).length - partials.length);
  assert.ok(namesIn(join(repository, "blobs")).every((name) => !name.endsWith(".incomplete")));
});

hubTest("a store without ranges sends the file anew", async ({ hub, get, repository }) => {
  const bytes = Deno.readFileSync(join(MODEL, SHARD));
  Deno.mkdirSync(join(repository, "blobs"), { recursive: true });
  Deno.writeFileSync(join(repository, "blobs", `${sha256(bytes)}.incomplete`), bytes.subarray(0, 1000));
  hub.ignoresRanges = true;
  checkSnapshot(await get());
});

hubTest(
  "a damaged or overlong beginning is found out and downloaded again",
  async ({ hub, get, repository }) => {
    const bytes = Deno.readFileSync(join(MODEL, SHARD));
    const partial = join(repository, "blobs", `${sha256(bytes)}.incomplete`);
    Deno.mkdirSync(join(repository, "blobs"), { recursive: true });
    Deno.writeFileSync(partial, new Uint8Array(5000));
    const folder = await get();
    checkSnapshot(folder);
    assert.ok(hub.asked.some(({ range }) => range?.startsWith("bytes=5000-")));
    Deno.removeSync(Deno.realPathSync(join(folder, SHARD)));
    Deno.writeFileSync(partial, new Uint8Array(bytes.length + 1));
    checkSnapshot(await get());
  },
);

hubTest(
  "content with a wrong hash is refused, and leaves nothing that looks right",
  async ({ hub, get, repository }) => {
    for (const path of ["vae/config.json", SHARD]) {
      const bytes = Deno.readFileSync(join(MODEL, path));
      const wrong = bytes.slice();
      wrong[wrong.length >> 1] ^= 1;
      hub.swapped.set(path, wrong);
      const etag = path === SHARD ? sha256(bytes) : gitHash(bytes);
      await refused(get(), new RegExp(`${path} of ${ID} was downloaded twice.*${etag}`), /another network/);
      assert.ok(!namesIn(join(repository, "blobs")).includes(etag));
      hub.swapped.delete(path);
    }
    checkSnapshot(await get());
  },
);

hubTest("more bytes than were announced are no file", async ({ hub, get }) => {
  hub.swapped.set(SHARD, new Uint8Array(Deno.statSync(join(MODEL, SHARD)).size + 10));
  await refused(get(), /cannot be downloaded: more bytes than|hash/);
});

hubTest("a gated model: what to click, with a token and without", async ({ hub, get, settings }) => {
  hub.gated = "hf_right";
  const page = `${hub.endpoint}/${ID}`;
  await refused(
    get(),
    /is gated: who wants to download/,
    new RegExp(`open ${page}.*"Agree and access repository".*HF_TOKEN`),
  );
  await refused(
    get({ settings: { ...settings, token: "hf_other" } }),
    /this token's account has no access/,
    new RegExp(`open ${page}.*"Agree.*fine-grained`),
  );
  checkSnapshot(await get({ settings: { ...settings, token: "hf_right" } }));
  const [hubs, stores] = ["hub", "store"].map((server) => hub.asked.filter((one) => one.server === server));
  assert.ok(hubs.some(({ authorization }) => authorization === "Bearer hf_right"));
  assert.ok(
    stores.length > 0 && stores.every(({ authorization }) => authorization === null),
    "the store saw the token",
  );
});

hubTest("401 with a token says that the token is no good", async ({ hub, get, settings }) => {
  hub.trouble = () => Response.json({ error: "Invalid credentials" }, { status: 401 });
  await refused(
    get({ settings: { ...settings, token: "hf_old" } }),
    /does not take the token/,
    /make a new one at/,
  );
  await refused(get(), /there is no model some-lab\/FLUX.1-small/);
});

hubTest("404: no such model, no such revision, no such file", async ({ hub, get, settings }) => {
  await refused(
    hubModel("some-lab/other", { settings, patience: 1 }),
    /there is no model some-lab\/other/,
    /spelling/,
  );
  await refused(
    hubModel("some-lab/other", { settings: { ...settings, token: "hf_x" }, patience: 1 }),
    /there is no model some-lab\/other/,
  );
  await refused(get({ revision: "v9" }), /has no revision "v9"/, /tree\/main/);
  await refused(get({ revision: "../../x" }), /is no revision/, /^$/);
  hub.trouble = ({ path }) =>
    path.endsWith(SHARD)
      ? Response.json({}, { status: 404, headers: { "X-Error-Code": "EntryNotFound" } })
      : undefined;
  await refused(get(), /answers 404 \(EntryNotFound\)/);
});

hubTest("429 waits as long as Retry-After says, and not for ever", async ({ hub, get, notes }) => {
  hub.trouble = ({ path, count }) =>
    path.endsWith(SHARD) && count === 1
      ? new Response("slow down", { status: 429, headers: { "Retry-After": "2" } })
      : undefined;
  const start = performance.now();
  checkSnapshot(await get());
  assert.ok(performance.now() - start >= 2000);
  assert.match(notes.join(), /asks to wait for 2 s/);
  hub.trouble = () => new Response("", { status: 429, headers: { "Retry-After": "86400" } });
  await refused(get({ revision: "v1" }), /429 \(too many requests\)/, /come back in 86400 s/);
  hub.trouble = () => new Response("", { status: 429 });
  await refused(get({ revision: "v1" }), /429/, /come back later/);
});

hubTest("a server that is out of order for a moment is asked again", async ({ hub, get }) => {
  hub.trouble = ({ count, server }) =>
    server === "hub" && count <= 2 ? new Response("", { status: count === 1 ? 500 : 503 }) : undefined;
  checkSnapshot(await get());
  hub.trouble = () => new Response("", { status: 502 });
  await refused(get({ revision: "v1" }), /answers 502/, /kept/);
});

hubTest("no network is an error that says so", async ({ get, settings }) => {
  const nowhere = { settings: { ...settings, endpoint: "http://127.0.0.1:1" } };
  await refused(get(nowhere), /127.0.0.1:1 cannot be reached/, /check the network/);
});

hubTest("an answer that is none of a hub is an error that says so", async ({ hub, get }) => {
  hub.trouble = () => new Response("<html>log in to the wireless network</html>", { status: 200 });
  await refused(get(), /an answer that makes no sense/, /HF_ENDPOINT/);
  hub.trouble = ({ path }) => path.includes("/revision/") ? Response.json({ sha: "../../etc" }) : undefined;
  await refused(get(), /a commit that is none/);
  hub.trouble = ({ path }) =>
    path.includes("/tree/")
      ? Response.json([{ type: "file", path: "model_index.json", size: 3, oid: "../../../etc/passwd" }])
      : undefined;
  await refused(get(), /whose hash or size is none/);
});

hubTest(
  "a repository that is no FLUX.1 model in diffusers' layout is refused before the download",
  async ({ hub, get }) => {
    hub.trouble = ({ path }) =>
      path.includes("/tree/")
        ? Response.json([{ type: "file", path: "flux1-dev.safetensors", size: 3, oid: "0".repeat(40) }])
        : undefined;
    await refused(get(), /it has no .*vocab.json.*model_index.json/, /--transformer/);
    assert.equal(hub.sent, 0);
  },
);

hubTest("an index that names files elsewhere is refused", async ({ hub, get }) => {
  const index = "transformer/diffusion_pytorch_model.safetensors.index.json";
  const text = JSON.stringify({ weight_map: { a: "../../../secret.safetensors" } });
  const bytes = new TextEncoder().encode(text);
  hub.swapped.set(index, bytes);
  hub.trouble = async ({ path, count, server }) => {
    if (server !== "hub" || !path.includes("/tree/") || count > 1) return undefined;
    const entry = { type: "file", path: index, size: bytes.length, oid: gitHash(bytes) };
    const needed = tree(MODEL).filter((path) => path !== index).map((path) => {
      const content = Deno.readFileSync(join(MODEL, path));
      return { type: "file", path, size: content.length, oid: gitHash(content) };
    });
    return await Promise.resolve(Response.json([entry, ...needed]));
  };
  await refused(get(), /names shards that it may not name/, /do not use this model/);
});

hubTest("a full disk keeps what has arrived", async ({ get, repository }) => {
  const { write } = Deno.FsFile.prototype;
  let room = 300_000;
  Deno.FsFile.prototype.write = function (bytes) {
    if (room <= 0) {
      return Promise.reject(Object.assign(new Error("No space left on device"), { code: "ENOSPC" }));
    }
    room -= bytes.length;
    return write.call(this, bytes);
  };
  try {
    await refused(get(), /cannot write .*the disk is full/, /kept: the same command goes on/);
  } finally {
    Deno.FsFile.prototype.write = write;
  }
  const kept = namesIn(join(repository, "blobs")).map((name) =>
    Deno.statSync(join(repository, "blobs", name)).size
  );
  assert.ok(kept.reduce((a, b) => a + b) >= 300_000);
  checkSnapshot(await get());
});

hubTest("what does not fit on the disk is not begun", async ({ hub, get }) => {
  hub.trouble = ({ path, count }) =>
    path.includes("/tree/") && count === 1
      ? Response.json(tree(MODEL).map((path) => ({ type: "file", path, size: 2 ** 52, oid: "0".repeat(40) })))
      : undefined;
  await refused(get(), /takes \d+\.\d GB more, and .* has room for/, /HF_HOME/);
  assert.equal(hub.sent, 0);
});

hubTest("two runs at a time do not disturb each other", async ({ get, hub }) => {
  const [first, second] = await Promise.all([get(), get()]);
  assert.equal(first, second);
  checkSnapshot(first);
  const whole = tree(MODEL).reduce((sum, path) => sum + Deno.statSync(join(MODEL, path)).size, 0);
  assert.equal(hub.sent, whole, "a file was downloaded twice");
});

Deno.test("hub: settings are huggingface_hub's", () =>
  inFolder((root) => {
    const read = (variables: Record<string, string>) => hubSettings((name) => variables[name]);
    const HOME = root;
    assert.deepEqual(read({ HOME }), {
      endpoint: "https://huggingface.co",
      cache: `${root}/.cache/huggingface/hub`,
      token: undefined,
      offline: false,
    });
    assert.equal(read({ HOME, XDG_CACHE_HOME: "/x" }).cache, "/x/huggingface/hub");
    assert.equal(read({ HOME, HF_HOME: "~/hf" }).cache, `${root}/hf/hub`);
    assert.equal(read({ HOME, HF_HOME: "/hf", HUGGINGFACE_HUB_CACHE: "/old" }).cache, "/old");
    assert.equal(read({ HOME, HUGGINGFACE_HUB_CACHE: "/old", HF_HUB_CACHE: "/new" }).cache, "/new");
    for (const offline of ["1", "true", "YES", "On"]) {
      assert.ok(read({ HOME, HF_HUB_OFFLINE: offline }).offline);
    }
    for (const offline of ["0", "", "no"]) assert.ok(!read({ HOME, HF_HUB_OFFLINE: offline }).offline);
    Deno.mkdirSync(join(root, ".cache/huggingface"), { recursive: true });
    Deno.writeTextFileSync(join(root, ".cache/huggingface/token"), "hf_file\n");
    Deno.writeTextFileSync(join(root, "mine"), "hf_mine");
    assert.equal(read({ HOME }).token, "hf_file");
    assert.equal(read({ HOME, HF_TOKEN_PATH: "~/mine" }).token, "hf_mine");
    assert.equal(read({ HOME, HF_TOKEN: " hf_variable " }).token, "hf_variable");
    assert.equal(
      read({ HOME, HF_ENDPOINT: "https://mirror.example/hf/" }).endpoint,
      "https://mirror.example/hf",
    );
    for (const HF_ENDPOINT of ["mirror.example", "ftp://mirror.example"]) {
      assert.throws(() => read({ HOME, HF_ENDPOINT }), { name: "UsageError", message: /HF_ENDPOINT/ });
    }
  }));

Deno.test("hub: ids are told from paths, and hosts are the endpoint's and the stores'", () => {
  for (const id of ["black-forest-labs/FLUX.1-dev", "a/b", "models/tiny"]) assert.ok(isHubId(id), id);
  for (
    const path of ["/a/b", "./a/b", "../b", "a", "a/b/c", "~/a", "a/", "a/..", ".a/b", "a--b/c", "a/b c"]
  ) {
    assert.ok(!isHubId(path), path);
  }
  assert.deepEqual(hubHosts(), ["huggingface.co:443", "*.hf.co:443"]);
  assert.deepEqual(hubHosts(""), ["huggingface.co:443", "*.hf.co:443"]);
  assert.deepEqual(hubHosts("http://127.0.0.1:8080/x"), ["127.0.0.1:8080", "*.hf.co:443"]);
  assert.deepEqual(hubHosts("http://mirror.example"), ["mirror.example:80", "*.hf.co:443"]);
  assert.deepEqual(hubHosts("nonsense"), ["*.hf.co:443"]);
});

Deno.test("hub: gen_image draws with a model by its id, with the task's permissions", () =>
  inFolder(async (root) => {
    await using hub = serveHub(ID, MODEL, EXTRA);
    const { port } = new URL(hub.endpoint);
    const store = { HF_HOME: join(root, "hf"), HF_TOKEN: "" };
    const output = join(root, "a.png");
    const args = [
      "--ckpt",
      ID,
      "--height",
      "32",
      "--width",
      "32",
      "--output-file",
      output,
      "--cache-dir",
      root,
    ];
    const run = (env: Record<string, string>, ...more: string[]) =>
      ended(taskCommand("generate", [...args, ...more], { ...store, ...env }));
    // The store of this hub is on a port that the task may not reach: the error names it.
    const online = { HF_ENDPOINT: hub.endpoint };
    const denied = await run(online);
    assert.equal(denied.code, 1);
    assert.match(denied.stderr, /gen_image: Deno may not connect to 127\.0\.0\.1:\d+\n/);
    assert.ok(!denied.stderr.includes(`127.0.0.1:${port}`), "the hub itself could not be reached");

    await hubModel(ID, {
      settings: { endpoint: hub.endpoint, cache: join(root, "hf/hub"), token: undefined, offline: false },
    });
    const cached = await run({ HF_HUB_OFFLINE: "1" }, "--json");
    assert.equal(cached.code, 0, cached.stderr);
    assert.equal(JSON.parse(cached.stdout).model, ID);

    // What is not needed is not missed, offline too.
    Deno.removeSync(join(root, "hf/hub/models--some-lab--FLUX.1-small/snapshots", hub.commit, SHARD));
    const whole = await run({ HF_HUB_OFFLINE: "1" });
    assert.match(whole.stderr, /is not complete in/);
    const transformer = join(root, "flux1-small.safetensors");
    await writePart(transformer, bflTransformer(MODEL));
    const single = await run({ HF_HUB_OFFLINE: "1" }, "--transformer", transformer);
    assert.equal(single.code, 0, single.stderr);
    const random = await run({ HF_HUB_OFFLINE: "1" }, "--random-weights");
    assert.equal(random.code, 0, random.stderr);

    const missing = await run({ HF_HUB_OFFLINE: "1", HF_HOME: join(root, "empty") });
    assert.equal(missing.code, 2);
    assert.match(missing.stderr, /is not in .*empty.*HF_HUB_OFFLINE/);
    const revision = await ended(
      taskCommand("generate", ["--ckpt", MODEL, "--revision", "main", "--output-file", output]),
    );
    assert.equal(revision.code, 2);
    assert.match(revision.stderr, /--revision is for a --ckpt from the hub/);
  }));

Deno.test("hub: Ctrl-C ends a download with a word, and the next one goes on", () =>
  inFolder(async (root) => {
    await using hub = serveHub(ID, MODEL);
    let waiting: (() => void) | undefined;
    const reached = new Promise<void>((resolve) => waiting = resolve);
    hub.trouble = async ({ path }) => {
      if (!path.endsWith("scheduler_config.json")) return undefined;
      waiting!();
      await new Promise((resolve) => setTimeout(resolve, 1500));
      return undefined;
    };
    const child = taskCommand("generate", ["--ckpt", ID, "--output-file", join(root, "a.png")], {
      HF_HOME: root,
      HF_ENDPOINT: hub.endpoint,
    }).spawn();
    await reached;
    child.kill("SIGINT");
    const { code, stderr } = await child.output();
    assert.equal(code, 2);
    assert.match(
      new TextDecoder().decode(stderr),
      /stopped; what has arrived of some-lab\/FLUX.1-small is kept/,
    );
    hub.trouble = undefined;
    const settings = { endpoint: hub.endpoint, cache: join(root, "hub"), token: undefined, offline: false };
    checkSnapshot(await hubModel(ID, { settings })); // nothing of the first one is in its way
  }));
