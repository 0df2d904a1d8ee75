/** The embedded model on the CPU, and that it is the one that the golden pictures were drawn with. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { join } from "node:path";
import { openCpu } from "../../ffi/cpu/open.ts";
import { EMBEDDED_MODEL } from "../../recipes/base/command_line.ts";
import { TINY_GOLDEN, tinySuite } from "../support/golden_suite_tiny.ts";
import { ownDevice } from "../support/test_device.ts";

Deno.test("models/tiny holds the weights that the golden pictures were drawn with, in at most 32 MB", () => {
  let bytes = 0;
  for (const [file, sha256] of Object.entries(TINY_GOLDEN.sha256)) {
    const content = Deno.readFileSync(join(EMBEDDED_MODEL, file));
    bytes += content.length;
    assert.equal(
      createHash("sha256").update(content).digest("hex"),
      sha256,
      `${file}: make_golden.py --only tiny`,
    );
  }
  assert.ok(bytes <= 32_000_000, `${bytes} bytes`);
});

tinySuite(ownDevice("cpu", () => openCpu()));
