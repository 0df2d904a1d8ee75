/** The program as a user runs it: a process of its own, with the permissions that the task gives it. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { readPngText } from "../../recipes/base/image.ts";
import { EMBEDDED_MODEL } from "../../recipes/base/command_line.ts";
import { withModelCopy } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";
import { ROOT, runTask, taskCommand } from "../support/programs.ts";

const MODEL = goldenPath("schnell-like");

const command = (args: readonly string[]) => taskCommand("generate", args);
const run = (...args: string[]) => runTask("generate", ...args);

/** Size, from the PNG's header chunk. */
function sizeOf(png: Uint8Array): [number, number] {
  const view = new DataView(png.buffer, png.byteOffset);
  assert.equal(view.getUint32(0), 0x89504e47, "no PNG");
  return [view.getUint32(16), view.getUint32(20)];
}

Deno.test("gen_image writes a PNG with its settings and prints path, seed and time", async () => {
  const folder = await Deno.makeTempDir();
  const output = join(folder, "picture.png");
  const args = [
    "--ckpt",
    MODEL,
    "--output-file",
    output,
    "--cache-dir",
    join(folder, "cache"),
    "--height",
    "48",
  ];
  const prompt = "a red apple, très joli 🍎";
  const result = await run(...args, "--width", "80", "--seed", "7", "--prompt", prompt);
  assert.equal(result.code, 0, result.stderr);
  assert.match(result.stdout, new RegExp(`^${output}  seed 7  \\d+\\.\\d s\n$`));
  assert.equal(result.stderr, "", "no progress bar where stderr is no terminal");
  const png = await Deno.readFile(output);
  assert.deepEqual(sizeOf(png), [80, 48]);
  const { parameters } = readPngText(png);
  assert.ok(parameters.startsWith(`${prompt}\n`), parameters);
  for (const part of ["Steps: 4", "Seed: 7", "Size: 80x48", "Model: schnell-like", "01_bfloat16"]) {
    assert.ok(parameters.includes(part), `${part} is not in ${parameters}`);
  }

  // Again, in JSON and float32, over the file that is there.
  const json = await run(
    ...args,
    "--width=80",
    "--seed=7",
    "--disable_bf16",
    "--json",
    "--num_inference_steps",
    "2",
  );
  assert.equal(json.code, 0, json.stderr);
  const report = JSON.parse(json.stdout);
  assert.equal(report.path, output);
  assert.equal(report.seed, "7");
  assert.equal(report.numInferenceSteps, 2);
  assert.equal(report.recipes[0], "00_baseline_fp32");
  assert.equal(report.milliseconds.steps.length, 2);
  assert.ok(readPngText(await Deno.readFile(output)).parameters.includes("00_baseline_fp32"));
  assert.deepEqual([...Deno.readDirSync(folder)].map(({ name }) => name).sort(), ["cache", "picture.png"]);
});

Deno.test("gen_image draws the same bytes for the same seed, and others for another", async () => {
  const folder = await Deno.makeTempDir();
  const draw = async (name: string, seed: string) => {
    const output = join(folder, name);
    const args = [
      "--ckpt",
      MODEL,
      "--output-file",
      output,
      "--height",
      "32",
      "--width",
      "32",
      "--seed",
      seed,
    ];
    assert.equal((await run(...args, "--cache-dir", folder)).code, 0);
    return await Deno.readFile(output);
  };
  const first = await draw("a.png", "-3");
  assert.deepEqual(await draw("b.png", "-3"), first);
  assert.notDeepEqual(await draw("c.png", "18446744073709551615"), first);
});

Deno.test("gen_image keeps compiled kernels in --cache-dir and makes damaged ones again", async () => {
  const folder = await Deno.makeTempDir();
  const cache = join(folder, "cache");
  const args = ["--ckpt", MODEL, "--output-file", join(folder, "a.png"), "--height", "32", "--width", "32"];
  assert.equal((await run(...args, "--cache-dir", cache)).code, 0);
  const entries = [...Deno.readDirSync(cache)].map(({ name }) => join(cache, name));
  assert.ok(entries.length > 0, "nothing was kept");
  await Deno.writeFile(entries[0], new Uint8Array(100));
  const again = await run(...args, "--cache-dir", cache);
  assert.equal(again.code, 0);
  assert.match(again.stderr, /^gen_image: .* is damaged and is made again\n$/);
  assert.equal((await run(...args, "--cache-dir", cache)).stderr, "");
});

Deno.test("gen_image --random-weights draws from configs and tokenizers alone, and says so", () =>
  withModelCopy("schnell-like", async (folder) => {
    for (const part of ["text_encoder", "text_encoder_2", "transformer", "vae"]) {
      for (const { name } of [...Deno.readDirSync(join(folder, part))]) {
        if (name !== "config.json") Deno.removeSync(join(folder, part, name));
      }
    }
    const output = join(folder, "a.png");
    const args = ["--ckpt", folder, "--output-file", output, "--cache-dir", join(folder, "cache")];
    args.push("--random-weights", "--json", "--height", "32", "--width", "32", "--num_inference_steps", "1");
    const { code, stdout, stderr } = await run(...args);
    assert.equal(code, 0, stderr);
    assert.equal(JSON.parse(stdout).model, "schnell-like with random weights");
    assert.match(
      readPngText(await Deno.readFile(output)).parameters,
      /Model: schnell-like with random weights/,
    );
  }));

