/** Several prompts and pictures: files of prompts, names of pictures, and the program that draws them. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { Image } from "imagescript";
import { FileError, UsageError } from "../../recipes/base/errors.ts";
import { readPngText } from "../../recipes/base/image.ts";
import { numberedPaths, readPrompts } from "../../recipes/base/prompts.ts";
import { inFolder } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";
import { withKontext } from "../support/golden_suite_kontext.ts";
import { runTask } from "../support/programs.ts";

Deno.test("readPrompts: a prompt on each line, without what surrounds them", () =>
  inFolder(async (folder) => {
    const path = join(folder, "prompts.txt");
    const cases: [string, string[]][] = [
      ["a cat", ["a cat"]],
      ["a cat\n", ["a cat"]],
      ["\ufeffa cat\r\n\r\n  two dogs, # one of them red \t\r\n", ["a cat", "two dogs, # one of them red"]],
      ["猫\rein Hund\n\n", ["猫", "ein Hund"]],
    ];
    for (const [text, prompts] of cases) {
      await Deno.writeTextFile(path, text);
      assert.deepEqual(await readPrompts(path), prompts);
    }
    await Deno.writeTextFile(path, " \n\n\t\n");
    await assert.rejects(
      readPrompts(path),
      (error) => error instanceof UsageError && /no prompts/.test(error.message),
    );
    await Deno.writeFile(path, Uint8Array.of(0x61, 0xff, 0xfe));
    await assert.rejects(
      readPrompts(path),
      (error) => error instanceof FileError && /no UTF-8/.test(error.message),
    );
    for (const missing of [join(folder, "none.txt"), folder]) {
      await assert.rejects(
        readPrompts(missing),
        (error) => error instanceof FileError && error.message.includes(missing),
      );
    }
  }));

Deno.test("numberedPaths: a number before the ending, padded so that they sort", () => {
  assert.deepEqual(numberedPaths("/x.y/a.b.png", 1), ["/x.y/a.b.png"]);
  assert.deepEqual(numberedPaths("/x.y/a.b.png", 2), ["/x.y/a.b-1.png", "/x.y/a.b-2.png"]);
  const many = numberedPaths("out.PNG", 100);
  assert.deepEqual([many[0], many[8], many[99]], ["out-001.PNG", "out-009.PNG", "out-100.PNG"]);
  assert.deepEqual(many, many.toSorted());
});

const SMALL = [
  "--ckpt",
  goldenPath("schnell-like"),
  "--height",
  "32",
  "--width",
  "32",
  "--num_inference_steps",
  "2",
];

Deno.test("gen_image --prompt-file draws each prompt as it is drawn alone", () =>
  inFolder(async (folder) => {
    const prompts = ["a cat", "two dogs", "three apples"];
    await Deno.writeTextFile(join(folder, "prompts.txt"), prompts.join("\n"));
    const args = [...SMALL, "--seed", "3", "--cache-dir", join(folder, "cache")];
    const many = await runTask(
      "generate",
      ...args,
      "--prompt-file",
      join(folder, "prompts.txt"),
      "--output-file",
      join(folder, "many.png"),
    );
    assert.equal(many.code, 0, many.stderr);
    const lines = many.stdout.trimEnd().split("\n");
    assert.equal(lines.length, 3);
    for (const [i, prompt] of prompts.entries()) {
      const path = join(folder, `many-${i + 1}.png`);
      assert.match(lines[i], new RegExp(`^${path}  seed 3  \\d+\\.\\d s$`));
      const alone = join(folder, "alone.png");
      const { code, stderr } = await runTask("generate", ...args, "--prompt", prompt, "--output-file", alone);
      assert.equal(code, 0, stderr);
      assert.deepEqual(await Deno.readFile(path), await Deno.readFile(alone), prompt);
    }
  }));

Deno.test("gen_image --num_images_per_prompt draws several of each, with one line of JSON for each", () =>
  inFolder(async (folder) => {
    await Deno.writeTextFile(join(folder, "prompts.txt"), "a cat\ntwo dogs\n");
    const { code, stdout, stderr } = await runTask(
      "generate",
      ...SMALL,
      "--cache-dir",
      join(folder, "cache"),
      "--prompt-file",
      join(folder, "prompts.txt"),
      "--num_images_per_prompt",
      "2",
      "--json",
      "--output-file",
      join(folder, "a.png"),
    );
    assert.equal(code, 0, stderr);
    const reports = stdout.trimEnd().split("\n").map((line) => JSON.parse(line));
    assert.deepEqual(
      reports.map(({ path, prompt }) => [path, prompt]),
      ["a cat", "a cat", "two dogs", "two dogs"].map((prompt, i) => [join(folder, `a-${i + 1}.png`), prompt]),
    );
    const pictures = await Promise.all(reports.map(({ path }) => Deno.readFile(path)));
    const pixels = await Promise.all(pictures.map(async (png) => String((await Image.decode(png)).bitmap)));
    assert.equal(new Set(pixels).size, 4, "each is another picture");
    assert.match(readPngText(pictures[1]).parameters, /^a cat\n.*Picture: 2 of 2/);
    assert.match(readPngText(pictures[2]).parameters, /^two dogs\n.*Picture: 1 of 2/);
  }));

Deno.test("gen_image: wrong calls with files of prompts and pictures end in a clear line", () =>
  inFolder(async (folder) => {
    const [prompts, empty, text] = ["prompts.txt", "empty.txt", "text.png"].map((name) => join(folder, name));
    await Deno.writeTextFile(prompts, "a\nb\n");
    await Deno.writeTextFile(empty, "\n");
    await Deno.writeTextFile(text, "no picture");
    await Deno.mkdir(join(folder, "out-2.png"));
    const cases: [string[], number, RegExp][] = [
      [["--prompt-file", empty], 2, /empty\.txt has no prompts/],
      [["--prompt-file", join(folder, "none")], 1, /none cannot be read: there is no such file/],
      [["--prompt-file", prompts, "--prompt", "c"], 2, /--prompt-file.*cannot be used with.*--prompt/],
      [["--num_images_per_prompt", "0"], 2, /--num_images_per_prompt/],
      [["--prompt-file", prompts, "--output-file", join(folder, "out.png")], 1, /out-2\.png: it is a folder/],
      [["--image", text], 2, /--image is for FLUX\.1-Kontext checkpoints, and schnell-like is none/],
    ];
    for (const [args, expected, message] of cases) {
      const { code, stdout, stderr } = await runTask("generate", ...SMALL, "--cache-dir", folder, ...args);
      assert.match(stderr, message, args.join(" "));
      assert.equal(code, expected, stderr);
      assert.equal(stdout, "");
    }
    await withKontext(async (model) => {
      for (
        const [image, message] of [[text, /text\.png is neither a PNG nor a JPEG/], [
          join(folder, "none.jpg"),
          /none\.jpg cannot be read/,
        ]] as const
      ) {
        const { stderr } = await runTask(
          "generate",
          "--ckpt",
          model,
          "--image",
          image,
          "--cache-dir",
          folder,
        );
        assert.match(stderr, message);
      }
    });
  }));

Deno.test("gen_image --image edits a JPEG with a small Kontext model, and says with what", () =>
  inFolder((folder) =>
    withKontext(async (model) => {
      const output = join(folder, "a.png");
      const draw = async (image: string) => {
        const { code, stdout, stderr } = await runTask(
          "generate",
          "--ckpt",
          model,
          "--image",
          goldenPath(`pictures/${image}`),
          "--height",
          "32",
          "--width",
          "48",
          "--num_inference_steps",
          "1",
          "--max_sequence_length",
          "16",
          "--cache-dir",
          join(folder, "cache"),
          "--json",
          "--output-file",
          output,
        );
        assert.equal(code, 0, stderr);
        return { report: JSON.parse(stdout), png: await Deno.readFile(output) };
      };
      const { report, png } = await draw("photo.jpg");
      assert.deepEqual(report.image, { width: 1248, height: 832 });
      assert.equal(report.guidanceScale, 2.5);
      assert.ok(report.milliseconds.image > 0);
      assert.match(readPngText(png).parameters, /Distilled CFG Scale: 2\.5/);
      assert.notDeepEqual((await draw("turned6.jpg")).png, png);
    })
  ));
