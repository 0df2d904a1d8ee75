/** FlashAttention-3 through libtorch, over stand-ins for both and for the driver (tests/support/fake_torch.cpp). */
import assert from "node:assert/strict";
import { join } from "node:path";
import type { CudaDevice } from "../../ffi/cuda/device.ts";
import { findFlashAttention3 } from "../../ffi/cuda/flash_attn3.ts";
import { openCuda } from "../../ffi/cuda/open.ts";
import type { DType } from "../../ffi/dtype.ts";
import { FfiError } from "../../ffi/errors.ts";
import { LibraryNotFoundError } from "../../ffi/library.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { type FakeCuda, type FakeOptions, testFakeCuda } from "../support/fake_cuda.ts";
import { buildPackages, type FakePackages, type FakeTorch, withFakeTorch } from "../support/fake_torch.ts";
import { inFolder } from "../support/folders.ts";

const FA3_FWD: FakePackages = { package: "fa3_fwd" };

/** A test with the device open between stand-ins; afterwards nothing of any may be left. */
function testFlashAttention3(
  title: string,
  packages: FakePackages,
  body: (device: CudaDevice, fake: FakeTorch, cuda: FakeCuda) => void | Promise<void>,
  options: FakeOptions = {},
): void {
  testFakeCuda(`flash attention 3: ${title}`, options, (cuda) =>
    withFakeTorch(packages, async (fake) => {
      {
        using device = openCuda(0);
        await body(device, fake, cuda);
      }
      assert.equal(fake.alive, 0, "tensors of PyTorch are left");
      assert.equal(cuda.alive, 0, "handles of the driver are left");
    }));
}

const tensor = (device: CudaDevice, shape: readonly number[], dtype: DType = "bf16") =>
  Tensor.empty(device, shape, dtype);

/** One call, with q, k and v of a dtype and heads of 128. */
function attend(device: CudaDevice, dtype: DType = "bf16", tokens = 5): boolean {
  return device.scope(() => {
    const x = tensor(device, [1, tokens, 2, 128], dtype);
    const out = tensor(device, [1, tokens, 2, 128]);
    return device.attention({ library: "fa3", q: x, k: x, v: x, out, scale: 0.5 });
  });
}

/** What a failing call says, in one text. */
function failure(body: () => unknown): string {
  try {
    body();
  } catch (error) {
    assert.ok(error instanceof FfiError, String(error));
    return `${error.message} | ${error.hint}`;
  }
  return assert.fail("nothing was thrown");
}

// -- calls -------------------------------------------------------------------------------------------------------

testFlashAttention3(
  "the operator gets all tensors, on the device's stream",
  FA3_FWD,
  async (device, fake) => {
    const q = tensor(device, [2, 5, 3, 128], "f8e4m3");
    const joined = tensor(device, [2, 7, 3 * 128 * 3], "f8e4m3");
    const [k, v] = [1, 2].map((i) => joined.narrow(2, i * 384, 384).reshape([2, 7, 3, 128]));
    // Columns of something wider, as beside the MLP.
    const wide = Tensor.fromBytes(device, new Uint8Array(2 * 5 * 504 * 2), [2, 5, 504], "bf16");
    const out = wide.narrow(2, 8, 384).reshape([2, 5, 3, 128]);
    await device.synchronize();
    assert.equal(device.attention({ library: "fa3", q, k, v, out, scale: 0.25 }), true);
    assert.deepEqual(fake.report.split("\n"), [
      "q f8 2 5 3 128 / 1920 384 128 1",
      "k f8 2 7 3 128 / 8064 1152 128 1",
      "v f8 2 7 3 128 / 8064 1152 128 1",
      "out bf16 2 5 3 128 / 2520 504 128 1",
      `scale 0.2500 stream ${device.context.stream}`,
      "",
    ]);
    const bits = new Uint16Array((await device.download(wide)).buffer);
    const inColumns = (i: number) => i % 504 >= 8 && i % 504 < 392;
    assert.ok(
      bits.every((value, i) => value === (inColumns(i) ? 0x3f80 : 0)),
      "the result is in its columns only",
    );
    assert.equal(fake.alive, 0);
    const { providers } = device.properties();
    assert.equal(providers["FlashAttention-3"], "fa3_fwd 0.0.3, PyTorch 2.11.1");
  },
);

testFlashAttention3("sizes of 1 have the strides of a dense tensor", FA3_FWD, (device, fake) => {
  device.scope(() => {
    const { memory } = tensor(device, [4096]);
    const x = new Tensor(memory, "bf16", [1, 1, 1, 128], [7, 3, 999, 1]);
    const y = new Tensor(memory, "bf16", [1, 4, 1, 128], [7, 256, 999, 1]);
    assert.ok(device.attention({ library: "fa3", q: x, k: y, v: y, out: x, scale: 1 }));
  });
  const [q, k] = fake.report.split("\n");
  assert.deepEqual([q, k], ["q bf16 1 1 1 128 / 128 128 128 1", "k bf16 1 4 1 128 / 1024 256 128 1"]);
});

