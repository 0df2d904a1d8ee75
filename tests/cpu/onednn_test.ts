import assert from "node:assert/strict";
import { loadAssembler } from "../../ffi/cpu/assembler.ts";
import { CpuDevice, viewOf } from "../../ffi/cpu/device.ts";
import { OneDnnProvider } from "../../ffi/cpu/onednn_provider.ts";
import { openCpu } from "../../ffi/cpu/open.ts";
import { SCRATCH_BYTES, WasmRunner } from "../../ffi/cpu/runner.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { missingOneDnn } from "../support/providers.ts";

const missing = missingOneDnn();
const oneDnnTest = (name: string, fn: () => Promise<void>) =>
  Deno.test({
    name: `${name}${missing === undefined ? "" : ` (skipped: ${missing})`}`,
    ignore: missing !== undefined,
    fn,
  });

oneDnnTest("oneDNN never falls to its reference implementation for the model's shapes", async () => {
  const assembler = await loadAssembler();
  let provider: OneDnnProvider | undefined;
  using device = new CpuDevice(
    (device) => provider = new OneDnnProvider(device, device.runner!, 1),
    (device) => {
      const scratch = device.reserve(SCRATCH_BYTES).byteOffset;
      return new WasmRunner(device.wasmMemory, assembler, { threads: 1, scratch });
    },
  );
  for (const dtype of ["f32", "bf16"] as const) {
    const zeros = (shape: number[]) => {
      const tensor = Tensor.empty(device, shape, dtype);
      device.upload(new Uint8Array(tensor.byteLength), tensor.memory);
      return tensor;
    };
    for (
      const [m, n, k] of [[1, 1536, 256], [77, 128, 128], [320, 320, 128], [320, 1024, 256], [256, 64, 256]]
    ) {
      for (const constant of [true, false]) {
        const bias = constant ? zeros([n]) : undefined;
        device.matmul({ a: zeros([m, k]), b: zeros([n, k]), bias, out: zeros([m, n]), constant });
      }
      // Attention's second product: v is a transposed view of rows of several heads.
      const values = zeros([k, 2 * n]).narrow(1, 0, n).permute([1, 0]);
      device.matmul({ a: zeros([m, k]), b: values, out: zeros([m, n]) });
    }
    for (
      const [c, o, size, kernel, stride] of [
        [16, 112, 32, 3, 1],
        [64, 32, 64, 3, 1],
        [32, 3, 64, 3, 1],
        [3, 32, 64, 3, 1],
        [96, 64, 32, 1, 1],
        [32, 32, 64, 3, 2],
      ]
    ) {
      const edge = kernel >> 1;
      const padding = stride === 2 ? [0, 0, 1, 1] as const : [edge, edge, edge, edge] as const;
      const weight = zeros([o, c, kernel, kernel]);
      for (const last of [false, true]) {
        const picture = (channels: number, side: number) =>
          last ? zeros([1, side, side, channels]).permute([0, 3, 1, 2]) : zeros([1, channels, side, side]);
        device.conv({
          x: picture(c, size),
          weight,
          bias: zeros([o]),
          out: picture(o, size / stride),
          stride,
          padding,
        });
      }
    }
  }
  const used = provider!.implementations();
  assert.deepEqual(used.filter((name) => /^(matmul|conv) ref/.test(name)), [], used.join(", "));
});

oneDnnTest("oneDNN opens, closes and opens again in one process", async () => {
  for (let round = 0; round < 3; round++) {
    using device = await openCpu({ provider: "onednn", threads: 1 + round });
    const a = Tensor.fromFloat32(device, [1, 2, 3, 4], [2, 2]);
    const out = Tensor.empty(device, [2, 2], "f32");
    device.matmul({ a, b: a, out });
    const bytes = await device.download(out);
    assert.deepEqual([...new Float32Array(bytes.buffer)], [5, 11, 11, 25]);
    assert.match(device.properties().providers.matmul, new RegExp(`^oneDNN 2\\..*, ${1 + round} thread`));
  }
});

oneDnnTest("oneDNN: more shapes than primitives are kept", async () => {
  using device = await openCpu({ provider: "onednn", threads: 1 });
  const b = Tensor.fromFloat32(device, [1, 1, 1, 1], [1, 4]);
  for (let m = 1; m <= 600; m++) {
    device.scope(() => {
      const a = Tensor.fromFloat32(device, new Float32Array(4 * m).fill(m), [m, 4]);
      const out = Tensor.empty(device, [m, 1], "f32");
      device.matmul({ a, b, out });
      assert.equal(viewOf(out, "f32", m)[m - 1], 4 * m);
    });
  }
});

// A library of that version is made on the spot, where a C compiler may be run (not under `deno task test`).
const compiler = Deno.permissions.querySync({ name: "run", command: "cc" }).state === "granted";
Deno.test({
  name: "oneDNN 3 is refused with its version, and WebAssembly takes over",
  ignore: !compiler,
  fn: async () => {
    const folder = await Deno.makeTempDir();
    try {
      const source = `${folder}/three.c`;
      await Deno.writeTextFile(
        source,
        "static int v[6] = {3, 5, 1}; const int *dnnl_version(void) { return v; }\n",
      );
      const compiled = await new Deno.Command("cc", {
        args: ["-shared", "-fPIC", "-o", `${folder}/libdnnl.so.3`, source],
      }).output().catch(() => undefined);
      if (compiled?.success !== true) return console.log("no C compiler here: nothing to test with");
      await Deno.remove(source);
      const before = Deno.env.get("FLUX_LIB_PATH");
      Deno.env.set("FLUX_LIB_PATH", folder);
      try {
        using device = await openCpu({ threads: 1 });
        assert.match(
          device.properties().providers.matmul,
          /^WebAssembly .*libdnnl\.so\.3 is oneDNN 3\.5\.1; this program calls 2\.x/,
        );
        await assert.rejects(openCpu({ provider: "onednn" }), {
          name: "FfiError",
          message: /oneDNN 3\.5\.1/,
        });
      } finally {
        if (before === undefined) Deno.env.delete("FLUX_LIB_PATH");
        else Deno.env.set("FLUX_LIB_PATH", before);
      }
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  },
});