Deno.test("gen_image --t5_float8 and --cache_dit_config run their recipes, and say what was reused", async () => {
  const folder = await Deno.makeTempDir();
  const args = [
    "--ckpt",
    goldenPath("dev-like"),
    "--output-file",
    join(folder, "a.png"),
    "--cache-dir",
    folder,
  ];
  args.push("--height", "32", "--width", "32", "--num_inference_steps", "12", "--max_sequence_length", "16");
  args.push("--t5_float8", "dynamic", "--cache_dit_config", "1000", "--json", "--verbose");
  const { code, stdout, stderr } = await run(...args);
  assert.equal(code, 0, stderr);
  const { recipes, reusedSteps } = JSON.parse(stdout);
  assert.deepEqual(recipes.slice(-2), ["09_first_block_cache", "11_float8_text_encoder"]);
  assert.deepEqual(reusedSteps, [8, 9, 10, 11]);
  assert.match(stderr, /steps that reused the blocks' result: 4 of 12/);
});

Deno.test("gen_image says in --verbose what runs where", async () => {
  const folder = await Deno.makeTempDir();
  const args = [
    "--ckpt",
    MODEL,
    "--output-file",
    join(folder, "a.png"),
    "--cache-dir",
    folder,
    "--height",
    "32",
  ];
  const { code, stderr } = await run(...args, "--width", "32", "--verbose");
  assert.equal(code, 0);
  assert.match(stderr, /schnell-like on cpu .*01_bfloat16/);
  assert.match(stderr, /matmul: (oneDNN|WebAssembly)/);
  assert.match(stderr, /load \d+ ms, text \d+ ms, steps \d+ \d+ \d+ \d+ ms/);
  assert.match(stderr, /memory: weights \d+\.\d+ GB, activations \d+\.\d+ GB at most/);
});

Deno.test("gen_image ends wrong calls with one clear line and an exit code", async (test) => {
  const folder = await Deno.makeTempDir();
  const file = join(folder, "file");
  const empty = join(folder, "empty");
  await Deno.writeTextFile(file, "text");
  await Deno.mkdir(empty);
  const cases: [string[], number, RegExp][] = [
    [["--frobnicate"], 2, /unknown option '--frobnicate'/],
    [["--promt", "x"], 2, /Did you mean --prompt/],
    [["surplus"], 2, /too many arguments/],
    [["--height", "tall"], 2, /--height.*'tall'.*whole number/],
    [["--height", "0"], 2, /--height.*'0'/],
    [["--height", "15"], 2, /height is 15: give 16 or more/],
    [["--width", "12.5"], 2, /--width/],
    [["--num_inference_steps", "0"], 2, /--num_inference_steps/],
    [["--max_sequence_length", "513"], 2, /--max_sequence_length.*1 to 512/],
    [["--guidance_scale", "much"], 2, /--guidance_scale.*number/],
    [["--seed", "1e3"], 2, /--seed/],
    [["--seed", "18446744073709551616"], 2, /--seed/],
    [["--seed"], 2, /argument missing/],
    [["--device", "tpu"], 2, /--device.*'tpu'.*cpu/],
    [["--device", "hip"], 1, /hip/],
    [["--compile_export_mode", "export_aoti"], 2, /08_export, which runs on cuda and hip, not on cpu/],
    [["--use-cached-model"], 2, /--use-cached-model asks for recipe 08_export.*not on cpu/],
    [
      ["--use-cached-model", "--compile_export_mode", "disabled"],
      2,
      /--compile_export_mode disabled clashes with --use-cached-model/,
    ],
    [
      ["--cache_dit_config", "0.1"],
      2,
      /09_first_block_cache is for FLUX\.1-dev and Kontext: this model has no guidance/,
    ],
    [["--cache_dit_config", "none.yaml"], 2, /Give a threshold.*none\.yaml: there is no such file/],
    [["--cache_dit_config", "-1"], 2, /Give a threshold from 0/],
    [["--offload"], 2, /--offload asks for recipe 12_offload, which runs on cuda and hip, not on cpu/],
    [["--t5_float8", "all"], 2, /--t5_float8.*weights, dynamic/],
    [["--t5_float8", "weights", "--disable_bf16"], 2, /--disable_bf16 clashes with --t5_float8/],
    [["--trace-file", "t.json"], 2, /--trace-file is for benchmarks/],
    [["--image", "photo.png"], 2, /Kontext checkpoints, and schnell-like is none/],
    [["--output-file", "picture.jpg"], 2, /PNG/],
    [["--output-file", join(folder, "missing", "a.png")], 1, /missing does not exist/],
    [["--output-file", join(file, "a.png")], 1, /is not a folder/],
    [["--output-file", join(folder, "folder.png")], 1, /is a folder/],
    [["--num_inference_steps", "1001"], 2, /--num_inference_steps.*1 to 1000/],
    [["--ckpt", ""], 2, /--ckpt.*path/],
    [["--ckpt", join(folder, "nowhere")], 1, /nowhere.*no such model folder/],
    [["--ckpt", empty], 1, /empty.*no model/],
    [["--ckpt", file], 1, /is a file/],
  ];
  await Deno.mkdir(join(folder, "folder.png"));
  for (const [args, code, message] of cases) {
    await test.step(args.join(" ").replaceAll(folder, "..."), async () => {
      const output = args.includes("--output-file") ? [] : ["--output-file", join(folder, "never.png")];
      const model = args.includes("--ckpt") ? [] : ["--ckpt", MODEL];
      const result = await run(...model, ...output, "--cache-dir", join(folder, "cache"), ...args);
      assert.equal(result.code, code, result.stderr);
      assert.match(result.stderr, message);
      assert.equal(result.stdout, "");
      assert.ok(!/^\s+at /m.test(result.stderr), `a stack trace:\n${result.stderr}`);
      assert.ok(result.stderr.trim().split("\n").length <= 3, result.stderr);
    });
  }
  assert.deepEqual(
    [...Deno.readDirSync(folder)].map(({ name }) => name).filter((name) => /never|tmp/.test(name)),
    [],
  );
});

Deno.test("gen_image takes paths from the folder where the user is", async () => {
  const folder = await Deno.realPath(await Deno.makeTempDir());
  const { code, stdout, stderr } = await new Deno.Command("deno", {
    args: [
      "task",
      "--quiet",
      "--config",
      join(ROOT, "deno.json"),
      "generate",
      "--height",
      "32",
      "--width",
      "32",
    ]
      .concat("--ckpt", MODEL, "--output-file", "below.png", "--cache-dir", "cache", "--json"),
    cwd: folder,
    clearEnv: true, // `deno task` passes on the INIT_CWD of a task around it, such as the one that runs this test
    env: { PATH: Deno.env.get("PATH") ?? "", HOME: Deno.env.get("HOME") ?? "" },
  }).output();
  assert.equal(code, 0, new TextDecoder().decode(stderr));
  assert.equal(JSON.parse(new TextDecoder().decode(stdout)).path, join(folder, "below.png"));
  assert.deepEqual([...Deno.readDirSync(folder)].map(({ name }) => name).sort(), ["below.png", "cache"]);
});

Deno.test("gen_image --help shows every flag, and examples that work", async () => {
  const { code, stdout } = await run("--help");
  assert.equal(code, 0);
  for (
    const flag of [
      "ckpt",
      "prompt",
      "image",
      "cache-dir",
      "device",
      "num_inference_steps",
      "output-file",
      "seed",
    ]
  ) {
    assert.ok(stdout.includes(`--${flag} `), flag);
  }
  assert.match(stdout, /Examples:\n\s+deno task generate/);
});

Deno.test("gen_image leaves nothing behind on Ctrl-C", async () => {
  const folder = await Deno.makeTempDir();
  const output = join(folder, "a.png");
  await Deno.writeTextFile(output, "the old picture");
  const child = command([
    // Half an entry of the cache may stay, which is made again; it is not the user's.
    ...["--ckpt", MODEL, "--output-file", output, "--cache-dir", join(folder, "cache")],
    ...["--num_inference_steps", "1000", "--height", "128", "--width", "128", "--verbose"],
  ]).spawn();
  const reader = child.stderr.getReader();
  await reader.read(); // the device is open and the model loaded
  child.kill("SIGINT");
  while (!(await reader.read()).done);
  await child.stdout.cancel();
  const status = await child.status;
  assert.ok(!status.success);
  assert.equal(await Deno.readTextFile(output), "the old picture");
  assert.deepEqual([...Deno.readDirSync(folder)].filter(({ name }) => name.includes("tmp")), []);
});

Deno.test("gen_image draws with the embedded model when no checkpoint is given", async () => {
  const folder = await Deno.makeTempDir();
  const output = join(folder, "a.png");
  const started = performance.now();
  const { code, stdout, stderr } = await run("--output-file", output, "--cache-dir", folder, "--json");
  assert.equal(code, 0, stderr);
  assert.ok(performance.now() - started < 20_000, "the first picture takes over 20 s");
  const report = JSON.parse(stdout);
  assert.equal(report.prompt, "A cat playing with a ball of yarn");
  const { sample_size } = JSON.parse(await Deno.readTextFile(join(EMBEDDED_MODEL, "vae/config.json")));
  assert.deepEqual(sizeOf(await Deno.readFile(output)), [sample_size, sample_size]);
});
