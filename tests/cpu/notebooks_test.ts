/** The notebooks of examples/ run from top to bottom, and show what they promise. */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { join } from "node:path";
import { LADDER } from "../../recipes/switches.ts";
import { decodePicture } from "../../recipes/base/read_picture.ts";
import { inFolder } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";
import { withKontext } from "../support/golden_suite_kontext.ts";
import { missingCompiler } from "../support/emulated_compiler.ts";
import {
  missingJupyter,
  notebookPath,
  notebookProgram,
  printed,
  type RunCell,
  runNotebook,
  shown,
} from "../support/notebooks.ts";
import { ROOT } from "../support/programs.ts";
import { parseXml, type XmlElement } from "../support/xml.ts";

const NAMES = ["01_first_image", "02_the_ladder", "03_write_a_kernel", "04_kontext_edit"];

function testNotebook(title: string, body: () => Promise<void>, missing = missingJupyter): void {
  const word = missing === undefined ? "" : ` (skipped: ${missing})`;
  Deno.test({ name: `${title}${word}`, ignore: missing !== undefined, fn: body });
}

/** A GPU that no machine has, instead of the one that may be here. */
const NO_GPU = { 'openDevice("cuda")': 'openDevice("cuda:4095")' };

function pngs(cells: readonly RunCell[]): Buffer[] {
  const inHtml = shown(cells, "text/html").flatMap((html) =>
    [...html.matchAll(/src="data:image\/png;base64,([^"]*)"/g)].map(([, data]) => data)
  );
  return [...shown(cells, "image/png"), ...inHtml].map((data) => Buffer.from(data, "base64"));
}

function textsOf(svg: string): string[] {
  const texts: string[] = [];
  const walk = ({ name, text, children }: XmlElement) => {
    if (name === "text") texts.push(text);
    children.forEach(walk);
  };
  walk(parseXml(svg));
  return texts;
}

Deno.test("notebooks are committed without outputs, for Deno's kernel", () => {
  for (const name of NAMES) {
    const { cells, metadata } = JSON.parse(Deno.readTextFileSync(notebookPath(name)));
    assert.deepEqual(metadata.kernelspec, { display_name: "Deno", language: "typescript", name: "deno" });
    for (const cell of cells.filter((cell: { cell_type: string }) => cell.cell_type === "code")) {
      assert.deepEqual([cell.outputs, cell.execution_count], [[], null], name);
    }
  }
});

