/** The programs in examples/, as a user runs them. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { readPngText } from "../../recipes/base/image.ts";
import { readPicture } from "../../recipes/base/read_picture.ts";
import { inFolder } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";
import { withKontext } from "../support/golden_suite_kontext.ts";
import { ROOT } from "../support/programs.ts";

Deno.test("kontext_edit.ts edits a picture and keeps its shape", () =>
  inFolder((folder) =>
    withKontext(async (model) => {
      const command = new Deno.Command("deno", {
        args: [
          "run",
          "--no-prompt",
          "--allow-read",
          "--allow-write",
          "--allow-ffi",
          "--allow-sys=cpus",
          "--allow-env",
          "--config",
          join(ROOT, "deno.json"),
          join(ROOT, "examples/kontext_edit.ts"),
          model,
          goldenPath("pictures/photo.jpg"),
          "make it winter",
        ],
        cwd: folder,
        env: { FLUX_DEVICE: "cpu" },
      });
      const { code, stdout, stderr } = await command.output();
      assert.equal(code, 0, new TextDecoder().decode(stderr));
      assert.match(new TextDecoder().decode(stdout), /^edit-1\.png: \d+ x \d+, guidance 2\.5, \d+\.\d s\n$/);
      const path = join(folder, "edit-1.png");
      const { width, height } = await readPicture(path);
      assert.ok(Math.abs(Math.log(width / height * 44 / 60)) < 0.2, "it keeps the picture's shape");
      assert.deepEqual(readPngText(await Deno.readFile(path)), { prompt: "make it winter" });
    })
  ));
