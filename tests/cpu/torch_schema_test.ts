/** Reading what PyTorch's operators take. */
import assert from "node:assert/strict";
import { defaultBits, doubleBits, type OperatorArgument, parseSchema } from "../../ffi/cuda/torch_schema.ts";
import { FfiError } from "../../ffi/errors.ts";

Deno.test("parseSchema: types, aliases, options, defaults and results", () => {
  const { name, args, results } = parseSchema(
    "fwd(Tensor q,Tensor(out!)? out = None, float? softmax_scale=None,bool causal = False, int left = -1," +
      "ScalarType kind, float softcap = 0.5) -> (Tensor(out!), Tensor)",
  );
  assert.equal(name, "fwd");
  assert.equal(results, 2);
  const argument = (type: string, name: string, optional: boolean, value?: string) => ({
    name,
    type,
    optional,
    default: value,
  });
  assert.deepEqual(args, [
    argument("Tensor", "q", false),
    argument("Tensor", "out", true, "None"),
    argument("float", "softmax_scale", true, "None"),
    argument("bool", "causal", false, "False"),
    argument("int", "left", false, "-1"),
    argument("ScalarType", "kind", false),
    argument("float", "softcap", false, "0.5"),
  ]);
  assert.deepEqual(parseSchema("ones() -> Tensor"), { name: "ones", args: [], results: 1 });
});

Deno.test("parseSchema: what it does not know is an error that shows it", () => {
  const wrong = [
    ["fwd(Tensor q", /fwd\(Tensor q/],
    ["fwd(Tensor[] parts) -> Tensor", /Tensor\[\] parts/],
    ["fwd(Tensor q, *, Tensor k) -> Tensor", /\*/],
    ["fwd(Tensor) -> Tensor", /Tensor$/],
  ] as const;
  for (const [text, message] of wrong) {
    assert.throws(
      () => parseSchema(text),
      (error: unknown) => error instanceof FfiError && message.test(error.message),
    );
  }
});

Deno.test("defaultBits: as the C shim takes them", () => {
  const bits = (type: string, text: string | undefined, optional = false) => {
    const argument: OperatorArgument = { name: "x", type, optional, default: text };
    return defaultBits(argument);
  };
  assert.equal(bits("Tensor", "None", true), 0n);
  assert.equal(bits("bool", "False"), 0n);
  assert.equal(bits("bool", "True"), 1n);
  assert.equal(bits("int", "7"), 7n);
  assert.equal(bits("int", "-1"), 2n ** 64n - 1n);
  assert.equal(bits("float", "0.0"), 0n);
  assert.equal(bits("float", "1.5"), 0x3ff8000000000000n);
  assert.equal(doubleBits(-2), 0xc000000000000000n);
  for (
    const [type, text, optional] of [
      ["Tensor", undefined, false],
      ["Tensor", undefined, true],
      ["int", "0", true],
      ["int", "1.5", false],
      ["bool", "maybe", false],
      ["str", "mean", false],
    ] as const
  ) {
    assert.throws(() => bits(type, text, optional), /has to be given: \w+ x$/);
  }
});