Deno.test("every relative link of the notebooks leads to a file", () => {
  for (const name of NAMES) {
    const { cells } = JSON.parse(Deno.readTextFileSync(notebookPath(name)));
    for (const { cell_type, source } of cells) {
      if (cell_type !== "markdown") continue;
      for (const [, to] of source.join("").matchAll(/\]\(([^)#]+)\)/g)) {
        if (!to.includes("://")) assert.ok(Deno.statSync(new URL(to, `file://${notebookPath(name)}`)), to);
      }
    }
  }
});

Deno.test("the notebooks' code is type-checked, as one program each", () =>
  inFolder(async (folder) => {
    const paths = NAMES.map((name) => join(folder, `${name}.ts`));
    for (const [i, name] of NAMES.entries()) await Deno.writeTextFile(paths[i], notebookProgram(name));
    const { code, stderr } = await new Deno.Command("deno", {
      args: ["check", "--quiet", "--config", join(ROOT, "deno.json"), ...paths],
    }).output();
    assert.equal(code, 0, new TextDecoder().decode(stderr));
  }));

testNotebook("01_first_image draws, shows tensors and bars, and says that there is no GPU", async () => {
  const cells = await runNotebook("01_first_image", NO_GPU);
  const text = printed(cells);
  assert.match(text, /No GPU here, the CPU computes \(.+\)\./);
  assert.match(text, /deno task doctor/);
  assert.match(text, /seed 42 again: equal\n/);
  assert.match(text, /step 4: noise level 0\.000, spread [0-9.]+\n/);
  const pictures = await Promise.all(pngs(cells).map((bytes) => decodePicture(bytes, "output")));
  assert.deepEqual(pictures.map(({ width, height }) => [width, height]), Array(4).fill([256, 256]));
  assert.deepEqual(pictures[0].rgb, pictures[1].rgb, "the first of the three is the same as that above");
  assert.notDeepEqual(pictures[1].rgb, pictures[3].rgb);
  const tensors = shown(cells, "image/svg+xml").map((svg) => textsOf(svg));
  assert.deepEqual(tensors.map(([title]) => title), ["f32 [1, 256, 64] on cpu", "bf16 [1, 64, 256] on cpu"]);
  for (const [, statistics] of tensors) {
    assert.match(statistics, /^min -[0-9.]+ {3}max [0-9.]+ {3}mean .* {3}std 1\./);
  }
  const bars = shown(cells, "text/html").filter((html) => html.includes("<progress"));
  assert.equal(bars.length, 4, "loading, and three pictures");
  for (const bar of bars) assert.match(bar, /<progress value="100" max="100"/);
});

testNotebook(
  "02_the_ladder shows each rung's lines, pictures and a growing chart; GPU rungs say so",
  async () => {
    const cells = await runNotebook("02_the_ladder", NO_GPU);
    const code = shown(cells, "text/markdown");
    for (const { name } of LADDER) {
      const lines = code.filter((text) => text.includes(`name: "${name}"`));
      assert.equal(lines.length, 1, name);
      assert.match(lines[0], /^```ts\nexport (const|function) [\s\S]*\n\};?\n```$/);
      assert.match(lines[0], /apply|execute/);
    }
    const text = printed(cells);
    for (
      const name of ["04_channels_last", "05_flash_attention", "08_export", "12_offload", "13_fused_blocks"]
    ) {
      assert.match(text, new RegExp(`${name} needs a GPU.* on cpu\\.`));
    }
    const drawn = [
      "00_baseline_fp32",
      "01_bfloat16",
      "02_compile",
      "03_fuse_qkv",
      "06_float8",
      "07_tuning",
      "11_float8_text_encoder",
    ];
    assert.match(text, /09_first_block_cache is for FLUX\.1-dev and Kontext/);
    assert.equal(pngs(cells).length, drawn.length);
    const charts = shown(cells, "image/svg+xml");
    assert.equal(charts.length, drawn.length);
    charts.forEach((svg, i) => {
      const texts = textsOf(svg);
      assert.deepEqual(drawn.filter((name) => texts.includes(name)), drawn.slice(0, i + 1));
      assert.equal(texts.filter((text) => /^\d+ ms/.test(text)).length, i + 1);
    });
  },
);

testNotebook("03_write_a_kernel checks its operator on the CPU, and has nothing to time there", async () => {
  const cells = await runNotebook("03_write_a_kernel", NO_GPU);
  const text = printed(cells);
  assert.equal(text.match(/largest error .*no GPU here, so the operator of the CPU/g)?.length, 3);
  assert.match(text, /No GPU here: nothing to time/);
  assert.match(text, /20 calls of our operator; likeness equal/);
  assert.equal(pngs(cells).length, 2);
});

testNotebook(
  "03_write_a_kernel compiles, checks, times and uses its kernel on the emulated GPU",
  async () => {
    const cells = await runNotebook("03_write_a_kernel", {
      'openDevice("cuda")': 'import("../tests/support/emulated_gpu.ts").then((gpu) => gpu.openEmulatedGpu())',
      "4352, 3072": "16, 512",
      "RUNS = 50": "RUNS = 2",
      "seed: 42 }": "seed: 42, height: 32, width: 32, numInferenceSteps: 1 }",
    });
    const text = printed(cells);
    assert.doesNotMatch(text, /No GPU/);
    assert.equal(text.match(/largest error .*\(the kernel\)/g)?.length, 3);
    assert.match(text, /one after another: [0-9.]+ us[\s\S]*in one: [0-9.]+ us/);
    const [, likeness] = /5 calls of our operator; likeness (\S+)/.exec(text)!;
    assert.ok(likeness === "equal" || Number(likeness) > 40, likeness);
  },
  missingJupyter ?? missingCompiler(),
);

testNotebook(
  "04_kontext_edit without a checkpoint shows what the model sees, and skips the edits",
  async () => {
    const cells = await runNotebook("04_kontext_edit", NO_GPU);
    const text = printed(cells);
    assert.match(text, /256 x 256 is encoded as 1024 x 1024/);
    assert.match(text, /FLUX_KONTEXT names no folder/);
    assert.equal(text.match(/No Kontext checkpoint: skipped\./g)?.length, 2);
    const [, decibels] = /encoded and decoded: ([0-9.]+) dB/.exec(shown(cells, "text/plain").join("\n"))!;
    assert.ok(Number(decibels) > 30, decibels);
    assert.equal(pngs(cells).length, 3);
  },
);

testNotebook("04_kontext_edit edits, one instruction after another", () =>
  withKontext(async (folder) => {
    const cells = await runNotebook(
      "04_kontext_edit",
      {
        ...NO_GPU,
        "numInferenceSteps: 28": "numInferenceSteps: 1",
        "...preferredSize(image)": "height: 64, width: 80",
      },
      { FLUX_KONTEXT: folder, FLUX_IMAGE: goldenPath("pictures/photo.jpg") },
    );
    assert.doesNotMatch(printed(cells), /skipped/);
    const captions = shown(cells, "text/plain");
    assert.ok(captions.includes("before | make it winter"));
    assert.ok(captions.includes("before | add a red balloon | make it a pencil drawing"));
    const pictures = await Promise.all(pngs(cells).map((bytes) => decodePicture(bytes, "output")));
    assert.equal(pictures.filter(({ width, height }) => width === 80 && height === 64).length, 3);
  }));