testFlashAttention3("the package flash_attn_3 is the same", { package: "flash_attn_3" }, (device, fake) => {
  assert.ok(attend(device, "f8e4m3"));
  assert.match(fake.report, /^q f8 1 5 2 128/);
});

testFlashAttention3(
  "what recorded work writes stays until no graph is in use",
  FA3_FWD,
  (device, fake) => {
    attend(device);
    assert.equal(fake.alive, 0, "nothing is kept of what runs at once");
    const first = device.record(() => void [attend(device), attend(device)]);
    assert.equal(fake.alive, 2);
    const second = device.record(() => void attend(device, "bf16", 9));
    assert.equal(fake.alive, 3);
    first[Symbol.dispose]();
    assert.equal(fake.alive, 3, "the other graph is in use");
    second[Symbol.dispose]();
    assert.equal(fake.alive, 0);

    assert.throws(() =>
      device.record(() => {
        attend(device);
        throw new RangeError("stop");
      }), RangeError);
    assert.equal(fake.alive, 0, "nothing was recorded");
    device.record(() => void attend(device)); // closing the device gives back what is left
  },
);

// -- what it does not take ---------------------------------------------------------------------------------------

testFakeCuda("flash attention 3: what it is not made for is left to others, and opens nothing", {}, () => {
  using device = openCuda(0);
  device.scope(() => {
    const [q, k] = [tensor(device, [1, 4, 2, 128]), tensor(device, [1, 6, 2, 128])];
    const plan = { library: "fa3" as const, q, k, v: k, out: q, scale: 1 };
    const float8 = tensor(device, [1, 4, 2, 128], "f8e4m3");
    const narrow = tensor(device, [1, 4, 2, 64]);
    const half = tensor(device, [1, 4, 2, 128], "f16");
    const odd = tensor(device, [1, 4, 260]).narrow(2, 0, 256).reshape([1, 4, 2, 128]);
    const behind = tensor(device, [4 * 256 + 8]).narrow(0, 4, 4 * 256).reshape([1, 4, 2, 128]);
    const columns = tensor(device, [1, 4, 128, 2]).permute([0, 1, 3, 2]);
    for (
      const [what, changed] of Object.entries({
        "heads of 64": { q: narrow, k: narrow, v: narrow, out: narrow },
        f16: { q: half, k: half, v: half, out: half },
        "two dtypes": { q: float8 },
        "a float8 result": { q: float8, k: float8, v: float8, out: float8 },
        "rows at odd places": { q: odd },
        "an odd address": { out: behind },
        "a strided last dimension": { q: columns },
        "no keys": { k: k.narrow(1, 0, 0), v: k.narrow(1, 0, 0) },
      })
    ) {
      assert.equal(device.attention({ ...plan, ...changed }), false, what);
    }
    const none = q.narrow(1, 0, 0);
    assert.equal(device.attention({ ...plan, q: none, out: none }), true, "no queries: nothing to do");
  });
});

for (const capability of [80, 89, 100, 120]) {
  testFakeCuda(
    `flash attention 3: compute capability ${capability} has no such kernels`,
    { capability },
    () => {
      using device = openCuda(0);
      assert.equal(attend(device), false);
    },
  );
}

// -- failures ----------------------------------------------------------------------------------------------------

testFlashAttention3("PyTorch's failures are errors that name the call", FA3_FWD, (device, fake) => {
  const shim = "aoti_torch_";
  for (
    const [call, after] of [
      ["create_cuda_stream_guard", 0],
      ["create_tensor_from_blob", 0],
      ["create_tensor_from_blob", 3],
    ] as const
  ) {
    fake.fail(shim + call, after);
    assert.equal(
      failure(() => attend(device)),
      `PyTorch 2.11.1: ${shim}${call} failed | PyTorch has written the reason to stderr, above this line`,
    );
    assert.equal(fake.alive, 0, `${call} leaves nothing`);
  }
  assert.ok(attend(device), "a failure is not final");
});

