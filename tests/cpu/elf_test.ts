/** What a shared library's file says of it, read without opening it. */
import assert from "node:assert/strict";
import { join } from "node:path";
import fc from "fast-check";
import { readSharedLibrary } from "../../ffi/elf.ts";
import { FfiError, FileError } from "../../ffi/errors.ts";
import { missingCompiler } from "../support/fake_cuda.ts";
import { buildPackages } from "../support/fake_torch.ts";
import { inFolder } from "../support/folders.ts";

const skip = missingCompiler();
const ignore = skip !== undefined;
const word = ignore ? ` (skipped: ${skip})` : "";
const library = () => `${buildPackages({ package: "fa3_fwd" })}/fa3_fwd/_C.abi3.so`;

Deno.test({
  name: `readSharedLibrary: imports without weak ones, and constants${word}`,
  ignore,
  fn: () => {
    const { imports, constants } = readSharedLibrary(library());
    for (const name of ["torch_library_impl", "aoti_torch_get_size", "PyModule_Create2"]) {
      assert.ok(imports.includes(name), name);
    }
    for (const name of ["fake_torch_note", "PyInit__C", ""]) assert.ok(!imports.includes(name), name);
    assert.match(new TextDecoder("latin1").decode(constants), /fwd\(Tensor q,.*int sm_margin = 0\) -> /);
  },
});

Deno.test({
  name: `readSharedLibrary: damaged files are typed errors${word}`,
  ignore,
  fn: () =>
    inFolder((folder) => {
      const whole = Deno.readFileSync(library());
      const path = join(folder, "damaged.so");
      const reads = (bytes: Uint8Array) => {
        Deno.writeFileSync(path, bytes);
        try {
          readSharedLibrary(path);
        } catch (error) {
          assert.ok(error instanceof FfiError && error.message.includes(path), String(error));
        }
      };
      fc.assert(fc.property(fc.nat(whole.length - 1), (length) => reads(whole.subarray(0, length))));
      // The header, and the table of sections at the end.
      const places = fc.oneof(fc.nat(63), fc.integer({ min: whole.length - 2048, max: whole.length - 1 }));
      fc.assert(
        fc.property(places, fc.integer({ min: 1, max: 255 }), (at, flip) =>
          reads(
            whole.with(at, whole[at] ^ flip),
          )),
        { numRuns: 300 },
      );
    }),
});

Deno.test("readSharedLibrary: what is no library, or not there", () =>
  inFolder((folder) => {
    const path = join(folder, "text.so");
    for (const text of ["", "no library", "no library ".repeat(50)]) {
      Deno.writeTextFileSync(path, text);
      assert.throws(() => readSharedLibrary(path), (error: unknown) =>
        error instanceof FfiError &&
        error.message.startsWith(`${path} is no whole library for 64-bit Linux`));
    }
    assert.throws(() => readSharedLibrary(join(folder, "absent.so")), FileError);
  }));