testFlashAttention3(
  "from 2.13 on PyTorch's own words are in the error, their first line",
  { package: "fa3_fwd", torch: ["SINCE_2_13"] },
  (device, fake) => {
    assert.ok(attend(device, "f8e4m3"), "options lie in memory that PyTorch gives");
    fake.fail("torch_new_stable_ivalue");
    const told = (call: string) => `${call} failed: ${call} was told to fail | undefined`;
    assert.equal(failure(() => attend(device)), `PyTorch 2.13.0: ${told("torch_new_stable_ivalue")}`);
    fake.fail("aoti_torch_create_tensor_from_blob");
    assert.equal(
      failure(() => attend(device)),
      `PyTorch 2.13.0: ${told("aoti_torch_create_tensor_from_blob")}`,
    );
    const text = failure(() =>
      device.scope(() => {
        const [q, k, v] = [4, 5, 6].map((tokens) => tensor(device, [1, tokens, 1, 128]));
        device.attention({ library: "fa3", q, k, v, out: q, scale: 1 });
      })
    );
    assert.equal(text, "PyTorch 2.13.0: the operator fa3_fwd::fwd failed: sizes do not fit | undefined");
    assert.ok(attend(device), "a failure is not final");
  },
);

// -- other versions ----------------------------------------------------------------------------------------------

testFlashAttention3(
  "an operator with one option more is called as its schema says",
  {
    package: "fa3_fwd",
    attention: ['SCHEMA_START="fwd(Tensor q,Tensor k,Tensor v,Tensor? sink = None,"', "OPTIONS_SHIFT=1"],
  },
  (device, fake) => {
    assert.ok(attend(device, "f8e4m3"));
    assert.match(fake.report, /\nscale 0\.5000 stream/);
  },
);

/** Packages that cannot be used, and what is said of them. */
const MISFITS: readonly [title: string, packages: FakePackages, message: RegExp][] = [
  [
    "an operator that has to be given what we do not know",
    { package: "fa3_fwd", attention: ['SCHEMA_START="fwd(Tensor q,Tensor k,Tensor v,Tensor sink,"'] },
    /^PyTorch: the operator takes an argument that has to be given: Tensor sink \|/,
  ],
  [
    "an operator without what we give",
    { package: "fa3_fwd", attention: ['SCHEMA_START="fwd(Tensor q,Tensor k,Tensor values,"'] },
    /^PyTorch: the operator fa3_fwd::fwd takes no Tensor v \|/,
  ],
  [
    "a library without the operator",
    { package: "fa3_fwd", attention: ['SCHEMA_START="forward(Tensor q,Tensor k,Tensor v,"'] },
    /_C\.abi3\.so does not say what its operator fwd takes \| pip install fa3-fwd/,
  ],
  [
    "a library for a newer PyTorch",
    { package: "fa3_fwd", torch: ["LACKS_IMPL"] },
    /was built for another PyTorch than 2\.11\.1 at .*libtorch\.so, which lacks torch_library_impl \| pip install --upgrade torch fa3-fwd/,
  ],
];

for (const [title, packages, message] of MISFITS) {
  testFlashAttention3(title, packages, (device) => {
    for (let i = 0; i < 2; i++) assert.match(failure(() => attend(device)), message);
  });
}

// -- where it is -------------------------------------------------------------------------------------------------

testFakeCuda("flash attention 3: it is found with the PyTorch of the same Python", {}, async () => {
  const whole = buildPackages({ package: "flash_attn_3" });
  await inFolder((alone) => {
    Deno.mkdirSync(join(alone, "fa3_fwd"));
    Deno.writeTextFileSync(join(alone, "fa3_fwd/_C.abi3.so"), "");
    const before = Deno.env.get("FLUX_LIB_PATH");
    try {
      Deno.env.set("FLUX_LIB_PATH", `${alone}:${whole}`);
      assert.deepEqual(findFlashAttention3(), {
        package: "flash_attn_3",
        path: `${whole}/flash_attn_3/_C.abi3.so`,
        torch: `${whole}/torch/lib`,
        version: "flash_attn_3 0.0.3, PyTorch 2.11.1",
      });
      Deno.renameSync(join(whole, "flash_attn_3"), join(whole, "elsewhere"));
      const { path, torch, version } = findFlashAttention3();
      assert.deepEqual([path, torch], [`${alone}/fa3_fwd/_C.abi3.so`, `${whole}/torch/lib`]);
      assert.equal(version, "fa3_fwd of unknown version, PyTorch 2.11.1");
    } finally {
      Deno.renameSync(join(whole, "elsewhere"), join(whole, "flash_attn_3"));
      if (before === undefined) Deno.env.delete("FLUX_LIB_PATH");
      else Deno.env.set("FLUX_LIB_PATH", before);
    }
  });
});

Deno.test({
  name: "flash attention 3: where it is not installed, the error says how to install it",
  permissions: { ffi: true, env: "inherit", read: false }, // no package is seen
  fn: () => {
    assert.throws(findFlashAttention3, (error: unknown) => {
      assert.ok(error instanceof LibraryNotFoundError);
      assert.match(
        error.message,
        /^FlashAttention-3 was not found \(looked for flash_attn_3\/_C\.abi3\.so, fa3_fwd/,
      );
      assert.match(error.hint!, /^deno task doctor .*; pip install fa3-fwd installs it, with PyTorch$/);
      return true;
    });
  },
});
